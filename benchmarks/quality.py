"""How quality and illumination are judged: what is found of known faults, how exactly, and at what cost.

Run: ``python benchmarks/quality.py [REAL_DATA]``. Simulated plates, and where the folder of real data is given, real
images blurred by known amounts. One process, one thread; costs are medians of CPU seconds over rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import tifffile

from screening import illumination, quality
from screening.illumination import FlatField
from screening.simulation import CHANNELS, SimulationConfig, design, simulate_site

ROUNDS = 5
SIGMAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main(real_data: Path | None) -> None:
    """Print the four tables."""
    cv2.setNumThreads(1)
    faults_of_a_plate()
    fields()
    if real_data is not None:
        blurs(real_data)
    costs()


def faults_of_a_plate() -> None:
    """Soft frames of a simulated plate of all mechanisms: which are flagged, and what else is."""
    config = SimulationConfig(replicates=1, compounds_per_moa=2, frames=12, out_of_focus_rate=0.03)
    plate_map, _ = design(config)
    sites = [simulate_site(config, plate, well, 0) for plate, well in zip(plate_map.plate, plate_map.well, strict=True)]
    measures = [quality.measure(site.stack) for site in sites]
    plate = quality.typical(pd.concat(measures))
    n_soft = found = wrong = 0
    focus: dict[bool, list[float]] = {True: [], False: []}
    for site, measured in zip(sites, measures, strict=True):
        judged = quality.flag(measured, plate, quality.QualityConfig())
        bad = set(judged.loc[judged["bad"], "frame"])
        soft = set(site.bad_frames)
        n_soft, found, wrong = n_soft + len(soft), found + len(bad & soft), wrong + len(bad - soft)
        ratio = (measured.pivot(index="frame", columns="channel", values="focus") / plate.focus).mean(axis=1)
        for frame, value in ratio.items():
            focus[frame in soft].append(value)
    print(f"simulated plate: {len(sites)} sites of {config.frames} frames, drugs of all mechanisms")
    print(f"  soft frames found {found} of {n_soft}, others flagged {wrong}")
    print(
        f"  focus, share of the plate's: soft frames up to {max(focus[True]):.2f}, others from {min(focus[False]):.2f}"
    )


def fields() -> None:
    """The error of the estimated flat field on a simulated plate, by number of sites."""
    config = SimulationConfig(frames=3, height=512, width=512, cells_per_site=32, replicates=1, compounds_per_moa=5)
    plate_map, _ = design(config)
    wells = list(zip(plate_map.plate, plate_map.well, strict=True))[:48]
    stacks = [simulate_site(config, plate, well, 0).stack for plate, well in wells]
    # A plate without cells, gain or noise shows its illumination alone, over an even background.
    bare = config.model_copy(update={"cells_per_site": 0, "debris_per_site": 0.0, "exposure": 1e6, "read_noise": 0.0})
    empty = simulate_site(bare, *wells[0], 0).stack[0].astype(np.float32)
    print("flat field of a simulated plate, relative error (root mean square and largest), and of no correction")
    for n_sites in (32, len(stacks)):
        found = illumination.calibrate(stacks[:n_sites], FlatField())
        assert found.flat_field is not None
        for name, plane, field in zip(CHANNELS, empty, found.flat_field, strict=True):
            truth = cv2.resize(plane, field.shape[::-1], interpolation=cv2.INTER_AREA)
            truth /= truth.mean()
            error, uncorrected = field / truth - 1, 1 / truth - 1
            rms, none = (float(np.sqrt(np.mean(values**2))) for values in (error, uncorrected))
            largest = np.abs(error).max(), np.abs(uncorrected).max()
            print(f"  {n_sites} sites  {name:<13} {rms:6.1%} {largest[0]:6.1%}   none {none:6.1%} {largest[1]:6.1%}")


def blurs(folder: Path) -> None:
    """Focus of real images after a Gaussian blur, as a share of what it was: median, and the range over images."""
    sets = {"nuclei_dsb2018": [cv2.imread(str(path), 0) for path in sorted((folder / "nuclei_dsb2018").rglob("*.png"))]}
    images = sorted((folder / "cellpainting_nf1").rglob("*_images/*.tif*"))
    for dye in ("DAPI", "GFP", "RFP"):
        sets[f"cellpainting {dye}"] = [tifffile.imread(path) for path in images if dye in path.name]
    movie = [tifffile.imread(path) for path in sorted((folder / "mitocheck_movie").rglob("*.tif*"))]
    sets["mitocheck_movie"] = [plane for plane in movie if plane.shape == (190, 211)]
    print("focus of blurred real images, share of the sharp image's; columns: sigma, px")
    print(f"{'':<30}" + "".join(f"{sigma:>18}" for sigma in SIGMAS))
    for name, planes in sets.items():
        shares = []
        for plane in planes:
            blurred = [cv2.GaussianBlur(plane.astype(np.float32), (0, 0), sigma) for sigma in SIGMAS]
            measured = [quality.measure(image[None, None])["focus"].item() for image in (plane, *blurred)]
            shares.append(np.array(measured[1:]) / measured[0])
        low, middle, high = np.min(shares, axis=0), np.median(shares, axis=0), np.max(shares, axis=0)
        cells = [f"{m:6.2f} ({a:.2f}-{b:.2f})" for a, m, b in zip(low, middle, high, strict=True)]
        print(f"{name:<22}{len(planes):>3} images" + "".join(f"{cell:>18}" for cell in cells))


def costs() -> None:
    """CPU seconds of one site."""
    config = SimulationConfig(frames=16, height=1024, width=1024, cells_per_site=128)
    stack = simulate_site(config, "plate-1", "A01", 0).stack
    calibration = illumination.calibrate([stack[:3]], FlatField(min_sites=1))
    measured = quality.measure(stack)
    steps: dict[str, Callable[[], object]] = {
        "measure": lambda: quality.measure(stack),
        "flag": lambda: quality.flag(measured, calibration.quality, quality.QualityConfig()),
        "correct": lambda: illumination.correct(stack, calibration),
    }
    print(f"CPU of a site of {'×'.join(map(str, stack.shape))}")
    for name, step in steps.items():
        seconds = []
        for _ in range(ROUNDS + 1):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
        print(f"  {name:<8} {1e3 * statistics.median(seconds[1:]):6.0f} ms")  # the first round compiles


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
