"""Clips: for each tracked cell a small movie in a window that follows it, the input of the network.

Which frames, which cells and why not the others, and the cut itself. Follows MitoReID's
preparation, except that one soft frame costs a repair and not the field, and that intensities are
scaled per plate and not per image, so that they can be compared between wells. The rules in one
place, for readers: ``docs/cells.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeAlias

import cv2
import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from screening.features import Tracks
from storage_schemas.base import Config
from storage_schemas.clips import WHITE, Clips, ClipType, Ranges
from storage_schemas.errors import InputError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Frames = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8 | np.uint16 | np.float32]

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
    low: tuple[float, ...] = Field(
        (0.0,), min_length=1, description="black, image units; one for all channels of the clips or one each"
    )
    high: tuple[float, ...] = Field(
        (65535.0,), min_length=1, description="white, image units; one for all channels of the clips or one each"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if len(self.low) != len(self.high) and 1 not in (len(self.low), len(self.high)):
            raise ValueError(f"low has {len(self.low)} values and high {len(self.high)}: give 1 or as many")
        if not np.all(np.array(self.low) < np.array(self.high)):
            raise ValueError("low must be below high in each channel")
        return self

    def ends(self, n_channels: int) -> tuple[FloatArray, FloatArray]:
        """Black and white of each channel, (C,) each.

        Raises:
            InputError: if there are values for another number of channels.
        """
        for name, values in (("low", self.low), ("high", self.high)):
            if len(values) not in (1, n_channels):
                raise InputError(
                    f"segment.clips.scaling.{name} has {len(values)} values for the {n_channels} channels of the "
                    f"clips: give 1 or {n_channels}"
                )
        low, high = (np.broadcast_to(np.array(values, np.float32), n_channels) for values in (self.low, self.high))
        return low, high


class CellScaling(_Percentiles):
    """One range per cell and channel, of its own pixels over the clip: only form and course are left, not brightness.

    Percentiles 0 and 100 give min-max.
    """

    method: Literal["cell"] = Field("cell", description="one range per cell and channel")


Scaling: TypeAlias = PlateScaling | SiteScaling | FixedScaling | CellScaling


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
    padding: Literal["black", "edge"] = Field(
        "black", description="what a window shows beyond the image: black, or the image's edge pixels continued"
    )
    scaling: Annotated[Scaling, Field(discriminator="method")] = Field(
        PlateScaling(), description="which intensities become black and white"
    )
    dtype: ClipType = Field(
        "uint8", description="type of the stored pixels; black is 0, white 255 (uint8), 65535 (uint16) or 1 (float16)"
    )
    store: Literal["all", "sample", "none"] = Field(
        "all",
        description="clips that are kept on disk: all, a sample to look at, or none; with sample and none cells are "
        "embedded as they are cut out, by a trained `network`",
    )
    sample: int = Field(16, ge=1, description="clips of a well that store sample keeps, about: as many of each site")
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


def intensity_ranges(
    stack: npt.NDArray[Any],
    cells: npt.NDArray[np.int32],
    tracks: Tracks,
    ids: npt.NDArray[np.integer[Any]],
    frames: Frames,
    bad: BoolArray,
    low: FloatArray,
    high: FloatArray,
    config: ClipsConfig,
) -> Ranges:
    """What becomes black and white in each channel of the clips of some tracks.

    Args:
        stack: (T, C, H, W), the corrected site, with the channels of the clips.
        cells: (T, H, W) int32, pixels of track i have value i.
        tracks: of the site.
        ids: (N,) tracks, as for :func:`cut`.
        frames: (F,) of :func:`choose_frames`.
        bad: (T,) bool, frames not fit to be shown.
        low: (C,) black of the plate, for the :class:`PlateScaling`, at whose percentile it is.
        high: (C,) white of the plate, likewise.
        config: the rules.

    Raises:
        InputError: if a fixed scaling has values for another number of channels.
    """
    match config.scaling:
        case SiteScaling() as scaling:
            low, high = np.array([_percentiles(plane, scaling) for plane in stack.swapaxes(0, 1)], np.float32).T
        case FixedScaling() as scaling:
            low, high = scaling.ends(stack.shape[1])
        case CellScaling() as scaling:
            return _cell_ranges(stack, cells, ids, _sources(tracks, frames, bad, config), tracks, scaling)
    shape = len(ids), stack.shape[1]
    return Ranges(np.broadcast_to(low, shape), np.broadcast_to(high, shape))


def _percentiles(planes: npt.NDArray[Any], scaling: _Percentiles) -> FloatArray:
    """Of the finite pixels (T, H, W), about a million of them at most; (2,), nothing if there are none."""
    step = max(1, math.isqrt(planes.size // 2**20))
    pixels = planes[:, ::step, ::step]
    finite = pixels[np.isfinite(pixels)]
    ends = np.percentile(finite, (scaling.low, scaling.high)) if finite.size else np.zeros(2)
    return np.asarray(ends, np.float32)


def _cell_ranges(
    stack: npt.NDArray[Any],
    cells: npt.NDArray[np.int32],
    ids: npt.NDArray[np.integer[Any]],
    sources: _Sources,
    tracks: Tracks,
    scaling: CellScaling,
) -> Ranges:
    ranges = np.zeros((len(ids), stack.shape[1], 2), np.float32)
    for i, track in enumerate(ids):
        windows = sources.windows[track - 1]
        own = []
        for pixels, window in zip(sources.pixels, windows, strict=True):
            y0, x0, y1, x1 = tracks.box[track - 1, window]
            own.append(stack[pixels, :, y0:y1, x0:x1][:, cells[window, y0:y1, x0:x1] == track])
        ranges[i] = [_percentiles(values[:, None, None], scaling) for values in np.concatenate(own, axis=1)]
    return Ranges(ranges[..., 0], ranges[..., 1])


def too_many_bad(bad: BoolArray, frames: Frames, config: ClipsConfig) -> bool:
    """Whether a movie with bad frames (T,) bool gives no clips of its frames (F,) at all."""
    return bool(bad[frames].mean() > config.max_bad or bad.all())


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
        BAD_FRAMES: np.full(n_tracks, too_many_bad(bad, frames, config)),
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
) -> Clips:
    """Cut the clips of some tracks.

    A window is centred on the cell's box in each frame (centre rounded down); beyond the image it
    shows what ``padding`` says. Where the cell is missing, the window and mask are those of the
    nearest frame that has it; with ``repair``, bad frames show the nearest good frame. Black is
    ``low`` and white ``high``, cut off beyond and rounded to ``dtype`` *before* masking and
    resizing, so without these a clip's pixel is the image's pixel; NaN is black. Larger windows are
    averaged down to ``size`` (area), smaller ones interpolated (linear).

    Args:
        stack: (T, C, H, W), the corrected site, any real dtype.
        cells: (T, H, W) int32, pixels of track i have value i.
        tracks: of the site.
        ids: (N,) tracks to cut, each present in a usable frame (as those kept by :func:`select`
            are).
        frames: (F,) of :func:`choose_frames`.
        bad: (T,) bool, frames not fit to be shown.
        low: (C,) or (N, C) black, image units (:func:`intensity_ranges`).
        high: (C,) or (N, C) white, image units.
        config: how to cut.

    Returns:
        (N, C, F, size, size) of the type ``config.dtype``, from 0 (black) to white as
        :data:`storage_schemas.clips.WHITE` says.
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
    low, high = (np.broadcast_to(end, (len(positions), n_channels)) for end in (low, high))
    # A range that all clips share is applied to the whole image, for windows overlap.
    shared = bool((low == low[:1]).all() and (high == high[:1]).all())
    white = np.float32(WHITE[config.dtype])
    work = np.dtype(np.float32 if config.dtype == "float16" else config.dtype)
    clips = np.zeros((len(positions), n_channels, len(frames), config.size, config.size), config.dtype)
    # Nothing is left to be done with a window that is a clip's frame as it is.
    as_shown = work == clips.dtype and bool((sides == config.size).all())
    pad = int(sides.max(initial=0)) + 1
    padded = (n_channels, height + 2 * pad, width + 2 * pad)
    # What is not a number becomes black once it is scaled.
    field = np.zeros(padded, work) if shared else np.full(padded, np.nan, np.float32)
    inside = field[:, pad : pad + height, pad : pad + width]
    for f, source in enumerate(sources.pixels if len(positions) else ()):
        for channel in range(n_channels):
            if shared:
                plane = np.ascontiguousarray(stack[source, channel], np.float32)
                _scale(plane, low[0, channel], high[0, channel], white, inside[channel])
            else:
                inside[channel] = stack[source, channel]
        if config.padding == "edge":
            _continue_edges(field, pad)
        for i, (side, (y, x)) in enumerate(zip(sides.tolist(), (corners[:, f] + pad).tolist(), strict=True)):
            window, out = field[:, y : y + side, x : x + side], clips[i, :, f]
            if not shared:
                raw, window = window, np.empty(window.shape, work)
                for channel, plane in enumerate(raw):
                    _scale(plane, low[i, channel], high[i, channel], white, window[channel])
            if config.mask == "soft":
                masked = out if as_shown else np.zeros(window.shape, work)
                _mask(window, cells[windows[i, f]], positions[i] + 1, corners[i, f], box[i, f], masked)
                window = masked
            if window is not out:
                _store(window, out)
    return clips


@numba.njit(cache=True, nogil=True)
def _scale(plane: FloatArray, low: np.float32, high: np.float32, white: np.float32, out: Pixels) -> None:
    """Scale (H, W) from [low, high] to [0, white], rounded into integers; a range without width leaves both ends."""
    gain = white / max(high - low, np.float32(1e-12))
    half = np.float32(0.5 * (out.itemsize < 4))
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            value = (plane[y, x] - low) * gain
            # A NaN fails both comparisons and stays black.
            level = np.float32(0)
            if value >= white:
                level = white
            elif value > 0:
                level = value + half
            out[y, x] = level


def _continue_edges(field: Pixels, pad: int) -> None:
    """Fill the border of (C, H, W), ``pad`` wide, with the nearest pixels of what it surrounds."""
    inner = slice(pad, -pad)
    field[:, :pad, inner], field[:, -pad:, inner] = field[:, pad, None, inner], field[:, -pad - 1, None, inner]
    field[..., :pad], field[..., -pad:] = field[..., pad, None], field[..., -pad - 1, None]


@numba.njit(cache=True, nogil=True)
def _mask(
    window: Pixels,
    labels: npt.NDArray[np.int32],
    track: int,
    corner: IntArray,
    box: npt.NDArray[np.int32],
    out: Pixels,
) -> None:
    """Multiply a window (C, side, side) whose corner lies at (y, x) by the cell's mask, softened by a mean.

    ``out`` is 0 on entry and is written to only as far from the cell's box as the mean reaches.
    """
    side, reach = window.shape[-1], _SOFT_MASK // 2
    top, left = corner
    y0, x0 = max(box[0] - reach, top), max(box[1] - reach, left)
    y1, x1 = min(box[2] + reach, top + side), min(box[3] + reach, left + side)
    height, width = max(y1 - y0, 0), max(x1 - x0, 0)
    # Pixels of the cell above and to the left; nothing lies outside of the image.
    total = np.zeros((height + _SOFT_MASK, width + _SOFT_MASK), np.int32)
    for i in range(1, len(total)):
        y, row = y0 - reach + i - 1, 0
        for j in range(1, total.shape[1]):
            x = x0 - reach + j - 1
            if 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] and labels[y, x] == track:
                row += 1
            total[i, j] = total[i - 1, j] + row
    half = np.float32(0.5 * (out.itemsize < 4))
    for i in range(height):
        above, below = total[i], total[i + _SOFT_MASK]
        for channel in range(len(window)):
            source, target = window[channel, y0 - top + i, x0 - left :], out[channel, y0 - top + i, x0 - left :]
            for j in range(width):
                count = below[j + _SOFT_MASK] - below[j] - above[j + _SOFT_MASK] + above[j]
                target[j] = source[j] * (np.float32(count) / np.float32(_SOFT_MASK**2)) + half


def _store(window: Pixels, out: Clips) -> None:
    """Resize a window (C, side, side) to a clip's frame (C, size, size)."""
    size = out.shape[-1]
    if window.shape[-1] != size:
        shrinks = window.shape[-1] > size
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        window = np.stack([cv2.resize(plane, (size, size), interpolation=interpolation) for plane in window])
    out[:] = window
