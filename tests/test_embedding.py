"""Embedding: independent of batches, of the network's mode and of the container of the clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from screening.embedding import EmbedConfig, embed
from screening.i3d import I3DResNet, ModelConfig
from screening.training import Normalisation
from storage_schemas.clips import white
from storage_schemas.errors import InputError

NORMALISATION = Normalisation(mean=(0.4, 0.5), std=(0.2, 0.3))
FRAMES = (0, 1, 2, 3)


@pytest.fixture
def network() -> I3DResNet:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        network = I3DResNet(ModelConfig(depth=10, width=4), in_channels=2, n_classes=3)
        network(torch.randn(8, 2, 4, 16, 16))  # running means other than the first
    return network


def clips(n: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 2, 4, 16, 16), dtype=np.uint8)


def test_embeddings_are_those_of_each_clip_alone(network: I3DResNet) -> None:
    found = embed(network, clips(), NORMALISATION, FRAMES, EmbedConfig(batch_size=3))
    assert found.dtype == np.float32
    assert found.shape == (7, network.embedding_dim)
    x = (torch.from_numpy(clips()) / 255 - torch.tensor([0.4, 0.5]).reshape(2, 1, 1, 1)) / torch.tensor(
        [0.2, 0.3]
    ).reshape(2, 1, 1, 1)
    with torch.no_grad():
        for i in range(7):
            _, expected = network.eval()(x[i : i + 1])
            np.testing.assert_allclose(found[i], expected[0], rtol=1e-3, atol=1e-4)


def test_tensors_and_arrays_give_the_same(network: I3DResNet) -> None:
    array = embed(network, clips(), NORMALISATION, FRAMES)
    tensor = embed(network, torch.from_numpy(clips()), NORMALISATION, FRAMES)
    assert np.array_equal(array, tensor)


@pytest.mark.parametrize("dtype", ["uint16", "float16"])
def test_the_type_of_the_clips_changes_an_embedding_only_by_rounding(network: I3DResNet, dtype: str) -> None:
    exact = np.random.default_rng(1).beta(1, 3, (7, 2, 4, 16, 16))
    coarse = np.rint(exact * 255).astype(np.uint8)
    finer = (exact * white(dtype)).astype(dtype)
    of_coarse, of_finer = (embed(network, c, NORMALISATION, FRAMES) for c in (coarse, finer))
    spread = np.linalg.norm(of_coarse - of_coarse.mean(axis=0), axis=1).mean()
    assert (np.linalg.norm(of_coarse - of_finer, axis=1) < 0.05 * spread).all()


def test_bfloat16_changes_an_embedding_only_by_rounding(network: I3DResNet) -> None:
    full, rounded = (
        embed(network, clips(), NORMALISATION, FRAMES, EmbedConfig(precision=p)) for p in ("float32", "bf16")
    )
    assert rounded.dtype == np.float32
    assert not np.array_equal(full, rounded)
    np.testing.assert_allclose(full, rounded, atol=0.02 * np.abs(full).max())


def test_only_the_frames_asked_for_count(network: I3DResNet) -> None:
    other = clips()
    other[:, :, :3] = 0
    assert np.array_equal(embed(network, clips(), NORMALISATION, [3]), embed(network, other, NORMALISATION, [3]))


def test_embedding_leaves_the_weights_and_statistics(network: I3DResNet) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    embed(network, clips(), NORMALISATION, FRAMES)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_no_clips_give_no_embeddings(network: I3DResNet) -> None:
    assert embed(network, clips(0), NORMALISATION, FRAMES).shape == (0, network.embedding_dim)


def test_other_channels_are_refused(network: I3DResNet) -> None:
    with pytest.raises(InputError, match="1 channels but the network is made for 2"):
        embed(network, clips()[:, :1], NORMALISATION, FRAMES)
