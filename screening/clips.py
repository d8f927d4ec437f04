"""Clips: for each tracked cell a small movie in a window that follows it, the input of the network.

Which frames, which cells and why not the others, and the cut itself. Follows MitoReID's
preparation, except that one soft frame costs a repair and not the field, and that intensities are
scaled per plate and not per image, so that they can be compared between wells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import cv2
import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from screening.features import Tracks
from screening.illumination import Calibration
from storage_schemas.base import Config
from storage_schemas.errors import InputError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Frames = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]
Plane8 = npt.NDArray[np.uint8]

# Why a track has no clip; the empty reason is that of tracks which have one.
KEPT = ""
BAD_FRAMES = "bad frames"
SHORT = "short"
BORDER = "border"
SMALL = "small"
EXCLUSIONS = (BAD_FRAMES, SHORT, BORDER, SMALL)

_SOFT_MASK = 11  # px, side of the mean that softens masks, MitoReID's


class FixedWindow(Config):
    """Every cell is seen at one magnification: size is information."""

    method: Literal["fixed"] = Field("fixed", description="one magnification for every cell")
    size: int = Field(128, ge=8, description="side of the square window, px of the image")


class TrackWindow(Config):
    """The window is as large as the cell's largest box over the clip (MitoReID)."""

    method: Literal["track"] = Field("track", description="as large as the cell grows over the clip")
    max_size: int = Field(512, ge=8, description="largest side of the square window, px of the image")


class _Percentiles(Config):
    low: float = Field(1.0, ge=0, le=100, description="percentile of pixels that becomes black, %")
    high: float = Field(99.8, ge=0, le=100, description="percentile of pixels that becomes white, %")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class PlateScaling(_Percentiles):
    """One range per plate and channel: intensities compare between wells of a plate."""

    method: Literal["plate"] = Field("plate", description="one range per plate and channel")


class SiteScaling(_Percentiles):
    """One range per site and channel: evens out differences between wells, drug effects too."""

    method: Literal["site"] = Field("site", description="one range per site and channel")


class FixedScaling(Config):
    """The same range for every plate."""

    method: Literal["fixed"] = Field("fixed", description="one range for all plates")
    low: tuple[float, ...] = Field((0.0,), description="black, image units; one for all channels or one each")
    high: tuple[float, ...] = Field((65535.0,), description="white, image units; one for all channels or one each")


ScalingConfig = Annotated[PlateScaling | SiteScaling | FixedScaling, Field(discriminator="method")]


class ClipsConfig(Config):
    """How clips are chosen and cut."""

    frames: int = Field(16, ge=1, description="frames of a clip")
    step: int | None = Field(
        None,
        ge=1,
        description="movie frames from one clip frame to the next; none spreads them evenly",
    )
    window: Annotated[FixedWindow | TrackWindow, Field(discriminator="method")] = Field(
        FixedWindow(), description="what of the image a clip shows"
    )
    size: int = Field(128, ge=8, description="side of a clip, px")
    mask: Literal["none", "soft"] = Field(
        "soft", description="soft blacks out what is outside the cell, with an 11 px ramp"
    )
    scaling: ScalingConfig = Field(PlateScaling(), description="which intensities become black and white")
    repair: bool = Field(True, description="take bad frames from the nearest good frame")
    max_bad: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of a clip's frames that may be bad; above it the cells are excluded",
    )
    max_missing: float = Field(0.2, ge=0, lt=1, description="share of a clip's frames in which the cell may be missing")
    exclude_border: bool = Field(True, description="exclude cells that touch the image's border in the clip")
    min_relative_area: float = Field(
        1 / 3,
        ge=0,
        lt=1,
        description="exclude cells smaller than this share of the site's mean cell area",
    )


def choose_frames(n_frames: int, config: ClipsConfig) -> IntArray:
    """The frames of a movie that make up a clip: by step from the first, or first to last.

    Returns:
        (frames,) int64, ascending.

    Raises:
        InputError: if the movie is too short.
    """
    needed = (config.frames - 1) * (config.step or 1) + 1
    if n_frames < needed:
        raise InputError(
            f"a movie of {n_frames} frames is too short for clips of {config.frames} frames, "
            f"{config.step or 1} apart: it takes {needed}; set segment.clips.frames"
            f"{' or segment.clips.step' if config.step else ''} lower"
        )
    if config.step:
        return np.arange(config.frames) * config.step
    return np.rint(np.linspace(0, n_frames - 1, config.frames)).astype(np.int64)


def intensity_range(
    stack: npt.NDArray[Any],
    calibration: Calibration,
    config: PlateScaling | SiteScaling | FixedScaling,
) -> tuple[FloatArray, FloatArray]:
    """What becomes black and white in each channel of a site's clips: (C,) and (C,) float32.

    Args:
        stack: (T, C, H, W), the corrected site.
        calibration: of its plate, estimated with the percentiles of the :class:`PlateScaling`.
        config: the scaling.

    Raises:
        InputError: if a fixed scaling has values for another number of channels, or black not
            below white.
    """
    n_channels = stack.shape[1]
    match config:
        case PlateScaling():
            return calibration.low, calibration.high
        case SiteScaling():
            ranges = [
                np.percentile(plane[np.isfinite(plane)], (config.low, config.high))
                if np.isfinite(plane).any()
                else np.zeros(2)
                for plane in stack.swapaxes(0, 1)
            ]
            low, high = np.array(ranges, np.float32).T
            return low, high
        case FixedScaling():
            for name, values in (("low", config.low), ("high", config.high)):
                if len(values) not in (1, n_channels):
                    raise InputError(
                        f"clips.scaling.{name} has {len(values)} values for {n_channels} channels: "
                        f"give 1 or {n_channels}"
                    )
            low = np.broadcast_to(np.array(config.low, np.float32), n_channels)
            high = np.broadcast_to(np.array(config.high, np.float32), n_channels)
            if (low >= high).any():
                raise InputError("clips.scaling.low must be below clips.scaling.high in each channel")
            return low, high


@dataclass(frozen=True)
class _Sources:
    """Where each frame of a clip comes from.

    Attributes:
        pixels: (F,) frame of the movie whose pixels are shown.
        windows: (n, F) frame of the movie whose box and mask are used; 0 for a track that is never
            present.
        missing: (n, F) bool, whether the track is absent in the frame shown.
    """

    pixels: IntArray
    windows: IntArray
    missing: BoolArray


def _sources(tracks: Tracks, frames: Frames, bad: BoolArray, config: ClipsConfig) -> _Sources:
    usable = ~bad if config.repair and not bad.all() else np.ones_like(bad)
    pixels = _nearest(usable[None], frames)[0]
    seen = tracks.present & usable
    return _Sources(pixels, _nearest(seen, pixels), ~seen[:, pixels])


def _nearest(valid: BoolArray, frames: Frames) -> IntArray:
    """The valid frame nearest to each of ``frames`` (F,), the earlier of two: (n, T) to (n, F)."""
    n_frames = valid.shape[1]
    distance = np.abs(frames[:, None] - np.arange(n_frames))
    nearest = np.argmin(np.where(valid[:, None, :], distance, n_frames), axis=2)
    return np.asarray(nearest, np.int64)


def select(
    tracks: Tracks,
    frames: Frames,
    bad: BoolArray,
    shape: tuple[int, int],
    config: ClipsConfig,
) -> pd.DataFrame:
    """Say of every track whether it gets a clip, and if not, the first reason that holds of these.

    - ``bad frames``: more than ``max_bad`` of the clip's frames are bad (so for all tracks of the
      site);
    - ``short``: the cell is missing in more than ``max_missing`` of the frames shown;
    - ``border``: its box touches the image's border in one of the frames shown;
    - ``small``: its mean area is below ``min_relative_area`` of the mean over the site's tracks.

    Args:
        tracks: of the site.
        frames: (F,) of :func:`choose_frames`.
        bad: (T,) bool, frames not fit to be shown.
        shape: (H, W) of the image.
        config: the rules.

    Returns:
        A row a track: track (int32, from 1), excluded ("" for those with a clip), n_missing
        (frames of the clip in which the cell is missing) and n_repaired (frames of the clip taken
        from a neighbour).
    """
    sources = _sources(tracks, frames, bad, config)
    n_tracks = len(tracks.present)
    rows = np.arange(n_tracks)[:, None]

    y0, x0, y1, x1 = np.moveaxis(tracks.box[rows, sources.windows], -1, 0)
    touching = ((y0 <= 0) | (x0 <= 0) | (y1 >= shape[0]) | (x1 >= shape[1])).any(axis=1)
    area = tracks.features["cell_area"][rows, sources.windows].mean(axis=1)
    seen = ~np.isnan(area)
    smallest = config.min_relative_area * area[seen].mean() if seen.any() else 0.0

    n_missing = sources.missing.sum(axis=1)
    reasons = {
        BAD_FRAMES: np.full(n_tracks, bad[frames].mean() > config.max_bad or bad.all()),
        SHORT: (n_missing > config.max_missing * len(frames)) | ~seen,
        BORDER: touching & config.exclude_border,
        SMALL: area < smallest,
    }
    return pd.DataFrame(
        {
            "track": np.arange(1, n_tracks + 1, dtype=np.int32),
            "excluded": np.select([reasons[reason] for reason in EXCLUSIONS], EXCLUSIONS, KEPT).astype(object),
            "n_missing": n_missing.astype(np.int32),
            "n_repaired": np.full(n_tracks, (sources.pixels != frames).sum(), np.int32),
        }
    )


def cut(
    stack: npt.NDArray[Any],
    cells: npt.NDArray[np.int32],
    tracks: Tracks,
    ids: npt.NDArray[np.integer[Any]],
    frames: Frames,
    bad: BoolArray,
    low: FloatArray,
    high: FloatArray,
    config: ClipsConfig,
) -> Plane8:
    """Cut the clips of some tracks.

    A window is centred on the cell's box in each frame (centre rounded down); what it shows beyond
    the image is black. Where the cell is missing, the window and mask are those of the nearest
    frame that has it; with ``repair``, bad frames show the nearest good frame. Black is ``low``
    and white ``high``, clipped and rounded to 8 bit *before* masking and resizing, so without
    these a clip's pixel is the image's pixel; NaN is black. Larger windows are averaged down to
    ``size`` (area), smaller ones interpolated (linear).

    Args:
        stack: (T, C, H, W), the corrected site, any real dtype.
        cells: (T, H, W) int32, pixels of track i have value i.
        tracks: of the site.
        ids: (N,) tracks to cut, each present in a usable frame (as those kept by :func:`select`
            are).
        frames: (F,) of :func:`choose_frames`.
        bad: (T,) bool, frames not fit to be shown.
        low: (C,) black, image units.
        high: (C,) white, image units.
        config: how to cut.

    Returns:
        (N, C, F, size, size) uint8.
    """
    positions = np.asarray(ids, np.int64) - 1
    sources = _sources(tracks, frames, bad, config)
    windows = sources.windows[positions]
    box = tracks.box[positions[:, None], windows]
    assert (box >= 0).all(), "a track that is in no usable frame has no clip"
    centre = (box[..., :2] + box[..., 2:]) // 2
    match config.window:
        case FixedWindow(size=size):
            sides = np.full(len(positions), size)
        case TrackWindow(max_size=max_size):
            sides = (box[..., 2:] - box[..., :2]).max(axis=(1, 2), initial=1).clip(max=max_size)
    corners = centre - sides[:, None, None] // 2

    n_channels, height, width = stack.shape[1:]
    clips = np.empty((len(positions), n_channels, len(frames), config.size, config.size), np.uint8)
    pad = int(sides.max(initial=0)) + 1
    field = np.zeros((n_channels, height + 2 * pad, width + 2 * pad), np.uint8)
    inside = field[:, pad : pad + height, pad : pad + width]
    for f, source in enumerate(sources.pixels):
        for channel in range(n_channels):
            plane = np.ascontiguousarray(stack[source, channel], np.float32)
            _to_uint8(plane, np.float32(low[channel]), np.float32(high[channel]), inside[channel])
        for i, (side, position) in enumerate(zip(sides, positions, strict=True)):
            top, left = corners[i, f]
            window = field[:, top + pad : top + pad + side, left + pad : left + pad + side]
            if config.mask == "soft":
                mask = _soft_mask(cells[windows[i, f]], int(position) + 1, top, left, side)
                window = np.stack([cv2.multiply(plane, mask, scale=1 / 255) for plane in window])
            _resize(window, clips[i, :, f])
    return clips


@numba.njit(cache=True, nogil=True)
def _to_uint8(plane: FloatArray, low: np.float32, high: np.float32, out: Plane8) -> None:
    """Scale (H, W) from [low, high] to [0, 255]; a range without width leaves black and white."""
    gain = np.float32(255) / max(high - low, np.float32(1e-12))
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            value = (plane[y, x] - low) * gain
            # A NaN fails both comparisons and stays black.
            level = np.float32(0)
            if value >= 255:
                level = np.float32(255)
            elif value > 0:
                level = value + np.float32(0.5)
            out[y, x] = np.uint8(level)


def _soft_mask(labels: npt.NDArray[np.int32], track: int, top: int, left: int, side: int) -> Plane8:
    """The mask of a cell in a window, 0 to 255, as if softened over the whole image."""
    margin = _SOFT_MASK // 2
    top, left, side = top - margin, left - margin, side + 2 * margin
    y0, x0 = max(top, 0), max(left, 0)
    inside = labels[y0 : max(top + side, 0), x0 : max(left + side, 0)] == track
    mask = np.zeros((side, side), np.uint8)
    mask[y0 - top : y0 - top + inside.shape[0], x0 - left : x0 - left + inside.shape[1]] = inside
    mask *= 255
    softened = cv2.blur(mask, (_SOFT_MASK, _SOFT_MASK), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(softened[margin:-margin, margin:-margin], np.uint8)


def _resize(window: Plane8, out: Plane8) -> None:
    size = out.shape[-1]
    if window.shape[-1] == size:
        out[:] = window
        return
    shrinks = window.shape[-1] > size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    for plane, target in zip(window, out, strict=True):
        target[:] = cv2.resize(plane, (size, size), interpolation=interpolation)
