"""Image quality per frame and channel, and which frames of a movie are not fit to be looked at.

A frame is judged by the frames around it, never by a fixed level: drugs change contrast and
brightness over time, and that change is what a screen is after. Only what dips and comes back, or
shows nothing at all, is called bad.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from storage_schemas.base import Config

FloatArray = npt.NDArray[np.float64]

_CAMERA_CEILINGS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))


def _laplacian(plane: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The Laplacian at half resolution, slightly smoothed: else it would be mostly camera noise."""
    size = (max(1, plane.shape[1] // 2), max(1, plane.shape[0] // 2))
    half = cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    return cv2.Laplacian(cv2.GaussianBlur(half, (5, 5), 1), cv2.CV_32F)


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
    dropped: float = Field(
        0.1,
        ge=0,
        le=1,
        description="a frame is empty if a channel's sd falls below this share of its neighbours'",
    )
    saturated: float = Field(
        0.2,
        gt=0,
        le=1,
        description="a frame is saturated if more than this share of a channel's pixels is",
    )


def measure(stack: npt.NDArray[Any]) -> pd.DataFrame:
    """Measure each plane of a movie.

    ``focus`` is the variance of the Laplacian of the smoothed plane (Pech-Pacheco et al.
    2000) over the variance of the plane: unlike the Laplacian alone, it does not move with
    intensity scale or offset.

    Args:
        stack: (T, C, H, W), any real dtype, as the camera gave it (a correction would hide
            saturation); non-finite pixels are left out.

    Returns:
        A row a frame and channel, in that order: frame and channel (int), focus (no unit, NaN for
        a constant plane), saturated (share of pixels at the channel's highest value, if that is a
        camera's ceiling of 8 to 16 bit), mean and sd (stack units, NaN for a plane without finite
        pixels).
    """
    ceilings = []
    for channel in range(stack.shape[1]):
        top = float(np.fmax.reduce(stack[:, channel], axis=None))
        ceilings.append(top if top in _CAMERA_CEILINGS else np.inf)
    rows = [
        (frame, channel, *_measure_plane(stack[frame, channel], ceilings[channel]))
        for frame, channel in np.ndindex(stack.shape[:2])
    ]
    columns = ["frame", "channel", "focus", "saturated", "mean", "sd"]
    types = dict.fromkeys(columns[:2], np.int32) | dict.fromkeys(columns[2:], np.float64)
    return pd.DataFrame(rows, columns=columns).astype(types)


def _measure_plane(plane: npt.NDArray[Any], ceiling: float) -> tuple[float, float, float, float]:
    saturated = np.count_nonzero(plane == ceiling) / plane.size if np.isfinite(ceiling) else 0.0
    plane = plane.astype(np.float32)
    finite = np.isfinite(plane)
    if not finite.all():
        if not finite.any():
            return np.nan, saturated, np.nan, np.nan
        plane[~finite] = plane[finite].mean()
    mean, sd = (float(value.item()) for value in cv2.meanStdDev(plane))
    if sd == 0:
        return np.nan, saturated, mean, sd
    _, edges = cv2.meanStdDev(_laplacian(plane))
    return float(edges.item() / sd) ** 2, saturated, mean, sd


def flag_frames(measures: pd.DataFrame, config: QualityConfig) -> npt.NDArray[np.bool_]:
    """Say which frames of one movie are soft, empty or saturated.

    Soft is focus below that of the neighbours, over all channels; empty is contrast (sd) lost in a
    channel against its neighbours, or not there in any; saturated is a channel at its ceiling.

    A frame is compared with the median of the frames before it and with that of the frames after
    it, and must fall short of both: a movie whose contrast fades, or changes in one step and
    stays, has no such frame inside. The first and last frame have one side only, and a movie of
    one frame none: nothing in it is soft.

    Args:
        measures: of :func:`measure`, one movie.
        config: the thresholds.

    Returns:
        (T,) bool, True for bad frames, in the order of ``frame``.
    """
    focus, saturated, sd = (
        measures.pivot(index="frame", columns="channel", values=name).to_numpy(np.float64)
        for name in ("focus", "saturated", "sd")
    )
    ratio = focus / _typical(focus, config.neighbours)
    known = np.isfinite(ratio)
    mean_ratio = np.where(known, ratio, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    soft = known.any(axis=1) & (mean_ratio < config.soft)

    typical_sd = _typical(sd, config.neighbours)
    # Written with "not at least", so that an sd of NaN (a plane without finite pixels) counts as
    # dropped.
    dropped = (np.isfinite(typical_sd) & ~(sd >= config.dropped * typical_sd)).any(axis=1)
    blank = ~(sd > 0).any(axis=1)
    return np.asarray(soft | dropped | blank | (saturated > config.saturated).any(axis=1))


def _typical(values: FloatArray, neighbours: int) -> FloatArray:
    """The lower of the medians of the frames before and after each, (T, C); NaN without any."""
    typical = np.full_like(values, np.nan)
    for frame in range(len(values)):
        for side in (values[max(0, frame - neighbours) : frame], values[frame + 1 :][:neighbours]):
            for channel, column in enumerate(side.T):
                finite = column[np.isfinite(column)]
                if finite.size:
                    typical[frame, channel] = np.fmin(typical[frame, channel], np.median(finite))
    return typical
