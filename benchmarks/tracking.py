"""How well and how fast tracks are found, beside laptrack where it is installed.

Run: ``python benchmarks/tracking.py``. Real movies are read from ``SCREENING_TEST_DATA`` or ``../shared/data``; rows
without their data are left out. One process, one thread; CPU seconds, both methods in turn, medians over rounds.

A link joins two objects that follow each other in a track; recall is of the true links, precision of those found.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from screening.segmentation import segment_nuclei
from screening.simulation import SimulationConfig, simulate_site
from screening.tracking import TrackingConfig, track

try:
    from laptrack import LapTrack
except ImportError:
    LapTrack = None

ROUNDS = 3
Array = npt.NDArray[Any]
Object = tuple[int, int]  # frame, label
Link = tuple[Object, Object]
Division = tuple[Object, frozenset[Object]]
Follow = Callable[[Array, Array], tuple[Array, pd.DataFrame]]


@dataclass(frozen=True)
class Movie:
    """Labels to be linked, and what is true of them: ``truth`` has the true track of each object's pixels."""

    name: str
    labels: Array
    image: Array
    truth: Array
    parents: pd.DataFrame | None  # None where divisions are not known
    true_links: int | None = None  # where not all objects are there to be linked


def ours(labels: Array, image: Array) -> tuple[Array, pd.DataFrame]:
    """Our default."""
    found = track(labels, image=image)
    return found.labels, found.parents


def peers(labels: Array, image: Array) -> tuple[Array, pd.DataFrame]:
    """Laptrack on centroids, with gaps and divisions, and gates as wide as ours."""
    rows = [(t, *row) for t, plane in enumerate(labels) for row in _centroids(plane)]
    spots = pd.DataFrame(rows, columns=["frame", "label", "y", "x", "area"])
    gate = (1.3 * 2 * np.sqrt(spots["area"].median() / np.pi)) ** 2
    tracker = LapTrack(
        cutoff=gate, gap_closing_cutoff=gate, gap_closing_max_frame_count=3, splitting_cutoff=gate, merging_cutoff=False
    )
    tracks, splits, _ = tracker.predict_dataframe(
        spots, coordinate_cols=["y", "x"], frame_col="frame", only_coordinate_cols=False
    )
    out = np.zeros(labels.shape, np.int32)
    for t, plane in enumerate(labels):
        here = tracks[tracks["frame"] == t]
        table = np.zeros(plane.max() + 1, np.int32)
        table[here["label"]] = here["track_id"] + 1
        out[t] = table[plane]
    if len(splits) == 0:
        return out, pd.DataFrame({"track": [], "parent": []}, dtype=int)
    return out, pd.DataFrame({"track": splits["child_track_id"] + 1, "parent": splits["parent_track_id"] + 1})


def _centroids(plane: Array) -> Iterator[tuple[int, float, float, int]]:
    y, x = np.nonzero(plane)
    label, index, area = np.unique(plane[y, x], return_inverse=True, return_counts=True)
    yield from zip(label, np.bincount(index, y) / area, np.bincount(index, x) / area, area, strict=True)


def links(labels: Array, identity: Array, parents: pd.DataFrame | None) -> tuple[set[Link], set[Division]]:
    """Links and divisions of the objects ``labels`` when their tracks are ``identity``."""
    seen: dict[int, list[Object]] = {}
    for t, (plane, tracks) in enumerate(zip(labels, identity, strict=True)):
        inside = plane > 0
        codes, counts = np.unique(np.stack([plane[inside], tracks[inside]]), axis=1, return_counts=True)
        # The track that most of the object's pixels are of; 0 is no track.
        most: dict[int, int] = {}
        for position in np.argsort(counts):
            most[int(codes[0, position])] = int(codes[1, position])
        for label, number in sorted(most.items()):
            if number:
                seen.setdefault(number, []).append((t, label))
    joined = {pair for objects in seen.values() for pair in pairwise(objects)}
    families: dict[Object, set[Object]] = {}
    for row in () if parents is None else parents.itertuples():
        if row.track in seen and row.parent in seen:
            families.setdefault(seen[row.parent][-1], set()).add(seen[row.track][0])
    return joined, {(mother, frozenset(both)) for mother, both in families.items() if len(both) == 2}


def row(movie: Movie, follow: Follow, seconds: float) -> str:
    """Recall, precision and divisions of a method, as cells of a table."""
    found, parents = follow(movie.labels, movie.image)
    true_links, true_divisions = links(movie.labels, movie.truth, movie.parents)
    our_links, our_divisions = links(movie.labels, found, parents)
    both = len(true_links & our_links)
    recall, precision = both / (movie.true_links or len(true_links)), both / max(1, len(our_links))
    divisions = "–"
    if movie.parents is not None:
        divisions = f"{len(our_divisions)} / {len(true_divisions)} / {len(our_divisions & true_divisions)}"
    return f"{recall:.3f} | {precision:.3f} | {divisions} | {seconds:.2f}"


# --------------------------------------------------------------------------------------------------
# Movies
# --------------------------------------------------------------------------------------------------


def crowd(
    name: str,
    n: int,
    side: int,
    frames: int,
    diameter: float,
    wander: float,
    speed: float = 0.0,
    vanish: float = 0.0,
    shift: float = 0.0,
    lost: tuple[int, ...] = (),
) -> Movie:
    """Ellipses that wander (sd, px), go their own straight ways (``speed``, px a frame), vanish for one to three
    frames (share of objects a frame), on a stage that jumps (px a frame), with frames ``lost``.
    """
    rng = np.random.default_rng(0)
    margin = 0.3 * side
    total = int(n * ((side + 2 * margin) / side) ** 2)
    start = np.full((total, 2), np.inf)
    for k in range(total):
        while True:
            spot = rng.uniform(-margin, side + margin, 2)
            if np.hypot(*(start[:k] - spot).T).min(initial=np.inf) > 1.15 * diameter:
                break
        start[k] = spot
    angle = rng.uniform(0, 2 * np.pi, len(start))
    course = speed * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    turn = rng.uniform(0, 360, len(start))
    jump = shift * rng.normal(0, 1, (frames, 2)).cumsum(axis=0)
    steps = rng.normal(0, wander, (frames, len(start), 2)).cumsum(axis=0)
    axes = diameter / 2 * rng.uniform(0.8, 1.15, (len(start), 2))
    light = rng.lognormal(0, 0.35, len(start))
    hidden_until = np.zeros(len(start), int)
    labels, image = np.zeros((frames, side, side), np.int32), np.zeros((frames, side, side), np.float32)
    for t in range(frames):
        hides = (rng.random(len(start)) < vanish) & (hidden_until <= t)
        hidden_until[hides] = t + rng.integers(1, 4, hides.sum())
        for k in np.flatnonzero(hidden_until <= t) if t not in lost else ():
            y, x = np.rint(16 * (start[k] + t * course[k] + steps[t, k] + jump[t])).astype(int)
            size = np.rint(16 * axes[k] * rng.lognormal(0, 0.05, 2)).astype(int)
            for canvas, value in ((labels[t], k + 1), (image[t], light[k])):
                cv2.ellipse(canvas, (int(x), int(y)), size.tolist(), turn[k], 0, 360, float(value), -1, shift=4)
        image[t] += rng.normal(0.2, 0.05, (side, side))
    return Movie(name, labels, image, labels, None)


def simulated_movies() -> Iterator[Movie]:
    """The simulated screen, and what is hard about real movies, one at a time."""
    config = SimulationConfig(frames=16, height=768, width=768, cells_per_site=72, division_rate=0.03)
    for well in ("A01", "A02", "B01", "B02"):
        site = simulate_site(config, "plate-1", well, 0)
        yield Movie(f"simulated screen, {well}", site.nuclei, site.stack[:, 0], site.nuclei, site.parents)
    yield crowd("dense, small", 300, 400, 16, 14, 1.6)
    yield crowd("few, large, fast", 12, 1024, 60, 100, 15, speed=30)
    yield crowd("own straight ways", 50, 440, 24, 20, 1.5, speed=15)
    yield crowd("vanishing for 1–3 frames", 120, 400, 20, 18, 1.6, vanish=0.03)
    yield crowd("frames lost", 120, 400, 20, 18, 1.6, lost=(7, 15, 16))
    yield crowd("stage jumping, sd half a diameter", 120, 400, 20, 18, 1.6, shift=9)


def real_movies(folder: Path) -> Iterator[Movie]:
    """The confluent tissue, from its given masks and from ours: an object of ours is the one it overlaps by half."""
    given = _read(folder / "nuclei_tracks" / "example_label.tif").astype(np.int32)
    image = _read(folder / "nuclei_tracks" / "example_images.tif").astype(np.float32)
    yield Movie("nuclei_tracks, given masks", given, image, given, None)
    labels = np.stack([segment_nuclei(plane) for plane in image])
    truth = np.zeros_like(given)
    for t in range(len(given)):
        shared = np.zeros((labels[t].max() + 1, given[t].max() + 1), np.int64)
        np.add.at(shared, (labels[t], given[t]), 1)
        union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
        for ours_, theirs in zip(*np.nonzero(shared[1:, 1:] > 0.5 * union[1:, 1:]), strict=True):
            truth[t][labels[t] == ours_ + 1] = theirs + 1
    yield Movie("nuclei_tracks, our masks", labels, image, truth, None, len(links(given, given, None)[0]))


def _read(path: Path) -> Array:
    return np.stack(cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)[1])


def main() -> None:
    """Print the tables."""
    cv2.setNumThreads(1)
    folder = Path(os.environ.get("SCREENING_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    methods: dict[str, Follow] = {"ours": ours} if LapTrack is None else {"ours": ours, "laptrack": peers}
    print("| movie | objects | method | recall | precision | divisions found / true / both | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for movie in chain(real_movies(folder) if folder.is_dir() else (), simulated_movies()):
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(ROUNDS):
            for name, follow in methods.items():
                start = time.process_time()
                follow(movie.labels, movie.image)
                seconds[name].append(time.process_time() - start)
        n = sum(len(np.unique(plane)) - 1 for plane in movie.labels)
        for name, follow in methods.items():
            print(
                f"| {movie.name} | {n} | {name} | {row(movie, follow, statistics.median(seconds[name]))} |", flush=True
            )

    if folder.is_dir():
        movie = next(real_movies(folder))
        print("\n`nuclei_tracks`, drift from frame to frame (y, x in px), seen and taken out or not:")
        for match in (TrackingConfig().drift_match, 0.3):
            found = track(movie.labels, TrackingConfig(drift_match=match))
            moves = ", ".join(f"({y:.1f}, {x:.1f})" for y, x in found.drift[1:])
            true, joined = (links(movie.labels, tracks, None)[0] for tracks in (movie.truth, found.labels))
            agreed = len(true & joined)
            print(
                f"drift_match {match}: {moves}; taken out {found.drift_removed.sum()}; "
                f"recall {agreed / len(true):.3f}, precision {agreed / len(joined):.3f}"
            )

    big = crowd("500 objects, 100 frames, 1024²", 500, 1024, 100, 22, 2.0)
    for name, image in (("without intensities", None), ("with", big.image)):
        start = time.process_time()
        track(big.labels, image=image)
        print(f"{big.name}, {name}: {time.process_time() - start:.1f} s CPU")


if __name__ == "__main__":
    main()
