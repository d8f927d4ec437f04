"""From one site's images to its tracked cells, their measures and their clips: the pure part of `segment`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from screening import cellpose_model, clips, features, network, quality, segmentation, tracking
from screening.cellpose_model import CellposeConfig
from screening.clips import ClipsConfig
from screening.features import Tracks
from screening.illumination import Calibration, FlatField, IlluminationConfig, correct
from screening.network import NetworkConfig
from screening.quality import QualityConfig
from screening.segmentation import CellsConfig, NucleiConfig
from screening.tracking import TrackingConfig
from storage_schemas.base import Config
from storage_schemas.clips import Clips, Ranges
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
    network: str | None = Field(
        None, description="channel of mitochondria, whose network is measured; null: no such measures, at no cost"
    )


class SegmentConfig(Config):
    """From plates to single-cell clips."""

    channels: ChannelsConfig = Field(description="which of the plates' channels is what")
    projection: Projection = Field("max", description="how a z axis is projected: max or mean")
    alike: bool = Field(
        True,
        description="sites of a plate are alike: one of other size or length fails, and frames are judged against the "
        "plate; false for movies of different origin brought together in one plate",
    )
    illumination: IlluminationConfig = Field(FlatField(), description="correction of uneven illumination")
    quality: QualityConfig = Field(QualityConfig(), description="what counts as a bad frame")
    nuclei: Annotated[NucleiConfig | CellposeConfig, Field(discriminator="method")] = Field(
        NucleiConfig(), description="segmentation of nuclei"
    )
    cells: Annotated[CellsConfig | CellposeConfig, Field(discriminator="method")] = Field(
        CellsConfig(), description="segmentation of cells"
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="tracking over time")
    network: NetworkConfig = Field(NetworkConfig(), description="mitochondrial network of channels.network")
    clips: ClipsConfig = Field(ClipsConfig(), description="single-cell clips")
    labels: bool = Field(True, description="write labels beside the plates' images (NGFF image-labels) for viewers")

    @model_validator(mode="after")
    def _networks_see_cells(self) -> Self:
        if isinstance(self.cells, CellposeConfig) and self.channels.cytoplasm is None:
            raise ValueError("cells.method cellpose needs an image of the cells: set channels.cytoplasm")
        return self


# Why a site is left out, in words that failures are counted by.
Fault = Literal["channels", "frames", "shape", "blank"]

NO_CELLS = "no cells"  # beside the flags of frames, the one reason for which a whole site gives nothing


class SiteError(InputError):
    """A site that cannot be used.

    Args:
        fault: why, for counting.
        problem: what was found and what was expected.
    """

    def __init__(self, fault: Fault, problem: str) -> None:
        super().__init__(problem)
        self.fault = fault

    def __reduce__(self) -> tuple[type[SiteError], tuple[Fault, str]]:
        # The default pickles args=(message,), which does not fit __init__; errors cross Ray processes.
        return type(self), (self.fault, str(self))


@dataclass(frozen=True)
class SiteForm:
    """What the sites of a plate have in common.

    Attributes:
        channels: names.
        shape: (T, C, H, W).
    """

    channels: tuple[str, ...]
    shape: tuple[int, int, int, int]


@dataclass(frozen=True)
class Site:
    """What is known of a site once its cells have been found and followed.

    Attributes:
        nuclei: (T, H, W) int32, one value a track.
        cells: (T, H, W) int32, the same tracks' whole cells.
        tracks: measures of the tracks.
        parents: track, parent and frame of each division.
        quality: measures of the frames (see :func:`screening.quality.flag`), with ``n_nuclei`` (objects found in the
            frame), ``drift_y`` and ``drift_x`` (px, see :class:`screening.tracking.Tracking`) and ``site_flag`` (why
            the whole site gives no clips; "" if it is not for its images).
        frames: (F,) frames of the movie that the clips are made of.
        selection: a row a track (see :func:`screening.clips.select`) and ``clip``, the position of its clip.
        clips: (N, C', F, size, size), of the tracks that are not excluded, in order.
        ranges: intensities that each of the clips shows as black and white.
    """

    nuclei: npt.NDArray[np.int32]
    cells: npt.NDArray[np.int32]
    tracks: Tracks
    parents: pd.DataFrame
    quality: pd.DataFrame
    frames: npt.NDArray[np.int64]
    selection: pd.DataFrame
    clips: Clips
    ranges: Ranges


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
        SiteError: if every frame is blank.
        InputError: if the movie lacks a channel or is too short for a clip.
    """
    nucleus = _position(channels, config.channels.nucleus)
    picks = [_position(channels, name) for name in config.channels.clips or channels]
    frames = clips.choose_frames(len(stack), config.clips)
    measures = quality.measure(stack)
    usual = calibration.quality if config.alike else quality.typical(measures)
    judged = quality.flag(measures, usual, config.quality)
    if (judged["sd"] == 0).all():
        raise SiteError("blank", f"each frame is one value ({stack.flat[0]}): chunks are missing or the camera was off")
    bad = judged.groupby("frame")["bad"].first().to_numpy()
    corrected = correct(stack, calibration)

    stained = _filled(corrected[:, nucleus])
    nuclei = _find_nuclei(stained, config.nuclei)
    n_nuclei = nuclei.max(axis=(1, 2))  # they are numbered from 1 without gaps
    tracked = tracking.track(nuclei, config.tracking, stained)
    nuclei, parents = tracked.labels, tracked.parents
    # Cells take the numbers of their nuclei, so what was linked as nuclei is linked as cells.
    cytoplasm = config.channels.cytoplasm
    seen = None if cytoplasm is None else _filled(corrected[:, _position(channels, cytoplasm)])
    cells = np.stack(
        [_find_cells(None if seen is None else seen[t], stained[t], nuclei[t], config.cells) for t in range(len(stack))]
    )
    tracks = features.measure(nuclei, cells, corrected, channels, calibration.low)
    if config.channels.network is not None:
        mitochondria = corrected[:, _position(channels, config.channels.network)]
        found = network.measure(cells, mitochondria, len(tracks.present), config.network)
        tracks = replace(tracks, features=tracks.features | found)
    selection = clips.select(tracks, frames, bad, stack.shape[2:], config.clips)
    kept = selection["excluded"] == clips.KEPT
    selection["clip"] = pd.array(np.where(kept, kept.cumsum() - 1, -1), dtype="Int32")
    selection.loc[~kept, "clip"] = pd.NA
    ids = selection.loc[kept, "track"].to_numpy()
    # Only channels that are picked out are copied.
    shown = corrected if picks == list(range(len(channels))) else corrected[:, picks]
    low, high = calibration.low[picks], calibration.high[picks]
    ranges = clips.intensity_ranges(shown, cells, tracks, ids, frames, bad, low, high, config.clips)
    frame = judged["frame"].to_numpy()
    return Site(
        nuclei,
        cells,
        tracks,
        parents,
        judged.assign(
            n_nuclei=n_nuclei[frame],
            drift_y=tracked.drift[frame, 0],
            drift_x=tracked.drift[frame, 1],
            site_flag=_site_flag(judged, n_nuclei, clips.too_many_bad(bad, frames, config.clips)),
        ),
        frames,
        selection,
        clips.cut(shown, cells, tracks, ids, frames, bad, ranges.low, ranges.high, config.clips),
        ranges,
    )


def _find_nuclei(movie: npt.NDArray[np.float32], config: NucleiConfig | CellposeConfig) -> npt.NDArray[np.int32]:
    if isinstance(config, CellposeConfig):
        return np.stack([cellpose_model.segment_nuclei(plane, config) for plane in movie])
    return segmentation.segment_movie(movie, config)


def _find_cells(
    cytoplasm: npt.NDArray[np.float32] | None,
    nucleus: npt.NDArray[np.float32],
    nuclei: npt.NDArray[np.int32],
    config: CellsConfig | CellposeConfig,
) -> npt.NDArray[np.int32]:
    if not isinstance(config, CellposeConfig):
        return segmentation.segment_cells(cytoplasm, nuclei, config)
    assert cytoplasm is not None, "SegmentConfig has seen to it"
    return cellpose_model.segment_cells(cytoplasm, nucleus, nuclei, config)


def check_form(site: SiteForm, plate: SiteForm, config: SegmentConfig) -> None:
    """Check that a site is like its plate's, so that its cells can be compared with theirs.

    Raises:
        SiteError: if it lacks a channel of its plate or frames for a clip, or, where sites are to be alike,
            has another height or width or so many frames that its clips would be of other time points.
    """
    missing = [name for name in plate.channels if name not in site.channels]
    if missing:
        raise SiteError(
            "channels",
            f"has no channel {missing}; its channels are {list(site.channels)}, its plate's {list(plate.channels)}",
        )
    n_frames, usual = site.shape[0], plate.shape[0]
    try:
        frames = clips.choose_frames(n_frames, config.clips)
    except InputError as error:
        raise SiteError("frames", str(error)) from error
    if not config.alike:
        return
    advice = "; if its plate brings different movies together, set segment.alike to false"
    if site.shape[2:] != plate.shape[2:]:
        size, usual_size = (" × ".join(map(str, form.shape[2:])) for form in (site, plate))
        raise SiteError("shape", f"is {size} px, the sites of its plate {usual_size} px{advice}")
    if not np.array_equal(frames, clips.choose_frames(usual, config.clips)):
        raise SiteError(
            "frames",
            f"has {n_frames} frames, the sites of its plate {usual}: its clips would be of other time points{advice}",
        )


def _filled(movie: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A movie (T, H, W) whose pixels that are no numbers show the background, for segmentation."""
    finite = np.isfinite(movie)
    if finite.all():
        return movie
    filled = np.zeros_like(movie)
    for plane, whole, out in zip(movie, finite, filled, strict=True):
        if whole.any():
            out[:] = np.where(whole, plane, np.median(plane[whole]))
    return filled


def _site_flag(judged: pd.DataFrame, n_nuclei: npt.NDArray[np.integer[Any]], unusable: bool) -> str:
    """Why the whole site gives no clips: what is wrong with most of its bad frames, or that there are no cells."""
    counts: dict[str, int] = {}
    if unusable:
        for name in quality.FLAGS:
            counts[name] = judged.loc[judged["flags"].str.contains(name), "frame"].nunique()
    flag = max(counts, key=lambda name: counts[name], default="")
    # Frames without contrast are what a field without cells looks like.
    return NO_CELLS if flag in ("", quality.EMPTY) and not n_nuclei.any() else flag


def _position(channels: tuple[str, ...], name: str) -> int:
    if name not in channels:
        raise InputError(f"has no channel {name!r}; its channels are {list(channels)}")
    return channels.index(name)
