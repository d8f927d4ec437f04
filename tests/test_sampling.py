"""P x K batches: their form, and that an epoch visits every clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.sampling import pk_batches
from storage_schemas.errors import InputError


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    p=st.integers(2, 10),
    k=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_every_batch_is_p_groups_of_one_identity(counts: list[int], p: int, k: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 7, counts))
    batches = pk_batches(labels, p, k, np.random.default_rng(seed))
    assert batches.dtype == np.int64
    assert batches.shape[1] == p * k
    groups = labels[batches].reshape(len(batches), p, k)
    assert (groups == groups[:, :, :1]).all()
    for batch in groups[:, :, 0]:
        assert len(set(batch.tolist())) == min(p, len(counts))
    for positions, identity in zip(batches.reshape(-1, k), groups[:, :, 0].ravel(), strict=True):
        count = counts[identity // 7]
        assert len(set(positions.tolist())) == min(k, count)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(4, 50), identities=st.integers(4, 12), seed=st.integers(0, 1000))
def test_an_epoch_of_equal_identities_visits_every_clip(count: int, identities: int, seed: int) -> None:
    labels = np.repeat(np.arange(identities), count)
    batches = pk_batches(labels, 4, 4, np.random.default_rng(seed))
    visits = np.bincount(batches.ravel(), minlength=len(labels))
    assert visits.min() >= 1
    # What is more than one visit fills the last groups and the last batch.
    assert batches.size - len(labels) <= 4 * identities + 16


def test_a_rare_identity_is_seen_more_often_and_a_common_one_less() -> None:
    labels = np.repeat([0, 1, 2], [8, 8, 80])
    visits = np.bincount(pk_batches(labels, 3, 4, np.random.default_rng(0)).ravel(), minlength=96)
    assert visits[:16].min() >= 3
    assert visits[16:].max() <= 1


def test_the_draw_follows_the_generator_alone() -> None:
    labels = np.arange(60) % 7
    first, again, other = (pk_batches(labels, 4, 3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_one_identity_is_refused() -> None:
    with pytest.raises(InputError, match="at least two identities"):
        pk_batches(np.zeros(10, int), 2, 2, np.random.default_rng(0))
