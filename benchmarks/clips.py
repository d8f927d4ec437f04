"""What clips and hand-made features cost, beside the plain way of doing the same.

Run: ``python benchmarks/clips.py [HEIGHT] [CELLS]``. One process, one thread, interleaved runs, medians of CPU seconds.
The plain clips are a loop over cells and frames that slices, scales, masks, pads and stacks; the plain features a loop
over frames of ``regionprops_table`` with the scikit-image properties that have their like among ours.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
from skimage.measure import regionprops_table

from screening import clips, features, network

ROUNDS, FRAMES, CHANNELS, SIZE = 3, 16, ("a", "b", "c"), 128
LOW, HIGH = np.full(3, 200, np.float32), np.full(3, 3000, np.float32)


def movie(side: int, n_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stack (T, C, H, W) float32 of noise, and nuclei and cells, ellipses that drift."""
    rng = np.random.default_rng(0)
    tile = rng.poisson(800, (side, side)).astype(np.float32)
    stack = np.stack([np.stack([np.roll(tile, 31 * t + 7 * c) for c in range(3)]) for t in range(FRAMES)])
    columns = int(np.ceil(np.sqrt(n_cells)))
    places = np.stack(np.divmod(np.arange(n_cells), columns), axis=1) + 0.5
    nuclei, cells = np.zeros((2, FRAMES, side, side), np.int32)
    radius = 0.42 * side / columns
    for t in range(FRAMES):
        centres = places * side / columns + rng.normal(0, radius / 8, places.shape)
        for i, (y, x) in enumerate(centres, start=1):
            for labels, share in ((cells, 1.0), (nuclei, 0.4)):
                axes = (int(radius * share), int(0.8 * radius * share))
                cv2.ellipse(labels[t], (int(x), int(y)), axes, 20 * i, 0, 360, i, -1)
    return stack, nuclei, cells


def plain_clips(
    stack: np.ndarray, cells: np.ndarray, tracks: features.Tracks, ids: np.ndarray, mask: str
) -> np.ndarray:
    """Slice, scale, mask, pad and stack, cell by cell."""
    found = []
    for track in ids:
        frames = []
        for t in range(FRAMES):
            y0, x0, y1, x1 = tracks.box[track - 1, t]
            top, left = (y0 + y1) // 2 - SIZE // 2, (x0 + x1) // 2 - SIZE // 2
            bottom, right = top + SIZE, left + SIZE
            height, width = stack.shape[2:]
            here = np.s_[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
            window = stack[t, :, *here]
            beyond = ((0, 0), (max(-top, 0), max(bottom - height, 0)), (max(-left, 0), max(right - width, 0)))
            share = (window - LOW[:, None, None]) / (HIGH - LOW)[:, None, None]
            share = np.clip(share, 0, 1)
            if mask == "soft":
                share = share * cv2.blur((cells[t][here] == track).astype(np.float32), (11, 11))
            frames.append(np.pad(np.floor(255 * share + 0.5).astype(np.uint8), beyond))
        found.append(np.stack(frames, axis=1))
    return np.stack(found)


def plain_features(stack: np.ndarray, nuclei: np.ndarray, cells: np.ndarray) -> None:
    """What scikit-image measures of the same objects."""
    names = ("label", "area", "bbox", "centroid", "perimeter", "eccentricity", "axis_major_length")
    names += ("axis_minor_length", "extent", "solidity", "intensity_mean", "intensity_std", "intensity_min")
    names += ("intensity_max", "centroid_weighted")
    for t in range(FRAMES):
        for labels in (nuclei, cells):
            regionprops_table(labels[t], np.moveaxis(stack[t], 0, -1), properties=names)


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each way, its runs interleaved with the others'."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first compiles


def main(side: int, n_cells: int) -> None:
    """Print a row a way: CPU seconds a site, and how many times faster than the plain way."""
    cv2.setNumThreads(1)
    print(f"{FRAMES} × {len(CHANNELS)} × {side}² pixels, {n_cells} cells")
    stack, nuclei, cells = movie(side, n_cells)
    tracks = features.measure(nuclei, cells, stack, CHANNELS)
    ids, frames, bad = np.arange(1, n_cells + 1), np.arange(FRAMES), np.zeros(FRAMES, bool)
    window = clips.FixedWindow(size=SIZE)

    def cut(config: clips.ClipsConfig) -> np.ndarray:
        return clips.cut(stack, cells, tracks, ids, frames, bad, LOW, HIGH, config)

    assert np.array_equal(
        cut(clips.ClipsConfig(window=window, size=SIZE, mask="none")), plain_clips(stack, cells, tracks, ids, "none")
    )
    for mask in ("none", "soft"):
        ways: dict[str, Callable[[], object]] = {"plain": lambda m=mask: plain_clips(stack, cells, tracks, ids, m)}
        for dtype in ("uint8", "uint16", "float16"):
            config = clips.ClipsConfig(window=window, size=SIZE, mask=mask, dtype=dtype)
            ways[dtype] = lambda config=config: cut(config)
        _print(f"clips of {SIZE}², mask {mask}", medians(ways, ROUNDS))
    ways = {
        "plain, 14 properties": lambda: plain_features(stack, nuclei, cells),
        f"ours, {len(tracks.features)} features": lambda: features.measure(nuclei, cells, stack, CHANNELS),
        f"mitochondrial network, {len(network.NAMES)} features": lambda: network.measure(
            cells, stack[:, 1], n_cells, network.NetworkConfig()
        ),
    }
    _print("features", medians(ways, 1))


def _print(title: str, seconds: dict[str, float]) -> None:
    print(title)
    plain = next(iter(seconds.values()))
    for name, median in seconds.items():
        print(f"  {name:<36} {median:8.3f} s CPU a site  {plain / median:6.1f} ×")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3] or ("1024", "120")))
