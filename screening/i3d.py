"""I3D ResNet, the residual network over space and time that embeds clips (Hara et al., CVPR 2018).

As MitoReID uses it ("Deep learning large-scale drug discovery and repurposing", Nature
Computational Science 2024): every two-dimensional convolution of a ResNet gains a time axis, and a
batch-norm neck (Luo et al., CVPRW 2019) stands between the embedding that the metric losses see and
the classifier. Tensors are named as in Hara's code, so that weights released for it can be told apart
(:func:`recognise`) and read (:func:`load_mitoreid`).

Axis letters: N clips, C channels, T frames, H height, W width (px), D embedding dimension.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional

from screening.torch_files import read_state_dict
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Stride: TypeAlias = tuple[int, int, int]
Temporal: TypeAlias = Literal["standard", "retain", "image"]


class ModelConfig(Config):
    """The shape of the network."""

    depth: Literal[10, 18, 34, 50, 101] = Field(
        18, description="layers: 10, 18 and 34 of basic blocks, 50 and 101 of bottlenecks"
    )
    cardinality: Literal[1, 32] = Field(
        1, description="groups of a bottleneck's middle convolution; 32 makes a ResNeXt of depth 50 or 101"
    )
    width: int = Field(64, ge=4, description="channels of the stem; the stages have 1, 2, 4 and 8 times as many")
    temporal: Temporal = Field(
        "retain",
        description="time in the last stages: halved (standard) or kept (retain); image: one frame",
    )
    image_frame: int = Field(-1, description="frame of the clip that temporal=image sees; negative counts from the end")
    crop: int | None = Field(
        None, ge=1, description="side of the middle of a clip that the network is fed, px; null: the whole clip"
    )
    neck: bool = Field(True, description="batch-norm neck between embedding and classifier")
    stem_frames: int = Field(
        7,
        ge=1,
        description="frames the first convolution spans (odd); 3 makes a small network cheaper",
    )
    shortcut: Literal["A", "B"] | None = Field(
        None,
        description="where shapes change: A pads zeros, B projects; null: A, or B for depths 50 and 101",
    )

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        if self.stem_frames % 2 == 0:
            raise ValueError(f"stem_frames is {self.stem_frames}: choose an odd number of frames")
        if self.cardinality > 1 and self.depth not in _BOTTLENECK_DEPTHS:
            raise ValueError(
                f"cardinality {self.cardinality} groups the middle of a bottleneck, and depth {self.depth} has none: "
                f"choose depth {' or '.join(map(str, _BOTTLENECK_DEPTHS))}, or cardinality 1"
            )
        if self.cardinality > 1 and self.width % 16:
            raise ValueError(
                f"width {self.width} cannot be shared by {self.cardinality} groups: choose a multiple of 16"
            )
        return self

    @property
    def name(self) -> str:
        """What the field calls it: ``ResNet-18``, ``ResNeXt-101``."""
        return f"{'ResNeXt' if self.cardinality > 1 else 'ResNet'}-{self.depth}"


def frames_seen(config: ModelConfig, n_frames: int) -> list[int]:
    """The frames of a clip that the network is fed: all, or the one that ``temporal="image"`` sees.

    Raises:
        InputError: if ``image_frame`` lies outside the clip.
    """
    if config.temporal != "image":
        return list(range(n_frames))
    if not -n_frames <= config.image_frame < n_frames:
        raise InputError(
            f"model.image_frame is {config.image_frame} but clips have {n_frames} frames: "
            f"choose from {-n_frames} to {n_frames - 1}"
        )
    return [config.image_frame % n_frames]


class I3DResNet(nn.Module):
    """Clips to class scores and embeddings.

    Weights are drawn from torch's global generator (He et al., ICCV 2015, fan-out); fork and seed
    it for a reproducible start, as :meth:`screening.training.TrainingState.make` does.

    Args:
        config: the shape of the network.
        in_channels: C of the clips.
        n_classes: identities or mechanisms to tell apart.
    """

    def __init__(self, config: ModelConfig, in_channels: int, n_classes: int) -> None:
        super().__init__()
        self.config = config
        bottlenecks = config.depth in _BOTTLENECK_DEPTHS
        project = (config.shortcut or ("B" if bottlenecks else "A")) == "B"
        # Halving time in every stage leaves one frame of 16; retaining it leaves four.
        late: Stride = (1, 2, 2) if config.temporal == "retain" else (2, 2, 2)
        strides: tuple[Stride, ...] = ((1, 1, 1), (2, 2, 2), late, late)

        width = config.width
        self.conv1 = nn.Conv3d(
            in_channels,
            width,
            kernel_size=(config.stem_frames, 7, 7),
            stride=(1, 2, 2),
            padding=(config.stem_frames // 2, 3, 3),
            bias=False,
        )
        self.bn1 = nn.BatchNorm3d(width)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        stages = []
        channels = width
        for index, (n_blocks, first) in enumerate(zip(_BLOCKS_PER_STAGE[config.depth], strides, strict=True)):
            planes = width * 2**index
            stage: list[nn.Module] = []
            for stride in (first, *[(1, 1, 1)] * (n_blocks - 1)):
                block = (
                    Bottleneck(channels, planes, stride, project, config.cardinality)
                    if bottlenecks
                    else BasicBlock(channels, planes, stride, project)
                )
                stage.append(block)
                channels = block.out_channels
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.embedding_dim = channels
        self.neck = nn.BatchNorm1d(channels) if config.neck else None
        self.classifier = nn.Linear(channels, n_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # The neck's features should stay centred on the origin, where cosine distance is measured.
        if self.neck is not None:
            self.neck.bias.requires_grad_(False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embed and classify.

        Args:
            x: normalised clips (N, C, T, H, W) float32, any number of frames and any size.

        Returns:
            Logits (N, n_classes) and embedding (N, D): in training the embedding before the neck,
            which the metric losses pull together; in evaluation the one after it, which cosine
            distance compares.

        Raises:
            InputError: if clips are smaller than ``config.crop``.
        """
        if self.config.crop is not None:
            x = _middle(x, self.config.crop)
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, width, T, H/2, W/2)
        x = self.maxpool(x)  # (N, width, T/2, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        before = x.mean(dim=(2, 3, 4))  # (N, D): the original's fixed average pool at its sizes, and any clip fits
        after = before if self.neck is None else self.neck(before)
        logits = self.classifier(after)
        return logits, before if self.training else after


def _middle(x: Tensor, side: int) -> Tensor:
    """(N, C, T, H, W) to the middle (N, C, T, side, side)."""
    h, w = x.shape[3:]
    if min(h, w) < side:
        raise InputError(f"model.crop is {side} but clips are {h} × {w} px: choose {min(h, w)} at most, or null")
    top, left = (h - side) // 2, (w - side) // 2
    return x[..., top : top + side, left : left + side]


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions around a shortcut."""

    def __init__(self, channels: int, planes: int, stride: Stride, project: bool) -> None:
        super().__init__()
        self.out_channels = planes
        self.conv1 = nn.Conv3d(channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = _shortcut(channels, planes, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) to (N, planes, T/stride, H/stride, W/stride)."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3x3 convolution between two 1x1x1 ones, around a shortcut.

    A ResNeXt's (Xie et al., CVPR 2017) is twice as wide in the middle, in groups that do not see each other.
    """

    def __init__(self, channels: int, planes: int, stride: Stride, project: bool, cardinality: int) -> None:
        super().__init__()
        self.out_channels = out = 4 * planes
        middle = planes if cardinality == 1 else 2 * planes
        self.conv1 = nn.Conv3d(channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(middle)
        self.conv2 = nn.Conv3d(middle, middle, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm3d(middle)
        self.conv3 = nn.Conv3d(middle, out, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(out)
        self.downsample = _shortcut(channels, out, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) to (N, 4 * planes, T/stride, H/stride, W/stride)."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return functional.relu(y + self.downsample(x), inplace=True)


class PadShortcut(nn.Module):
    """Shortcut A: every stride-th value (an average pool of kernel 1) and zeros as new channels.

    Gradients flow back through it; in Hara's code they do not, since it takes the bare data there.
    """

    def __init__(self, channels: int, out: int, stride: Stride) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out - channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) to (N, out, T/stride, H/stride, W/stride); no weights."""
        t, h, w = self.stride
        return functional.pad(x[:, :, ::t, ::h, ::w], (0, 0, 0, 0, 0, 0, 0, self.new_channels))


def _shortcut(channels: int, out: int, stride: Stride, project: bool) -> nn.Module:
    if stride == (1, 1, 1) and channels == out:
        return nn.Identity()
    if project:
        convolution = nn.Conv3d(channels, out, 1, stride, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm3d(out))
    return PadShortcut(channels, out, stride)


@dataclass(frozen=True)
class Recognised:
    """Which network a file's tensors belong to.

    Attributes:
        config: the shape of that network; ``temporal`` is its default, since no tensor tells it.
        in_channels: C of its clips.
        n_classes: of its classifier, None if it has none.
        names: our name -> name in the file.
        unknown: names in the file that have no place in the network.
    """

    config: ModelConfig
    in_channels: int
    n_classes: int | None
    names: Mapping[str, str]
    unknown: tuple[str, ...]


def recognise(tensors: Mapping[str, Tensor], source: str) -> Recognised:
    """Tell from names and shapes which network tensors belong to, by Hara's and torchvision's names.

    The layers may stand below any prefix (``module.``, ``backbone.``, ...). What stands outside of them is known by
    its role, not its name: a batch norm of the embedding's size is the neck, a matrix (classes, D) the classifier.
    That a tensor is recognised does not mean that its shape fits.

    Args:
        tensors: name -> tensor; convolutions in 3D or, as torchvision's, in 2D.
        source: what to call the tensors in errors, such as the file's path.

    Raises:
        InputError: if they belong to no residual network, or to one that cannot be built.
    """
    prefixes = Counter(match[1] for name in tensors if (match := re.match(r"((?:.*\.)?)layer[1-4]\.\d+\.", name)))
    if not prefixes:
        raise InputError(
            f"{source}: holds no residual network: none of its {len(tensors)} tensors is named like "
            f"layer1.0.conv1.weight; it begins with {', '.join(list(tensors)[:3]) or 'nothing'}"
        )
    prefix = prefixes.most_common(1)[0][0]
    body = re.compile(re.escape(prefix) + r"((?:conv1|bn1|layer[1-4]\.\d+)\..+)")
    names = {match[1]: name for name in tensors if (match := body.fullmatch(name))}
    shapes = {ours: tuple(tensors[theirs].shape) for ours, theirs in names.items()}

    settings = _settings(shapes, source)
    embedding_dim = settings["width"] * (32 if settings["depth"] in _BOTTLENECK_DEPTHS else 8)
    heads = _heads(tensors, set(tensors) - set(names.values()), embedding_dim)
    names |= heads
    try:
        config = ModelConfig.model_validate({**settings, "neck": any(name.startswith("neck.") for name in heads)})
    except ValidationError as error:
        problems = "; ".join(" ".join([*map(str, entry["loc"]), entry["msg"]]) for entry in error.errors())
        raise InputError(f"{source}: holds a network that cannot be built: {problems}") from error
    stem = shapes.get("conv1.weight", ())
    classifier = heads.get("classifier.weight")
    taken = set(names.values())
    return Recognised(
        config=config,
        in_channels=stem[1] if len(stem) > 1 else 3,
        n_classes=None if classifier is None else tensors[classifier].shape[0],
        names=names,
        unknown=tuple(name for name in tensors if name not in taken),
    )


def _settings(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, Any]:
    """The settings that the layers' names and shapes tell; of several witnesses the most common is believed.

    So one tensor that is misshapen is named, and not all the others.
    """
    widths = Counter(shape[0] for name, shape in shapes.items() if name.startswith(("conv1.", "bn1.")) and shape)
    middle = [shape for name, shape in shapes.items() if name.endswith(".conv2.weight") and len(shape) > 1]
    groups = Counter(out // max(1, within) for out, within, *_ in middle)
    bottlenecks = any(".conv3." in name for name in shapes)
    stem = shapes.get("conv1.weight", ())
    default = ModelConfig()
    return {
        "depth": _depth(shapes, bottlenecks, source),
        "cardinality": groups.most_common(1)[0][0] if groups and bottlenecks else default.cardinality,
        "width": widths.most_common(1)[0][0] if widths else default.width,
        "stem_frames": stem[2] if len(stem) == 5 and stem[2] % 2 else default.stem_frames,
        "shortcut": "B" if any(".downsample." in name for name in shapes) else "A",
    }


def _depth(names: Iterable[str], bottlenecks: bool, source: str) -> int:
    """The smallest network that has all the blocks, so that those of an incomplete file can be named."""
    found = {match[1] for name in names if (match := re.match(r"(layer[1-4]\.\d+)\.", name))}
    last = [
        max((int(b.partition(".")[2]) for b in found if b.startswith(f"layer{i}.")), default=-1) for i in range(1, 5)
    ]
    for depth, blocks in _BLOCKS_PER_STAGE.items():
        if (depth in _BOTTLENECK_DEPTHS) == bottlenecks and all(n < m for n, m in zip(last, blocks, strict=True)):
            return depth
    kind = "bottlenecks" if bottlenecks else "basic blocks"
    raise InputError(
        f"{source}: its stages have {tuple(n + 1 for n in last)} {kind}, more than any network here; depths are "
        f"{', '.join(map(str, _BLOCKS_PER_STAGE))}"
    )


def _heads(tensors: Mapping[str, Tensor], rest: set[str], embedding_dim: int) -> dict[str, str]:
    """Neck and classifier among what stands outside the layers: our name -> name in the file."""
    modules: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in tensors:
        if name in rest:
            module, _, leaf = name.rpartition(".")
            modules[module][leaf] = tensors[name]
    necks = [name for name, leaves in modules.items() if "running_mean" in leaves or "running_var" in leaves]
    linear = [name for name, leaves in modules.items() if "weight" in leaves and leaves["weight"].ndim == 2]
    classifiers = [name for name in linear if name not in necks]
    heads: dict[str, str] = {}
    for ours, candidates, leaves in (("neck", necks, _NECK), ("classifier", classifiers, _CLASSIFIER)):
        # One of another size is the second best: it will be named as misshapen.
        sized = [c for c in candidates if any(embedding_dim in tensor.shape[-1:] for tensor in modules[c].values())]
        for module in (sized or candidates)[:1]:
            heads |= {f"{ours}.{leaf}": f"{module}.{leaf}".lstrip(".") for leaf in leaves if leaf in modules[module]}
    return heads


def load_mitoreid(path: str | os.PathLike[str], temporal: Temporal = "retain") -> I3DResNet:
    """The network of a checkpoint that MitoReID released, or of any other of Hara's networks in that form.

    The file is a torch file whose ``state_dict`` holds the tensors, or that is one itself; nothing in it is run.
    Depth, cardinality, shortcut, neck, width, channels and classes are told from the tensors. A classifier without
    bias gets one of zeros, which changes nothing.

    Args:
        path: file or URL.
        temporal: how the network treats time, which no tensor tells: ``retain`` or ``standard`` for sequences,
            ``image`` for the network of one frame.

    Returns:
        The network on the CPU in float32, in evaluation mode.

    Raises:
        InputError: if the file is missing, cut short, no torch file or holds code; or naming every tensor that
            is missing, unexpected, misshapen or holds values that are no numbers.
    """
    if temporal not in get_args(Temporal):
        raise InputError(f"temporal is {temporal!r}: choose one of {', '.join(get_args(Temporal))}")
    source = os.fspath(path)
    tensors = read_state_dict(source)
    found = recognise(tensors, source)
    with torch.device("meta"):  # no weights are drawn that would be overwritten
        config = found.config.model_copy(update={"temporal": temporal})
        network = I3DResNet(config, found.in_channels, found.n_classes or 1)
    expected = network.state_dict()
    given = {ours: tensors[theirs] for ours, theirs in found.names.items()}
    problems = misfits(expected, given, found.names)
    surplus = [theirs for ours, theirs in found.names.items() if ours not in expected]
    problems += [f"unexpected: {name} {tuple(tensors[name].shape)}" for name in (*surplus, *found.unknown)]
    if problems:
        raise InputError(
            f"{source}: does not fit a {config.name} with shortcut {config.shortcut}, "
            f"{'a neck' if config.neck else 'no neck'} and {found.n_classes or 'no'} classes:\n  "
            + "\n  ".join(problems)
        )
    state = {name: torch.zeros(expected[name].shape) for name in expected if _may_lack(name)}
    network.to_empty(device="cpu").load_state_dict(state | given)
    return network.eval()


def misfits(
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    names: Mapping[str, str],
    may_differ: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """What keeps a file's tensors from being a network's, a line a tensor.

    Args:
        expected: the network's tensors.
        given: the file's, by the network's names.
        names: the network's name -> name in the file.
        may_differ: by the network's name, whether a tensor may be missing or of another shape.
    """
    lines = []
    for ours, like in expected.items():
        tensor = given.get(ours)
        if tensor is None:
            if may_differ(ours) or _may_lack(ours):
                continue
            if ours == "classifier.weight":
                lines.append(f"missing: classifier.weight, a matrix (classes, {like.shape[1]}) by any name")
            else:
                lines.append(f"missing: {ours} {tuple(like.shape)}")
        elif tensor.shape != like.shape:
            if not may_differ(ours):
                lines.append(f"misshapen: {names[ours]} {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        elif problem := _unusable(tensor):
            lines.append(f"unusable: {names[ours]} {problem}")
    return lines


def _unusable(tensor: Tensor) -> str:
    """Why a tensor cannot be a network's, empty if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        return "is not stored as plain real numbers"
    if not bool(torch.isfinite(tensor).all()):
        return "holds values that are NaN or infinite"
    return ""


def _may_lack(name: str) -> bool:
    """A classifier may be without bias, and old torch did not count batches."""
    return name == "classifier.bias" or name.endswith(".num_batches_tracked")


_BLOCKS_PER_STAGE = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
_BOTTLENECK_DEPTHS = (50, 101)
_NECK = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_CLASSIFIER = ("weight", "bias")
