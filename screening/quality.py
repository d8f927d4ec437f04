"""Image quality per frame and channel, and which frames of a movie are not fit to be looked at.

A frame is judged by the frames around it and by what is usual on its plate, never by a fixed level:
drugs change contrast and brightness over time, and that change is what a screen is after. Within a
movie only what dips and comes back is bad; against the plate only what is far out of its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from storage_schemas.base import Config

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# Why a frame is bad, the graver first.
NOT_FINITE = "not finite"
EMPTY = "empty"
SATURATED = "saturated"
DEBRIS = "debris"
SOFT = "soft"
FLAGS = (NOT_FINITE, EMPTY, SATURATED, DEBRIS, SOFT)

_MEASURES = ("focus", "saturated", "glare", "mean", "sd", "not_finite")

_FRAME_KEYS = ["plate", "well", "site", "frame"]

_CAMERA_CEILINGS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))

_GAUSSIAN = cv2.getGaussianKernel(5, 1)
_SMOOTHING = _GAUSSIAN @ _GAUSSIAN.T
_SECOND_DIFFERENCE = np.array([1.0, -2.0, 1.0])
# What is left of the variance of white noise in an image at half resolution (a mean of four pixels), smoothed, and
# in its Laplacian.
_NOISE_LEFT = float((_SMOOTHING**2).sum() / 4)
_NOISE_IN_EDGES = float((cv2.Laplacian(np.pad(_SMOOTHING, 2), cv2.CV_64F) ** 2).sum() / 4)
_NOISE_ROWS = 16  # noise is the same everywhere: every 16th row tells
_BLOCK = 8  # px, side of the blocks that glare is looked for in: hot pixels and noise average out


class QualityConfig(Config):
    """When a frame is bad."""

    neighbours: int = Field(
        5,
        ge=1,
        description="frames on each side to compare a frame with; sees runs of up to half as many",
    )
    soft: float = Field(
        0.6,
        ge=0,
        le=1,
        description="a frame is soft below this share of its neighbours' focus, mean over channels",
    )
    plate_soft: float = Field(
        0.4,
        ge=0,
        le=1,
        description="a frame is soft below this share of the plate's typical focus, mean over channels",
    )
    dropped: float = Field(
        0.1,
        ge=0,
        le=1,
        description="a frame is empty if a channel's sd falls below this share of its neighbours'",
    )
    plate_dropped: float = Field(
        0.05,
        ge=0,
        le=1,
        description="a frame is empty if every channel's sd is below this share of the plate's typical sd",
    )
    saturated: float = Field(
        0.1,
        gt=0,
        le=1,
        description="a frame is saturated if this share of a channel's pixels is, beyond the plate's typical share",
    )
    debris: float = Field(
        5.0,
        gt=1,
        description="a frame holds debris if 0.5 % of a channel shines this many times brighter than the plate's "
        "brightest fields do",
    )
    not_finite: float = Field(
        0.01, ge=0, le=1, description="a frame is lost if more than this share of a channel's pixels is NaN or infinite"
    )


@dataclass(frozen=True)
class PlateQuality:
    """What is usual on a plate, for frames to be compared with; NaN where no sampled frame tells.

    Attributes:
        focus: (C,) median focus.
        saturated: (C,) median share of saturated pixels.
        glare: (C,) 90th percentile of glare, camera units: fields of few cells must not make those of many
            look like debris.
        sd: (C,) median sd, camera units.
    """

    focus: FloatArray
    saturated: FloatArray
    glare: FloatArray
    sd: FloatArray


def measure(stack: npt.NDArray[Any]) -> pd.DataFrame:
    """Measure each plane of a movie.

    ``focus`` is the variance of the Laplacian of the smoothed plane (Pech-Pacheco et al. 2000) over
    the variance of the smoothed plane, both less what the camera's noise adds to them (its variance
    estimated after Immerkaer 1996): unlike the Laplacian alone it moves neither with intensity scale
    or offset nor with the number of cells, and a dim frame is not sharper for its noise.

    Args:
        stack: (T, C, H, W), any real dtype, as the camera gave it (a correction would hide
            saturation); non-finite pixels are left out.

    Returns:
        A row a frame and channel, in that order: frame and channel (int), focus (no unit, NaN for
        a plane that is constant or all noise), saturated (share of pixels at the channel's highest
        value, if that is a camera's ceiling of 8 to 16 bit), glare (stack units: how far the
        brightest 0.5 % of the plane, in blocks of 8 px, is above its median), mean and sd (stack
        units, NaN for a plane without finite pixels), not_finite (share of pixels).
    """
    ceilings = []
    for channel in range(stack.shape[1]):
        # A lost plane has no highest value, which must not hide the others'.
        top = np.fmax.reduce([float(np.fmax.reduce(plane, axis=None)) for plane in stack[:, channel]])
        ceilings.append(top if top in _CAMERA_CEILINGS else np.inf)
    rows = [
        (frame, channel, *_measure_plane(stack[frame, channel], ceilings[channel]))
        for frame, channel in np.ndindex(stack.shape[:2])
    ]
    types = {"frame": np.int32, "channel": np.int32} | dict.fromkeys(_MEASURES, np.float64)
    return pd.DataFrame(rows, columns=list(types)).astype(types)


def typical(measures: pd.DataFrame) -> PlateQuality:
    """What is usual over the frames of :func:`measure`, of one site or of many."""
    finite = measures[measures["not_finite"] == 0].groupby("channel")
    channels = range(int(measures["channel"].max()) + 1)
    medians = finite[["focus", "saturated", "sd"]].median().reindex(channels)
    return PlateQuality(
        medians["focus"].to_numpy(np.float64),
        medians["saturated"].to_numpy(np.float64),
        finite["glare"].quantile(0.9).reindex(channels).to_numpy(np.float64),
        medians["sd"].to_numpy(np.float64),
    )


def flag(measures: pd.DataFrame, plate: PlateQuality, config: QualityConfig) -> pd.DataFrame:
    """Say which frames of one movie are bad, and why.

    - ``not finite``: more than a share of a channel's pixels is NaN or infinite;
    - ``empty``: contrast (sd) lost in a channel against the frames around it; or no contrast in any
      channel, or next to none against the plate in every one; or one value all over a channel that
      has contrast elsewhere on the plate;
    - ``saturated``: more of a channel at the camera's ceiling than is usual on the plate;
    - ``debris``: part of a channel shines far brighter than anything usual on the plate;
    - ``soft``: focus, over all channels, below that of the frames around it or far below the plate's.

    Against its neighbours a frame is compared with the median of the frames before it and with that
    of the frames after it, and must fall short of both: a movie whose contrast fades, or changes in
    one step and stays, has no such frame inside. The first and last frame have one side only, and a
    movie of one frame none.

    Args:
        measures: of :func:`measure`, one movie.
        plate: what is usual on its plate.
        config: the thresholds.

    Returns:
        The measures in the order of frame and channel, with ``flags`` (str: why the channel makes its
        frame bad, joined by ", "; "" where it does not) and ``bad`` (bool: the frame is bad, for one
        channel or another).
    """
    tables = measures.pivot(index="frame", columns="channel")
    focus, saturated, glare, sd, not_finite = (
        tables[name].to_numpy(np.float64) for name in ("focus", "saturated", "glare", "sd", "not_finite")
    )
    dropped = sd < config.dropped * _around(sd, config.neighbours)
    constant = (sd == 0) & (plate.sd > 0)
    blank = np.all(sd <= config.plate_dropped * np.nan_to_num(plate.sd), axis=1)
    soft = (_mean_ratio(focus, _around(focus, config.neighbours)) < config.soft) | (
        _mean_ratio(focus, plate.focus) < config.plate_soft
    )
    found = {
        NOT_FINITE: not_finite > config.not_finite,
        EMPTY: dropped | constant | blank[:, None],
        SATURATED: saturated > np.nan_to_num(plate.saturated) + config.saturated,
        DEBRIS: glare > config.debris * np.where(plate.glare > 0, plate.glare, np.nan),
        SOFT: np.broadcast_to(soft[:, None], focus.shape),
    }
    reasons = np.stack([found[name] for name in FLAGS], axis=-1)
    bad = reasons.any(axis=(1, 2))
    return measures.sort_values(["frame", "channel"], ignore_index=True).assign(
        flags=[", ".join(np.array(FLAGS)[row]) for row in reasons.reshape(-1, len(FLAGS))],
        bad=np.repeat(bad, len(plate.sd)),
    )


def flags_of_frames(judged: pd.DataFrame) -> pd.DataFrame:
    """A row a flag and frame that it holds of in one channel or another: plate, well, site, frame and flag.

    Args:
        judged: of :func:`flag`, of any number of sites, with their keys.
    """
    rows = judged.assign(flag=judged["flags"].str.split(", ")).explode("flag")
    return rows.loc[rows["flag"] != "", [*_FRAME_KEYS, "flag"]].drop_duplicates(ignore_index=True)


def limits(plate: PlateQuality, channels: Sequence[str], config: QualityConfig) -> pd.DataFrame:
    """A row a channel: what is usual on a plate, and beyond which value a frame is bad against it.

    The limit of focus is what each channel would have if all were as soft: it is their mean that counts.
    """
    return pd.DataFrame(
        {
            "channel": channels,
            "usual_focus": plate.focus,
            "soft_below": config.plate_soft * plate.focus,
            "usual_sd": plate.sd,
            "empty_below": config.plate_dropped * plate.sd,
            "usual_saturated": plate.saturated,
            "saturated_above": np.nan_to_num(plate.saturated) + config.saturated,
            "usual_glare": plate.glare,
            "debris_above": config.debris * plate.glare,
        }
    )


def summarise(judged: pd.DataFrame) -> pd.DataFrame:
    """A row a plate: sites, sites_flagged, frames, the share of them that is bad, and the share that has each flag.

    Args:
        judged: of :func:`flag`, of any number of sites, with their keys and ``site_flag``.
    """
    frames = judged.drop_duplicates(_FRAME_KEYS)
    sites = frames.drop_duplicates(_FRAME_KEYS[:3])
    n_frames = frames.groupby("plate").size()
    table = pd.DataFrame(
        {
            "sites": sites.groupby("plate").size(),
            "sites_flagged": (sites["site_flag"] != "").groupby(sites["plate"]).sum(),
            "frames": n_frames,
            "bad": frames.groupby("plate")["bad"].mean(),
        }
    )
    flagged = flags_of_frames(judged).groupby(["plate", "flag"]).size().unstack().reindex(table.index, columns=FLAGS)
    return table.join(flagged.fillna(0).div(n_frames, axis=0)).reset_index()


def worst_sites(judged: pd.DataFrame, n: int) -> pd.DataFrame:
    """The sites with a flag or a bad frame, the worst first, at most ``n``.

    Args:
        judged: as for :func:`summarise`.
        n: how many.

    Returns:
        A row a site: plate, well, site, site_flag, bad (share of its frames) and flags (those of its frames).
    """
    keys = _FRAME_KEYS[:3]
    sites = judged.drop_duplicates(_FRAME_KEYS).groupby(keys).agg({"site_flag": "first", "bad": "mean"})
    flags = (
        flags_of_frames(judged).groupby(keys)["flag"].agg(lambda found: ", ".join(f for f in FLAGS if f in set(found)))
    )
    table = sites.assign(flags=flags.reindex(sites.index).fillna("")).reset_index()
    table = table[(table["bad"] > 0) | (table["site_flag"] != "")]
    worst = table.assign(used=table["site_flag"] == "").sort_values(
        ["used", "bad"], ascending=[True, False], kind="stable"
    )
    return worst.drop(columns="used").head(n).reset_index(drop=True)


def _measure_plane(plane: npt.NDArray[Any], ceiling: float) -> tuple[float, ...]:
    """The measures of one plane, in the order of ``_MEASURES``."""
    saturated = np.count_nonzero(plane == ceiling) / plane.size if np.isfinite(ceiling) else 0.0
    not_finite = 0.0
    # Other dtypes than these OpenCV does not reduce.
    if plane.dtype not in (np.uint8, np.uint16, np.float32):
        plane = plane.astype(np.float32)
    if plane.dtype == np.float32:
        finite = np.isfinite(plane)
        not_finite = 1 - np.count_nonzero(finite) / plane.size
        if not_finite == 1:
            return np.nan, saturated, np.nan, np.nan, np.nan, not_finite
        if not_finite:
            plane = np.where(finite, plane, plane[finite].mean())
    mean, sd = (float(value.item()) for value in cv2.meanStdDev(plane))
    # At half resolution, slightly smoothed: else edges would be mostly camera noise.
    half = _shrunk(plane, 2).astype(np.float32)
    blocks = _shrunk(half, _BLOCK // 2).ravel()
    top = int(0.995 * (blocks.size - 1))
    middle = (blocks.size - 1) // 2
    ordered = np.partition(blocks, (middle, top))
    glare = float(ordered[top] - ordered[middle])
    return _focus(plane, half), saturated, glare, mean, sd, not_finite


def _focus(plane: npt.NDArray[Any], half: npt.NDArray[np.float32]) -> float:
    noise = _noise_variance(plane)
    smooth = cv2.GaussianBlur(half, (5, 5), 1)
    contrast = _variance(smooth)
    signal = contrast - _NOISE_LEFT * noise
    # Rounding leaves a variance in constant planes too; and what is mostly noise has no focus.
    if contrast <= 1e-12 * float(smooth[0, 0]) ** 2 or signal <= _NOISE_LEFT * noise:
        return float("nan")
    return max(_variance(cv2.Laplacian(smooth, cv2.CV_32F)) - _NOISE_IN_EDGES * noise, 0.0) / signal


def _noise_variance(plane: npt.NDArray[Any]) -> float:
    """Variance of white noise, from second differences along both axes, which smooth structure hardly has.

    The median keeps the edges out (Immerkaer 1996 takes the mean, which lets them in).
    """
    if min(plane.shape) < 3:
        return 0.0
    rows = np.arange(0, plane.shape[0] - 2, _NOISE_ROWS)
    down = sum(
        weight * plane[rows + i].astype(np.float32) for i, weight in enumerate(_SECOND_DIFFERENCE.astype(np.float32))
    )
    both = down[:, :-2] - 2 * down[:, 1:-1] + down[:, 2:]
    spread = float(np.median(np.abs(both))) / 0.6745
    return spread**2 / float((_SECOND_DIFFERENCE**2).sum() ** 2)


def _shrunk(plane: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    height, width = plane.shape
    size = (max(1, width // factor), max(1, height // factor))
    return cv2.resize(plane, size, interpolation=cv2.INTER_AREA)


def _variance(plane: npt.NDArray[Any]) -> float:
    return float(cv2.meanStdDev(plane)[1].item()) ** 2


def _mean_ratio(values: FloatArray, reference: FloatArray) -> FloatArray:
    """Mean over channels of what a frame has of its reference, (T,); NaN where nothing can be compared."""
    ratio = values / np.where(reference > 0, reference, np.nan)
    known = np.isfinite(ratio)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, ratio, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _around(values: FloatArray, neighbours: int) -> FloatArray:
    """The lower of the medians of the frames before and after each, (T, C); NaN without any."""
    around = np.full_like(values, np.nan)
    for frame in range(len(values)):
        for side in (values[max(0, frame - neighbours) : frame], values[frame + 1 :][:neighbours]):
            for channel, column in enumerate(side.T):
                finite = column[np.isfinite(column)]
                if finite.size:
                    around[frame, channel] = np.fmin(around[frame, channel], np.median(finite))
    return around
