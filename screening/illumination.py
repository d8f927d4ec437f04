"""A plate's illumination and intensity range: estimated from a sample of its sites, then applied.

A camera image is taken to be ``offset + field(x) * light``: a dark level that is the same
everywhere, and a smooth multiplicative field (vignetting, an off-centre lamp). What sites have in
common is the field, because cells lie elsewhere in each; this is the retrospective estimate of
CIDRE (Smith et al. 2015) and BaSiC (Peng et al. 2017) in its plainest form, a mean over sites,
smoothed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from storage_schemas.base import Config
from storage_schemas.errors import InputError

FloatArray = npt.NDArray[np.float32]

# Bounds of what a plate's sample holds in memory, however many sites are streamed through it.
_MAX_SITES = 256
_MAX_PIXELS_PER_CHANNEL = 8192


class NoIllumination(Config):
    """Images are taken as the camera gave them."""

    method: Literal["none"] = Field("none", description="as the camera gave them")


class FlatField(Config):
    """One smooth field per plate and channel, the mean over sites."""

    method: Literal["flat_field"] = Field("flat_field", description="a smooth field per plate and channel")
    min_sites: int = Field(
        32,
        ge=1,
        le=_MAX_SITES // 2,
        description="sites needed; with fewer no field is estimated, for it would learn the cells",
    )
    grid: int = Field(64, ge=8, le=256, description="side of the grid that holds the field, points")
    smoothing: float = Field(0.2, gt=0, le=1, description="sigma of the gaussian, as a share of the image's side")
    floor: float = Field(0.1, gt=0, lt=1, description="lowest value of the field, whose mean is 1; bounds the gain")


IlluminationConfig = Annotated[NoIllumination | FlatField, Field(discriminator="method")]


@dataclass(frozen=True)
class Calibration:
    """Illumination and intensity range of one plate.

    Attributes:
        flat_field: (C, h, w) float32 of mean 1 on a coarse grid that spans the image; None for no
            correction.
        offset: (C,) float32, camera units, the dark level under the field; 0 without a field.
        low: (C,) float32, corrected units, the background: what clips show as black.
        high: (C,) float32, corrected units, what clips show as white; never below ``low``.
    """

    flat_field: FloatArray | None
    offset: FloatArray
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True)
class _Site:
    """What is kept of a site: a lattice of its pixels and its mean and darkest view on the grid."""

    shape: tuple[int, int]
    step: int
    pixels: FloatArray  # (T, C, h', w')
    mean: FloatArray | None  # (C, grid, grid)
    darkest: FloatArray | None


def calibrate(
    stacks: Iterable[npt.NDArray[Any]],
    config: NoIllumination | FlatField,
    percentiles: tuple[float, float] = (1.0, 99.8),
) -> Calibration:
    """Estimate a plate's flat field and intensity range from a sample of its sites.

    The stacks are consumed once, one at a time; what is kept of them is bounded (with more than
    256 sites an evenly spread subset). Sites may differ in shape: the field spans the field of
    view, not pixels.

    Args:
        stacks: (T, C, H, W) images of sites of one plate, any real dtype; non-finite pixels are
            left out.
        config: how the field is estimated.
        percentiles: of the corrected pixels of each channel that become ``low`` and ``high``, in
            percent.

    Raises:
        InputError: without sites, with sites that differ in channels, or with a channel that has
            no finite pixel.
    """
    sites = _sample(stacks, config.grid if isinstance(config, FlatField) else None)
    if not sites:
        raise InputError("there are no sites to calibrate a plate from: give at least one")
    n_channels = sites[0].pixels.shape[1]
    field, offset = None, np.zeros(n_channels, np.float32)
    if isinstance(config, FlatField):
        whole = [site for site in sites if site.mean is not None]
        if len(whole) >= config.min_sites:
            field, offset = _estimate_field(whole, config)
    corrected: list[list[FloatArray]] = [[] for _ in range(n_channels)]
    for site in sites:
        start = site.step // 2
        for channel, values in enumerate(corrected):
            light = site.pixels[:, channel] - offset[channel]
            if field is not None:
                light /= _stretch(field[channel], site.shape)[start :: site.step, start :: site.step]
            values.append(light[np.isfinite(light)])
    ranges = np.empty((n_channels, 2), np.float32)
    for channel, values in enumerate(corrected):
        pool = np.concatenate(values)
        if not pool.size:
            raise InputError(f"channel {channel} has no finite pixel in the {len(sites)} sampled sites")
        ranges[channel] = np.percentile(pool, percentiles)
    return Calibration(field, offset, ranges[:, 0].copy(), ranges[:, 1].copy())


def correct(stack: npt.NDArray[Any], calibration: Calibration) -> FloatArray:
    """Undo a plate's uneven illumination: ``(stack - offset) / flat_field``.

    The offset must go before dividing, or corners would glow; the background stays in (``low`` is
    its level).

    Args:
        stack: (T, C, H, W), any real dtype.
        calibration: of the stack's plate.

    Returns:
        (T, C, H, W) float32, a new array; non-finite pixels stay so.

    Raises:
        InputError: if the stack has another number of channels than the plate.
    """
    n_channels = len(calibration.offset)
    if stack.ndim != 4 or stack.shape[1] != n_channels:
        raise InputError(
            f"a stack of shape {stack.shape} does not fit a plate of {n_channels} channels: expected (T, C, H, W)"
        )
    corrected = stack.astype(np.float32)
    if calibration.flat_field is None:
        return corrected
    for channel, (field, offset) in enumerate(zip(calibration.flat_field, calibration.offset, strict=True)):
        gain = 1 / _stretch(field, stack.shape[2:])
        for plane in corrected[:, channel]:
            plane -= offset
            plane *= gain
    return corrected


def _sample(stacks: Iterable[npt.NDArray[Any]], grid: int | None) -> list[_Site]:
    """Keep up to ``_MAX_SITES`` sites, evenly spread over a stream of unknown length."""
    sites: list[_Site] = []
    stride = 1
    for position, stack in enumerate(stacks):
        if sites and stack.shape[1] != sites[0].pixels.shape[1]:
            raise InputError(
                f"site {position} of the plate's sample has {stack.shape[1]} channels, "
                f"the ones before it {sites[0].pixels.shape[1]}"
            )
        if position % stride:
            continue
        sites.append(_summarise(stack, grid))
        if len(sites) > _MAX_SITES:
            sites = sites[::2]
            stride *= 2
    return sites


def _summarise(stack: npt.NDArray[Any], grid: int | None) -> _Site:
    n_frames, n_channels, *shape = stack.shape
    step = int(np.ceil(np.sqrt(n_frames * shape[0] * shape[1] / _MAX_PIXELS_PER_CHANNEL)))
    step = max(1, min(step, *shape))
    pixels = stack[:, :, step // 2 :: step, step // 2 :: step].astype(np.float32)
    mean = darkest = None
    if grid is not None:
        coarse = np.empty((n_frames, n_channels, grid, grid), np.float32)
        for frame, channel in np.ndindex(n_frames, n_channels):
            plane = stack[frame, channel].astype(np.float32)
            cv2.resize(plane, (grid, grid), coarse[frame, channel], interpolation=cv2.INTER_AREA)
        # A frame with a hole in it is broken: the others say the same about the field.
        coarse = coarse[np.isfinite(coarse).all(axis=(1, 2, 3))]
        if len(coarse):
            mean, darkest = coarse.mean(axis=0), coarse.min(axis=0)
    return _Site((shape[0], shape[1]), step, pixels, mean, darkest)


def _estimate_field(sites: list[_Site], config: FlatField) -> tuple[FloatArray, FloatArray]:
    """Field (C, grid, grid) of mean 1 and offset (C,) from the coarse views of sites."""
    sigma = config.smoothing * config.grid
    means = np.stack([site.mean for site in sites if site.mean is not None], axis=1)
    darkest = np.stack([site.darkest for site in sites if site.darkest is not None], axis=1)
    fields, offsets = [], []
    for mean, dark in zip(means, darkest, strict=True):
        offset = _camera_offset(_smooth(mean.mean(axis=0), sigma), _smooth(np.percentile(dark, 10, axis=0), sigma))
        light = mean - offset
        # Bright wells would outvote the others, and empty ones are all noise: level the one, damp
        # the other.
        level = light.mean(axis=(1, 2), keepdims=True)
        typical = np.median(level)
        field = np.ones_like(light[0])
        if typical > 0:
            field = _smooth((light / (level.clip(min=0) + typical)).mean(axis=0), sigma)
        field = np.clip(field / field.mean(), config.floor, None)
        fields.append(field / field.mean())
        offsets.append(offset)
    return np.stack(fields).astype(np.float32), np.array(offsets, np.float32)


def _camera_offset(mean: FloatArray, darkest: FloatArray) -> float:
    """The dark level o under a field f, from the mean and the darkest view of the same sites.

    ``mean = o + (b + s) f`` and ``darkest = o + b f`` with background light b and cells' light s,
    so darkest is a straight line over mean, and the line meets the diagonal at o. Where they show
    no line, the field is even or all light is the cells', and o is the darkest level itself.
    """
    # Fitted as mean over darkest: cells make the mean the noisier of the two, and as the abscissa
    # its noise would flatten the line.
    together = np.mean((mean - mean.mean()) * (darkest - darkest.mean()))
    slope = np.clip(darkest.var() / together, 0, 0.9) if together > 0 else 0.0
    offset = (darkest.mean() - slope * mean.mean()) / (1 - slope)
    ceiling = darkest.min()
    return float(np.clip(offset, min(0.0, ceiling), ceiling))


def _smooth(plane: npt.NDArray[Any], sigma: float) -> FloatArray:
    """Gaussian smoothing about a quadratic surface.

    A gaussian alone flattens a field where it falls towards the edges, by over 10 % in a vignetted
    corner; the surface takes the fall and leaves it a residual without a trend.
    """
    y, x = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in plane.shape), indexing="ij"))
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    weights, *_ = np.linalg.lstsq(basis, plane.ravel(), rcond=None)
    trend = (basis @ weights).reshape(plane.shape)
    residual = cv2.GaussianBlur(plane - trend, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return np.asarray(trend + residual, np.float32)


def _stretch(field: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    height, width = shape
    return np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
