"""Where each tracked cell is and what it looks like: positions, boxes, hand-made features.

One pass over labels and intensities gathers sums per object, and the features follow from the
sums. They stand in for the shape and intensity features that MitoReID compares itself with (IPP)
and keep to CellProfiler's definitions where it has them; ``docs/cells.md`` gives every formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]
Sums = npt.NDArray[np.float64]
Features = dict[str, npt.NDArray[np.float32]]

OBJECTS = ("nucleus", "cell")
_SHAPES = (
    "area",
    "perimeter",
    "form_factor",
    "eccentricity",
    "major_axis",
    "minor_axis",
    "extent",
    "solidity",
)
_INTENSITIES = (
    "mean",
    "sd",
    "min",
    "max",
    "integrated",
    "edge",
    "texture",
    "coarse_texture",
    "radial",
    "mass_displacement",
)
_COARSE = 4  # px between the neighbours of the coarse texture

# Columns of the sums per object and frame ...
_AREA, _Y, _X, _YY, _YX, _XX, _PERIMETER, _EDGE_PIXELS, _HULL = range(N_SHAPE_SUMS := 9)
# ... and per channel: intensities, their squares, first moments and second moment about the image's origin,
# extremes, the sum over edge pixels, and of pairs of pixels near and far the number and squared differences.
_SUM, _SQUARES, _VY, _VX, _VRR, _MIN, _MAX, _EDGE, _NEAR, _NEAR_PAIRS, _FAR, _FAR_PAIRS = range(_N_LIGHT_SUMS := 12)


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
    features: Features


def feature_names(channel_names: Sequence[str]) -> list[str]:
    """The names of the features that :func:`measure` gives, in order.

    Of each object ``{nucleus|cell}_{measure}`` for its shape and ``{nucleus|cell}_{measure}_{channel}``
    for its intensities; then what lies between the two objects, and the nucleus' motion.
    """
    return [
        *(
            name
            for kind in OBJECTS
            for name in (
                *(f"{kind}_{shape}" for shape in _SHAPES),
                *(f"{kind}_{measure}_{channel}" for channel in channel_names for measure in _INTENSITIES),
            )
        ),
        "cell_nucleus_share",
        "cell_nucleus_offset",
        *(f"cell_nucleus_ratio_{channel}" for channel in channel_names),
        "nucleus_speed",
        "nucleus_displacement",
    ]


def measure(
    nuclei: Labels,
    cells: Labels,
    stack: npt.NDArray[Any],
    channel_names: Sequence[str],
    background: npt.NDArray[Any] | None = None,
) -> Tracks:
    """Measure every tracked cell in every frame.

    Args:
        nuclei: (T, H, W) int32, 0 background, the value of a pixel is its track (1..n).
        cells: (T, H, W) int32, the same tracks' whole cells.
        stack: (T, C, H, W), any real dtype; an object with a pixel that is not finite has no
            intensity features in that channel and frame.
        channel_names: C names.
        background: (C,) intensity of an empty place; all intensities are above it. None for 0.

    Returns:
        The tracks 1..n, where n is the highest label; no tracks for movies without labels.
    """
    n_frames, n_channels = stack.shape[:2]
    assert nuclei.shape == cells.shape == (n_frames, *stack.shape[2:])
    assert len(channel_names) == n_channels
    n_tracks = int(max(nuclei.max(initial=0), cells.max(initial=0)))
    shapes = {kind: np.zeros((n_frames, n_tracks, N_SHAPE_SUMS)) for kind in OBJECTS}
    boxes = {kind: np.full((n_frames, n_tracks, 4), -1, np.int32) for kind in OBJECTS}
    lights = {kind: np.zeros((n_channels, n_frames, n_tracks, _N_LIGHT_SUMS)) for kind in OBJECTS}
    for t in range(n_frames):
        planes = np.ascontiguousarray(stack[t], np.float32)
        for kind, labels in zip(OBJECTS, (nuclei[t], cells[t]), strict=True):
            found = add_shapes(np.ascontiguousarray(labels, np.int32), shapes[kind][t], boxes[kind][t])
            for plane, light in zip(planes, lights[kind], strict=True):
                _add_light(plane, *found, light[t])

    dark = np.zeros(n_channels) if background is None else np.asarray(background, np.float64)
    values: dict[str, Sums] = {}
    for kind in OBJECTS:
        found_shapes = shape_features(shapes[kind], boxes[kind])
        values |= {f"{kind}_{name}": value for name, value in found_shapes.items()}
        for channel, name in enumerate(channel_names):
            found_light = _light_features(shapes[kind], lights[kind][channel], dark[channel])
            values |= {f"{kind}_{measure}_{name}": value for measure, value in found_light.items()}
    nucleus, cell = (_centroids(shapes[kind]) for kind in OBJECTS)
    values["cell_nucleus_share"] = values["nucleus_area"] / values["cell_area"]
    values["cell_nucleus_offset"] = np.hypot(*np.moveaxis(nucleus - cell, -1, 0))
    for channel, name in enumerate(channel_names):
        values[f"cell_nucleus_ratio_{name}"] = _nucleus_ratio(
            shapes["nucleus"], shapes["cell"], lights["nucleus"][channel], lights["cell"][channel], dark[channel]
        )
    values["nucleus_speed"], values["nucleus_displacement"] = _motion(nucleus)
    return Tracks(
        present=shapes["cell"][..., _AREA].T > 0,
        centroid=cell.transpose(1, 0, 2).astype(np.float32),
        box=np.ascontiguousarray(boxes["cell"].transpose(1, 0, 2)),
        features={name: values[name].T.astype(np.float32) for name in feature_names(channel_names)},
    )


# --- from sums to features, all (T, n) -----------------------------------------------------------


def _present(shape: Sums) -> Sums:
    """Areas, NaN where an object is absent."""
    area = shape[..., _AREA]
    return np.where(area > 0, area, np.nan)


def _centroids(shape: Sums) -> Sums:
    """(T, n, 2), y and x."""
    return shape[..., [_Y, _X]] / _present(shape)[..., None]


def axes(shape: Sums, pixel: float = 0.0) -> tuple[Sums, Sums]:
    """Full axes, px, of the ellipses that have the objects' second moments, the longer first.

    Args:
        shape: (..., 9) sums of :func:`add_shapes`.
        pixel: variance of a pixel about its centre: 0 takes it for a point, 1/12 for a square, so
            that a line is as wide as its pixels.
    """
    area = _present(shape)
    y, x = shape[..., _Y] / area, shape[..., _X] / area
    yy = shape[..., _YY] / area - y * y + pixel
    yx = shape[..., _YX] / area - y * x
    xx = shape[..., _XX] / area - x * x + pixel
    middle, half_difference = (yy + xx) / 2, np.sqrt((yy - xx) ** 2 / 4 + yx**2)
    # Rounding may take the shorter axis of a line below nothing.
    return 4 * np.sqrt(middle + half_difference), 4 * np.sqrt(np.maximum(middle - half_difference, 0))


def shape_features(shape: Sums, box: npt.NDArray[np.int32]) -> dict[str, Sums]:
    """What the outlines (..., 9) and boxes (..., 4) of objects give."""
    area = _present(shape)
    major, minor = axes(shape)
    perimeter = np.where(shape[..., _AREA] > 0, shape[..., _PERIMETER], np.nan)
    sides = (box[..., 2:] - box[..., :2]).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "area": area,
            "perimeter": perimeter,
            # Objects of a few pixels have no perimeter.
            "form_factor": np.where(perimeter > 0, 4 * np.pi * area / perimeter**2, np.nan),
            # A single pixel has no axes; it is as round as can be.
            "eccentricity": np.where(major > 0, np.sqrt(1 - (minor / major) ** 2), 0 * area),
            "major_axis": major,
            "minor_axis": minor,
            "extent": area / (sides[..., 0] * sides[..., 1]),
            "solidity": area / shape[..., _HULL],
        }


def _light_features(shape: Sums, light: Sums, dark: float) -> dict[str, Sums]:
    area = _present(shape)
    total, squares, vy, vx, vrr, low, high, edge, near, near_pairs, far, far_pairs = np.moveaxis(light, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / area
        variance = squares / area - mean * mean
        # Below this the difference of the two is rounding, and the object constant.
        variance = np.where(variance <= 1e-12 * mean * mean, 0, variance)
        spread = np.where(variance > 0, 2 * variance, np.nan)
        integrated = total - dark * area
        # Moments of the light above the background, about the centre of area.
        weight = np.where(integrated > 0, integrated, np.nan)
        y, x = shape[..., _Y] / area, shape[..., _X] / area
        offset_y = (vy - dark * shape[..., _Y]) / weight - y
        offset_x = (vx - dark * shape[..., _X]) / weight - x
        of_area = (shape[..., _YY] + shape[..., _XX]) / area - y * y - x * x
        about_origin = (vrr - dark * (shape[..., _YY] + shape[..., _XX])) / weight
        of_light = about_origin - 2 * (y * offset_y + x * offset_x) - y * y - x * x
        features = {
            "mean": mean - dark,
            "sd": np.sqrt(variance),
            "min": low - dark,
            "max": high - dark,
            "integrated": integrated,
            "edge": edge / shape[..., _EDGE_PIXELS] - dark,
            "texture": near / near_pairs / spread,
            "coarse_texture": far / far_pairs / spread,
            "radial": np.where(of_area > 0, of_light / of_area, np.nan),
            "mass_displacement": np.hypot(offset_y, offset_x),
        }
    # A sum with a pixel that is not finite is not either, where extremes could overlook it.
    return {name: np.where(np.isfinite(mean), value, np.nan) for name, value in features.items()}


def _nucleus_ratio(nucleus: Sums, cell: Sums, nucleus_light: Sums, cell_light: Sums, dark: float) -> Sums:
    """Mean of the nucleus over the mean of the rest of its cell."""
    area, rest = nucleus[..., _AREA], cell[..., _AREA] - nucleus[..., _AREA]
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = nucleus_light[..., _SUM] / area - dark
        outer = (cell_light[..., _SUM] - nucleus_light[..., _SUM]) / rest - dark
        return np.where((area > 0) & (outer > 0) & np.isfinite(outer), inner / outer, np.nan)


def _motion(centroids: Sums) -> tuple[Sums, Sums]:
    """Speed since the frame in which an object was last seen (px a frame) and distance from its first place (px)."""
    speed = np.full(centroids.shape[:2], np.nan)
    displacement = np.full_like(speed, np.nan)
    first = np.full(centroids.shape[1:], np.nan)
    last, seen_at = first.copy(), np.zeros(len(first))
    for t, place in enumerate(centroids):
        here = ~np.isnan(place[:, 0])
        first = np.where(np.isnan(first), place, first)
        displacement[t] = np.hypot(*(place - first).T)
        speed[t] = np.hypot(*(place - last).T) / np.maximum(t - seen_at, 1)
        last, seen_at = np.where(here[:, None], place, last), np.where(here, t, seen_at)
    return speed, displacement


# --- from pixels to sums -------------------------------------------------------------------------

# Both passes go by runs of one label in a row: within a run there is nothing to look up, so that its sums stay in
# registers. The labels are looked at once, whatever the number of channels.


@numba.njit(cache=True, nogil=True)
def add_shapes(labels: Labels, sums: Sums, box: npt.NDArray[np.int32]) -> tuple[Labels, npt.NDArray[np.int64], Labels]:
    """Add up the shapes of the objects of a plane.

    Args:
        labels: (H, W) int32, 0 background, label i at position i - 1.
        sums: (n, 9), added to.
        box: (n, 4), -1 on entry, (y0, x0, y1, x1) on return, ends exclusive.

    Returns:
        runs, (R, 4) int32 of label, row, first and last column (exclusive), in reading order; where
        the runs of each row begin, (H + 1,); and the objects' pixels that touch something else
        across an edge, (E, 3) int32 of label, row, column.
    """
    height, width = labels.shape
    runs = np.empty((labels.size, 4), np.int32)
    rows = np.zeros(height + 1, np.int64)
    edges = np.empty((labels.size, 3), np.int32)
    on_edge = np.zeros((height, width), np.bool_)
    n_runs, n_edges = 0, 0
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
            runs[n_runs, 0], runs[n_runs, 1], runs[n_runs, 2], runs[n_runs, 3] = label, y, start, x
            n_runs += 1
            _add_run(sums[label - 1], box[label - 1], y, start, x)
            inner = 0 < y < height - 1
            for i in range(start, x):
                ends = i == start or i == x - 1
                if ends or not inner or labels[y - 1, i] != label or labels[y + 1, i] != label:
                    edges[n_edges, 0], edges[n_edges, 1], edges[n_edges, 2] = label, y, i
                    on_edge[y, i] = True
                    n_edges += 1
        rows[y + 1] = n_runs
    for e in range(n_edges):
        label, y, x = edges[e]
        sums[label - 1, _EDGE_PIXELS] += 1
        sums[label - 1, _PERIMETER] += _edge_length(labels, on_edge, label, y, x)
    for i in range(len(sums)):
        if sums[i, _AREA] > 0:
            sums[i, _HULL] = _hull_pixels(labels, i + 1, box[i])
    return runs[:n_runs], rows, edges[:n_edges]


@numba.njit(cache=True, nogil=True)
def _add_run(sums: Sums, box: npt.NDArray[np.int32], y: int, start: int, stop: int) -> None:
    length = stop - start
    sum_x = length * (start + stop - 1) / 2
    if sums[_AREA] == 0:
        box[0], box[1], box[3] = y, start, stop
    box[1] = min(box[1], start)
    box[2] = y + 1
    box[3] = max(box[3], stop)
    sums[_AREA] += length
    sums[_Y] += length * y
    sums[_X] += sum_x
    sums[_YY] += length * y * y
    sums[_YX] += y * sum_x
    # The squares of n numbers about their mean add up to n (n^2 - 1) / 12.
    sums[_XX] += length * (length * length - 1) / 12 + sum_x * sum_x / length


@numba.njit(cache=True, nogil=True)
def _edge_length(labels: Labels, on_edge: npt.NDArray[np.bool_], label: int, y: int, x: int) -> float:
    """What an edge pixel adds to the perimeter, by its neighbours on the edge (Benkrid & Crookes 2000)."""
    height, width = labels.shape
    straight, diagonal = 0, 0
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            ny, nx = y + dy, x + dx
            if (dy or dx) and 0 <= ny < height and 0 <= nx < width and on_edge[ny, nx] and labels[ny, nx] == label:
                if dy and dx:
                    diagonal += 1
                else:
                    straight += 1
    if (straight == 2 or straight == 3) and diagonal <= 2:
        return 1.0
    if (straight, diagonal) == (0, 2) or (straight, diagonal) == (1, 3):
        return math.sqrt(2)
    if straight == 1 and (diagonal == 1 or diagonal == 2):
        return (1 + math.sqrt(2)) / 2
    return 0.0


@numba.njit(cache=True, nogil=True)
def _hull_pixels(labels: Labels, label: int, box: npt.NDArray[np.int32]) -> float:
    """Pixels whose centres lie in the convex hull of an object's pixel centres.

    The outermost pixels of each row make the hull's two chains (Andrew 1979); Pick's theorem
    counts the lattice points in it from its area and the points on its outline.
    """
    y0, x0, y1, x1 = box
    left = np.empty((y1 - y0, 2), np.int64)
    right = np.empty((y1 - y0, 2), np.int64)
    n_left = n_right = 0
    for y in range(y0, y1):
        first = x0
        while first < x1 and labels[y, first] != label:
            first += 1
        if first == x1:
            continue  # an object of several pieces
        last = x1 - 1
        while labels[y, last] != label:
            last -= 1
        n_left = _extend(left, n_left, y, -first)
        n_right = _extend(right, n_right, y, last)
    doubled_area, outline = 0, right[0, 1] + left[0, 1] + right[n_right - 1, 1] + left[n_left - 1, 1]
    for chain, n in ((left, n_left), (right, n_right)):
        for i in range(1, n):
            dy, dx = chain[i, 0] - chain[i - 1, 0], chain[i, 1] - chain[i - 1, 1]
            doubled_area += dy * (chain[i, 1] + chain[i - 1, 1])
            outline += np.gcd(dy, dx)
    return float((doubled_area + outline) / 2 + 1)


@numba.njit(cache=True, nogil=True)
def _extend(chain: npt.NDArray[np.int64], n: int, y: int, x: int) -> int:
    """Add a point below to the n points of a chain that bulges to higher x; the new number of points."""
    while n >= 2:
        (y0, x0), (y1, x1) = chain[n - 2], chain[n - 1]
        if (x1 - x0) * (y - y0) > (x - x0) * (y1 - y0):
            break
        n -= 1
    chain[n, 0], chain[n, 1] = y, x
    return n + 1


# Sums may be added in any order, which lets the compiler use vector instructions.
@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _add_light(
    plane: npt.NDArray[np.float32], runs: Labels, rows: npt.NDArray[np.int64], edges: Labels, sums: Sums
) -> None:
    """Add up the intensities of the objects of a plane, (n, 12), from what :func:`add_shapes` found."""
    sums[:, _MIN], sums[:, _MAX] = np.inf, -np.inf
    columns = np.arange(plane.shape[1]).astype(np.float64)
    for r in range(len(runs)):
        label, y, start, stop = runs[r]
        run, column = plane[y, start:stop], columns[start:stop]
        total, squares, vx, vxx = 0.0, 0.0, 0.0, 0.0
        for i in range(len(run)):
            value, moment = np.float64(run[i]), run[i] * column[i]
            total += value
            squares += value * value
            vx += moment
            vxx += moment * column[i]
        low, high = run[0], run[0]
        for i in range(len(run)):
            low = min(low, run[i])
            high = max(high, run[i])
        of = sums[label - 1]
        of[_SUM] += total
        of[_SQUARES] += squares
        of[_VY] += total * y
        of[_VX] += vx
        of[_VRR] += total * y * y + vxx
        of[_MIN] = min(of[_MIN], low)
        of[_MAX] = max(of[_MAX], high)
    for e in range(len(edges)):
        label, y, x = edges[e]
        sums[label - 1, _EDGE] += plane[y, x]
    for dy, dx in ((0, 1), (1, 0)):
        _add_pairs(plane, runs, rows, dy, dx, sums[:, _NEAR:_FAR])
    for dy, dx in ((0, _COARSE), (_COARSE, 0)):
        _add_pairs(plane, runs, rows, dy, dx, sums[:, _FAR:])


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _add_pairs(
    plane: npt.NDArray[np.float32], runs: Labels, rows: npt.NDArray[np.int64], dy: int, dx: int, sums: Sums
) -> None:
    """Add the squared differences of pixels of one object that lie (dy, dx) apart, and their number, (n, 2)."""
    for y in range(dy, len(rows) - 1):
        i, j = rows[y], rows[y - dy]
        while i < rows[y + 1] and j < rows[y - dy + 1]:
            stop, other_stop = runs[i, 3], runs[j, 3] + dx
            if runs[i, 0] == runs[j, 0]:
                first, last = max(runs[i, 2], runs[j, 2] + dx), min(stop, other_stop)
                if last > first:
                    here, there = plane[y, first:last], plane[y - dy, first - dx : last - dx]
                    squares = 0.0
                    for k in range(len(here)):
                        difference = np.float64(here[k]) - there[k]
                        squares += difference * difference
                    sums[runs[i, 0] - 1, 0] += squares
                    sums[runs[i, 0] - 1, 1] += last - first
            if stop <= other_stop:
                i += 1
            else:
                j += 1
