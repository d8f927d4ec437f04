"""The losses against loops that follow their definitions anchor by anchor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.losses import batch_hard_triplet_loss, center_loss, mislabelled_as_control, triplet_losses


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(max(float(((a - b) ** 2).sum()), 1e-12))


def looped_triplets(
    embedding: np.ndarray, label: np.ndarray, others: np.ndarray, other_label: np.ndarray, margin: float
) -> list[float]:
    losses = []
    for x, own in zip(embedding, label, strict=True):
        positives = [distance(x, y) for y, identity in zip(others, other_label, strict=True) if identity == own]
        negatives = [distance(x, y) for y, identity in zip(others, other_label, strict=True) if identity != own]
        losses.append(max(0.0, margin + max(positives) - min(negatives)) if negatives else 0.0)
    return losses


def looped_triplet(embedding: np.ndarray, label: np.ndarray, margin: float) -> float:
    return float(np.mean(looped_triplets(embedding, label, embedding, label, margin)))


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


def test_triplets_are_sought_among_the_others() -> None:
    rng = np.random.default_rng(3)
    others = rng.normal(size=(12, 5))
    label = rng.integers(0, 3, 12)
    found = triplet_losses(*(torch.tensor(a) for a in (others[4:7], label[4:7], others, label)), margin=2.0)
    assert found.tolist() == pytest.approx(looped_triplets(others[4:7], label[4:7], others, label, 2.0), rel=1e-9)
    none = triplet_losses(torch.ones(3, 5), torch.arange(3), torch.ones(0, 5), torch.arange(0))
    assert none.tolist() == [0, 0, 0]


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_triplet_of_single_precision_is_exact_to_1e_5_also_far_from_the_origin(offset: float) -> None:
    rng = np.random.default_rng(0)
    label = np.arange(64) // 4
    embedding = (rng.normal(size=(64, 512)) * 0.1 + offset).astype(np.float32)
    loss = batch_hard_triplet_loss(torch.tensor(embedding), torch.tensor(label))
    assert float(loss) == pytest.approx(looped_triplet(embedding.astype(np.float64), label, 0.3), abs=1e-5)


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


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20), limit=st.integers(1, 8), control=st.integers(0, 2))
def test_mislabelled_clips_are_left_out_while_they_are_few(seed: int, n: int, limit: int, control: int) -> None:
    predicted, label = np.random.default_rng(seed).integers(0, 3, (2, n))
    suspects = [i for i in range(n) if predicted[i] == control and label[i] != control]
    expected = suspects if len(suspects) < limit else []
    found = mislabelled_as_control(torch.tensor(predicted), torch.tensor(label), control, limit)
    assert torch.nonzero(found).flatten().tolist() == expected
