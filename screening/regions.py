"""Compiled operations on label images: watershed, connected regions, sums over labels and along their borders.

A label image is (H, W) int32, 0 for background. Most of a field is background, so what is done about objects goes by a
list of their pixels (:func:`positions`) and not through the image. Regions are held as runs, the stretches of equal
pixels of each row: there are far fewer runs than pixels, so what is decided about regions is plain numpy on short
arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int32]
Plane = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Pixels that are passed over at once where nothing is in them.
_BLOCK = 64
_STEPS = 4096
_UNLABELLED = -1
# Rows and columns to the neighbours that come before a pixel in reading order, and how far they are.
_CHAMFER = (
    (0, 1, 1.0),
    (1, 0, 1.0),
    (1, 1, 1.4),
    (1, -1, 1.4),
    (1, 2, 2.1969),
    (1, -2, 2.1969),
    (2, 1, 2.1969),
    (2, -1, 2.1969),
)


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
def positions(image: npt.NDArray[Any]) -> Places:
    """Where an image is not 0.

    What is found about objects costs less by a list of their pixels than by the image, most of which is background.

    Args:
        image: (H, W) integers.

    Returns:
        (n,) int32 positions in the flattened image, in order.
    """
    flat = image.ravel()
    places = np.empty(flat.size, np.int32)
    n = 0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        anything = block[0]
        for i in range(len(block)):
            anything |= block[i]
        if anything != 0:
            for i in range(len(block)):
                places[n] = start + i
                n += block[i] != 0
    return places[:n].copy()


@numba.njit(cache=True, nogil=True)
def watershed(landscape: Plane, markers: Labels, inside: Places) -> Labels:
    """Flood a mask from the markers over the edges of pixels, low ground first, at one height first come first.

    The landscape is taken in 4,096 steps from its lowest point in the mask to its highest, so that a bucket a step
    takes the place of a heap (F. Meyer 1994). The labels are those of ``skimage.segmentation.watershed`` pixel by
    pixel, as long as no two markers' pixels share a step: only then it leaves open which comes first.

    Args:
        landscape: (H, W) float32.
        markers: (H, W) int32 labels to start from.
        inside: :func:`positions` of the mask, where labels may go.

    Returns:
        (H, W) int32 labels; 0 outside the mask and where no marker reaches.
    """
    height, width = markers.shape
    size = height * width
    labels = np.zeros((height, width), np.int32)
    label, ground, marker = labels.ravel(), landscape.ravel(), markers.ravel()
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for p in inside:
        low, high = min(low, ground[p]), max(high, ground[p])
        label[p] = _UNLABELLED
    scale = np.float32(_STEPS - 1) / (high - low) if high > low else np.float32(0)
    # The pixels of a bucket are a chain. A pixel is in one bucket only, so one array holds the links of all.
    first = np.full(_STEPS, -1, np.int32)
    last = np.full(_STEPS, -1, np.int32)
    following = np.empty(size, np.int32)
    for p in inside:
        if marker[p] != 0:
            label[p] = marker[p]
            _append(p, int((ground[p] - low) * scale), first, last, following)
    for now in range(_STEPS):
        p = first[now]
        while p >= 0:
            x = p % width
            for q, exists in (
                (p - width, p >= width),
                (p - 1, x > 0),
                (p + 1, x < width - 1),
                (p + width, p < size - width),
            ):
                if exists and label[q] == _UNLABELLED:
                    label[q] = label[p]
                    _append(q, max(int((ground[q] - low) * scale), now), first, last, following)
            p = following[p]
    for p in inside:
        if label[p] == _UNLABELLED:
            label[p] = 0
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
def inner_distance(shape: tuple[int, int], inside: Places) -> Plane:
    """Distance (px) of the pixels of a mask to the outside; the border of the image is not outside.

    The chamfer distance of G. Borgefors 1986 over 5 × 5 pixels, with the weights of OpenCV, whose function goes through
    the whole image instead.

    Args:
        shape: of the mask.
        inside: its :func:`positions`.

    Returns:
        (H, W) float32; 0 outside. Where there is no outside it is infinite.
    """
    height, width = shape
    distance = np.zeros(shape, np.float32)
    flat = distance.ravel()
    for p in inside:
        flat[p] = np.inf
    for direction in (1, -1):
        for i in range(len(inside)):
            p = inside[i] if direction == 1 else inside[len(inside) - 1 - i]
            y, x = p // width, p % width
            nearest = flat[p]
            for dy, dx, step in _CHAMFER:
                v, u = y - direction * dy, x - direction * dx
                if 0 <= v < height and 0 <= u < width:
                    nearest = min(nearest, distance[v, u] + np.float32(step))
            flat[p] = nearest
    return distance


@numba.njit(cache=True, nogil=True)
def hills(inner: Plane, contrast: Plane, around: Plane, inside: Places) -> Plane:
    """Smoothed distance to the outside x root of the brightness against what is around, and 0 outside the mask.

    Args:
        inner: (H, W) float32 distance; it is averaged over 3 × 3 px by binomial weights.
        contrast: (H, W) float32 brightness.
        around: (H, W) float32 mean brightness of the surroundings.
        inside: :func:`positions` of the mask.

    Returns:
        (H, W) float32.
    """
    rows, columns = inner.shape
    height = np.zeros_like(inner)
    for p in inside:
        y, x = p // columns, p % columns
        if contrast[y, x] > 0:
            total = np.float32(0)
            for v, weight in ((max(y - 1, 0), 1), (y, 2), (min(y + 1, rows - 1), 1)):
                line = inner[v, max(x - 1, 0)] + 2 * inner[v, x] + inner[v, min(x + 1, columns - 1)]
                total += np.float32(weight) * line
            rise = np.sqrt(contrast[y, x] / max(around[y, x], np.float32(1e-6)))
            height[y, x] = total / np.float32(16) * rise
    return height


@numba.njit(cache=True, nogil=True)
def summits(height: Plane, reach: int, inside: Places) -> tuple[Labels, int]:
    """Number the pixels that none within ``reach`` rows and columns exceeds; neighbouring ones share a number.

    Args:
        height: (H, W) float32.
        reach: at least 1, px.
        inside: :func:`positions` of the pixels that may be summits, if over 0.

    Returns:
        (H, W) int32 labels, 0 where there is none, and how many there are.
    """
    columns = height.shape[1]
    labels = np.zeros(height.shape, np.int32)
    n = 0
    for p in inside:
        y, x = p // columns, p % columns
        top = height[y, x]
        # Most pixels have a higher neighbour, which spares looking at the whole window.
        if top <= 0 or _exceeded(height, y, x, 1) or _exceeded(height, y, x, reach):
            continue
        label = 0
        for v in range(max(y - 1, 0), y + 1):
            for u in range(max(x - 1, 0), min(x + 2, columns)):
                label = max(label, labels[v, u])
        if label == 0:
            n += 1
            label = n
        labels[y, x] = label
    return labels, n


@numba.njit(cache=True, nogil=True)
def _exceeded(height: Plane, y: int, x: int, reach: int) -> bool:
    rows, columns = height.shape
    for v in range(max(y - reach, 0), min(y + reach + 1, rows)):
        for u in range(max(x - reach, 0), min(x + reach + 1, columns)):
            if height[v, u] > height[y, x]:
                return True
    return False


@numba.njit(cache=True, nogil=True)
def label_sums(labels: Labels, inner: Plane, contrast: Plane, n: int, inside: Places) -> tuple[Sums, Sums, Sums, Sums]:
    """What is known of each label, at the position of its value: (n + 1,) float64 each, 0 for the background.

    Args:
        labels: (H, W) int32.
        inner: (H, W) float32 distance to the outside.
        contrast: (H, W) float32 brightness over the background.
        n: the greatest label.
        inside: :func:`positions` of the labels.

    Returns:
        area in px, greatest distance, sum of brightness, sum of its square.
    """
    area, peak, light, square = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    label, distance, bright = labels.ravel(), inner.ravel(), contrast.ravel()
    for p in inside:
        k = label[p]
        if k != 0:
            value = float(bright[p])
            area[k] += 1
            peak[k] = max(peak[k], distance[p])
            light[k] += value
            square[k] += value * value
    return area, peak, light, square


@numba.njit(cache=True, nogil=True)
def contacts(labels: Labels, inner: Plane, contrast: Plane, inside: Places) -> tuple[Labels, Labels, Plane, Plane]:
    """The pixel edges at which two labels meet; arguments as those of :func:`label_sums`.

    Returns:
        (edges,) each: the lesser label, the greater, the lesser of the two pixels' distances, and the lesser of their
        brightnesses.
    """
    height, width = labels.shape
    limit = 2 * len(inside)
    lesser, greater = np.empty(limit, np.int32), np.empty(limit, np.int32)
    thickness, brightness = np.empty(limit, np.float32), np.empty(limit, np.float32)
    n = 0
    for p in inside:
        y, x = p // width, p % width
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
def cut(labels: Labels, contrast: Plane, name: Labels, level: Plane, inside: Places) -> Labels:
    """Rename labels and cut each at a level of its own.

    Args:
        labels: (H, W) int32.
        contrast: (H, W) float32.
        name: (n + 1,) int32, what each label is called from now on.
        level: (n + 1,) float32, what its pixels must exceed.
        inside: :func:`positions` of the labels.

    Returns:
        (H, W) int32; 0 where a pixel does not.
    """
    out = np.zeros_like(labels)
    named, label, bright = out.ravel(), labels.ravel(), contrast.ravel()
    for p in inside:
        k = label[p]
        if k != 0 and bright[p] > level[k]:
            named[p] = name[k]
    return out


@numba.njit(cache=True, nogil=True)
def minus(plane: Plane, smooth: Plane, out: Plane) -> None:
    """Subtract what varies slowly from a plane, in one pass and without blowing it up to the plane's size.

    Args:
        plane: (H, W) float32.
        smooth: (h, W) float32, of which the rows between are interpolated as ``cv2.resize`` does.
        out: (H, W) float32, written; may be ``plane``.
    """
    height, width = plane.shape
    rows = len(smooth)
    for y in range(height):
        place = min(max((y + 0.5) * rows / height - 0.5, 0.0), rows - 1.0)
        above, below = smooth[int(place)], smooth[min(int(place) + 1, rows - 1)]
        share = np.float32(place - int(place))
        line, result = plane[y], out[y]
        for x in range(width):
            result[x] = line[x] - (above[x] + share * (below[x] - above[x]))


@numba.njit(cache=True, nogil=True)
def outside_in_halves(plane: Plane, mask: Mask) -> tuple[Plane, Plane]:
    """Share of each 2 × 2 pixels outside a mask, and the mean over all four of what a plane is there and 0 inside.

    Args:
        plane: (H, W) float32.
        mask: (H, W) uint8, 0 or 1; an odd last row or column counts twice.

    Returns:
        two of ((H + 1) // 2, (W + 1) // 2) float32.
    """
    height, width = plane.shape
    shape = (height + 1) // 2, (width + 1) // 2
    share, total = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for y in range(shape[0]):
        below = min(2 * y + 1, height - 1)
        for x in range(shape[1]):
            right = min(2 * x + 1, width - 1)
            a, b = np.float32(1 - mask[2 * y, 2 * x]), np.float32(1 - mask[2 * y, right])
            c, d = np.float32(1 - mask[below, 2 * x]), np.float32(1 - mask[below, right])
            light = (
                a * plane[2 * y, 2 * x] + b * plane[2 * y, right] + c * plane[below, 2 * x] + d * plane[below, right]
            )
            share[y, x] = np.float32(0.25) * (a + b + c + d)
            total[y, x] = np.float32(0.25) * light
    return share, total


@numba.njit(cache=True, nogil=True)
def shared_pixels(
    one: Labels, inside: Places, move: npt.NDArray[np.int64], other: Labels, n: int, m: int
) -> npt.NDArray[np.int64]:
    """Count the pixels that labels of two images share, once those of the first have moved.

    Args:
        one: (H, W) int32, labels up to ``n``.
        inside: :func:`positions` of ``one``.
        move: (n, 2) rows and columns by which each label is moved.
        other: (H, W) int32, labels up to ``m``.
        n: labels of ``one``.
        m: labels of ``other``.

    Returns:
        (n + 1, m + 1); the first row is 0.
    """
    height, width = other.shape
    shared = np.zeros((n + 1, m + 1), np.int64)
    label = one.ravel()
    for p in inside:
        k = label[p]
        y, x = p // width + move[k - 1, 0], p % width + move[k - 1, 1]
        if 0 <= y < height and 0 <= x < width:
            shared[k, other[y, x]] += 1
    return shared


@numba.njit(cache=True, nogil=True)
def enlarge(coarse: Labels, kept: Mask, bright: Flags, centres: Labels) -> Labels:
    """Labels found at a lower resolution, in that of their image.

    Args:
        coarse: (h, w) int32.
        kept: (h, w) uint8, where a label is taken over whole; elsewhere only where it is bright.
        bright: (H, W) bool.
        centres: (H, W) int32 labels that stay as they are.

    Returns:
        (H, W) int32.
    """
    height, width = centres.shape
    rows, columns = coarse.shape
    out = np.empty_like(centres)
    column = np.arange(width) * columns // width
    for y in range(height):
        label, whole = coarse[y * rows // height], kept[y * rows // height]
        for x in range(width):
            u = column[x]
            around = label[u] if bright[y, x] or whole[u] != 0 else np.int32(0)
            out[y, x] = centres[y, x] if centres[y, x] != 0 else around
    return out


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
        for first in range(1, width, _BLOCK):
            left, here = image[y, first - 1 : width - 1], image[y, first:]
            size = min(_BLOCK, len(here))
            changes = 0
            for i in range(size):
                changes += here[i] != left[i]
            if changes == 0:
                continue
            for i in range(size):
                if here[i] != left[i]:
                    stop[run] = first + i
                    run += 1
                    start[run] = first + i
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
