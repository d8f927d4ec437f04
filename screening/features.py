"""Where each tracked cell is and what it looks like: positions, boxes, hand-made features.

One pass over labels and intensities gathers sums per object, and the features follow from the
sums; this stands in for the shape and intensity features that MitoReID compares itself with (IPP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]
Sums = npt.NDArray[np.float64]

OBJECTS = ("nucleus", "cell")
_SHAPES = ("area", "eccentricity")
_INTENSITIES = ("mean", "sd", "texture")

# Columns of the sums per object and frame ...
_AREA, _Y, _X, _YY, _YX, _XX = range(6)
# ... and per channel: finite pixels, their sum and squares, and pairs of neighbours with their
# squared differences.
_COUNT, _SUM, _SQUARES, _PAIRS, _DIFFERENCES = range(5)


@dataclass(frozen=True)
class Tracks:
    """The tracked cells of a site over its T frames, track ``i + 1`` at position ``i``.

    Attributes:
        present: (n, T) bool, whether the cell is seen.
        centroid: (n, T, 2) float32, (y, x) of the cell's centre of area, px; NaN where absent.
        box: (n, T, 4) int32, (y0, x0, y1, x1) of the cell, px, ends exclusive; -1 where absent.
        features: name to (n, T) float32; NaN where absent or undefined. Names are those of
            :func:`feature_names`.
    """

    present: npt.NDArray[np.bool_]
    centroid: npt.NDArray[np.float32]
    box: npt.NDArray[np.int32]
    features: dict[str, npt.NDArray[np.float32]]


def feature_names(channel_names: Sequence[str]) -> list[str]:
    """The names of the features that :func:`measure` gives, in order.

    ``{nucleus|cell}_area`` (px), ``_eccentricity`` (of the ellipse with the same second moments, 0
    round to 1 line) and per channel ``_mean_{channel}``, ``_sd_{channel}`` (image units) and
    ``_texture_{channel}``: Geary's contiguity ratio (Geary 1954) over pixels that share an edge,
    near 0 for a smooth object and 1 for one that is all grain.
    """
    return [
        name
        for kind in OBJECTS
        for name in (
            *(f"{kind}_{shape}" for shape in _SHAPES),
            *(f"{kind}_{measure}_{channel}" for channel in channel_names for measure in _INTENSITIES),
        )
    ]


def measure(nuclei: Labels, cells: Labels, stack: npt.NDArray[Any], channel_names: Sequence[str]) -> Tracks:
    """Measure every tracked cell in every frame.

    Args:
        nuclei: (T, H, W) int32, 0 background, the value of a pixel is its track (1..n).
        cells: (T, H, W) int32, the same tracks' whole cells.
        stack: (T, C, H, W), any real dtype; non-finite pixels count for area but not for
            intensity.
        channel_names: C names.

    Returns:
        The tracks 1..n, where n is the highest label; no tracks for movies without labels.
    """
    assert nuclei.shape == cells.shape == (stack.shape[0], *stack.shape[2:])
    assert len(channel_names) == stack.shape[1]
    n_tracks = int(max(nuclei.max(initial=0), cells.max(initial=0)))
    features: dict[str, npt.NDArray[np.float32]] = {}
    for kind, labels in zip(OBJECTS, (nuclei, cells), strict=True):
        shape, intensity, box = _gather(np.ascontiguousarray(labels, np.int32), stack, n_tracks)
        features |= _features(kind, shape, intensity, channel_names)
    # Boxes and sums of the last round are the cells'.
    area = shape[..., _AREA]
    with np.errstate(invalid="ignore"):
        centroid = shape[..., [_Y, _X]] / area[..., None]
    return Tracks(
        present=area.T > 0,
        centroid=centroid.transpose(1, 0, 2).astype(np.float32),
        box=np.ascontiguousarray(box.transpose(1, 0, 2)),
        features={name: features[name] for name in feature_names(channel_names)},
    )


def _features(
    kind: str, shape: Sums, intensity: Sums, channel_names: Sequence[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """Turn sums (T, n, 6) and (T, n, C, 5) into features (n, T)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        area = np.where(shape[..., _AREA] > 0, shape[..., _AREA], np.nan)
        y, x = shape[..., _Y] / area, shape[..., _X] / area
        yy, yx, xx = (
            shape[..., _YY] / area - y * y,
            shape[..., _YX] / area - y * x,
            shape[..., _XX] / area - x * x,
        )
        half_difference = np.sqrt((yy - xx) ** 2 / 4 + yx**2)
        major = (yy + xx) / 2 + half_difference
        # A single pixel has no axes; it is as round as can be.
        flatness = np.where(major > 0, 2 * half_difference / major, 0 * area)
        values = {f"{kind}_area": area, f"{kind}_eccentricity": np.sqrt(np.minimum(flatness, 1))}
        for channel, name in enumerate(channel_names):
            count, total, squares, pairs, differences = np.moveaxis(intensity[:, :, channel], -1, 0)
            mean = total / count
            variance = squares / count - mean * mean
            # Below this the difference of the two is rounding, and the object constant.
            variance = np.where(variance <= 1e-12 * mean * mean, 0, variance)
            values[f"{kind}_mean_{name}"] = mean
            values[f"{kind}_sd_{name}"] = np.sqrt(variance)
            values[f"{kind}_texture_{name}"] = np.where(variance > 0, differences / pairs / (2 * variance), np.nan)
    return {name: value.T.astype(np.float32) for name, value in values.items()}


def _gather(labels: Labels, stack: npt.NDArray[Any], n_tracks: int) -> tuple[Sums, Sums, npt.NDArray[np.int32]]:
    n_frames, n_channels = stack.shape[:2]
    shape = np.zeros((n_frames, n_tracks, 6))
    intensity = np.zeros((n_frames, n_tracks, n_channels, 5))
    box = np.full((n_frames, n_tracks, 4), -1, np.int32)
    for frame in range(n_frames):
        _add_shapes(labels[frame], shape[frame], box[frame])
        for channel in range(n_channels):
            plane = np.ascontiguousarray(stack[frame, channel], np.float32)
            _add_intensities(labels[frame], plane, intensity[frame, :, channel])
    return shape, intensity, box


# Both passes go by runs of one label in a row: sums stay in registers until a run ends, which spares
# adding to the object's sums at every pixel.


@numba.njit(cache=True, nogil=True)
def _add_shapes(labels: Labels, sums: Sums, box: npt.NDArray[np.int32]) -> None:
    height, width = labels.shape
    for y in range(height):
        x = 0
        while x < width:
            label = labels[y, x]
            start = x
            x += 1
            while x < width and labels[y, x] == label:
                x += 1
            if label == 0:
                continue
            track = label - 1
            length = x - start
            sum_x = length * (start + x - 1) / 2
            # The squares of n numbers about their mean add up to n (n^2 - 1) / 12.
            squares_x = length * (length * length - 1) / 12 + sum_x * sum_x / length
            total = sums[track]
            if total[_AREA] == 0:
                box[track] = (y, start, y + 1, x)
            box[track, 1] = min(box[track, 1], start)
            box[track, 2] = y + 1
            box[track, 3] = max(box[track, 3], x)
            total[_AREA] += length
            total[_Y] += length * y
            total[_X] += sum_x
            total[_YY] += length * y * y
            total[_YX] += y * sum_x
            total[_XX] += squares_x


@numba.njit(cache=True, nogil=True)
def _add_intensities(labels: Labels, plane: npt.NDArray[np.float32], sums: Sums) -> None:
    height, width = labels.shape
    for y in range(height):
        x = 0
        while x < width:
            label = labels[y, x]
            if label == 0:
                x += 1
                continue
            count, pairs = 0, 0
            total, squares, differences = 0.0, 0.0, 0.0
            left = np.nan
            while x < width and labels[y, x] == label:
                value = np.float64(plane[y, x])
                if np.isfinite(value):
                    count += 1
                    total += value
                    squares += value * value
                    if np.isfinite(left):
                        pairs += 1
                        differences += (value - left) ** 2
                    if y > 0 and labels[y - 1, x] == label and np.isfinite(plane[y - 1, x]):
                        pairs += 1
                        differences += (value - plane[y - 1, x]) ** 2
                left = value
                x += 1
            sums[label - 1, _COUNT] += count
            sums[label - 1, _SUM] += total
            sums[label - 1, _SQUARES] += squares
            sums[label - 1, _PAIRS] += pairs
            sums[label - 1, _DIFFERENCES] += differences
