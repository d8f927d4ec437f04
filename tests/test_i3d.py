"""The network: its size, what it returns, and what its choices do."""

from __future__ import annotations

import pytest
import torch
from hara import Hara
from torch import nn

from screening.i3d import I3DResNet, ModelConfig, PadShortcut, frames_seen
from storage_schemas.errors import InputError


def small(**choices: object) -> ModelConfig:
    return ModelConfig.model_validate({"depth": 10, "width": 4, "stem_frames": 3, **choices})


def final_map(network: I3DResNet, x: torch.Tensor) -> torch.Size:
    shapes: list[torch.Size] = []
    handle = network.layer4.register_forward_hook(lambda m, i, out: shapes.append(out.shape))
    network.eval()(x)
    handle.remove()
    return shapes[0]


@pytest.mark.parametrize(("depth", "expected"), [(18, 33_050_598), (50, 46_280_934)])
def test_number_of_parameters_is_the_published_one(depth: int, expected: int) -> None:
    with torch.device("meta"):  # counted, not allocated
        network = I3DResNet(ModelConfig.model_validate({"depth": depth}), in_channels=3, n_classes=38)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(
    ("temporal", "frames", "expected"),
    [("retain", 16, (4, 4, 4)), ("standard", 16, (1, 4, 4)), ("image", 1, (1, 4, 4))],
)
def test_time_and_space_left_before_pooling(temporal: str, frames: int, expected: tuple[int, ...]) -> None:
    network = I3DResNet(small(temporal=temporal), in_channels=3, n_classes=5)
    assert final_map(network, torch.zeros(1, 3, frames, 112, 112))[2:] == expected


@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.parametrize("shape", [(1, 8, 64, 64), (3, 5, 33, 47), (2, 1, 16, 16)])
def test_any_channels_frames_and_size_fit(depth: int, shape: tuple[int, ...]) -> None:
    network = I3DResNet(small(depth=depth), in_channels=shape[0], n_classes=5)
    logits, embedding = network(torch.randn(2, *shape))
    assert logits.shape == (2, 5)
    assert embedding.shape == (2, network.embedding_dim)
    assert network.embedding_dim == 4 * 8 * (4 if depth == 50 else 1)


def test_training_returns_the_embedding_before_the_neck_and_evaluation_after_it() -> None:
    torch.manual_seed(0)
    network = I3DResNet(small(), in_channels=2, n_classes=3)
    assert network.neck is not None
    x = torch.randn(4, 2, 4, 32, 32)
    network.train()
    _, before = network(x)
    assert bool((before >= 0).all())  # averaged after a ReLU
    network.eval()
    network.neck.reset_running_stats()
    network.neck.running_mean = torch.full((32,), 7.0)
    logits, after = network(x)
    network.neck.running_mean = torch.zeros(32)
    _, pooled = network(x)
    torch.testing.assert_close(after, pooled - 7.0 / (1 + 1e-5) ** 0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, network.classifier(after))


def test_neck_has_a_frozen_bias_and_may_be_left_out() -> None:
    network = I3DResNet(small(), in_channels=3, n_classes=3)
    assert network.neck is not None
    assert not network.neck.bias.requires_grad
    assert network.neck.weight.requires_grad
    bare = I3DResNet(small(neck=False), in_channels=3, n_classes=3).eval()
    assert bare.neck is None
    x = torch.randn(2, 3, 4, 32, 32)
    logits, embedding = bare(x)
    torch.testing.assert_close(logits, bare.classifier(embedding))


def test_shortcut_a_is_a_strided_average_pool_and_zero_channels() -> None:
    x = torch.randn(2, 3, 5, 7, 8)
    y = PadShortcut(3, 8, (2, 2, 1))(x)
    pooled = nn.functional.avg_pool3d(x, kernel_size=1, stride=(2, 2, 1))
    torch.testing.assert_close(y[:, :3], pooled)
    assert y.shape[1] == 8
    assert not y[:, 3:].any()


@pytest.mark.parametrize(
    ("depth", "shortcut", "projections"), [(18, None, 0), (18, "B", 3), (50, None, 4), (50, "A", 0)]
)
def test_shortcut_follows_the_choice_or_the_blocks(depth: int, shortcut: str | None, projections: int) -> None:
    with torch.device("meta"):
        network = I3DResNet(small(depth=depth, shortcut=shortcut), in_channels=3, n_classes=2)
    names = [name for name, _ in network.named_parameters() if name.endswith("downsample.0.weight")]
    assert len(names) == projections


def test_weights_begin_as_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    weight = I3DResNet(small(width=16), in_channels=3, n_classes=2).layer4[0].conv2.weight
    fan_out = weight.shape[0] * weight[0, 0].numel()
    assert float(weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_frames_seen() -> None:
    assert frames_seen(small(temporal="retain"), 4) == [0, 1, 2, 3]
    assert frames_seen(small(temporal="image"), 4) == [3]
    assert frames_seen(small(temporal="image", image_frame=1), 4) == [1]
    with pytest.raises(InputError, match="choose from -4 to 3"):
        frames_seen(small(temporal="image", image_frame=4), 4)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"stem_frames": 4}, "stem_frames is 4: choose an odd number"),
        ({"depth": 18, "cardinality": 32, "width": 16}, "depth 18 has none: choose depth 50 or 101, or cardinality 1"),
        ({"depth": 101, "cardinality": 32, "width": 24}, "choose a multiple of 16"),
        ({"depth": 152}, "10, 18, 34, 50 or 101"),
        ({"cardinality": 8}, "1 or 32"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(choices: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small(**choices)


@pytest.mark.parametrize(
    ("depth", "shortcut", "cardinality"),
    [(10, "A", 1), (18, "B", 1), (34, "A", 1), (50, "A", 1), (50, "B", 32), (101, "B", 1), (101, "A", 32)],
)
def test_tensors_are_those_of_the_original(depth: int, shortcut: str, cardinality: int) -> None:
    with torch.device("meta"):
        config = ModelConfig.model_validate({"depth": depth, "shortcut": shortcut, "cardinality": cardinality})
        ours = I3DResNet(config, in_channels=3, n_classes=38)
        theirs = Hara(depth, shortcut, cardinality=cardinality, neck="neck")
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }


def test_a_resnext_shares_the_middle_of_its_blocks_among_groups() -> None:
    with torch.device("meta"):
        network = I3DResNet(ModelConfig(depth=101, cardinality=32), in_channels=3, n_classes=38)
    assert network.config.name == "ResNeXt-101"
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3, network.layer4)] == [3, 4, 23, 3]
    for planes, stage in zip(
        (128, 256, 512, 1024), (network.layer1, network.layer2, network.layer3, network.layer4), strict=True
    ):
        for block in stage:
            assert block.conv2.groups == 32
            assert block.conv2.in_channels == block.conv2.out_channels == 32 * (planes // 32)
            assert block.conv3.out_channels == 2 * planes
    assert network.embedding_dim == 2048
