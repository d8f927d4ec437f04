"""The losses against loops that follow their definitions anchor by anchor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.losses import batch_hard_triplet_loss, center_loss


def looped_triplet(embedding: np.ndarray, label: np.ndarray, margin: float) -> float:
    losses = []
    for i in range(len(label)):
        positive = max(np.linalg.norm(embedding[i] - embedding[j]) for j in range(len(label)) if label[j] == label[i])
        negatives = [np.linalg.norm(embedding[i] - embedding[j]) for j in range(len(label)) if label[j] != label[i]]
        losses.append(max(0.0, margin + positive - min(negatives)))
    return float(np.mean(losses))


def looped_center(embedding: np.ndarray, label: np.ndarray, centers: np.ndarray) -> float:
    total = 0.0
    for x, c in zip(embedding, label, strict=True):
        total += min(max(float(np.sum((x - centers[c]) ** 2)), 1e-12), 1e12)
    return total / len(label)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 20),
    d=st.integers(1, 30),
    identities=st.integers(2, 5),
    margin=st.sampled_from([0.0, 0.3, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_triplet_equals_the_loop(n: int, d: int, identities: int, margin: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(n, d))
    label = rng.integers(0, identities, n)
    label[:2] = 0, 1  # at least two
    loss = batch_hard_triplet_loss(torch.tensor(embedding), torch.tensor(label), margin)
    assert float(loss) == pytest.approx(looped_triplet(embedding, label, margin), rel=1e-9, abs=1e-12)


def test_triplet_gradient_is_that_of_the_mined_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    label = torch.arange(12) // 3
    assert torch.autograd.gradcheck(lambda e: batch_hard_triplet_loss(e, label, 5.0), embedding)


def test_triplet_with_equal_embeddings_has_a_finite_gradient() -> None:
    embedding = torch.ones(4, 3, requires_grad=True)
    loss = batch_hard_triplet_loss(embedding, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.3)
    assert embedding.grad is not None
    assert bool(torch.isfinite(embedding.grad).all())


def test_triplet_without_negatives_is_zero() -> None:
    embedding = torch.randn(4, 3, requires_grad=True)
    loss = batch_hard_triplet_loss(embedding, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_triplet_is_zero_when_identities_are_far_apart() -> None:
    embedding = torch.tensor([[0.0], [0.1], [10.0], [10.1]])
    assert float(batch_hard_triplet_loss(embedding, torch.tensor([0, 0, 1, 1]))) == 0.0


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_center_equals_the_loop(offset: float) -> None:
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(9, 6)) + offset
    label = rng.integers(0, 4, 9)
    centers = rng.normal(size=(4, 6))
    embedding[0] = centers[label[0]]
    loss = center_loss(*(torch.tensor(a) for a in (embedding, label, centers)))
    assert float(loss) == pytest.approx(looped_center(embedding, label, centers), rel=1e-9)


def test_center_gradient_moves_centers_to_their_own_clips_only() -> None:
    centers = torch.zeros(3, 2, requires_grad=True)
    embedding = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    center_loss(embedding, torch.tensor([1, 1]), centers).backward()
    assert centers.grad is not None
    assert centers.grad.tolist() == [[0, 0], [-4, 0], [0, 0]]
