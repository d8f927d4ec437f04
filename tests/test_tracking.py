from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.tracking import TrackingConfig, _assign, link, track
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
            for k in np.unique(movie[t][movie[t] > 0]):
                here, there = identity[t][movie[t] == k], identity[t + 1][movie[t + 1] == k]
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
@given(st.integers(0, 10_000), st.sampled_from(["int32", "uint16", "int64", "uint8", ">u2"]))
def test_objects_are_conserved_and_ids_ordered(seed: int, dtype: str) -> None:
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
def test_ids_given_and_orientation_do_not_matter(seed: int) -> None:
    movie = random_movie(seed, step=10.0)
    tracks, parents = link(movie)
    np.testing.assert_array_equal(tracks, link(movie)[0])
    turns: list[tuple[Array, Array]] = [
        (shuffle(movie, seed, start=1000), tracks),
        (movie[:, ::-1], tracks[:, ::-1]),
        (movie[:, :, ::-1], tracks[:, :, ::-1]),
        (movie.transpose(0, 2, 1), tracks.transpose(0, 2, 1)),
    ]
    for turned, expected in turns:
        found, turned_parents = link(turned)
        assert same_partition(found, expected)
        assert len(parents) == len(turned_parents)


@pytest.mark.parametrize("scale", [0.6, 1, 2.5])
def test_follows_moving_objects_at_any_scale(scale: float) -> None:
    frames = [
        {k: (scale * (20 + 25 * k + 2 * t), scale * (15 + 12 * t + 5 * k), scale * 10) for k in (1, 2, 3)}
        for t in range(6)
    ]
    movie = draw(frames, (round(120 * scale), round(120 * scale)))
    assert same_partition(link(shuffle(movie, 3))[0], movie)


def crowd(shift: Array, n_frames: int = 4) -> Array:
    """A crowded field that moves as one, new cells coming in behind."""
    rng = np.random.default_rng(5)
    corners = np.stack(np.meshgrid(np.arange(-4, 14), np.arange(-4, 14)), -1).reshape(-1, 2) * 21.0 + 12
    corners += rng.uniform(-4, 4, corners.shape)
    return draw(
        [{k + 1: (y, x, 8) for k, (y, x) in enumerate(corners + t * shift)} for t in range(n_frames)], (200, 240)
    )


@pytest.mark.parametrize("max_drift", [0.5, 2.0])
def test_takes_out_the_common_drift(max_drift: float) -> None:
    """A drift of more than half the spacing: without taking it out links go astray."""
    shift = np.array([-5.0, 17.0])
    movie = crowd(shift)
    found = track(shuffle(movie, 0), TrackingConfig(max_drift=max_drift))
    if max_drift > 18 / 17:
        np.testing.assert_allclose(found.drift, [[0, 0], *[shift] * 3], atol=1)
        assert found.drift_removed.tolist() == [False, True, True, True]
        assert same_partition(found.labels, movie)
    else:
        assert not found.drift_removed.any()
        assert not same_partition(found.labels, movie)


def test_drift_over_lost_frames_and_no_drift() -> None:
    movie = crowd(np.array([10.0, 4.0]), 5)
    movie[[0, 2]] = 0
    found = track(shuffle(movie, 0))
    np.testing.assert_allclose(found.drift, [[0, 0], [0, 0], [0, 0], [20, 8], [10, 4]], atol=1)
    assert same_partition(found.labels, movie)
    still = track(random_movie(0))
    assert still.drift.shape == (5, 2)
    assert not still.drift.any()
    assert not still.drift_removed.any()


def test_the_motion_of_one_large_cell_is_no_drift() -> None:
    """It covers more pixels than all the others, which stay and would be lost with its motion taken out."""
    small: dict[int, Spot] = {k: (20 + 40 * k, 20, 10) for k in range(1, 5)}
    movie = draw([{**small, 9: (110, 90 + 24 * t, 30)} for t in range(4)], (220, 220))
    found = track(shuffle(movie, 0))
    assert found.drift[1:].any()
    assert not found.drift_removed.any()
    assert same_partition(found.labels, movie)


def test_no_drift_is_seen_where_there_is_none() -> None:
    movie = random_movie(0)
    for after, max_drift in ((movie[0], 0.5), (np.zeros_like(movie[0]), 0.5), (movie[1], 0.0)):
        found = track(np.stack([movie[0], after]), TrackingConfig(max_drift=max_drift))
        assert not found.drift.any()
        assert not found.drift_removed.any()


@pytest.mark.parametrize("seed", range(3))
def test_cells_that_keep_their_course_are_looked_for_ahead(seed: int) -> None:
    """Each cell goes its own straight way, further a frame than its neighbours are away."""
    rng = np.random.default_rng(seed)
    start, angle = rng.uniform(-60, 360, (90, 2)), rng.uniform(0, 2 * np.pi, 90)
    step = 14 * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    movie = draw([{k + 1: (y, x, 6) for k, (y, x) in enumerate(start + t * step)} for t in range(8)], (300, 300))
    ahead, behind = (link(shuffle(movie, 0), TrackingConfig(min_persistence=least))[0] for least in (0.3, 1.0))
    assert np.mean(link_scores(ahead, movie)) > np.mean(link_scores(behind, movie)) + 0.1


def test_wandering_cells_are_not_looked_for_ahead() -> None:
    movie = random_movie(1, n_frames=8, step=8.0)
    labels = [link(movie, TrackingConfig(min_persistence=least))[0] for least in (0.3, 1.0)]
    np.testing.assert_array_equal(*labels)


def test_intensity_tells_neighbours_apart() -> None:
    """Between two frames, a bright and a dim cell move to where either could have come from."""
    movie = draw([{1: (40, 40, 8), 2: (40, 64, 8)}] * 2 + [{1: (28, 52, 8), 2: (52, 52, 8)}] * 2)
    image = np.where(movie == 1, 900.0, np.where(movie == 2, 200.0, 100.0))
    swapped = movie.copy()
    swapped[2:] = np.choose(movie[2:], [0, 2, 1])
    for truth in (movie, swapped):
        brightness = np.where(truth == 1, 900.0, np.where(truth == 2, 200.0, 100.0))
        assert same_partition(link(movie, image=brightness)[0], truth)
        # Neither a gain that changes from frame to frame nor the camera's offset matters.
        brightness = brightness * np.array([1, 3, 2, 5])[:, None, None] + 500
        assert same_partition(link(movie, image=brightness)[0], truth)
    dark = link(movie, image=np.zeros_like(image))[0]
    np.testing.assert_array_equal(dark, link(movie)[0])


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


def test_splitting_of_a_shared_mask_is_no_division() -> None:
    """Two cells touch and share a mask for two frames."""
    apart: dict[int, Spot] = {1: (50, 38, 10), 2: (50, 62, 10), 3: (100, 50, 10)}
    frames = [apart] * 4 + [{1: (50, 41, 10), 2: (50, 59, 10), 3: (100, 50, 10)}] * 2 + [apart] * 3
    movie = draw(frames)
    for plane in movie[4:6]:
        plane[plane == 2] = 1
    tracks, parents = link(shuffle(movie, 0))
    assert len(parents) == 0
    assert tracks.max() == 3


@pytest.mark.parametrize(
    "labels", [np.zeros((5, 5), int), np.zeros((2, 5, 5)), np.full((2, 5, 5), -1), np.zeros((2, 5, 5), bool)]
)
def test_unusable_labels_are_refused(labels: Array) -> None:
    with pytest.raises(InputError, match=r"\(T, H, W\) integers"):
        link(labels)


@pytest.mark.parametrize("image", [np.zeros((2, 5, 4)), np.full((2, 5, 5), np.nan)])
def test_unusable_images_are_refused(image: Array) -> None:
    with pytest.raises(InputError, match="image must be finite and of the labels' shape"):
        link(np.ones((2, 5, 5), int), image=image)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_assignment_is_the_cheapest(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.random((n, m)) * 2
    one, other = np.nonzero(rng.random((n, m)) < 0.6)
    kept = _assign(one, other, cost[one, other], 1.2)
    chosen = one[kept], other[kept]
    assert len(set(chosen[0])) == len(chosen[0]) == len(set(chosen[1])) == len(chosen[1])

    allowed = set(zip(one.tolist(), other.tolist(), strict=True))
    columns = [*range(m), *[-1] * n]
    cheapest = min(
        sum(cost[i, j] - 1.2 for i, j in enumerate(choice) if (i, j) in allowed and cost[i, j] < 1.2)
        for choice in set(permutations(columns, n))
    )
    assert sum(cost[i, j] - 1.2 for i, j in zip(*chosen, strict=True)) == pytest.approx(cheapest)


def read_movie(path: Path) -> Array:
    return np.stack(cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)[1])


def test_real_tracks(real_data: Path) -> None:
    """Links against the reference of a confluent tissue, which is automatic and made without the drift."""
    true = read_movie(real_data / "nuclei_tracks" / "example_label.tif").astype(np.int32)
    image = read_movie(real_data / "nuclei_tracks" / "example_images.tif")
    for seen in (None, image):
        found = track(shuffle(true, 0), image=seen)
        recall, precision = link_scores(found.labels, true)
        assert recall >= 0.80
        assert precision >= 0.80
    # The foregrounds of neighbouring frames fit best when moved by about 16 px, in each of the five pairs.
    np.testing.assert_allclose(found.drift[1:, 0], -16, atol=3)
    np.testing.assert_allclose(found.drift[1:, 1], 0, atol=8)


def test_the_track_corrected_by_hand_moves_with_the_drift(real_data: Path) -> None:
    """A person's correction of one of these tracks, which the automatic reference has in three others."""
    true = read_movie(real_data / "nuclei_tracks" / "example_label.tif").astype(np.int32)
    by_hand = np.load(real_data / "nuclei_tracks" / "manual_corrected.npy")
    t, y, x = np.rint(by_hand).astype(int).T
    assert len(np.unique(true[t, y, x])) == 4
    tracks, _ = link(true, TrackingConfig(drift_match=0.3))
    assert len(np.unique(tracks[t, y, x])) <= 2


@pytest.mark.parametrize("diameters", [0.5, 1.0, 2.0])
def test_real_cells_survive_known_shifts(real_data: Path, diameters: float) -> None:
    """A real movie in a wider field, whose frames are put elsewhere: the drift is found and the links stay."""
    movie = read_movie(real_data / "cell_migration" / "cancer_cell_migration_voronoi_otsu_labeling_crop.tif")[:16]
    still = track(movie)
    assert not still.drift_removed.any()
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, len(movie))
    place = np.rint(21 * diameters * np.stack([np.sin(angle), np.cos(angle)], axis=1)).astype(int)
    place[::2] = 0
    step = np.diff(place, axis=0, prepend=place[:1])

    def moved(labels: Array) -> Array:
        wide = np.pad(labels, ((0, 0), (50, 50), (50, 50)))
        return np.stack([np.roll(plane, shift, (0, 1)) for plane, shift in zip(wide, place, strict=True)])

    found = track(moved(movie))
    assert found.drift_removed[1:].all()
    # The cells' own common motion is part of what is found.
    np.testing.assert_allclose(found.drift, step, atol=2.5)
    assert np.median(np.abs(found.drift - step)) < 1
    assert min(link_scores(found.labels, moved(still.labels))) >= 0.99


def test_real_migration_is_followed_through_its_divisions(real_data: Path) -> None:
    movie = read_movie(real_data / "cell_migration" / "cancer_cell_migration_voronoi_otsu_labeling_crop.tif")
    tracks, parents = link(movie)
    lengths = np.array([(tracks == k).any((1, 2)).sum() for k in range(1, tracks.max() + 1)])
    assert {7, 27} <= set(parents.frame)  # seen in the images; most others are masks that touched
    assert len(parents) // 2 <= 5
    assert tracks.max() <= 45
    assert np.median(lengths) >= 8
