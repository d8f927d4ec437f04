"""Starting weights: what fits is taken, what does not is named, and another network is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hara import Hara, fill, release
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional
from torchvision_models import import_models

from screening.i3d import I3DResNet, ModelConfig
from screening.initialisation import InitialWeights, RandomWeights, inflate, initialise, read_initial_weights
from storage_schemas import store
from storage_schemas.checkpoint import CheckpointManifest, write_checkpoint
from storage_schemas.errors import InputError

SMALL: dict[str, Any] = {"depth": 10, "width": 4, "stem_frames": 3}
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


def network(channels: int = 3, classes: int = 5, **choices: Any) -> I3DResNet:
    torch.manual_seed(7)
    return I3DResNet(ModelConfig.model_validate({**SMALL, **choices}), channels, classes)


def hara(**choices: Any) -> dict[str, Tensor]:
    """Tensors as Hara's Kinetics checkpoints have them."""
    made = Hara(**{**SMALL, "neck": None, "head": "fc", "classes": 400, **choices})
    return {f"module.{name}": tensor for name, tensor in fill(made).state_dict().items()}


def config(method: str, path: Path | None = None) -> InitialWeights:
    document = {"method": method} if path is None else {"method": method, "path": str(path)}
    return TypeAdapter[InitialWeights](InitialWeights).validate_python(document)


def copy(net: I3DResNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def unchanged(net: I3DResNet, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in net.state_dict().items() if torch.equal(tensor, before[name])}


def test_random_weights_are_left_as_drawn() -> None:
    net = network()
    before = copy(net)
    assert initialise(net, read_initial_weights(config("random")), "random") == []
    assert unchanged(net, before) == set(before)
    assert config("random") == RandomWeights()


def test_a_choice_needs_its_path_and_knows_its_method() -> None:
    with pytest.raises(ValidationError, match="path"):
        config("kinetics")
    with pytest.raises(ValidationError, match="random"):
        config("guess")


def test_kinetics_weights_are_taken_but_for_the_classifier() -> None:
    net = network()
    before, tensors = copy(net), hara()
    notes = initialise(net, tensors, "kinetics")
    for name, tensor in net.state_dict().items():
        if not name.startswith(("neck.", "classifier.")):
            assert torch.equal(tensor, tensors[f"module.{name}"]), name
    assert {name for name in unchanged(net, before) if not name.endswith("num_batches_tracked")} == {
        "neck.weight",
        "neck.bias",
        "neck.running_mean",
        "neck.running_var",
        "classifier.weight",
        "classifier.bias",
    }
    assert notes == [
        "module.fc.weight is not taken, and classifier.weight stays as drawn: "
        "(400, 32) in the file, (5, 32) in the network",
        "module.fc.bias is not taken, and classifier.bias stays as drawn: (400,) in the file, (5,) in the network",
        "neck.weight (32,) stays as drawn: it is not in the file",
        "neck.bias (32,) stays as drawn: it is not in the file",
        "neck.running_mean (32,) stays as drawn: it is not in the file",
        "neck.running_var (32,) stays as drawn: it is not in the file",
    ]


def test_a_stem_for_other_channels_or_frames_stays_as_drawn() -> None:
    for net in (network(channels=2), network(stem_frames=5)):
        before = copy(net)
        notes = initialise(net, hara(), "kinetics")
        assert any(note.startswith("module.conv1.weight is not taken, and conv1.weight stays") for note in notes)
        assert "conv1.weight" in unchanged(net, before)
        assert "bn1.weight" not in unchanged(net, before)


@pytest.mark.parametrize(("of_file", "of_network"), [("A", "B"), ("B", "A")])
def test_projections_may_be_on_one_side_only(of_file: str, of_network: str) -> None:
    notes = initialise(network(shortcut=of_network), hara(shortcut=of_file), "kinetics")
    named = [note for note in notes if ".downsample." in note]
    said = "is not taken: the network has no" if of_file == "B" else "stays as drawn: it is not in the file"
    assert named
    assert all(said in note for note in named)
    assert sum("layer3.0.downsample.0.weight" in note for note in named) == 1


@pytest.mark.parametrize(
    ("of_file", "told"),
    [
        ({"depth": 18}, "seems to hold a ResNet-18 of width 4.*set model.depth=18"),
        ({"depth": 34}, "ResNet-34"),
        ({"depth": 50, "shortcut": "B"}, "ResNet-50"),
        ({"width": 8}, "of width 8"),
        ({"depth": 50, "shortcut": "B", "cardinality": 32, "width": 16}, "ResNeXt-50 of width 16"),
    ],
)
def test_another_network_is_refused(of_file: dict[str, Any], told: str) -> None:
    net = network()
    before = copy(net)
    with pytest.raises(InputError, match=told):
        initialise(net, hara(**of_file), "kinetics")
    assert unchanged(net, before) == set(before)


def test_layers_that_do_not_fit_are_named_and_nothing_is_taken() -> None:
    net = network()
    before, tensors = copy(net), hara()
    del tensors["module.layer2.0.bn1.weight"]
    tensors["module.layer3.0.conv2.weight"] = torch.zeros(1, 2, 3, 4, 5)
    tensors["module.layer1.0.conv1.weight"][0] = torch.inf
    with pytest.raises(InputError) as caught:
        initialise(net, tensors, "kinetics")
    assert str(caught.value).splitlines()[1:] == [
        "  unusable: module.layer1.0.conv1.weight holds values that are NaN or infinite",
        "  missing: layer2.0.bn1.weight (8,)",
        "  misshapen: module.layer3.0.conv2.weight (1, 2, 3, 4, 5), expected (16, 16, 3, 3, 3)",
    ]
    assert unchanged(net, before) == set(before)


def test_tensors_without_a_place_are_named() -> None:
    notes = initialise(network(), {**hara(), "centers": torch.zeros(400, 32)}, "kinetics")
    assert "centers (400, 32) is not taken: nothing like it is in the network" in notes


def test_mitoreid_weights_pretrained_on_drugs_keep_their_neck(tmp_path: Path) -> None:
    theirs = fill(Hara(**{**SMALL, "classes": 9}))
    net = network()
    chosen = config("mitoreid", release(theirs, tmp_path / "x.pth"))
    notes = initialise(net, read_initial_weights(chosen), chosen.method)
    assert [note.split(" ")[0] for note in notes] == ["module.classifier.weight", "module.classifier.bias"]
    assert net.neck is not None
    assert torch.equal(net.neck.weight, theirs.bottleneck.weight)
    with torch.no_grad():
        x = torch.randn(2, 3, 4, 32, 32)
        assert net.conv1.weight.requires_grad
        same = Hara(**{**SMALL, "classes": 9, "frames": 4, "size": 32}).eval()
        same.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(net.eval()(x)[1], same(x)[1], rtol=1e-4, atol=1e-5)


def test_our_own_checkpoint_is_taken_whole(tmp_path: Path) -> None:
    trained = network()
    fill(trained, seed=3)
    manifest = CheckpointManifest(
        model=trained.config.model_dump(),
        class_names=("a", "b", "c", "d", "e"),
        channels=("x", "y", "z"),
        n_frames=4,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        embedding_dim=32,
        epoch=1,
        history=(),
        fingerprint="",
    )
    weights: dict[str, Any] = {name: tensor.numpy() for name, tensor in trained.state_dict().items()}
    write_checkpoint(str(tmp_path / "own"), manifest, weights)
    chosen = config("checkpoint", tmp_path / "own")
    net = network()
    assert initialise(net, read_initial_weights(chosen), "checkpoint") == []
    assert unchanged(net, copy(trained)) == set(weights)
    store.remove(str(tmp_path / "own" / "manifest.json"))
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        read_initial_weights(chosen)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


@pytest.mark.parametrize("method", ["mitoreid", "kinetics", "imagenet"])
def test_bad_files_are_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(InputError, match=r"x\.pth: no such file"):
        read_initial_weights(config(method, tmp_path / "x.pth"))
    torch.save({"state_dict": Harmful()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="code and is not run"):
        read_initial_weights(config(method, tmp_path / "x.pth"))
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a torch file"):
        read_initial_weights(config(method, tmp_path / "x.pth"))


@pytest.mark.parametrize(("channels", "frames"), [(3, 3), (2, 3), (5, 7), (1, 1)])
def test_an_inflated_kernel_sees_a_still_clip_as_an_image(channels: int, frames: int) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    inflated = inflate(weight, torch.zeros(4, channels, frames, 3, 3), still=False)
    assert inflated.shape == (4, channels, frames, 3, 3)
    # Loop-written: every tap of the kernel by itself.
    for o, c, t in np.ndindex(4, channels, frames):
        expected = weight[o, c] if channels == 3 else sum(weight[o, i] for i in range(3)) / channels
        torch.testing.assert_close(inflated[o, c, t], expected / frames)
    grey = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    clip = grey.unsqueeze(2).expand(1, channels, frames, 8, 8)
    seen = functional.conv3d(clip, inflated)
    torch.testing.assert_close(seen[:, :, 0], functional.conv2d(grey.expand(1, 3, 8, 8), weight))


def photographs(name: str) -> torch.nn.Module:
    return fill(getattr(import_models(), name)())


@needs_torchvision
@pytest.mark.parametrize(("name", "depth", "cardinality"), [("resnet18", 18, 1), ("resnext50_32x4d", 50, 32)])
def test_the_image_network_is_the_photographs_network(tmp_path: Path, name: str, depth: int, cardinality: int) -> None:
    theirs = photographs(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    chosen = config("imagenet", tmp_path / "x.pth")
    net = network(
        depth=depth, cardinality=cardinality, width=64, shortcut="B", neck=False, temporal="image", classes=1000
    )
    assert initialise(net, read_initial_weights(chosen), "imagenet") == []
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = net.eval()(x.unsqueeze(2))[0], theirs(x)
    assert float((ours - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@needs_torchvision
def test_photographs_in_a_network_over_time_and_other_channels() -> None:
    tensors = photographs("resnet18").state_dict()
    net = network(depth=18, width=64, channels=2, shortcut="A")
    notes = initialise(net, tensors, "imagenet")
    grey = tensors["conv1.weight"].sum(dim=1)
    torch.testing.assert_close(net.conv1.weight.detach().sum(dim=(1, 2)), grey)
    torch.testing.assert_close(net.layer3[1].conv2.weight[:, :, 2], tensors["layer3.1.conv2.weight"] / 3)
    left = {note.split(" ")[0] for note in notes if "is not taken" in note}
    assert left == {n for n in tensors if ".downsample." in n or n.startswith("fc.")}


@needs_torchvision
def test_two_and_three_dimensions_are_not_confused() -> None:
    models = import_models()
    with torch.device("meta"):  # only shapes are looked at
        net, deep = network(depth=18, width=64), network(depth=50, width=64)
        flat, other, wide = (make().state_dict() for make in (models.resnet18, models.resnet50, models.wide_resnet50_2))
        video = Hara(18, neck=None).state_dict()
    with pytest.raises(InputError, match=r"no time axis.*method imagenet"):
        initialise(net, flat, "kinetics")
    with pytest.raises(InputError, match="not those of a 2D network"):
        initialise(net, video, "imagenet")
    with pytest.raises(InputError, match="seems to hold a ResNet-50 of width 64"):
        initialise(net, other, "imagenet")
    with pytest.raises(InputError, match=r"misshapen: layer1\.0\.conv1\.weight"):
        initialise(deep, wide, "imagenet")
    with pytest.raises(InputError, match=r"misshapen: layer1\.0\.bn1\.weight \(1, 1, 1, 1\), expected \(64,\)"):
        initialise(net, flat | {"layer1.0.bn1.weight": torch.zeros(1, 1, 1, 1)}, "imagenet")
