"""Classical segmentation of nuclei and cells in fluorescence images.

The method knows one length, the nucleus diameter, which it measures in the image when it is not given, and
every other length is a multiple of it. Nuclei are found by a threshold that follows the local mean,
separated by a watershed from the tops of a distance transform weighted by brightness, put together again
where the border between two parts is about as wide and as bright as the parts themselves, and cut at a fixed
share of their own brightness, so that bright and dim neighbours are outlined alike.

Large nuclei are looked for at a reduced resolution and outlined in the full one, which costs less and finds the same.

Sources: N. Otsu 1979 (threshold), W. K. Newey and J. L. Powell 1987 (asymmetric least squares, for the
background), F. Meyer 1994 (watershed from markers), T. R. Jones et al. 2005 and A. E. Carpenter et al. 2006 (cells
grown from their nuclei), J. C. Caicedo et al. 2019 (how they are scored).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from screening.regions import (
    Flags,
    Labels,
    Mask,
    Places,
    Plane,
    Regions,
    Sums,
    contacts,
    cut,
    enlarge,
    find_regions,
    hills,
    inner_distance,
    label_sums,
    minus,
    outside_in_halves,
    positions,
    summits,
)
from screening.regions import watershed as flood
from storage_schemas.base import Config
from storage_schemas.errors import InputError

_FLOAT32_HOLDS = (np.uint8, np.uint16, np.float32)

# A threshold put through pure noise leaves parts 3 times as bright as the spread of what is below it, through smooth
# shading mostly 4; fields of nuclei measured from 6 (dense tissue) to 430.
_NOISE_CONTRAST = 5.0
# Brightness at an edge falls by 2.5 to 4 times the nucleus' own within a diameter, on a bell-shaped background by less.
_EDGE_STEEPNESS = 2.0
# The blur alone (sigma 1 px at least) makes a disk of 4 px of a single hot pixel.
_LEAST_AREA = 9
# Larger nuclei are reduced by the largest whole factor that leaves them at least the second of these wide, px, to be
# found; those smaller than the first are doubled, or the necks between them are lost in the grid of pixels.
_WORKING_DIAMETERS = (12.0, 14.0)
# Cells are shared out between nuclei at a whole fraction of the resolution that leaves these at least so wide, px.
_GROWING_DIAMETER = 7.0
# Windows wider than this, px, are taken of a reduced image.
_SMOOTH_WINDOW = 8
# A hole of less than half a nucleus is closed, a larger one is what several nuclei enclose.
_HOLE_AREA = 0.4


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
        0.75,
        gt=0,
        le=1,
        description="parts are one nucleus where their border is this much like the parts in width and brightness",
    )
    min_area: float = Field(0.14, ge=0, description="least area, share of a disk of the nucleus diameter")
    min_contrast: float = Field(0.35, ge=0, description="least brightness, share of the image's median nucleus")
    min_content: float = Field(
        0.14, ge=0, description="least area x brightness away from the border, share of a typical one"
    )


class CellsConfig(Config):
    """How cells are grown from their nuclei; lengths are in nucleus diameters, but for the blur."""

    method: Literal["classical"] = Field("classical", description="threshold and watershed")
    expansion: float = Field(
        0.35, ge=0, description="growth of the nuclei without a cytoplasm image, nucleus diameters"
    )
    rim: float = Field(0.15, ge=0, description="cytoplasm around every nucleus however dim, nucleus diameters")
    max_distance: float = Field(3.0, ge=0, description="farthest cytoplasm from its nucleus, nucleus diameters")
    smoothing: float = Field(
        1.4, ge=0, description="sigma of the Gaussian blur of the cytoplasm, px: noise has no size"
    )
    dim_weight: float = Field(
        0.4, gt=0, description="how far dim cytoplasm counts in the threshold: small more, large less"
    )
    brightness_weight: float = Field(0.5, ge=0, description="pull of bright cytoplasm against nearness when cells meet")


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
    return _segment(image, config)[0]


def segment_movie(movie: npt.NDArray[Any], config: NucleiConfig = NucleiConfig()) -> Labels:  # noqa: B008
    """Label the nuclei of each frame of a movie by one diameter, where :func:`segment_nuclei` measures each anew.

    It is measured in the middle frame, or, where that shows no nuclei, in the first or the last.

    Args:
        movie: (T, H, W), any real dtype, nuclei bright on dark.
        config: how they are found.

    Returns:
        (T, H, W) int32 labels, 0 background, 1..n without gaps in every frame.

    Raises:
        InputError: as for :func:`segment_nuclei`.
    """
    if config.diameter is None:
        for t in (len(movie) // 2, 0, len(movie) - 1):
            labels, diameter = _segment(movie[t], config)
            if labels.any():
                config = config.model_copy(update={"diameter": diameter})
                break
    return np.stack([segment_nuclei(plane, config) for plane in movie])


def _segment(image: npt.NDArray[Any], config: NucleiConfig) -> tuple[Labels, float]:
    """Labels of an image, and the nucleus diameter (px) that they were found by."""
    nothing = np.zeros(image.shape, np.int32), 0.0
    plane = _unit_range(image, "the nucleus image")
    if plane is None:
        return nothing
    plane = _without_glare(plane)
    plane = _minus(plane, _shading(plane))
    # Where the histogram is all noise or haze, Otsu's threshold splits that, and the parts are refused; then only
    # what stands clear of the noise of the flattened image is looked at.
    for sparse in (False, True):
        if sparse:
            plane = _minus(plane, _haze(plane))
        view = _look(plane, config, sparse)
        labels = _find_nuclei(plane, view, config)
        if labels.any():
            return labels, view.diameter / view.scale
    return nothing


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
    inside = positions(markers)
    if not inside.size:
        return markers
    area = np.bincount(markers.ravel()[inside])
    diameter = 2 * float(np.sqrt(np.median(area[area > 0]) / np.pi))
    if cytoplasm is None:
        return _expand(markers, _as_mask(markers == 0), config.expansion * diameter)
    if plane is None:
        return markers
    levels = _compress(_blur(plane, config.smoothing), config.dim_weight)
    level = _otsu(levels)
    factor = max(1, int(diameter / _GROWING_DIAMETER))
    # Whose cytoplasm it is needs less resolution than where it ends.
    coarse = _resize(levels, _scaled(plane.shape, 1 / factor))
    seeds = cv2.resize(markers, coarse.shape[::-1], interpolation=cv2.INTER_NEAREST)
    cells, dark = _grow(coarse, coarse > level, cast(Labels, seeds), diameter / factor, config)
    return cells if factor == 1 else enlarge(cells, dark, levels > level, markers)


def _grow(levels: Plane, bright: Flags, nuclei: Labels, diameter: float, config: CellsConfig) -> tuple[Labels, Mask]:
    """Cells, and where they are not bright: in holes, and in the rim around nuclei."""
    distance = cast(Plane, cv2.distanceTransform(_as_mask(nuclei == 0), cv2.DIST_L2, 5))
    # The rim is always cell: organelles often leave a dark gap around the nucleus that would cut them off.
    mask = _as_mask(bright | (distance <= config.rim * diameter))
    _fill_holes(mask, _HOLE_AREA * diameter**2)
    mask &= distance <= config.max_distance * diameter
    pull = config.brightness_weight / float(levels.max())
    landscape = distance / np.float32(diameter) - np.float32(pull) * levels
    return flood(landscape, nuclei, positions(mask)), mask & ~_as_mask(bright)


def _expand(nuclei: Labels, outside: Mask, reach: float) -> Labels:
    """The labels grown by ``reach`` px; a pixel goes to the nearest."""
    distance, nearest = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    inside = outside == 0
    owner = np.zeros(int(nearest.max()) + 1, np.int32)
    owner[nearest[inside]] = nuclei[inside]
    expanded: Labels = np.where(distance <= reach, owner[nearest], 0)
    return expanded


def _unit_range(image: npt.NDArray[Any], name: str) -> Plane | None:
    """The image as float32 from 0 to 1, or None where it has no contrast at all."""
    if image.ndim != 2 or image.dtype.kind not in "buif":
        raise InputError(f"{name} must be (H, W) of a real dtype, not {image.shape} {image.dtype}")
    if image.size == 0:
        return None
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(f"{name} holds NaN or infinite values: mask or repair the plane first")
    low, high = float(image.min()), float(image.max())
    if high == low:
        return None
    if image.dtype in _FLOAT32_HOLDS and 1e-30 < high - low < 1e30:
        plane = np.empty(image.shape, np.float32)
        for rows in _strips(plane):
            plane[rows] = image[rows]
            plane[rows] -= np.float32(low)
            plane[rows] *= np.float32(1 / (high - low))
        return plane
    # Others may be a small range on an offset so large that float32 knows but one value there.
    return ((image.astype(np.float64) - low) / (high - low)).astype(np.float32)


class _View(NamedTuple):
    """The image at the resolution that its nuclei are found at.

    Attributes:
        scale: px here per px of the image, at most 2.
        diameter: of a nucleus, px here.
        smooth: the image, blurred.
        clearance: by how much the compressed brightness is over the threshold.
        mask: 1 where it is, and in small holes.
        inside: positions of the mask.
    """

    scale: float
    diameter: float
    smooth: Plane
    clearance: Plane
    mask: Mask
    inside: Places


def _find_nuclei(plane: Plane, view: _View, config: NucleiConfig) -> Labels:
    outside = _sample(view.mask) == 0
    if not view.inside.size or not outside.any():
        return np.zeros(plane.shape, np.int32)
    contrast = _minus(view.smooth, _background(view, _median(_sample(view.smooth)[outside])))
    noise = _middle_and_spread(_sample(contrast)[outside])[1]
    # What is no brighter in all than noise is not looked at in its parts: there would be thousands.
    light = np.maximum(contrast.ravel()[view.inside], 0).astype(np.float64)
    if light @ light < _NOISE_CONTRAST * noise * light.sum():
        return np.zeros(plane.shape, np.int32)
    parts, height, whole, plateau = _split(view, contrast, config)
    if _is_shading(view, plateau[np.unique(whole)[1:]]):
        return np.zeros(plane.shape, np.int32)
    inside = view.inside
    if view.scale != 1:
        parts, inside = _at_full_resolution(whole[parts], height, view.clearance, plane.shape)
        contrast = _resize(contrast, plane.shape)
        whole = np.arange(len(whole), dtype=np.int32)
    return _trim(parts, contrast, inside, whole, plateau, noise, view.diameter / view.scale, config)


def _look(plane: Plane, config: NucleiConfig, sparse: bool) -> _View:
    """Measure the diameter, if need be, and set the threshold: each depends on the other."""

    @cache
    def threshold(scale: float, sigma: float) -> tuple[Plane, Plane, float]:
        smooth = _blur(_resize(plane, _scaled(plane.shape, scale)), sigma)
        return smooth, *_threshold(smooth, config, sparse)

    def look(diameter: float) -> _View:
        scale = _working_scale(diameter)
        here = diameter * scale
        smooth, levels, level = threshold(scale, max(1.0, config.smoothing * here))
        surface = _coarse_mean(levels, config.local_window * here)
        surface = np.maximum(surface + np.float32(config.local_contrast * _step(levels, level)), np.float32(level))
        clearance = _minus(levels, surface)
        mask = _as_mask(clearance > 0)
        _fill_holes(mask, _HOLE_AREA * here**2)
        return _View(scale, here, smooth, clearance, mask, positions(mask))

    if config.diameter is not None:
        return look(config.diameter)
    _, levels, level = threshold(1.0, 1.0)
    diameter = _typical_diameter(levels.shape, positions(_as_mask(levels > level)))
    for _ in range(3):
        view = look(diameter)
        before, diameter = diameter, _typical_diameter(view.mask.shape, view.inside) / view.scale
        if abs(diameter / before - 1) < 0.05:
            break
    return view


def _step(levels: Plane, level: float) -> float:
    """From the mean brightness below a threshold to that above it."""
    sample = _sample(levels)
    above = sample > level
    return float(sample[above].mean() - sample[~above].mean()) if above.any() and not above.all() else 0.0


def _working_scale(diameter: float) -> float:
    if diameter < _WORKING_DIAMETERS[0]:
        return 2.0
    # Whole pixels are averaged several times faster than parts of them.
    return 1 / max(1, int(diameter / _WORKING_DIAMETERS[1]))


def _threshold(smooth: Plane, config: NucleiConfig, sparse: bool) -> tuple[Plane, float]:
    """Brightness on the scale it is judged on, and the threshold there."""
    if sparse:
        middle, spread = _middle_and_spread(_sample(smooth))
        return smooth, middle + 6 * spread
    levels = _compress(smooth, config.dim_weight)
    return levels, _otsu(levels)


def _typical_diameter(shape: tuple[int, int], inside: Places) -> float:
    """Diameter (px) of the objects in a mask, large ones counting by their area.

    The mean distance to the outside over a disk of diameter d is d / 6. The 5 here makes up for the halo that
    a blurred nucleus adds to its mask.
    """
    distance = inner_distance(shape, inside).ravel()[inside]
    # A mask without an outside is one object as large as the image.
    return 5.0 * max(1.0, float(np.minimum(distance, max(shape)).mean())) if inside.size else 5.0


def _compress(plane: Plane, dim_weight: float) -> Plane:
    """Brightness over the background on a scale that is linear for dim and logarithmic for bright pixels.

    On it a nucleus a third as bright as another is still nearer to it than to the background.
    """
    light = _light(plane)
    # A few saturated specks pull Otsu's threshold above every nucleus; the bright level ignores them.
    reference = _otsu(plane) - light.floor if light.bright is None else 0.4 * (light.bright - light.floor)
    levels = np.empty_like(plane)
    for rows in _strips(plane):
        part = levels[rows]
        np.maximum(np.subtract(plane[rows], np.float32(light.floor), out=part), 0, out=part)
        part *= np.float32(1 / (dim_weight * max(reference, 1e-6)))
        np.log1p(part, out=part)
    return levels


class _Light(NamedTuple):
    """How bright an image is.

    Attributes:
        floor: of the darkest 1 %.
        bright: of the brightest 0.5 %, or None where less of the field than that stands out of the noise.
    """

    floor: float
    bright: float | None


def _light(plane: Plane) -> _Light:
    values = np.sort(_sample(plane), axis=None)
    middle, spread = _middle_and_spread(values)
    floor, bright = (float(values[round(share * (values.size - 1))]) for share in (0.01, 0.995))
    return _Light(floor, bright if bright > middle + 8 * spread else None)


def _without_glare(plane: Plane) -> Plane:
    """The image, in place, with specks far brighter than nuclei cut down: their blur would outshine what is near."""
    bright = _light(plane).bright
    return plane if bright is None else np.minimum(plane, np.float32(4 * bright), out=plane)


def _sample(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Every n-th pixel of every n-th row, at least 16,000 of a large image: quantiles need no more."""
    step = max(1, int((plane.size / 2**14) ** 0.5))
    return plane[::step, ::step]


def _middle_and_spread(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Median, and the standard deviation as the median absolute deviation tells it."""
    middle = _median(values)
    return middle, 1.4826 * _median(np.abs(values - np.float32(middle)))


def _median(values: npt.NDArray[np.float32]) -> float:
    """The upper one of an even number; sorting takes a quarter of the time of ``np.median``."""
    return float(np.sort(values, axis=None)[values.size // 2])


def _otsu(plane: Plane) -> float:
    """Otsu's threshold from 256 bins."""
    sample = np.ascontiguousarray(_sample(plane))
    low, high = float(sample.min()), float(sample.max())
    if high <= low:
        return high
    counts = cv2.calcHist([sample], [0], None, [256], [low, high + 1e-6 * (high - low)])
    counts = counts.ravel().astype(np.float64)
    centres = low + (np.arange(256) + 0.5) * (high - low) / 256
    below, total = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(centres[np.nanargmax(between)])


def _haze(plane: Plane) -> Plane:
    """The image as it varies over an eighth of the field and more, at a lower resolution."""
    height, width = plane.shape
    coarse = cv2.resize(plane, (min(64, width), min(64, height)), interpolation=cv2.INTER_AREA)
    return _blur(cast(Plane, coarse), 8)


def _shading(plane: Plane) -> Plane:
    """The quadratic surface that runs along the dark parts of the image, coarse: uneven background and its offset.

    Asymmetric least squares: a point above the surface weighs 2 %, so nuclei hardly lift it.
    """
    coarse = _reduced(plane, min(plane.shape) / 48)
    rows, columns = coarse.shape
    y, x = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y])
    values = coarse.ravel().astype(np.float64)
    weight = np.ones(values.size)
    for _ in range(12):
        weighted = terms * weight
        surface = np.linalg.lstsq(weighted @ terms.T, weighted @ values)[0] @ terms
        before, weight = weight, np.where(values > surface, 0.02, 0.98)
        if np.array_equal(weight, before):
            break
    return surface.reshape(rows, columns).astype(np.float32)


def _background(view: _View, typical: float) -> Plane:
    """Local mean of the pixels outside the mask, leaning on the ``typical`` one where a window holds few."""
    halves = outside_in_halves(view.smooth, view.mask)
    share, total = (_coarse_mean(plane, 1.8 * view.diameter) for plane in halves)
    return (total + np.float32(0.02 * typical)) / (share + np.float32(0.02))


def _is_shading(view: _View, brightness: Sums) -> bool:
    """Whether what was found is as large as uneven background may be, and has no edge."""
    if view.diameter < 0.25 * min(view.mask.shape):
        return False
    smooth = _blur(view.smooth, 0.08 * view.diameter)
    slope = np.hypot(*(cv2.Sobel(smooth, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))))
    edge = (view.mask > 0) & (cv2.erode(view.mask, np.ones((3, 3), np.uint8)) == 0)
    bright = float(np.median(brightness))
    return float(np.median(slope[edge])) * view.diameter < _EDGE_STEEPNESS * bright


def _split(view: _View, contrast: Plane, config: NucleiConfig) -> tuple[Labels, Plane, Labels, Sums]:
    """Watershed of the mask into parts of nuclei, from the tops of distance to the outside x root of brightness.

    Returns:
        the parts, the landscape that they were flooded in, (n + 1,) the nucleus that each is of, and (n + 1,) the
        brightness of each nucleus.
    """
    inner = inner_distance(contrast.shape, view.inside)
    around = _resize(_coarse_mean(contrast, 1.2 * view.diameter), contrast.shape)
    height = hills(inner, contrast, around, view.inside)
    seeds, n = summits(height, max(1, int(config.seed_distance * view.diameter) // 2), view.inside)
    parts = flood(-height, seeds, view.inside)
    return parts, height, *_merge(parts, n, inner, contrast, view, config.neck)


def _merge(parts: Labels, n: int, inner: Plane, contrast: Plane, view: _View, neck: float) -> tuple[Labels, Sums]:
    """Join neighbouring ones of ``n`` parts, best first, whose border is nearly as wide and as bright as the parts.

    Returns:
        (n + 1,) the nucleus that each part is of, and (n + 1,) the brightness of each nucleus.
    """
    area, peak, light, square = label_sums(parts, inner, contrast, n, view.inside)
    lesser, greater, thickness, brightness = contacts(parts, inner, contrast, view.inside)
    pairs, pair, length = np.unique(
        lesser.astype(np.int64) * (n + 1) + greater, return_inverse=True, return_counts=True
    )
    width = np.zeros(len(pairs))
    np.maximum.at(width, pair, thickness)
    border = np.bincount(pair, brightness, minlength=len(pairs)) / length
    one, other = pairs // (n + 1), pairs % (n + 1)
    disk = np.pi / 4 * view.diameter**2

    def likeness(edge: int, a: int, b: int) -> float:
        brighter = max(light[a] / area[a], light[b] / area[b], 1e-6)
        # What would be larger than a nucleus is less likely to be one.
        size = max(1.0, (area[a] + area[b]) / disk)
        return float(width[edge] / min(peak[a], peak[b]) * min(1.0, border[edge] / brighter) / size**0.25)

    root = np.arange(n + 1, dtype=np.int32)

    def find(node: int) -> int:
        while root[node] != node:
            node = int(root[node])
        return node

    for edge in sorted(range(len(pairs)), key=lambda edge: -likeness(edge, int(one[edge]), int(other[edge]))):
        a, b = sorted((find(int(one[edge])), find(int(other[edge]))))
        if a != b and likeness(edge, a, b) > neck:
            root[b] = a
            peak[a] = max(peak[a], peak[b])
            for sums in (area, light, square):
                sums[a] += sums[b]
    # The mean weighted by brightness itself stands for the plateau: the dim rim hardly counts in it.
    return np.array([find(node) for node in range(n + 1)], np.int32), square / np.maximum(light, 1e-9)


def _at_full_resolution(
    labels: Labels, height: Plane, clearance: Plane, shape: tuple[int, int]
) -> tuple[Labels, Places]:
    """Labels found at another resolution in that of the image, flooded anew around their inner pixels, and the mask.

    What has no inner pixel is lost: it is narrower than a tenth of a nucleus.
    """
    values, around = labels.astype(np.float32), np.ones((3, 3), np.uint8)
    inside = cv2.erode(values, around) == cv2.dilate(values, around)
    markers = cv2.resize(np.where(inside, labels, 0), shape[::-1], interpolation=cv2.INTER_NEAREST)
    inside = positions(_as_mask((_resize(clearance, shape) > 0) | (markers > 0)))
    return flood(-_resize(height, shape), cast(Labels, markers), inside), inside


def _trim(
    parts: Labels,
    contrast: Plane,
    inside: Places,
    whole: Labels,
    plateau: Sums,
    noise: float,
    diameter: float,
    config: NucleiConfig,
) -> Labels:
    """Cut each nucleus at a share of its own brightness, keep its largest piece, drop what is no nucleus."""
    level = (config.edge_level * plateau).astype(np.float32)
    trimmed = cut(parts, contrast, whole, level[whole], inside)
    regions = find_regions(trimmed)
    holes = _holes(regions, trimmed, _HOLE_AREA * diameter**2)
    regions.paint(trimmed, np.where(holes, whole[regions.values(parts)], 0).astype(np.int32))
    pieces = find_regions(trimmed)
    area, owner = pieces.areas(), pieces.values(trimmed)
    largest = np.zeros(len(plateau), np.int64)
    np.maximum.at(largest, owner, area)
    disk = np.pi / 4 * diameter**2
    nucleus = (owner > 0) & (area == largest[owner]) & (area >= max(config.min_area * disk, _LEAST_AREA))
    kept = np.zeros(parts.shape, np.int32)
    if not nucleus.any():
        return kept
    bright = plateau[owner]
    typical = float(np.median(bright[nucleus]))
    if typical < _NOISE_CONTRAST * noise:
        return kept
    # A nucleus cut by the border of the field may be small; a small one inside must be bright for its size.
    nucleus &= pieces.on_border() | (area * bright >= config.min_content * disk * typical)
    nucleus &= bright >= config.min_contrast * typical
    pieces.paint(kept, np.where(nucleus, np.cumsum(nucleus), 0).astype(np.int32))
    return kept


def _blur(plane: Plane, sigma: float) -> Plane:
    if sigma == 0:
        return plane
    size = 2 * max(1, round(3 * sigma)) + 1
    return cast(Plane, cv2.GaussianBlur(plane, (size, size), sigma, borderType=cv2.BORDER_REFLECT))


def _coarse_mean(plane: Plane, side: float) -> Plane:
    """Mean over a square window, of a resolution that leaves a wide one eight px wide, for it is smooth."""
    coarse = _reduced(plane, side / _SMOOTH_WINDOW)
    size = min(int(side * len(coarse) / len(plane)) | 1, 2 * min(coarse.shape) - 1)
    return cast(Plane, cv2.blur(coarse, (size, size), borderType=cv2.BORDER_REFLECT))


def _minus(plane: Plane, coarse: Plane) -> Plane:
    """The plane less what varies slowly, given at a lower resolution."""
    out = np.empty_like(plane)
    smooth = cv2.resize(coarse, (plane.shape[1], len(coarse)), interpolation=cv2.INTER_LINEAR)
    minus(plane, cast(Plane, smooth), out)
    return out


def _strips(plane: Plane) -> Iterator[slice]:
    """Rows that stay in the processor's cache while several operations go over them."""
    height, width = plane.shape
    step = max(1, 2**16 // width)
    return (slice(start, start + step) for start in range(0, height, step))


def _reduced(plane: Plane, factor: float) -> Plane:
    """The plane reduced by the power of two that is nearest below a factor, in halves: they are averaged fastest."""
    for _ in range(int(np.log2(max(factor, 1)))):
        plane = _resize(plane, _scaled(plane.shape, 0.5))
    return plane


def _scaled(shape: tuple[int, ...], scale: float) -> tuple[int, int]:
    height, width = shape
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(plane: Plane, shape: tuple[int, int]) -> Plane:
    if plane.shape == shape:
        return plane
    how = cv2.INTER_AREA if shape[0] < plane.shape[0] else cv2.INTER_LINEAR
    return cast(Plane, cv2.resize(plane, shape[::-1], interpolation=how))


def _as_mask(flags: Flags) -> Mask:
    return flags.view(np.uint8)


def _fill_holes(mask: Mask, max_area: float) -> None:
    """Close the holes of at most ``max_area`` px, in place; what touches the border is no hole."""
    regions = find_regions(mask)
    regions.paint(mask, _as_mask(_holes(regions, mask, max_area)))


def _holes(regions: Regions, image: npt.NDArray[Any], max_area: float) -> Flags:
    holes: Flags = (regions.values(image) == 0) & ~regions.on_border() & (regions.areas() <= max_area)
    return holes
