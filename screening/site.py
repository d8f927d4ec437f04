"""From one site's images to its tracked cells, their measures and their clips: the pure part of `segment`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from screening import clips, features, quality, segmentation, tracking
from screening.clips import ClipsConfig
from screening.features import Tracks
from screening.illumination import Calibration, FlatField, IlluminationConfig, correct
from screening.quality import QualityConfig
from screening.segmentation import CellsConfig, NucleiConfig
from screening.tracking import TrackingConfig
from storage_schemas.base import Config
from storage_schemas.errors import InputError
from storage_schemas.plate import Projection


class ChannelsConfig(Config):
    """Which of the plates' channels is what."""

    nucleus: str = Field(description="channel that nuclei are found in", examples=["nucleus"])
    cytoplasm: str | None = Field(
        None, description="channel that cells are found in; null: cells are grown around nuclei"
    )
    clips: tuple[str, ...] | None = Field(
        None, description="channels of the clips, in order; null: all that the plates have"
    )


class SegmentConfig(Config):
    """From plates to single-cell clips."""

    channels: ChannelsConfig = Field(description="which of the plates' channels is what")
    projection: Projection = Field("max", description="how a z axis is projected: max or mean")
    illumination: IlluminationConfig = Field(FlatField(), description="correction of uneven illumination")
    quality: QualityConfig = Field(QualityConfig(), description="what counts as a bad frame")
    nuclei: NucleiConfig = Field(NucleiConfig(), description="segmentation of nuclei")
    cells: CellsConfig = Field(CellsConfig(), description="segmentation of cells")
    tracking: TrackingConfig = Field(TrackingConfig(), description="tracking over time")
    clips: ClipsConfig = Field(ClipsConfig(), description="single-cell clips")
    labels: bool = Field(True, description="write labels beside the plates' images (NGFF image-labels) for viewers")


@dataclass(frozen=True)
class Site:
    """What is known of a site once its cells have been found and followed.

    Attributes:
        nuclei: (T, H, W) int32, one value a track.
        cells: (T, H, W) int32, the same tracks' whole cells.
        tracks: measures of the tracks.
        parents: track, parent and frame of each division.
        quality: measures of the frames (see :func:`screening.quality.measure`) and ``bad``.
        frames: (F,) frames of the movie that the clips are made of.
        selection: a row a track (see :func:`screening.clips.select`) and ``clip``, the position of its clip.
        clips: (N, C', F, size, size) uint8, of the tracks that are not excluded, in order.
    """

    nuclei: npt.NDArray[np.int32]
    cells: npt.NDArray[np.int32]
    tracks: Tracks
    parents: pd.DataFrame
    quality: pd.DataFrame
    frames: npt.NDArray[np.int64]
    selection: pd.DataFrame
    clips: npt.NDArray[np.uint8]


def process_site(
    stack: npt.NDArray[Any],
    channels: tuple[str, ...],
    calibration: Calibration,
    config: SegmentConfig,
) -> Site:
    """Correct, judge, segment, track, measure and cut one site.

    Args:
        stack: (T, C, H, W), any real dtype, as the camera gave it.
        channels: C names.
        calibration: of the site's plate.
        config: how each step is done.

    Raises:
        InputError: if the movie is blank, holds NaN, lacks a channel, or is too short for a clip.
    """
    if stack.min() == stack.max():
        raise InputError(f"every pixel is {stack.flat[0]}: chunks are missing or the camera was off")
    nucleus = _position(channels, config.channels.nucleus)
    picks = [_position(channels, name) for name in config.channels.clips or channels]
    frames = clips.choose_frames(len(stack), config.clips)
    measures = quality.measure(stack)
    bad = quality.flag_frames(measures, config.quality)
    corrected = correct(stack, calibration)

    nuclei = np.stack([segmentation.segment_nuclei(plane, config.nuclei) for plane in corrected[:, nucleus]])
    nuclei, parents = tracking.link(nuclei, config.tracking)
    # Cells take the numbers of their nuclei, so what was linked as nuclei is linked as cells.
    cytoplasm = config.channels.cytoplasm
    seen = None if cytoplasm is None else corrected[:, _position(channels, cytoplasm)]
    cells = np.stack(
        [
            segmentation.segment_cells(None if seen is None else seen[t], nuclei[t], config.cells)
            for t in range(len(stack))
        ]
    )
    tracks = features.measure(nuclei, cells, corrected, channels, calibration.low)
    selection = clips.select(tracks, frames, bad, stack.shape[2:], config.clips)
    kept = selection["excluded"] == clips.KEPT
    selection["clip"] = pd.array(np.where(kept, kept.cumsum() - 1, -1), dtype="Int32")
    selection.loc[~kept, "clip"] = pd.NA
    low, high = clips.intensity_range(corrected, calibration, config.clips.scaling)
    return Site(
        nuclei,
        cells,
        tracks,
        parents,
        measures.assign(bad=bad[measures["frame"].to_numpy()]),
        frames,
        selection,
        clips.cut(
            corrected[:, picks],
            cells,
            tracks,
            selection.loc[kept, "track"].to_numpy(),
            frames,
            bad,
            low[picks],
            high[picks],
            config.clips,
        ),
    )


def _position(channels: tuple[str, ...], name: str) -> int:
    if name not in channels:
        raise InputError(f"has no channel {name!r}; its channels are {list(channels)}")
    return channels.index(name)
