from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.tracking import TrackingConfig, _assign, estimate_drift, link
from storage_schemas.errors import InputError

Array = npt.NDArray[Any]
Spot = tuple[float, float, float]  # y, x, radius


def draw(frames: Sequence[dict[int, Spot]], shape: tuple[int, int] = (120, 120)) -> Array:
    """A label movie: per frame, a disk for each label."""
    movie = np.zeros((len(frames), *shape), np.int32)
    for plane, spots in zip(movie, frames, strict=True):
        for label, (y, x, radius) in spots.items():
            cv2.circle(plane, (round(x), round(y)), round(radius), label, -1)
    return movie


def shuffle(movie: Array, seed: int, start: int = 1) -> Array:
    """The same objects with other ids in every frame."""
    rng = np.random.default_rng(seed)
    out = np.zeros_like(movie)
    for t, plane in enumerate(movie):
        ids = np.unique(plane[plane > 0])
        for old, new in zip(ids, rng.permutation(len(ids)) + start, strict=True):
            out[t][plane == old] = new
    return out


def same_partition(a: Array, b: Array) -> bool:
    """Whether two label movies group the same pixels, whatever the ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def link_scores(found: Array, true: Array) -> tuple[float, float]:
    """Recall and precision of frame-to-frame links, for two labellings of the same objects."""

    def links(movie: Array, identity: Array) -> set[tuple[int, int, int]]:
        out = set()
        for t in range(len(movie) - 1):
            for track in np.unique(movie[t][movie[t] > 0]):
                here, there = identity[t][movie[t] == track], identity[t + 1][movie[t + 1] == track]
                if len(there):
                    out.add((t, int(np.median(here)), int(np.median(there))))
        return out

    objects = shuffle(true, 0)
    ours, theirs = links(found, objects), links(true, objects)
    both = len(ours & theirs)
    return both / len(theirs), both / len(ours)


def random_movie(seed: int, n_frames: int = 5, n: int = 12, step: float = 3.0) -> Array:
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2)[:n] * 28.0 + 18
    walk = corners + rng.normal(0, step, (n_frames, len(corners), 2)).cumsum(0) / 2
    return draw([{k + 1: (y, x, 7) for k, (y, x) in enumerate(frame)} for frame in walk])


def test_stationary_objects_keep_one_track() -> None:
    movie = draw([{1: (20, 20, 8), 2: (60, 80, 8), 3: (100, 30, 8)}] * 4)
    tracks, parents = link(shuffle(movie, 1))
    assert same_partition(tracks, movie)
    assert len(parents) == 0
    assert list(parents.columns) == ["track", "parent", "frame"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([np.int32, np.uint16, np.int64, np.uint8]))
def test_objects_are_conserved_and_ids_ordered(seed: int, dtype: type) -> None:
    movie = shuffle(random_movie(seed, step=12.0), seed).astype(dtype)
    rng = np.random.default_rng(seed)
    movie[rng.random(len(movie)) < 0.2] = 0
    tracks, parents = link(movie)
    assert tracks.dtype == np.int32
    np.testing.assert_array_equal(tracks > 0, movie > 0)
    for before, after in zip(movie, tracks, strict=True):  # each object whole in one track, no two in the same
        assert same_partition(before, after)
    ids = np.unique(tracks[tracks > 0])
    np.testing.assert_array_equal(ids, np.arange(1, len(ids) + 1))
    starts = [(int(np.flatnonzero((tracks == k).any((1, 2)))[0]), k) for k in ids]
    keys = [(t, int(movie[t][tracks[t] == k][0])) for t, k in starts]
    assert keys == sorted(keys)
    for row in parents.itertuples():
        assert dict((k, t) for t, k in starts)[row.track] == row.frame
        assert not (tracks[row.frame :] == row.parent).any()
        assert (tracks[: row.frame] == row.parent).any()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_ids_given_do_not_matter(seed: int) -> None:
    movie = random_movie(seed, step=10.0)
    tracks, parents = link(movie)
    other, other_parents = link(shuffle(movie, seed, start=1000))
    assert same_partition(tracks, other)
    assert len(parents) == len(other_parents)


@pytest.mark.parametrize("scale", [0.6, 1, 2.5])
def test_follows_moving_objects_at_any_scale(scale: float) -> None:
    frames = [
        {k: (scale * (20 + 25 * k + 2 * t), scale * (15 + 12 * t + 5 * k), scale * 10) for k in (1, 2, 3)}
        for t in range(6)
    ]
    movie = draw(frames, (round(120 * scale), round(120 * scale)))
    assert same_partition(link(shuffle(movie, 3))[0], movie)


@pytest.mark.parametrize("max_drift", [0.5, 1.2])
def test_takes_out_the_common_drift(max_drift: float) -> None:
    """A crowded field that moves as one by more than half the spacing: without the drift links go astray."""
    rng = np.random.default_rng(5)
    shift = np.array([0.0, 12.0])
    corners = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) * 21.0 + 12
    corners += rng.uniform(-4, 4, corners.shape)
    frames = [{k + 1: (y, x, 8) for k, (y, x) in enumerate(corners + t * shift) if x < 230} for t in range(4)]
    movie = draw(frames, (180, 240))
    diameter = 17.0
    drift = estimate_drift(movie[0], movie[1], diameter, max_drift)
    tracks, _ = link(shuffle(movie, 0), TrackingConfig(max_drift=max_drift))
    if max_drift > 12 / diameter:
        np.testing.assert_allclose(drift, shift, atol=2)
        assert same_partition(tracks, movie)
    else:
        np.testing.assert_array_equal(drift, 0)
        assert not same_partition(tracks, movie)


def test_no_drift_is_seen_where_there_is_none() -> None:
    movie = random_movie(0)
    assert not estimate_drift(movie[0], movie[0], 15.0, 0.5).any()
    assert not estimate_drift(movie[0], np.zeros_like(movie[0]), 15.0, 0.5).any()
    assert not estimate_drift(movie[0], movie[1], 15.0, 0.0).any()


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_closes_gaps_up_to_the_longest(missing: int) -> None:
    frames = [{1: (30, 30 + 3 * t, 8), 2: (90, 60, 8)} for t in range(8)]
    for t in range(3, 3 + missing):
        del frames[t][1]
    movie = draw(frames)
    tracks, parents = link(shuffle(movie, 0), TrackingConfig(max_gap=2))
    assert len(parents) == 0
    assert same_partition(tracks, movie) == (missing <= 2)
    assert tracks.max() == (2 if missing <= 2 else 3)


def test_crossing_through_a_gap() -> None:
    """Two objects swap sides while one of them is hidden for a frame."""
    frames: list[dict[int, Spot]] = [
        {1: (60, 20 + 12 * t, 9), 2: (60 + (14 if t == 3 else 0), 92 - 12 * t, 6)} for t in range(7)
    ]
    frames[3].pop(2)
    tracks, _ = link(shuffle(draw(frames), 0))
    assert len(np.unique(tracks[0])) == len(np.unique(tracks[6])) == 3
    assert tracks.max() == 2


@pytest.mark.parametrize("distance", [7, 9, 13, 18])
def test_division_ends_the_mother(distance: float) -> None:
    """Close daughters share the mother's place; far ones leave it."""
    still = {9: (100.0, 100.0, 10.0)}
    frames: list[dict[int, Spot]] = [{1: (40, 50, 10), **still}] * 3
    frames += [{2: (40, 50 - distance, 7), 3: (40, 50 + distance, 7), **still}] * 3
    movie = draw(frames)
    tracks, parents = link(shuffle(movie, 2))
    assert same_partition(tracks, movie)
    assert parents.frame.tolist() == [3, 3]
    mother = tracks[0, 40, 50]
    assert parents.parent.tolist() == [mother, mother]
    assert set(parents.track) == set(np.unique(tracks[3][tracks[3] > 0])) - {tracks[0, 100, 100]}
    off, none = link(movie, TrackingConfig(divisions=False))
    assert len(none) == 0
    assert off.shape == movie.shape


def test_flicker_is_no_division() -> None:
    """A nucleus split in two for one frame only."""
    whole: dict[int, Spot] = {1: (50, 50, 10)}
    movie = draw([whole, whole, {1: (50, 44, 6), 2: (50, 57, 6)}, whole, whole])
    tracks, parents = link(movie)
    assert len(parents) == 0
    assert tracks[0, 50, 50] == tracks[4, 50, 50]


def test_newcomer_beside_a_cell_is_no_division() -> None:
    movie = draw([{1: (50, 50, 10)}] * 3 + [{1: (50, 50, 10), 2: (50, 75, 10)}] * 3)
    tracks, parents = link(movie)
    assert len(parents) == 0
    assert same_partition(tracks, movie)


def test_empty_and_single_frames() -> None:
    for shape in ((0, 5, 5), (3, 10, 10), (1, 0, 4)):
        tracks, parents = link(np.zeros(shape, np.uint16))
        assert tracks.shape == shape
        assert tracks.dtype == np.int32
        assert len(parents) == 0
    one = shuffle(random_movie(0, n_frames=1), 4)
    np.testing.assert_array_equal(link(one)[0], one)


@pytest.mark.parametrize(
    "labels", [np.zeros((5, 5), int), np.zeros((2, 5, 5)), np.full((2, 5, 5), -1), np.zeros((2, 5, 5), bool)]
)
def test_unusable_labels_are_refused(labels: Array) -> None:
    with pytest.raises(InputError, match=r"\(T, H, W\) integers"):
        link(labels)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_assignment_is_the_cheapest(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.random((n, m)) * 2
    one, other = np.nonzero(rng.random((n, m)) < 0.6)
    chosen = _assign(one, other, cost[one, other], 1.2)
    assert len(set(chosen[0])) == len(chosen[0]) == len(set(chosen[1])) == len(chosen[1])

    allowed = set(zip(one.tolist(), other.tolist(), strict=True))
    columns = [*range(m), *[-1] * n]
    cheapest = min(
        sum(cost[i, j] - 1.2 for i, j in enumerate(choice) if (i, j) in allowed and cost[i, j] < 1.2)
        for choice in set(permutations(columns, n))
    )
    assert sum(cost[i, j] - 1.2 for i, j in zip(*chosen, strict=True)) == pytest.approx(cheapest)


def test_real_tracks(real_data: Path) -> None:
    """The reference is automatic and was made without the drift (see the next test), as is our default here."""
    pages = cv2.imreadmulti(str(real_data / "nuclei_tracks" / "example_label.tif"), flags=cv2.IMREAD_UNCHANGED)[1]
    true = np.stack(pages).astype(np.int32)
    recall, precision = link_scores(link(shuffle(true, 0))[0], true)
    assert recall >= 0.80
    assert precision >= 0.80


def test_real_drift(real_data: Path) -> None:
    """The foregrounds of neighbouring frames fit best when moved by about 16 px, in each of the five pairs."""
    pages = cv2.imreadmulti(str(real_data / "nuclei_tracks" / "example_label.tif"), flags=cv2.IMREAD_UNCHANGED)[1]
    drifts = np.array([estimate_drift(a, b, 21.0, 1.5) for a, b in pairwise(pages)])
    np.testing.assert_allclose(drifts[:, 0], -16, atol=3)
    np.testing.assert_allclose(drifts[:, 1], 0, atol=8)


def test_real_migration_is_followed_through_its_divisions(real_data: Path) -> None:
    path = real_data / "cell_migration" / "cancer_cell_migration_voronoi_otsu_labeling_crop.tif"
    movie = np.stack(cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)[1]).astype(np.int32)
    tracks, parents = link(movie)
    lengths = np.array([(tracks == k).any((1, 2)).sum() for k in range(1, tracks.max() + 1)])
    assert 4 <= len(parents) // 2 <= 10
    assert tracks.max() <= 45
    assert np.median(lengths) >= 8
