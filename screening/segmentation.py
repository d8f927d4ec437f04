"""Classical segmentation of nuclei and cells in fluorescence images.

The method knows one length, the nucleus diameter, which it measures in the image when it is not given, and
every other length is a multiple of it. Nuclei are found by a threshold that follows the local mean,
separated by a watershed from the tops of a distance transform weighted by brightness, put together again
where the neck between two parts is about as wide and as bright as the parts themselves, and cut at a fixed
share of their own brightness, so that bright and dim neighbours are outlined alike.

Sources: N. Otsu 1979 (threshold), F. Meyer 1994 (watershed from markers), T. R. Jones et al. 2005 and
A. E. Carpenter et al. 2006 (cells grown from their nuclei), J. C. Caicedo et al. 2019 (how they are scored).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field
from skimage.measure import label as connected_parts
from skimage.segmentation import watershed

from storage_schemas.base import Config
from storage_schemas.errors import InputError

Labels = npt.NDArray[np.int32]
Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

# A threshold put through pure noise leaves parts 2.5 times as bright as the spread of what is below it, through
# smooth shading 3.5; fields of nuclei measured from 5 (dense tissue) to 400.
_NOISE_CONTRAST = 4.0
# The blur alone (sigma 1 px at least) makes a disk of 4 px of a single hot pixel.
_LEAST_AREA = 9


class NucleiConfig(Config):
    """How nuclei are found; lengths are in nucleus diameters so that one setting serves every magnification."""

    method: Literal["classical"] = Field("classical", description="threshold and watershed")
    diameter: float | None = Field(None, gt=1, description="nucleus diameter, px; null measures it in each image")
    smoothing: float = Field(
        0.06, ge=0, description="sigma of the Gaussian blur before the threshold, nucleus diameters"
    )
    dim_weight: float = Field(
        0.4, gt=0, description="how far dim nuclei count in the threshold: small more, large less"
    )
    local_window: float = Field(2.4, gt=0, description="side of the window of the local mean, nucleus diameters")
    local_contrast: float = Field(
        0.1,
        ge=0,
        description="least excess over the local mean, share of the step from background to nuclei",
    )
    edge_level: float = Field(0.5, gt=0, lt=1, description="where a nucleus ends, share of its own brightness")
    seed_distance: float = Field(0.45, gt=0, description="least distance between two seeds, nucleus diameters")
    neck: float = Field(
        0.9,
        gt=0,
        le=1,
        description="parts whose neck is wider than this share of the smaller part are one nucleus",
    )
    min_area: float = Field(0.14, ge=0, description="least area, share of a disk of the nucleus diameter")
    min_contrast: float = Field(0.35, ge=0, description="least brightness, share of the image's median nucleus")
    min_content: float = Field(
        0.14, ge=0, description="least area x brightness away from the border, share of a typical one"
    )


class CellsConfig(Config):
    """How cells are grown from their nuclei; lengths are in nucleus diameters."""

    method: Literal["classical"] = Field("classical", description="threshold and watershed")
    expansion: float = Field(
        0.35, ge=0, description="growth of the nuclei without a cytoplasm image, nucleus diameters"
    )
    rim: float = Field(0.15, ge=0, description="cytoplasm around every nucleus however dim, nucleus diameters")
    max_distance: float = Field(3.0, ge=0, description="farthest cytoplasm from its nucleus, nucleus diameters")
    smoothing: float = Field(0.05, ge=0, description="sigma of the Gaussian blur of the cytoplasm, nucleus diameters")
    dim_weight: float = Field(
        0.6, gt=0, description="how far dim cytoplasm counts in the threshold: small more, large less"
    )
    brightness_weight: float = Field(1.0, ge=0, description="pull of bright cytoplasm against nearness when cells meet")


def segment_nuclei(image: npt.NDArray[Any], config: NucleiConfig = NucleiConfig()) -> Labels:  # noqa: B008
    """Label the nuclei of one image.

    Args:
        image: (H, W), any real dtype, nuclei bright on dark.
        config: how they are found.

    Returns:
        (H, W) int32 labels, 0 background, 1..n without gaps. An image of nothing but noise, smooth shading or
        a constant has none.

    Raises:
        InputError: the image is not two-dimensional and real, or holds NaN or infinite values.
    """
    plane = _unit_range(image, "the nucleus image")
    if plane is None:
        return np.zeros(image.shape, np.int32)
    plane = _without_glare(plane)
    # Where the histogram is all noise or haze, Otsu's threshold splits that, and the parts are refused; then only
    # what stands clear of the noise of the flattened image is looked at.
    for sparse in (False, True):
        if sparse:
            plane = plane - _haze(plane)
        diameter, smooth, mask = _foreground(plane, config, sparse)
        if mask.any() and not mask.all():
            excess = smooth - _background(smooth, mask, diameter)
            noise = _middle_and_spread(excess[~mask])[1]
            contrast = np.maximum(excess, 0)
            labels = _trim(_split(mask, contrast, diameter, config), contrast, noise, diameter, config)
            if labels.any():
                return labels
    return np.zeros(image.shape, np.int32)


def segment_cells(
    cytoplasm: npt.NDArray[Any] | None,
    nuclei: npt.NDArray[np.integer[Any]],
    config: CellsConfig = CellsConfig(),  # noqa: B008
) -> Labels:
    """Grow every nucleus to its cell.

    Args:
        cytoplasm: (H, W) image of any real dtype in which cytoplasm is bright; None expands the nuclei by
            ``config.expansion`` instead.
        nuclei: (H, W) integer labels, 0 background.
        config: how they are grown.

    Returns:
        (H, W) int32 labels: the cell of a nucleus has its id and contains it.

    Raises:
        InputError: the shapes differ, the labels are not integers from 0 on, or the image is not usable.
    """
    if nuclei.ndim != 2 or nuclei.dtype.kind not in "iu" or (nuclei.size and nuclei.min() < 0):
        raise InputError(f"nuclei must be (H, W) integer labels from 0 on, not {nuclei.ndim}-d {nuclei.dtype}")
    if cytoplasm is not None and cytoplasm.shape != nuclei.shape:
        raise InputError(f"cytoplasm is {cytoplasm.shape}, nuclei {nuclei.shape}: give planes of one site")
    plane = None if cytoplasm is None else _unit_range(cytoplasm, "the cytoplasm image")
    markers = nuclei.astype(np.int32)
    inside = markers > 0
    if not inside.any():
        return markers
    area = _areas(markers)[1:]
    diameter = 2 * float(np.sqrt(np.median(area[area > 0]) / np.pi))
    distance, nearest = cv2.distanceTransformWithLabels(
        (~inside).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    if cytoplasm is None:
        owner = np.zeros(int(nearest.max()) + 1, np.int32)
        owner[nearest[inside]] = markers[inside]
        expanded: Labels = np.where(distance <= config.expansion * diameter, owner[nearest], 0)
        return expanded
    if plane is None:
        return markers
    smooth = _blur(plane, config.smoothing * diameter)
    levels = _compress(smooth, config.dim_weight)
    # The rim is always cell: organelles often leave a dark gap around the nucleus that would cut them off.
    bright = _fill_holes((levels > _otsu(levels)) | (distance <= config.rim * diameter), 0.4 * diameter**2)
    mask = bright & (distance <= config.max_distance * diameter)
    landscape = distance / diameter - config.brightness_weight * levels / float(levels.max())
    return _watershed(landscape, markers, mask)


def _watershed(landscape: npt.NDArray[Any], markers: npt.NDArray[Any], mask: Mask) -> Labels:
    return cast(Labels, watershed(landscape, markers, mask=mask).astype(np.int32))  # type: ignore[no-untyped-call]


def _unit_range(image: npt.NDArray[Any], name: str) -> Plane | None:
    """The image as float32 from 0 to 1, or None where it has no contrast at all."""
    if image.ndim != 2 or image.dtype.kind not in "buif":
        raise InputError(f"{name} must be (H, W) of a real dtype, not {image.shape} {image.dtype}")
    if image.size == 0:
        return None
    if not np.isfinite(image).all():
        raise InputError(f"{name} holds NaN or infinite values: mask or repair the plane first")
    low, high = float(image.min()), float(image.max())
    if high == low:
        return None
    return ((image.astype(np.float64) - low) / (high - low)).astype(np.float32)


def _foreground(plane: Plane, config: NucleiConfig, sparse: bool) -> tuple[float, Plane, Mask]:
    """Nucleus diameter (px), the image blurred to suit it, and the mask of what may be nucleus."""
    diameter = config.diameter
    rounds = 1
    if diameter is None:
        diameter = _typical_diameter(np.greater(*_threshold(_blur(plane, 1.0), config, sparse)))
        rounds = 3
    for remaining in reversed(range(rounds)):
        smooth = _blur(plane, max(1.0, config.smoothing * diameter))
        levels, threshold = _threshold(smooth, config, sparse)
        mask = levels > threshold
        if mask.any() and not mask.all():
            step = float(levels[mask].mean() - levels[~mask].mean())
            mask &= levels > _local_mean(levels, config.local_window * diameter) + config.local_contrast * step
        mask = _fill_holes(mask, 0.4 * diameter**2)
        if remaining:
            diameter = _typical_diameter(mask)
    return diameter, smooth, mask


def _threshold(smooth: Plane, config: NucleiConfig, sparse: bool) -> tuple[Plane, float]:
    """Brightness on the scale it is judged on, and the threshold there."""
    if sparse:
        middle, spread = _middle_and_spread(smooth)
        return smooth, middle + 6 * spread
    levels = _compress(smooth, config.dim_weight)
    return levels, _otsu(levels)


def _typical_diameter(mask: Mask) -> float:
    """Diameter (px) of the objects in a mask, large ones counting by their area.

    The mean distance to the outside over a disk of diameter d is d / 6. The 5 here makes up for the halo that
    a blurred nucleus adds to its mask.
    """
    distance = _inner_distance(mask)[mask]
    return max(5.0, 5.0 * float(distance.mean())) if distance.size else 5.0


def _compress(plane: Plane, dim_weight: float) -> Plane:
    """Brightness over the background on a scale that is linear for dim and logarithmic for bright pixels.

    On it a nucleus a third as bright as another is still nearer to it than to the background.
    """
    floor = float(np.percentile(plane, 1))
    bright = _bright_level(plane)
    # A few saturated specks pull Otsu's threshold above every nucleus; the bright level ignores them.
    reference = _otsu(plane) - floor if bright is None else 0.4 * (bright - floor)
    unit = dim_weight * max(reference, 1e-6)
    return cast(Plane, np.log1p(np.maximum(plane - floor, 0) / unit))


def _bright_level(plane: Plane) -> float | None:
    """Brightness of the brightest 0.5 %, or None where less of the field than that stands out of the noise."""
    middle, spread = _middle_and_spread(plane)
    bright = float(np.percentile(plane, 99.5))
    return bright if bright > middle + 8 * spread else None


def _without_glare(plane: Plane) -> Plane:
    """The image with specks far brighter than its nuclei cut down, lest their blur outshine what is near."""
    bright = _bright_level(plane)
    return plane if bright is None else np.minimum(plane, np.float32(4 * bright))


def _middle_and_spread(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Median, and the standard deviation as the median absolute deviation tells it."""
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))


def _otsu(plane: Plane) -> float:
    """Otsu's threshold from 256 bins."""
    low, high = float(plane.min()), float(plane.max())
    if high <= low:
        return high
    counts = cv2.calcHist([plane], [0], None, [256], [low, high + 1e-6 * (high - low)])
    counts = counts.ravel().astype(np.float64)
    centres = low + (np.arange(256) + 0.5) * (high - low) / 256
    below, total = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(centres[np.nanargmax(between)])


def _haze(plane: Plane) -> Plane:
    """The image as it varies over an eighth of the field and more."""
    width, height = plane.shape[::-1]
    size = (min(64, width), min(64, height))
    coarse = cast(Plane, cv2.resize(plane, size, interpolation=cv2.INTER_AREA))
    return cast(Plane, cv2.resize(_blur(coarse, 8), (width, height), interpolation=cv2.INTER_LINEAR))


def _background(smooth: Plane, mask: Mask, diameter: float) -> Plane:
    """Local mean of the pixels outside the mask, leaning on their median where a window holds few."""
    outside = (~mask).astype(np.float32)
    typical = np.float32(np.median(smooth[~mask]))
    share = _local_mean(outside, 3.6 * diameter)
    total = _local_mean(smooth * outside, 3.6 * diameter)
    return (total + np.float32(0.02) * typical) / (share + np.float32(0.02))


def _split(mask: Mask, contrast: Plane, diameter: float, config: NucleiConfig) -> Labels:
    """Watershed of the mask into nuclei, from the tops of distance to the outside x root of brightness."""
    inner = _inner_distance(mask)
    relative = contrast / np.maximum(_local_mean(contrast, 1.2 * diameter), np.float32(1e-6))
    height = _blur(inner, 0.05 * diameter) * np.sqrt(relative)
    height[~mask] = 0
    window = np.ones((max(3, int(config.seed_distance * diameter) | 1),) * 2, np.uint8)
    tops = mask & (height == cv2.dilate(height, window)) & (height > 0)
    seeds = cv2.connectedComponents(tops.astype(np.uint8), connectivity=8)[1]
    parts = _watershed(-height, seeds, mask)
    return _merge(parts, inner, contrast, config.neck)


def _merge(labels: Labels, inner: Plane, contrast: Plane, neck: float) -> Labels:
    """Join neighbouring parts, best first, whose common border is nearly as thick and bright as the lesser part."""
    n = int(labels.max())
    first, second, thickness, brightness = (
        np.concatenate(sides)
        for sides in zip(*(_contacts(labels, inner, contrast, axis) for axis in (0, 1)), strict=True)
    )
    if first.size == 0:
        return labels
    pairs, pair, length = np.unique(first.astype(np.int64) * (n + 1) + second, return_inverse=True, return_counts=True)
    width = np.zeros(len(pairs))
    np.maximum.at(width, pair, thickness)
    light = np.bincount(pair, brightness) / length
    one, other = pairs // (n + 1), pairs % (n + 1)
    peak = np.zeros(n + 1)
    np.maximum.at(peak, labels.ravel(), inner.ravel())
    area = np.maximum(_areas(labels), 1)
    mean = np.bincount(labels.ravel(), contrast.ravel(), minlength=n + 1) / area

    def likeness(edge: int, a: int, b: int) -> float:
        dimmer = max(min(mean[a], mean[b]), 1e-6)
        return float(width[edge] / min(peak[a], peak[b]) * min(1.0, light[edge] / dimmer))

    root = np.arange(n + 1)

    def find(node: int) -> int:
        while root[node] != node:
            node = int(root[node])
        return node

    for edge in sorted(range(len(pairs)), key=lambda edge: -likeness(edge, int(one[edge]), int(other[edge]))):
        a, b = sorted((find(int(one[edge])), find(int(other[edge]))))
        if a != b and likeness(edge, a, b) > neck:
            root[b] = a
            peak[a] = max(peak[a], peak[b])
            mean[a] = (mean[a] * area[a] + mean[b] * area[b]) / (area[a] + area[b])
            area[a] += area[b]
    joined: Labels = np.array([find(node) for node in range(n + 1)], np.int32)[labels]
    return joined


def _contacts(labels: Labels, inner: Plane, contrast: Plane, axis: int) -> tuple[npt.NDArray[Any], ...]:
    """Pixel pairs along an axis where two labels meet: both labels, the lesser distance and brightness."""
    ahead, behind = (slice(1, None), slice(None)), (slice(None, -1), slice(None))
    if axis == 1:
        ahead, behind = ahead[::-1], behind[::-1]
    a, b = labels[ahead], labels[behind]
    meet = (a != b) & (a > 0) & (b > 0)
    return (
        np.minimum(a[meet], b[meet]),
        np.maximum(a[meet], b[meet]),
        np.minimum(inner[ahead][meet], inner[behind][meet]),
        np.minimum(contrast[ahead][meet], contrast[behind][meet]),
    )


def _trim(labels: Labels, contrast: Plane, noise: float, diameter: float, config: NucleiConfig) -> Labels:
    """Cut each label at a share of its own brightness, keep its largest piece, drop what is no nucleus."""
    n = int(labels.max())
    weight = np.bincount(labels.ravel(), contrast.ravel(), minlength=n + 1)
    # The mean weighted by brightness itself stands for the plateau: the dim rim hardly counts in it.
    plateau = np.bincount(labels.ravel(), (contrast**2).ravel(), minlength=n + 1) / np.maximum(weight, 1e-9)
    keep = (labels > 0) & (contrast > (config.edge_level * plateau)[labels])
    filled = np.where(_fill_holes(keep, 0.4 * diameter**2), labels, 0)
    pieces = connected_parts(filled, connectivity=1)  # type: ignore[no-untyped-call]
    area = _areas(pieces)
    owner = np.zeros(len(area), np.int64)
    owner[pieces.ravel()] = labels.ravel()
    largest = np.zeros(n + 1, np.int64)
    np.maximum.at(largest, owner[1:], area[1:])
    disk = np.pi / 4 * diameter**2
    nucleus = (area == largest[owner]) & (area >= max(config.min_area * disk, _LEAST_AREA))
    nucleus[0] = False
    if not nucleus.any():
        return np.zeros(labels.shape, np.int32)
    bright = plateau[owner]
    typical = float(np.median(bright[nucleus]))
    if typical < _NOISE_CONTRAST * noise:
        return np.zeros(labels.shape, np.int32)
    # A nucleus cut by the border of the field may be small; a small one inside must be bright for its size.
    border = np.zeros(len(area), bool)
    border[np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])] = True
    nucleus &= border | (area * bright >= config.min_content * disk * typical)
    nucleus &= bright >= config.min_contrast * typical
    ids = np.where(nucleus, np.cumsum(nucleus), 0).astype(np.int32)
    kept: Labels = ids[pieces]
    return kept


def _areas(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.bincount(labels.ravel())


def _blur(plane: Plane, sigma: float) -> Plane:
    if sigma == 0:
        return plane
    return cast(Plane, cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_REFLECT))


def _local_mean(plane: Plane, side: float) -> Plane:
    size = min(int(side) | 1, 2 * min(plane.shape) - 1)
    return cast(Plane, cv2.blur(plane, (size, size), borderType=cv2.BORDER_REFLECT))


def _inner_distance(mask: Mask) -> Plane:
    """Distance (px) of every mask pixel to the outside; the border of the image is not outside."""
    return cast(Plane, cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5))


def _fill_holes(mask: Mask, max_area: float) -> Mask:
    """The mask with its holes of at most ``max_area`` px closed; what touches the border is no hole."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    height, width = mask.shape
    left, top, wide, high, area = stats.T
    hole = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height) & (area <= max_area)
    hole[0] = False
    filled: Mask = mask | hole[parts]
    return filled
