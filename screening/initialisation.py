"""Where a network's weights start from: drawn at random, or taken from a file as far as they fit.

To start a training, read the file once with :func:`read_initial_weights` and give what it returns to
:func:`initialise`, before the network is wrapped or moved:

    tensors = read_initial_weights(config)
    notes = initialise(network, tensors, config.method)

Layers must be those of the network; classifier, neck, stem and projections may differ and then stay as drawn, each
named in a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from screening.i3d import I3DResNet, ModelConfig, Recognised, misfits, recognise
from screening.torch_files import read_state_dict
from storage_schemas.base import Config
from storage_schemas.checkpoint import read_manifest, read_weights
from storage_schemas.errors import InputError


class RandomWeights(Config):
    """The network starts as it was drawn."""

    method: Literal["random"] = Field("random", description="as drawn from the run's seed")


class CheckpointWeights(Config):
    """The network starts from one of our own, such as one that was trained on compounds."""

    method: Literal["checkpoint"] = Field("checkpoint", description="a network trained here")
    path: str = Field(description="its checkpoint's folder: SCREEN/checkpoint")


class MitoReIDWeights(Config):
    """The network starts from one that MitoReID released."""

    method: Literal["mitoreid"] = Field("mitoreid", description="a network that MitoReID released")
    path: str = Field(description="its torch file")


class KineticsWeights(Config):
    """The network starts from one of Hara's, trained on human actions (Hara et al., CVPR 2018)."""

    method: Literal["kinetics"] = Field("kinetics", description="one of Hara's networks, trained on Kinetics")
    path: str = Field(description="its torch file, such as resnet-18-kinetics.pth")


class ImageNetWeights(Config):
    """The network starts from torchvision's for photographs, inflated along time (Carreira & Zisserman, CVPR 2017)."""

    method: Literal["imagenet"] = Field("imagenet", description="one of torchvision's 2D ResNets, inflated along time")
    path: str = Field(description="its state dict, such as resnet18-f37072fd.pth")


InitialWeights: TypeAlias = Annotated[
    RandomWeights | CheckpointWeights | MitoReIDWeights | KineticsWeights | ImageNetWeights,
    Field(discriminator="method"),
]
Method: TypeAlias = Literal["random", "checkpoint", "mitoreid", "kinetics", "imagenet"]


def read_initial_weights(config: InitialWeights) -> dict[str, Tensor]:
    """The tensors of the file that a network is to start from, named as there; none for ``random``.

    Nothing in a file is run.

    Raises:
        InputError: if the file is missing, cut short, not of the form that the method reads, or holds code.
    """
    match config:
        case RandomWeights():
            return {}
        case CheckpointWeights():
            read_manifest(config.path)  # written last: without it the weights may be another network's
            return {name: torch.tensor(array) for name, array in read_weights(config.path).items()}
        case _:
            return read_state_dict(config.path)


@torch.no_grad()
def initialise(network: I3DResNet, tensors: Mapping[str, Tensor], method: Method) -> list[str]:
    """Set a network's weights, in place, to those of a file, as far as they fit.

    All its layers must fit. The classifier, the neck, the stem (another number of channels or frames) and the
    projections of shortcut B may not: they stay as they are. ``imagenet`` inflates every kernel (:func:`inflate`).

    Args:
        network: on any device; left as it is if an error is raised.
        tensors: as :func:`read_initial_weights` returns them.
        method: of their configuration.

    Returns:
        Notes for the user: every tensor of the file that was not taken, and every one of the network that stays as
        drawn, each with its reason.

    Raises:
        InputError: if the file is of another network, saying which, or holds values that are not numbers.
    """
    if method == "random":
        return []
    source = f"initial weights ({method})"
    found = recognise(tensors, source)
    _check_network(found, tensors, network.config, method, source)

    own = network.state_dict()
    given = {ours: tensors[theirs] for ours, theirs in found.names.items() if ours in own}
    if method == "imagenet":
        still = network.config.temporal == "image"
        kernels = {name: t for name, t in given.items() if (t.ndim, own[name].ndim) == (4, 5)}
        given |= {name: inflate(kernel, own[name], still) for name, kernel in kernels.items()}
    taken = {name for name, tensor in given.items() if tensor.shape == own[name].shape}
    if problems := misfits(own, given, found.names, _may_differ):
        raise InputError(f"{source}: the file does not fit a {network.config.name}:\n  " + "\n  ".join(problems))
    for name in taken:
        own[name].copy_(given[name])
    return _notes(own, given, taken, found, tensors)


def inflate(weight: Tensor, like: Tensor, still: bool) -> Tensor:
    """A 2D convolution's kernel made one over time, that answers to a clip of equal frames as the 2D one to an image.

    Args:
        weight: (out, C, H, W).
        like: (out, C', T, H, W), what it is made for.
        still: for one frame, of which padding leaves a kernel but its middle: each frame of it is the whole ``weight``.

    Returns:
        (out, C', T, H, W). Other channels than C get the mean over C, scaled so that the sum over channels stays.
    """
    channels, frames = like.shape[1:3]
    if weight.shape[1] != channels:
        weight = weight.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1) * (weight.shape[1] / channels)
    return weight.unsqueeze(2).expand(-1, -1, frames, -1, -1) / (1 if still else frames)


def _check_network(
    found: Recognised, tensors: Mapping[str, Tensor], wanted: ModelConfig, method: Method, source: str
) -> None:
    stem = found.names.get("conv1.weight")
    flat = stem is not None and tensors[stem].ndim == 4
    if flat and method != "imagenet":
        raise InputError(
            f"{source}: the file's convolutions have no time axis: a 2D network is read by method imagenet"
        )
    if not flat and method == "imagenet":
        raise InputError(
            f"{source}: the file's convolutions are not those of a 2D network; for Hara's, method kinetics"
        )
    file, net = found.config, wanted
    if (file.depth, file.cardinality, file.width) != (net.depth, net.cardinality, net.width):
        raise InputError(
            f"{source}: the file seems to hold a {file.name} of width {file.width}, and the network is a {net.name} of "
            f"width {net.width}: set model.depth={file.depth}, model.cardinality={file.cardinality} and "
            f"model.width={file.width}, or choose another file"
        )


def _may_differ(name: str) -> bool:
    return name.startswith(("conv1.", "neck.", "classifier.")) or ".downsample." in name


def _notes(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    taken: set[str],
    found: Recognised,
    tensors: Mapping[str, Tensor],
) -> list[str]:
    notes = []
    for ours, theirs in found.names.items():
        if ours not in own:
            notes.append(f"{theirs} {tuple(tensors[theirs].shape)} is not taken: the network has no {ours}")
        elif ours not in taken:
            shapes = f"{tuple(given[ours].shape)} in the file, {tuple(own[ours].shape)} in the network"
            notes.append(f"{theirs} is not taken, and {ours} stays as drawn: {shapes}")
    notes += [
        f"{name} {tuple(tensors[name].shape)} is not taken: nothing like it is in the network" for name in found.unknown
    ]
    absent = [name for name in own if name not in found.names and not name.endswith(".num_batches_tracked")]
    return notes + [f"{name} {tuple(own[name].shape)} stays as drawn: it is not in the file" for name in absent]
