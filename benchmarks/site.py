"""A site's way from stored pixels to clips, ours beside the plain way: CPU time of each step and F1 against the truth.

Run: ``python benchmarks/site.py [SIDE] [ROUNDS]``. A simulated site of 16 × 3 × SIDE² pixels, one process, one
thread; both ways in turn, medians over the rounds. Both see the pixels as stored, for the plain way corrects
nothing: what correcting and judging them costs us stands below.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import plain
from threadpoolctl import threadpool_limits

from screening import clips, features, quality, segmentation, tracking
from screening.illumination import Calibration, FlatField, calibrate, correct
from screening.memory import keep_freed_memory
from screening.simulation import CHANNELS, SimulationConfig, simulate_site
from storage_schemas.clips import Clips
from storage_schemas.plate import create_well, list_wells, open_plate, open_site

CELLS_IN_2048 = 480
TRACKING = tracking.TrackingConfig()
CONFIG = clips.ClipsConfig(frames=16)
Labels = npt.NDArray[np.int32]
T = TypeVar("T")


class Stopwatch:
    """CPU seconds of steps, by name, all threads of the process included."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, step: str, function: Callable[..., T], *arguments: Any) -> T:
        start = time.process_time()
        result = function(*arguments)
        self.seconds[step].append(time.process_time() - start)
        return result


def cells_of(channel: npt.NDArray[Any], nuclei: Labels) -> Labels:
    return np.stack([segmentation.segment_cells(*planes) for planes in zip(channel, nuclei, strict=True)])


def our_clips(stack: npt.NDArray[Any], cells: Labels, tracks: features.Tracks, calibration: Calibration) -> Clips:
    frames = clips.choose_frames(len(stack), CONFIG)
    bad = np.zeros(len(stack), bool)
    chosen = clips.select(tracks, frames, bad, stack.shape[2:], CONFIG)
    kept = chosen.loc[chosen["excluded"] == clips.KEPT, "track"].to_numpy()
    ranges = clips.intensity_ranges(stack, cells, tracks, kept, frames, bad, calibration.low, calibration.high, CONFIG)
    return clips.cut(stack, cells, tracks, kept, frames, bad, ranges.low, ranges.high, CONFIG)


def our_way(url: str, calibration: Calibration, clock: Stopwatch) -> tuple[Labels, Labels, int]:
    stack = clock("read", lambda: open_site(url).read())
    nuclei = clock("nuclei", segmentation.segment_movie, stack[:, 0])
    nuclei, _ = clock("tracking", tracking.link, nuclei, TRACKING, stack[:, 0])
    cells = clock("cells", cells_of, stack[:, 1], nuclei)
    tracks = clock("measures", features.measure, nuclei, cells, stack, CHANNELS)
    return nuclei, cells, len(clock("clips", our_clips, stack, cells, tracks, calibration))


def plain_way(url: str, calibration: Calibration, clock: Stopwatch) -> tuple[Labels, Labels, int]:
    stack = clock("read", plain.read, url)
    nuclei = clock("nuclei", lambda: np.stack([plain.segment_nuclei(plane) for plane in stack[:, 0]]))
    nuclei = clock("tracking", plain.link, nuclei)
    cells = clock(
        "cells",
        lambda: np.stack([plain.segment_cells(plane, ids) for plane, ids in zip(stack[:, 1], nuclei, strict=True)]),
    )
    measures = clock("measures", lambda: (plain.measure(nuclei, stack), plain.measure(cells, stack)))[1]
    cut = clock("clips", plain.cut, stack, cells, measures, calibration.low, calibration.high, CONFIG.size)
    return nuclei, cells, len(cut)


def agreement(truth: Labels, found: Labels) -> tuple[float, float]:
    """F1 at IoU 0.5 over all frames, and the mean IoU of the matched objects."""
    hits: list[float] = []
    n_objects = 0
    for true, mine in zip(truth.astype(np.int64), found, strict=True):
        shape = int(true.max()) + 1, int(mine.max()) + 1
        shared = np.bincount((true * shape[1] + mine).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        one, other = shared.sum(axis=1), shared.sum(axis=0)
        iou = (shared / np.maximum(one[:, None] + other - shared, 1))[1:, 1:]
        hits.extend(iou[iou > 0.5])
        n_objects += np.count_nonzero(one[1:]) + np.count_nonzero(other[1:])
    return 2 * len(hits) / n_objects, float(np.mean(hits))


def main(side: int, rounds: int) -> None:
    """Print a row a step, and what either way found."""
    cv2.setNumThreads(1)
    keep_freed_memory()  # both ways gain by it
    config = SimulationConfig(
        frames=16, height=side, width=side, cells_per_site=round(CELLS_IN_2048 * (side / 2048) ** 2)
    )
    truth = simulate_site(config, "plate-1", "A01", 0)
    calibration = calibrate([truth.stack], FlatField(min_sites=1))
    ways = {"ours": our_way, "plain": plain_way}
    clocks = {name: Stopwatch() for name in ways}
    found: dict[str, tuple[Labels, Labels, int]] = {}
    beside = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        create_well(f"{folder}/p.zarr", "A01", {"0": truth.stack}, CHANNELS)
        list_wells(f"{folder}/p.zarr", "p", ["A01"])
        (url,) = open_plate(f"{folder}/p.zarr").sites("A01").values()
        our_way(url, calibration, Stopwatch())  # compiles
        for _ in range(rounds):
            for name, way in ways.items():
                found[name] = way(url, calibration, clocks[name])
            beside("quality", quality.measure, truth.stack)
            beside("illumination", correct, truth.stack, calibration)

    medians = {
        name: {step: statistics.median(seconds) for step, seconds in clock.seconds.items()}
        for name, clock in clocks.items()
    }
    for steps in medians.values():
        steps["total"] = sum(steps.values())
        # The plain way measures area, box and mean intensities, and ours every feature.
        steps["total but measures"] = steps["total"] - steps["measures"]
    print(f"{' × '.join(map(str, truth.stack.shape))} px, medians of {rounds} rounds, ms of CPU\n")
    print("| step | " + " | ".join(f"{name} | ratio" if name != "ours" else name for name in ways) + " |")
    print("|---|---" + "|---|---" * (len(ways) - 1) + "|")
    ours = medians.pop("ours")
    for step in ours:
        plain_ways = (f"{1e3 * of[step]:.0f} | {of[step] / ours[step]:.1f}" for of in medians.values())
        print(f"| {step} | {1e3 * ours[step]:.0f} | {' | '.join(plain_ways)} |")
    for step, rounds_of_step in beside.seconds.items():
        print(f"| {step} | {1e3 * statistics.median(rounds_of_step):.0f} |" + " – |" * 2 * len(medians))
    print()
    for name, (nuclei, cells, n_clips) in found.items():
        scores = [
            f"{f1:.3f} (IoU {iou:.2f})" for f1, iou in map(agreement, (truth.nuclei, truth.cells), (nuclei, cells))
        ]
        print(f"{name}: F1 of nuclei {scores[0]}, of cells {scores[1]}; {nuclei.max()} tracks, {n_clips} clips")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*arguments, *(1024, 5)[len(arguments) :])
