"""The mitochondrial network of each cell: how much of it there is, in how many pieces, how branched.

What local contrast tells from the cytoplasm is a mitochondrion; its skeleton gives branches. The
measures are those of MiNA (Valente et al. 2017, Acta Histochem. 119, 315) on a skeleton as
AnalyzeSkeleton's (Arganda-Carreras et al. 2010, Microsc. Res. Tech. 73, 1019), and the form factor and
aspect ratio of Koopman et al. (2005, Am. J. Physiol. Cell Physiol. 289, C881). ``docs/cells.md``
gives every formula.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numba
import numpy as np
import numpy.typing as npt
from pydantic import Field
from skimage.morphology import skeletonize

from screening.features import N_SHAPE_SUMS, Features, Labels, Sums, add_shapes, axes, shape_features
from storage_schemas.base import Config

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]

NAMES = (
    "network_fragments",
    "network_area",
    "network_share",
    "network_length",
    "network_branches",
    "network_branch_length",
    "network_branch_points",
    "network_end_points",
    "network_form_factor",
    "network_aspect_ratio",
)

_BINS = 128  # of the histogram that a cell's threshold is found in

# Columns of the counts per cell.
_FRAGMENTS, _PIXELS, _LENGTH, _BRANCHES, _JUNCTIONS, _ENDS, _FORM, _ASPECT = range(N_COUNTS := 8)


class NetworkConfig(Config):
    """How mitochondria are told from the cytoplasm around them."""

    width: float = Field(3.0, gt=0, description="width of a mitochondrion as the image shows it, px")
    noise: float = Field(
        4.0, ge=0, description="contrast below which nothing is a mitochondrion, sd of the contrast of empty places"
    )


def measure(cells: Labels, planes: npt.NDArray[Any], n_tracks: int, config: NetworkConfig) -> Features:
    """Measure the network of every tracked cell in every frame.

    Args:
        cells: (T, H, W) int32, 0 background, the value of a pixel is its track (1..n).
        planes: (T, H, W) of the mitochondrial channel, any real dtype; a frame with a pixel that is
            not finite has no network features.
        n_tracks: n.
        config: how mitochondria are found.

    Returns:
        Name to (n, T) float32, names as in :data:`NAMES`; NaN where the cell is absent or, for means
        over branches and fragments, has none.
    """
    values = np.empty((len(NAMES), len(cells), n_tracks), np.float32)
    for t, (labels, plane) in enumerate(zip(cells, planes, strict=True)):
        if not np.isfinite(plane).all():
            values[:, t] = np.nan
            continue
        labels = np.ascontiguousarray(labels, np.int32)
        mask = mitochondria(labels, np.ascontiguousarray(plane, np.float32), n_tracks, config)
        # Half a disc of a mitochondrion's width: what is smaller is noise.
        values[:, t] = analyse(labels, mask, n_tracks, smallest=math.pi * config.width**2 / 8)
    return dict(zip(NAMES, values.transpose(0, 2, 1), strict=True))


def mitochondria(labels: Labels, plane: Plane, n_tracks: int, config: NetworkConfig) -> Mask:
    """Which pixels of a plane are mitochondria: (H, W) bool.

    A difference of Gaussians, which a ridge of ``width`` answers to and the cytoplasm's slow changes
    do not, is cut at Otsu's threshold in each cell, so that neither a cell's staining nor its
    membrane potential counts, but never within the noise of the plane. Where cells touch, a line of
    pixels between them is left out, for their networks would run together.
    """
    fine = cv2.GaussianBlur(plane, (0, 0), config.width / 4)
    contrast = np.asarray(fine - cv2.GaussianBlur(plane, (0, 0), config.width), np.float32)
    # The median ignores what few pixels stand out; 1.4826 makes it the sd of a normal distribution.
    sample = np.abs(contrast[::4, ::4])
    floor = config.noise * 1.4826 * float(np.median(sample))
    return _above(labels, contrast, _thresholds(labels, contrast, n_tracks, np.float32(floor)))


def analyse(labels: Labels, mask: Mask, n_tracks: int, smallest: float = 1.0) -> Sums:
    """Measures of a plane's networks, (10, n) as in :data:`NAMES`.

    Args:
        labels: (H, W) int32 of cells, 1..n.
        mask: (H, W) bool, mitochondria, of which no two that touch lie in different cells.
        n_tracks: n.
        smallest: pixels of a fragment; what has fewer does not count.
    """
    area = np.bincount(labels.ravel(), minlength=n_tracks + 1)[1:].astype(np.float64)
    counts = np.zeros((n_tracks, N_COUNTS))
    n_pieces, found = cv2.connectedComponents(mask.view(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    pieces = np.asarray(found, np.int32)
    shape, box = np.zeros((n_pieces - 1, N_SHAPE_SUMS)), np.full((n_pieces - 1, 4), -1, np.int32)
    runs, _, _ = add_shapes(pieces, shape, box)
    # The cell of a fragment is that of any of its pixels.
    cell = np.zeros(n_pieces, np.int64)
    cell[runs[:, 0]] = labels[runs[:, 1], runs[:, 2]]
    outline = shape_features(shape, box)
    kept = (cell[1:] > 0) & (outline["area"] >= smallest)
    major, minor = axes(shape, pixel=1 / 12)
    # Koopman's form factor is the inverse of CellProfiler's; that of fragments too small for a perimeter is 1.
    form = np.maximum(1 / np.nan_to_num(outline["form_factor"], nan=1.0), 1)
    for column, value in (
        (_FRAGMENTS, np.ones(len(kept))),
        (_PIXELS, outline["area"]),
        (_FORM, form),
        (_ASPECT, major / minor),
    ):
        counts[:, column] = np.bincount(cell[1:][kept] - 1, value[kept], n_tracks)
    skeleton = skeletonize(np.append(False, kept)[pieces])  # type: ignore[no-untyped-call]
    _add_skeleton(labels, skeleton, counts)

    counts[area == 0] = np.nan
    fragments, pixels, length, branches, junctions, ends, form, aspect = counts.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack(
            [
                fragments,
                pixels,
                pixels / area,
                length,
                branches,
                length / branches,
                junctions,
                ends,
                form / fragments,
                aspect / fragments,
            ]
        )


@numba.njit(cache=True, nogil=True)
def _thresholds(labels: Labels, contrast: Plane, n_tracks: int, floor: np.float32) -> Plane:
    """(n + 1,) Otsu's threshold (1979) of the contrast in each cell, the floor if that is higher."""
    low = np.full(n_tracks + 1, np.inf, np.float32)
    high = np.full(n_tracks + 1, -np.inf, np.float32)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label = labels[y, x]
            if label:
                low[label] = min(low[label], contrast[y, x])
                high[label] = max(high[label], contrast[y, x])
    histogram = np.zeros((n_tracks + 1, _BINS), np.int64)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label = labels[y, x]
            if label and high[label] > low[label]:
                share = (contrast[y, x] - low[label]) / (high[label] - low[label])
                histogram[label, min(int(share * _BINS), _BINS - 1)] += 1
    thresholds = np.full(n_tracks + 1, floor, np.float32)
    for label in range(1, n_tracks + 1):
        counts = histogram[label]
        number, moment = 0, 0.0
        for i in range(_BINS):
            number += counts[i]
            moment += counts[i] * i
        best, below, moment_below = 0.0, 0, 0.0
        for i in range(_BINS - 1):
            below += counts[i]
            moment_below += counts[i] * i
            if below == 0 or below == number:
                continue
            difference = moment_below / below - (moment - moment_below) / (number - below)
            between = below * (number - below) * difference * difference
            if between > best:
                best = between
                found = low[label] + (high[label] - low[label]) * np.float32((i + 1) / _BINS)
                thresholds[label] = max(floor, found)
    return thresholds


@numba.njit(cache=True, nogil=True)
def _above(labels: Labels, contrast: Plane, thresholds: Plane) -> Mask:
    """Pixels above their cell's threshold, without those that touch another cell's from above or the left."""
    height, width = labels.shape
    mask = np.zeros((height, width), np.bool_)
    for y in range(height):
        for x in range(width):
            label = labels[y, x]
            if label == 0 or contrast[y, x] <= thresholds[label]:
                continue
            alone = x == 0 or labels[y, x - 1] == label or labels[y, x - 1] == 0
            if y > 0:
                for i in range(max(x - 1, 0), min(x + 2, width)):
                    alone = alone and (labels[y - 1, i] == label or labels[y - 1, i] == 0)
            mask[y, x] = alone
    return mask


@numba.njit(cache=True, nogil=True)
def _links(skeleton: Mask, y: int, x: int) -> tuple[int, float]:
    """Number and length of the links from a skeleton's pixel to its neighbours.

    Diagonal neighbours are linked only if no pixel joins them by two straight links: corners would
    count as triangles.
    """
    height, width = skeleton.shape
    number, length = 0, 0.0
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            ny, nx = y + dy, x + dx
            if (dy == 0 and dx == 0) or not (0 <= ny < height and 0 <= nx < width) or not skeleton[ny, nx]:
                continue
            if dy == 0 or dx == 0:
                number += 1
                length += 1.0
            elif not skeleton[y, nx] and not skeleton[ny, x]:
                number += 1
                length += math.sqrt(2)
    return number, length


@numba.njit(cache=True, nogil=True)
def _add_skeleton(labels: Labels, skeleton: Mask, counts: Sums) -> None:
    """Add length, ends, junctions and branches of the skeletons to their cells' counts (n, 8).

    Junctions are pixels with more than two links, neighbouring ones taken together; branches are
    what is left in one piece without them.
    """
    height, width = skeleton.shape
    kind = np.zeros((height, width), np.uint8)  # 1 of a branch, 2 of a junction
    for y in range(height):
        for x in range(width):
            if skeleton[y, x] and labels[y, x]:
                number, length = _links(skeleton, y, x)
                kind[y, x] = 2 if number > 2 else 1
                cell = counts[labels[y, x] - 1]
                cell[_LENGTH] += length / 2  # each link has two ends
                cell[_ENDS] += number == 1
    stack = np.empty((kind.size, 2), np.int32)
    for y in range(height):
        for x in range(width):
            own = kind[y, x]
            if own == 0:
                continue
            counts[labels[y, x] - 1, _JUNCTIONS if own == 2 else _BRANCHES] += 1
            kind[y, x] = 0
            stack[0, 0], stack[0, 1] = y, x
            top = 1
            while top:
                top -= 1
                at_y, at_x = stack[top, 0], stack[top, 1]
                for ny in range(max(at_y - 1, 0), min(at_y + 2, height)):
                    for nx in range(max(at_x - 1, 0), min(at_x + 2, width)):
                        across = ny != at_y and nx != at_x and (skeleton[at_y, nx] or skeleton[ny, at_x])
                        if kind[ny, nx] == own and not (across and own == 1):
                            kind[ny, nx] = 0
                            stack[top, 0], stack[top, 1] = ny, nx
                            top += 1
