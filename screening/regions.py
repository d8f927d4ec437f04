"""Compiled operations on label images: watershed, connected regions, sums over labels and along their borders.

A label image is (H, W) int32, 0 for background. Regions are held as runs, the stretches of equal pixels of each row:
there are far fewer runs than pixels, so what is decided about regions is plain numpy on short arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.uint16]
Plane = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Regions(NamedTuple):
    """The 4-connected regions of equal value of an image, background included, in reading order of their first pixels.

    Attributes:
        row_first: (H + 1,) position of the first run of each row; the last entry is the number of runs.
        start: (runs,) first column of each run.
        stop: (runs,) column after its last.
        region: (runs,) number of the region it belongs to, from 0 on.
    """

    row_first: npt.NDArray[np.int64]
    start: npt.NDArray[np.int32]
    stop: npt.NDArray[np.int32]
    region: npt.NDArray[np.int32]

    def areas(self) -> npt.NDArray[np.int64]:
        """(regions,) areas, px."""
        return np.bincount(self.region, self.stop - self.start).astype(np.int64)

    def values(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(regions,) value of an image at a pixel of each region."""
        row = np.repeat(np.arange(len(self.row_first) - 1), np.diff(self.row_first))
        values = np.empty(int(self.region.max()) + 1, image.dtype)
        values[self.region] = image[row, self.start]
        return values

    def on_border(self) -> Flags:
        """(regions,) whether a region touches the border of the image."""
        touches = (self.start == 0) | (self.stop == self.stop[-1])
        touches[: self.row_first[1]] = True
        touches[self.row_first[-2] :] = True
        on_border = np.zeros(int(self.region.max()) + 1, np.bool_)
        on_border[self.region[touches]] = True
        return on_border

    def paint(self, image: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write the regions' ``values`` (regions,) into an image in place; where a value is 0 nothing is written."""
        _paint(image, self.row_first, self.start, self.stop, values[self.region])


def find_regions(image: npt.NDArray[Any]) -> Regions:
    """The regions of an (H, W) integer image of at least one pixel."""
    return Regions(*_find_regions(image))


@numba.njit(cache=True, nogil=True)
def watershed(levels: Levels, markers: Labels, mask: Mask) -> Labels:
    """Flood the mask from the markers over the edges of pixels, low levels first, within a level first come first.

    Levels are whole numbers, so a bucket a level takes the place of a heap (F. Meyer 1994). The labels are those of
    ``skimage.segmentation.watershed`` pixel by pixel, as long as no two markers' pixels share a level: only then it
    leaves open which comes first.

    Args:
        levels: (H, W) uint16 landscape.
        markers: (H, W) int32 labels to start from.
        mask: (H, W) uint8, nonzero where labels may go.

    Returns:
        (H, W) int32 labels; 0 outside the mask and where no marker reaches.
    """
    height, width = markers.shape
    size = height * width
    labels = np.zeros((height, width), np.int32)
    label, level, inside, marker = labels.ravel(), levels.ravel(), mask.ravel(), markers.ravel()
    n_levels = int(level.max()) + 1
    # The pixels of a bucket are a chain. A pixel is in one bucket only, so one array holds the links of all.
    first = np.full(n_levels, -1, np.int32)
    last = np.full(n_levels, -1, np.int32)
    following = np.empty(size, np.int32)
    for p in range(size):
        if marker[p] != 0 and inside[p] != 0:
            label[p] = marker[p]
            _append(p, int(level[p]), first, last, following)
    for now in range(n_levels):
        p = first[now]
        while p >= 0:
            x = p % width
            for q, exists in (
                (p - width, p >= width),
                (p - 1, x > 0),
                (p + 1, x < width - 1),
                (p + width, p < size - width),
            ):
                if exists and inside[q] != 0 and label[q] == 0:
                    label[q] = label[p]
                    _append(q, max(int(level[q]), now), first, last, following)
            p = following[p]
    return labels


@numba.njit(cache=True, nogil=True)
def _append(p: int, level: int, first: Labels, last: Labels, following: Labels) -> None:
    following[p] = -1
    if first[level] < 0:
        first[level] = p
    else:
        following[last[level]] = p
    last[level] = p


@numba.njit(cache=True, nogil=True)
def steps(landscape: Plane, mask: Mask) -> Levels:
    """A landscape in 4,096 steps from its lowest point in the mask to its highest, for :func:`watershed`.

    Args:
        landscape: (H, W) float32.
        mask: (H, W) uint8.

    Returns:
        (H, W) uint16; 0 outside the mask.
    """
    height, width = landscape.shape
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for y in range(height):
        for x in range(width):
            if mask[y, x] != 0:
                low, high = min(low, landscape[y, x]), max(high, landscape[y, x])
    scale = np.float32(4095) / (high - low) if high > low else np.float32(0)
    levels = np.zeros((height, width), np.uint16)
    for y in range(height):
        for x in range(width):
            if mask[y, x] != 0:
                levels[y, x] = np.uint16((landscape[y, x] - low) * scale)
    return levels


@numba.njit(cache=True, nogil=True)
def hills(inner: Plane, contrast: Plane, around: Plane, mask: Mask) -> Plane:
    """Distance to the outside x root of the brightness against what is around, and 0 outside the mask.

    Args:
        inner: (H, W) float32 distance.
        contrast: (H, W) float32 brightness.
        around: (H, W) float32 mean brightness of the surroundings.
        mask: (H, W) uint8.

    Returns:
        (H, W) float32.
    """
    height = np.zeros_like(inner)
    for y in range(inner.shape[0]):
        for x in range(inner.shape[1]):
            if mask[y, x] != 0:
                height[y, x] = inner[y, x] * np.sqrt(contrast[y, x] / max(around[y, x], np.float32(1e-6)))
    return height


@numba.njit(cache=True, nogil=True)
def label_sums(labels: Labels, inner: Plane, contrast: Plane) -> tuple[Sums, Sums, Sums, Sums]:
    """What is known of each label, at the position of its value: (n + 1,) float64 each, 0 for the background.

    Args:
        labels: (H, W) int32.
        inner: (H, W) float32 distance to the outside.
        contrast: (H, W) float32 brightness over the background.

    Returns:
        area in px, greatest distance, sum of brightness, sum of its square.
    """
    n = labels.max() + 1
    area, peak, light, square = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            k = labels[y, x]
            if k != 0:
                value = float(contrast[y, x])
                area[k] += 1
                peak[k] = max(peak[k], inner[y, x])
                light[k] += value
                square[k] += value * value
    return area, peak, light, square


@numba.njit(cache=True, nogil=True)
def cut(labels: Labels, contrast: Plane, label: Labels, level: Plane) -> Labels:
    """Rename labels and cut each at a level of its own.

    Args:
        labels: (H, W) int32.
        contrast: (H, W) float32.
        label: (n + 1,) int32, what each label is called from now on.
        level: (n + 1,) float32, what its pixels must exceed.

    Returns:
        (H, W) int32; 0 where a pixel does not.
    """
    out = np.empty_like(labels)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            k = labels[y, x]
            out[y, x] = label[k] if k != 0 and contrast[y, x] > level[k] else 0
    return out


@numba.njit(cache=True, nogil=True)
def contacts(labels: Labels, inner: Plane, contrast: Plane) -> tuple[Labels, Labels, Plane, Plane]:
    """The pixel edges at which two labels meet; arguments as those of :func:`label_sums`.

    Returns:
        (edges,) each: the lesser label, the greater, the lesser of the two pixels' distances, and the lesser of their
        brightnesses.
    """
    height, width = labels.shape
    limit = 2 * np.count_nonzero(labels)
    lesser, greater = np.empty(limit, np.int32), np.empty(limit, np.int32)
    thickness, brightness = np.empty(limit, np.float32), np.empty(limit, np.float32)
    n = 0
    for y in range(height):
        for x in range(width):
            one = labels[y, x]
            if one == 0:
                continue
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < height and u < width and labels[v, u] != 0 and labels[v, u] != one:
                    lesser[n], greater[n] = min(one, labels[v, u]), max(one, labels[v, u])
                    thickness[n] = min(inner[y, x], inner[v, u])
                    brightness[n] = min(contrast[y, x], contrast[v, u])
                    n += 1
    return lesser[:n], greater[:n], thickness[:n], brightness[:n]


@numba.njit(cache=True, nogil=True)
def _find_regions(image: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], Labels, Labels, Labels]:
    height, width = image.shape
    row_first = np.zeros(height + 1, np.int64)
    for y in range(height):
        changes = 0
        for x in range(1, width):
            changes += image[y, x] != image[y, x - 1]
        row_first[y + 1] = row_first[y] + changes + 1
    n = int(row_first[height])
    start, stop = np.empty(n, np.int32), np.empty(n, np.int32)
    parent = np.arange(n).astype(np.int32)
    run = 0
    for y in range(height):
        start[run] = 0
        for x in range(1, width):
            if image[y, x] != image[y, x - 1]:
                stop[run] = x
                run += 1
                start[run] = x
        stop[run] = width
        run += 1
        above, here = row_first[max(y - 1, 0)], row_first[y]
        while above < row_first[y] and here < run:
            overlap = start[above] < stop[here] and start[here] < stop[above]
            if overlap and image[y - 1, start[above]] == image[y, start[here]]:
                one, other = _root(parent, above), _root(parent, here)
                parent[max(one, other)] = min(one, other)
            if stop[above] < stop[here]:
                above += 1
            else:
                here += 1
    # A parent comes before its children, so it has its region's number by the time they ask for it.
    n_regions = 0
    for r in range(n):
        if parent[r] == r:
            parent[r] = n_regions
            n_regions += 1
        else:
            parent[r] = parent[parent[r]]
    return row_first, start, stop, parent


@numba.njit(cache=True, nogil=True)
def _root(parent: Labels, run: int) -> int:
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@numba.njit(cache=True, nogil=True)
def _paint(
    image: npt.NDArray[Any], row_first: npt.NDArray[np.int64], start: Labels, stop: Labels, value: npt.NDArray[Any]
) -> None:
    for y in range(len(row_first) - 1):
        for r in range(row_first[y], row_first[y + 1]):
            if value[r] != 0:
                image[y, start[r] : stop[r]] = value[r]
