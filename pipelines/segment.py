"""Stage `segment`: plates in; labels, tracked cells, quality measures and clips out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray

from pipelines.inputs import Inputs
from pipelines.units import Counts, StageError, Work, run_units
from screening.clips import PlateScaling
from screening.illumination import Calibration, calibrate
from screening.site import SegmentConfig, Site, process_site
from storage_schemas.calibration import read_calibration, write_calibration
from storage_schemas.clips import Clips, Ranges, write_clips
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.plate import Plate, SiteImage, open_site, write_labels
from storage_schemas.screen import Screen
from storage_schemas.store import exists
from storage_schemas.tables import CELLS, FEATURE_PREFIX, QUALITY, open_table, write_table

if TYPE_CHECKING:  # the configuration pulls in torch, which segmentation workers do without
    from pipelines.config import RunConfig

OUTPUT_VERSION = 2  # raised when the same configuration gives other files

_COUNTED = ("wells", "done", "failed", "sites", "frames", "bad_frames", "objects", "tracks", "clips")

_SAMPLED_SITES = 48  # of a plate, for its calibration
_SAMPLED_FRAMES = 3  # of each of them: first, middle, last


def segment(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Find, follow and cut out the cells of every well that has not been done.

    Returns:
        Counts over the whole stage, and notes for the reader.

    Raises:
        InputError: if a configured channel does not exist, or no well has a cell.
        StageError: if too many wells fail.
    """
    _check_channels(config.segment, inputs)
    notes = _calibrate_plates(config, inputs, screen)
    context = _Context(config.segment, inputs.plates, screen, fingerprint)
    run_units(
        screen,
        "segment",
        inputs.wells,
        Work(partial(segment_well, context), num_cpus=config.resources.segment_cpus),
        config.max_failed_share,
    )
    counts = _count(inputs, screen)
    failures = screen.failures("segment")
    excluded = sum(n for name, n in counts.items() if name.startswith("excluded"))
    assert counts["done"] + len(failures) == counts["wells"], "every well is done or recorded as failed"
    assert counts["tracks"] == counts["clips"] + excluded, "every track has a clip or a reason"
    if not counts["clips"]:
        reasons = {name: n for name, n in counts.items() if name.startswith("excluded")} or "none excluded"
        why = f"; {failures[0].unit} failed: {failures[0].message}" if failures else ""
        raise StageError(
            f"segment: no clip in any of {counts['wells']} wells: {counts['tracks']} tracks, {reasons}"
            f"{why}; check segment.channels.nucleus and the nuclei, tracking and clips settings"
        )
    return counts, notes


@dataclass(frozen=True)
class _Context:
    config: SegmentConfig
    plates: dict[str, Plate]
    screen: Screen
    fingerprint: str


def segment_well(context: _Context, well: WellKey) -> Counts:
    """Do one well: every site of it, then its clips, its quality table and, to commit it, its cells table."""
    config, screen = context.config, context.screen
    calibration_url = screen.calibration(well.plate)
    if not exists(calibration_url):
        raise InputError(f"{context.plates[well.plate].url}: none of the sites sampled for its calibration can be read")
    calibration = Calibration(*read_calibration(calibration_url))
    cells: list[pa.Table] = []
    measures: list[pd.DataFrame] = []
    clips: list[Clips] = []
    ranges: list[Ranges] = []
    n_clips = 0
    frames = np.zeros(0, np.int64)
    clip_channels: tuple[str, ...] = ()
    for name, url in context.plates[well.plate].sites(well.well).items():
        image = open_site(url)
        clip_channels = config.channels.clips or image.channels
        stack = image.read(projection=config.projection)
        try:
            site = process_site(stack, image.channels, calibration, config)
        except InputError as error:
            raise InputError(f"{url}: {error}") from error
        if config.labels:
            write_labels(url, {"nuclei": site.nuclei, "cells": site.cells})
        cells.append(_cells_table(well, name, site, n_clips))
        measures.append(_quality_table(well, name, site, image))
        clips.append(site.clips)
        ranges.append(site.ranges)
        n_clips += len(site.clips)
        frames = site.frames
    write_clips(
        screen.clips(well), np.concatenate(clips), clip_channels, frames.tolist(), Ranges.concatenate(ranges)
    )
    write_table(screen.quality(well), pd.concat(measures), QUALITY, context.fingerprint)
    table = pa.concat_tables(cells, promote_options="default")
    write_table(screen.cells(well), table, CELLS, context.fingerprint)
    return {"clips": n_clips}


def _check_channels(config: SegmentConfig, inputs: Inputs) -> None:
    """A readable site of each plate stands for the rest here; each well checks its own again when it is read."""
    named = config.channels
    wanted = [named.nucleus, named.cytoplasm, *(named.clips or ())]
    first: SiteImage | None = None
    for plate in inputs.plates.values():
        image = _first_site(plate, inputs)
        if image is None:
            continue  # its wells will be recorded as failed
        missing = [name for name in wanted if name is not None and name not in image.channels]
        if missing:
            raise InputError(
                f"{image.url}: has no channel {missing}; its channels are {list(image.channels)}: set "
                "segment.channels.nucleus, .cytoplasm and .clips to these names"
            )
        first = first or image
        if named.clips is None and image.channels != first.channels:
            raise InputError(
                f"{image.url}: has the channels {list(image.channels)}, {first.url} has {list(first.channels)}: say by "
                "segment.channels.clips which ones the clips are made of, in which order"
            )


def _first_site(plate: Plate, inputs: Inputs) -> SiteImage | None:
    for well in inputs.plate_map.loc[inputs.plate_map["plate"] == plate.name, "well"]:
        try:
            return open_site(next(iter(plate.sites(well).values())))
        except InputError:
            continue
    return None


def _calibrate_plates(config: RunConfig, inputs: Inputs, screen: Screen) -> list[str]:
    """Calibrate plates that are not, and again those with failed wells, whose sites may be readable by now."""
    failed = {WellKey.parse(failure.unit).plate for failure in screen.failures("segment")}
    calibrate_one = ray.remote(num_cpus=config.resources.segment_cpus)(_calibrate_plate)
    tasks = [
        calibrate_one.remote(
            config.segment, plate, sorted(inputs.plate_map.query("plate == @plate.name")["well"]), screen
        )
        for plate in inputs.plates.values()
        if plate.name in failed or not exists(screen.calibration(plate.name))
    ]
    ray.get(tasks)
    if config.segment.illumination.method == "none":
        return []
    calibrated = [name for name in inputs.plates if exists(screen.calibration(name))]
    flat = [name for name in calibrated if read_calibration(screen.calibration(name))[0] is None]
    return [
        f"plate {name}: illumination not corrected, it has fewer sites than segment.illumination.min_sites"
        for name in flat
    ]


def _calibrate_plate(config: SegmentConfig, plate: Plate, wells: list[str], screen: Screen) -> None:
    scaling = config.clips.scaling
    percentiles = (scaling.low, scaling.high) if isinstance(scaling, PlateScaling) else (1.0, 99.8)
    sample = _sample(config, plate, wells)
    first = next(sample, None)
    if first is None:
        # Nothing of it can be read: its wells will say so one by one, and other plates go on.
        return
    try:
        found = calibrate(chain([first], sample), config.illumination, percentiles)
    except InputError as error:
        raise InputError(f"{plate.url}: {error}") from error
    fields = found.flat_field, found.offset, found.low, found.high
    url = screen.calibration(plate.name)
    if exists(url):
        pairs = zip(fields, read_calibration(url), strict=True)
        if all(np.array_equal(np.asarray(new), np.asarray(old)) for new, old in pairs):
            return
        # What was cut with the old calibration would not compare with what is to be cut.
        screen.remove_cells(plate.name)
    write_calibration(url, *fields)


def _sample(config: SegmentConfig, plate: Plate, wells: list[str]) -> Iterator[np.ndarray[Any, Any]]:
    """A few frames of sites spread evenly over the plate's wells."""
    picked = np.unique(np.linspace(0, len(wells) - 1, min(len(wells), _SAMPLED_SITES)).astype(int))
    per_well = -(-_SAMPLED_SITES // len(picked))
    for position in picked:
        for url in _urls(plate, wells[position])[:per_well]:
            try:
                image = open_site(url)
                last = image.shape[0] - 1
                frames = sorted({round(last * i / (_SAMPLED_FRAMES - 1)) for i in range(_SAMPLED_FRAMES)})
                stack = image.read(frames=frames, projection=config.projection)
            except InputError:
                # The well's own unit will meet the same error and record it.
                continue
            # A frame that was never taken, or was lost, says nothing of the plate.
            taken = stack.min(axis=(1, 2, 3)) < stack.max(axis=(1, 2, 3))
            if taken.any():
                yield stack[taken]


def _urls(plate: Plate, well: str) -> list[str]:
    try:
        return list(plate.sites(well).values())
    except InputError:
        return []


def _cells_table(well: WellKey, name: str, site: Site, first_clip: int) -> pa.Table:
    tracks, selection = site.tracks, site.selection
    present = tracks.present
    n_tracks, n_frames = present.shape
    parent = pd.Series(site.parents["parent"].to_numpy(), index=site.parents["track"].to_numpy())
    frame = pd.DataFrame(
        {
            "plate": well.plate,
            "well": well.well,
            "site": name,
            "track": selection["track"],
            "parent": parent.reindex(selection["track"]).astype("Int32").to_numpy(),
            "first_frame": present.argmax(axis=1),
            "last_frame": n_frames - 1 - present[:, ::-1].argmax(axis=1),
            "n_frames": present.sum(axis=1),
            "n_missing": selection["n_missing"],
            "n_repaired": selection["n_repaired"],
            "excluded": selection["excluded"],
            "clip": selection["clip"] + first_clip,
        },
        index=range(n_tracks),
    )
    table = pa.Table.from_pandas(frame, preserve_index=False)
    vectors = {
        "centroid_y": tracks.centroid[..., 0],
        "centroid_x": tracks.centroid[..., 1],
        **{FEATURE_PREFIX + feature: values for feature, values in tracks.features.items()},
    }
    for column, values in vectors.items():
        table = table.append_column(column, _lists(values.astype(np.float32)))
    box = pa.FixedSizeListArray.from_arrays(pa.array(tracks.box.astype(np.int32).ravel()), 4)
    offsets = pa.array(np.arange(n_tracks + 1, dtype=np.int32) * n_frames)
    return table.append_column("box", pa.ListArray.from_arrays(offsets, box))


def _lists(values: np.ndarray[Any, Any]) -> pa.ListArray:
    """A list a row of a (n, T) array."""
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def _quality_table(well: WellKey, name: str, site: Site, image: SiteImage) -> pd.DataFrame:
    return site.quality.assign(
        plate=well.plate,
        well=well.well,
        site=name,
        channel=[image.channels[c] for c in site.quality["channel"]],
    )


def _count(inputs: Inputs, screen: Screen) -> Counts:
    """Count what all done units hold; reading key columns, so that a resumed run counts the same."""
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    counts.update(wells=len(inputs.wells), failed=len(screen.failures("segment")))
    done = screen.done_units("segment")
    for well in inputs.wells:
        if well not in done:
            continue
        cells = open_table(screen.cells(well), CELLS, ["n_frames", "excluded"])
        frames = open_table(screen.quality(well), QUALITY, ["site", "frame", "bad"]).to_pandas()
        per_frame = frames.drop_duplicates(["site", "frame"])
        excluded = Counter(cells["excluded"].to_pylist())
        counts.update(
            done=1,
            sites=frames["site"].nunique(),
            frames=len(per_frame),
            bad_frames=int(per_frame["bad"].sum()),
            objects=int(np.sum(cells["n_frames"].to_numpy())),
            tracks=len(cells),
            clips=excluded.pop("", 0),
        )
        counts.update({f"excluded: {reason}": n for reason, n in excluded.items()})
    return dict(counts)
