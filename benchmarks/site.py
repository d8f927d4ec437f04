"""Where the time of a site goes: CPU seconds of each step from pixels to clips, on simulated movies.

Run: ``python benchmarks/site.py [HEIGHT]``. One process, one thread, medians over rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

import cv2
import numpy as np

from screening import clips, features, quality, segmentation, tracking
from screening.illumination import FlatField, calibrate, correct
from screening.simulation import CHANNELS, SimulationConfig, simulate_site
from storage_schemas.plate import create_well, list_wells, open_plate, open_site

ROUNDS = 5
T = TypeVar("T")


def main(side: int) -> None:
    """Print a row a step."""
    cv2.setNumThreads(1)
    config = SimulationConfig(height=side, width=side, cells_per_site=round(18 * (side / 384) ** 2))
    stack = simulate_site(config, "plate-1", "A01", 0).stack
    calibration = calibrate([stack], FlatField(min_sites=1))
    clips_config = clips.ClipsConfig(frames=8, size=64, window=clips.FixedWindow(size=64))
    seconds: dict[str, list[float]] = {}

    def step(name: str, function: Callable[[], T]) -> T:
        start = time.process_time()
        result = function()
        seconds.setdefault(name, []).append(time.process_time() - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        create_well(f"{folder}/p.zarr", "A01", {"0": stack}, CHANNELS)
        list_wells(f"{folder}/p.zarr", "p", ["A01"])
        (url,) = open_plate(f"{folder}/p.zarr").sites("A01").values()
        for _ in range(ROUNDS + 1):
            pixels = step("read", lambda: open_site(url).read())
            bad = step("quality", lambda p=pixels: quality.flag_frames(quality.measure(p), quality.QualityConfig()))
            flat = step("illumination", lambda p=pixels: correct(p, calibration))
            nuclei = step("nuclei", lambda f=flat: np.stack([segmentation.segment_nuclei(p) for p in f[:, 0]]))
            linked, _ = step("tracking", lambda n=nuclei: tracking.link(n))
            cells = step(
                "cells",
                lambda f=flat, n=linked: np.stack(
                    [segmentation.segment_cells(p, m) for p, m in zip(f[:, 1], n, strict=True)]
                ),
            )
            tracks = step("features", lambda f=flat, n=linked, c=cells: features.measure(n, c, f, CHANNELS))
            frames = clips.choose_frames(len(flat), clips_config)
            chosen = clips.select(tracks, frames, bad, (side, side), clips_config)
            kept = chosen.loc[chosen["excluded"] == clips.KEPT, "track"].to_numpy()
            step(
                "clips",
                lambda f=flat, c=cells, t=tracks, k=kept, fr=frames, b=bad: clips.cut(
                    f, c, t, k, fr, b, calibration.low, calibration.high, clips_config
                ),
            )
    # The first round compiles.
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    total = sum(medians.values())
    print(f"{'×'.join(map(str, stack.shape))} pixels, {len(tracks.present)} tracks, {len(kept)} clips")
    for name, median in {**medians, "total": total}.items():
        print(f"{name:<13} {1e3 * median:8.1f} ms CPU  {median / total:6.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 384)
