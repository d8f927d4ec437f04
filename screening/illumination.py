"""A plate's illumination, intensity range and usual quality: estimated from a sample of its sites, then applied.

A camera image is taken to be ``offset + field(x) * light``: a dark level that is the same
everywhere, and a smooth multiplicative field (vignetting, an off-centre lamp). What sites have in
common is the field, because cells lie elsewhere in each; this is the retrospective estimate of
CIDRE (Smith et al. 2015) and BaSiC (Peng et al. 2017) in its plainest form, a mean over sites,
smoothed.

The sample comes as dask arrays that read a frame when it is wanted, so a plate's estimate holds a few
frames in memory however many it is made from. Inside a plane OpenCV does the work: dask gains nothing
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import dask
import dask.array as da
import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from screening.quality import PlateQuality, measure, typical
from storage_schemas.base import Config
from storage_schemas.errors import InputError

FloatArray = npt.NDArray[np.float32]

_PIXELS_PER_CHANNEL = 8192  # of a site's sampled frames, kept to estimate its plate's intensity range


class NoIllumination(Config):
    """Images are taken as the camera gave them."""

    method: Literal["none"] = Field("none", description="as the camera gave them")


class FlatField(Config):
    """One smooth field per plate and channel, the mean over sites."""

    method: Literal["flat_field"] = Field("flat_field", description="a smooth field per plate and channel")
    min_sites: int = Field(
        32,
        ge=1,
        description="sites needed; with fewer no field is estimated, for it would learn the cells",
    )
    grid: int = Field(64, ge=8, le=256, description="side of the grid that holds the field, points")
    smoothing: float = Field(0.2, gt=0, le=1, description="sigma of the gaussian, as a share of the image's side")
    floor: float = Field(0.1, gt=0, lt=1, description="lowest value of the field, whose mean is 1; bounds the gain")


IlluminationConfig = Annotated[NoIllumination | FlatField, Field(discriminator="method")]


@dataclass(frozen=True)
class Calibration:
    """Illumination, intensity range and usual quality of one plate.

    Attributes:
        flat_field: (C, h, w) float32 of mean 1 on a coarse grid that spans the image; None for no
            correction.
        offset: (C,) float32, camera units, the dark level under the field; 0 without a field.
        low: (C,) float32, corrected units, the background: what clips show as black.
        high: (C,) float32, corrected units, what clips show as white; never below ``low``.
        quality: what is usual on the plate, which bad frames are told by.
    """

    flat_field: FloatArray | None
    offset: FloatArray
    low: FloatArray
    high: FloatArray
    quality: PlateQuality


@dataclass(frozen=True)
class _Frame:
    """What is kept of a frame: a lattice of its pixels, its view on the grid and its measures."""

    shape: tuple[int, int]
    step: int
    pixels: FloatArray  # (C, h', w')
    coarse: FloatArray  # (C, grid, grid)
    measures: pd.DataFrame


def calibrate(
    stacks: Sequence[da.Array | npt.NDArray[Any]],
    config: NoIllumination | FlatField,
    percentiles: tuple[float, float] = (1.0, 99.8),
) -> Calibration:
    """Estimate a plate's flat field, intensity range and usual quality from a sample of its sites.

    Frames are computed under dask's scheduler of the moment, each once, and reduced at once. Sites may
    differ in shape: the field spans the field of view, not pixels.

    Args:
        stacks: (T, C, H, W) images of sites of one plate, any real dtype: dask's are read as they are wanted. Frames
            without a finite pixel (lost ones) and other non-finite pixels are left out.
        config: how the field is estimated.
        percentiles: of the corrected pixels of each channel that become ``low`` and ``high``, in
            percent.

    Raises:
        InputError: without sites, with sites that differ in channels, or with a channel that has
            no finite pixel.
    """
    if not stacks:
        raise InputError("there are no sites to calibrate a plate from: give at least one")
    n_channels = stacks[0].shape[1]
    for position, stack in enumerate(stacks):
        if stack.shape[1] != n_channels:
            raise InputError(
                f"site {position} of the plate's sample has {stack.shape[1]} channels, the first one {n_channels}"
            )
    grid = config.grid if isinstance(config, FlatField) else 1
    computed = dask.compute(*(_summaries(stack, grid) for stack in stacks))
    sites = [[frame for frame in site if frame is not None] for site in computed]
    field, offset = None, np.zeros(n_channels, np.float32)
    if isinstance(config, FlatField):
        views = [_views(site) for site in sites if site]
        whole = [view for view in views if len(view)]
        if len(whole) >= config.min_sites:
            field, offset = _estimate_field(whole, config)
    frames = [frame for site in sites for frame in site]
    ranges = []
    for channel in range(n_channels):
        pool = np.concatenate([np.zeros(0, np.float32), *(_corrected(f, channel, field, offset) for f in frames)])
        if not pool.size:
            raise InputError(f"channel {channel} has no finite pixel in the {len(stacks)} sampled sites")
        ranges.append(np.percentile(pool, percentiles))
    low, high = np.array(ranges, np.float32).T.copy()
    return Calibration(field, offset, low, high, typical(pd.concat([frame.measures for frame in frames])))


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
    if calibration.flat_field is None:
        return stack.astype(np.float32)
    # Numba reads neither half floats nor the bytes of another machine, as converters in Java write them.
    readable = stack.dtype.isnative and stack.dtype != np.float16
    corrected = np.empty(stack.shape, np.float32)
    for channel, (field, offset) in enumerate(zip(calibration.flat_field, calibration.offset, strict=True)):
        gain = np.float32(1) / _stretch(field, stack.shape[2:])
        for frame in range(len(stack)):
            plane = stack[frame, channel]
            _flatten(plane if readable else plane.astype(np.float32), offset, gain, corrected[frame, channel])
    return corrected


@numba.njit(cache=True, nogil=True)
def _flatten(plane: npt.NDArray[Any], offset: np.float32, gain: FloatArray, out: FloatArray) -> None:
    """One pass over the plane: numpy takes three, each through memory."""
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            out[y, x] = (np.float32(plane[y, x]) - offset) * gain[y, x]


def _summaries(stack: da.Array | npt.NDArray[Any], grid: int) -> list[Any]:
    """A task for each frame of a site that makes a :class:`_Frame` of it, or None of a lost one."""
    n_frames, _, *shape = stack.shape
    step = int(np.ceil(np.sqrt(n_frames * shape[0] * shape[1] / _PIXELS_PER_CHANNEL)))
    step = max(1, min(step, *shape))
    summarise = dask.delayed(_summarise)
    return [summarise(block, step, grid) for block in da.asarray(stack).rechunk((1, -1, -1, -1)).to_delayed().ravel()]


def _summarise(block: npt.NDArray[Any], step: int, grid: int) -> _Frame | None:
    """Reduce a frame (1, C, H, W)."""
    (frame,) = block
    if not np.isfinite(frame).any():
        return None
    pixels = frame[:, step // 2 :: step, step // 2 :: step].astype(np.float32)
    coarse = [cv2.resize(p.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) for p in frame]
    return _Frame(frame.shape[1:], step, pixels, np.stack(coarse), measure(block))


def _views(site: list[_Frame]) -> FloatArray:
    """Coarse views (T, C, grid, grid) of a site's whole frames.

    A frame with a hole in it is broken: the others say the same about the field.
    """
    coarse = np.stack([frame.coarse for frame in site])
    return coarse[np.isfinite(coarse).all(axis=(1, 2, 3))]


def _corrected(frame: _Frame, channel: int, field: FloatArray | None, offset: FloatArray) -> FloatArray:
    """A channel's finite pixels on the lattice, corrected."""
    light = frame.pixels[channel] - offset[channel]
    if field is not None:
        start = frame.step // 2
        light /= _stretch(field[channel], frame.shape)[start :: frame.step, start :: frame.step]
    finite: FloatArray = light[np.isfinite(light)]
    return finite


def _estimate_field(sites: list[FloatArray], config: FlatField) -> tuple[FloatArray, FloatArray]:
    """Field (C, grid, grid) of mean 1 and offset (C,) from the coarse views (T, C, grid, grid) of sites."""
    sigma = config.smoothing * config.grid
    means = np.stack([views.mean(axis=0) for views in sites], axis=1)
    darkest = np.stack([views.min(axis=0) for views in sites], axis=1)
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
