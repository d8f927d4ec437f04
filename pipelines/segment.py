"""Stage `segment`: plates in; labels, tracked cells, quality measures and clips out, or embeddings in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from zlib import crc32

import cv2
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.inputs import Inputs
from pipelines.one_pass import Embedders, Pending
from pipelines.spread import spread
from pipelines.units import Counts, StageError, Work, is_passing, run_units
from pipelines.vectors import write_embeddings
from screening.clips import KEPT, FixedScaling, PlateScaling, choose_frames
from screening.illumination import Calibration, calibrate
from screening.memory import keep_freed_memory
from screening.quality import PlateQuality, flags_of_frames
from screening.similarity import suggest
from screening.site import SegmentConfig, Site, SiteError, SiteForm, check_form, process_site
from storage_schemas.calibration import FLAT_FIELD, read_calibration, write_calibration
from storage_schemas.checkpoint import read_manifest
from storage_schemas.clips import Clips, Ranges, write_clips
from storage_schemas.errors import InputError, SchemaError, StoreError, is_disk_full
from storage_schemas.keys import SiteKey, WellKey
from storage_schemas.plate import Plate, Projection, SiteImage, open_site, write_labels
from storage_schemas.screen import Failure, Screen
from storage_schemas.store import exists
from storage_schemas.tables import CELLS, FEATURE_PREFIX, QUALITY, open_table, write_table

if TYPE_CHECKING:  # the configuration pulls in torch, which segmentation workers do without
    from pipelines.config import RunConfig

OUTPUT_VERSION = 3  # raised when the same configuration gives other files

_SAMPLED_SITES = 48  # of a plate, for its calibration
_SAMPLED_FRAMES = 3  # of each of them: first, middle, last
_SAMPLED_FORMS = 9  # wells, for what a plate's sites have in common


def segment(
    config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str, embedders: Embedders | None = None
) -> tuple[Counts, list[str]]:
    """Find, follow and cut out the cells of every well that has not been done, and embed them if there is who does.

    A site that cannot be used is recorded as failed, and its well is done without it; a well without any such site
    has failed.

    Returns:
        Counts over the whole stage, and notes for the reader.

    Raises:
        InputError: if a configured channel does not exist, or no well has a cell.
        StageError: if too much fails.
    """
    assert config.segment is not None, "plates come with settings of how to segment them"
    forms = _plate_forms(inputs)
    _check_forms(config.segment, inputs, forms)
    if embedders is not None:
        _check_network(config, inputs, forms)
    notes = _calibrate_plates(config, inputs, screen, forms)
    if embedders is not None:
        _pair_up(screen)
    context = _Context(config.segment, inputs.plates, forms, screen, fingerprint, embedders)
    run_units(
        screen,
        "segment",
        inputs.wells,
        Work(
            partial(segment_well, context),
            num_cpus=config.resources.segment_cpus,
            num_gpus=config.resources.segment_gpus,
            memory_mb=config.resources.segment_memory_mb,
            attempts=config.resources.attempts,
        ),
        config.max_failed_share,
    )
    counts = _count(inputs, screen)
    if not counts["clips"]:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        failures = screen.failures("segment")
        why = f"; {failures[0].unit} failed: {failures[0].message}" if failures else ""
        raise StageError(
            f"segment: no clip in any of {counts['wells']} wells: {shown}{why}; check segment.channels.nucleus and "
            "the nuclei, tracking and clips settings"
        )
    return counts, notes


def _pair_up(screen: Screen) -> None:
    """Leave of wells that are embedded as they are segmented those of which both is there."""
    # Otherwise `embed` would take them for those of cells that it has not seen.
    screen.write_record("embed", None)
    segmented, embedded = screen.done_units("segment"), screen.done_units("embed")
    for well in segmented ^ embedded:
        screen.remove_unit(well)


@dataclass(frozen=True)
class _Done:
    """What is written of a site but for its labels, which are much larger and are not held for the whole well.

    Attributes:
        cells: as CELLS, its clips counted from 0.
        quality: as QUALITY.
        clips: (N, C, F, size, size).
        ranges: of the clips.
        frames: of the movie, that the clips are made of.
    """

    cells: pa.Table
    quality: pd.DataFrame
    clips: Clips
    ranges: Ranges
    frames: list[int]


@dataclass(frozen=True)
class _Context:
    config: SegmentConfig
    plates: dict[str, Plate]
    forms: dict[str, SiteForm]
    screen: Screen
    fingerprint: str
    embedders: Embedders | None = None


def segment_well(context: _Context, well: WellKey) -> float:
    """Do one well: every site of it, then its clips, its quality table and, to commit it, its cells table.

    A well that is done but for some sites stays as it is unless one of them can be used by now.

    Returns:
        The share of its sites that failed.
    """
    # As many wells run at once as there are cores, and OpenCV would start a thread a core in each of them.
    cv2.setNumThreads(1)
    keep_freed_memory()
    screen, plate = context.screen, context.plates[well.plate]
    if well.plate not in context.forms or not exists(screen.calibration(well.plate)):
        for url in plate.sites(well.well).values():
            with suppress(SchemaError):
                open_site(url)  # that access is denied, say, is told by each well; the sampling went past it
        raise InputError(f"{plate.url}: none of the sites sampled for its calibration can be used")
    calibration = open_calibration(screen.calibration(well.plate))
    sites = {SiteKey(well.plate, well.well, name): url for name, url in plate.sites(well.well).items()}
    if exists(screen.cells(well)):
        again = _failed_again(context, calibration, well, sites)
        if again:
            screen.write_failures("segment", well, again)
            return len(again) / len(sites)
        screen.remove_unit(well)

    done: list[_Done] = []
    failed: list[Failure] = []
    pending: Pending = []
    for key, url in sites.items():
        outcome = _attempt(context, calibration, key, url, len(sites), pending)
        if isinstance(outcome, Failure):
            failed.append(outcome)
        else:
            done.append(outcome)
    assert len(done) + len(failed) == len(sites), "every site is done or recorded as failed"
    # Before the commit: a run cut off here leaves a well that is to be done, and one cut off later a true record.
    screen.write_failures("segment", well, failed)
    if done:
        _write_well(context, well, done, pending)
    else:
        screen.remove_unit(well)
    return len(failed) / len(sites)


def _failed_again(
    context: _Context, calibration: Calibration, well: WellKey, sites: Mapping[SiteKey, str]
) -> list[Failure]:
    """The failures of a well's failed sites tried again; none if one of them can be used, or is gone."""
    recorded = {failure.unit for failure in context.screen.failures("segment", well)}
    known = {key: url for key, url in sites.items() if str(key) in recorded}
    context = replace(context, embedders=None)  # where a site can be used, the whole well is done again
    failures: list[Failure] = []
    for key, url in known.items():
        outcome = _attempt(context, calibration, key, url, len(sites), [])
        if not isinstance(outcome, Failure):
            return []
        failures.append(outcome)
    return failures if len(known) == len(recorded) else []


def _attempt(
    context: _Context, calibration: Calibration, key: SiteKey, url: str, n_sites: int, pending: Pending
) -> _Done | Failure:
    """Do one of a well's sites; what it raises becomes a record, so that one bad site costs one site."""
    config, form = context.config, context.forms[key.plate]
    try:
        image = open_site(url)
        check_form(SiteForm(image.channels, image.shape), form, config)
        stack = image.read(form.channels, projection=config.projection)
        site = process_site(stack, form.channels, calibration, config)
        if config.labels:
            write_labels(url, {"nuclei": site.nuclei, "cells": site.cells})
    except SchemaError as error:
        return Failure(str(key), "unreadable", str(error))
    except SiteError as error:
        return Failure(str(key), error.fault, f"{url}: {error}")
    except Exception as error:  # whatever else it is, it is recorded with its site
        if is_passing(error) or isinstance(error, StoreError) or is_disk_full(error):
            raise
        return Failure(str(key), type(error).__name__, f"{url}: {error}")
    quality = _quality_table(key, site, form.channels)
    done = _Done(_cells_table(key, site), quality, site.clips, site.ranges, site.frames.tolist())
    if context.embedders is None:
        return done
    context.embedders.submit(done.clips, pending)
    kept = config.clips.sample if config.clips.store == "sample" else 0
    return _thin(done, -(-kept // n_sites), np.random.default_rng(crc32(str(key).encode())))


def _thin(site: _Done, at_most: int, rng: np.random.Generator) -> _Done:
    """A site with so many of its clips."""
    picked = np.sort(rng.permutation(len(site.clips))[:at_most])
    clip = np.full(len(site.cells), -1)
    clip[np.flatnonzero(site.cells["clip"].is_valid())[picked]] = np.arange(len(picked))
    column = pa.array(clip, pa.int32(), mask=clip < 0)
    cells = site.cells.set_column(site.cells.column_names.index("clip"), "clip", column)
    ranges = Ranges(site.ranges.low[picked], site.ranges.high[picked])
    return replace(site, cells=cells, clips=site.clips[picked], ranges=ranges)


def _write_well(context: _Context, well: WellKey, sites: Sequence[_Done], pending: Pending) -> None:
    screen = context.screen
    channels = context.config.channels.clips or context.forms[well.plate].channels
    ranges = Ranges.concatenate([site.ranges for site in sites])
    clips = np.concatenate([site.clips for site in sites])
    frames = sites[0].frames
    same = all(site.frames == frames for site in sites)
    write_clips(screen.clips(well), clips, channels, frames if same else None, ranges)
    write_table(screen.quality(well), pd.concat([site.quality for site in sites]), QUALITY, context.fingerprint)
    table = pa.concat_tables([site.cells for site in sites], promote_options="default")
    # Clips lie in the array in the order of the cells that have one.
    has_clip = table["clip"].is_valid().to_numpy()
    clip = pa.array(has_clip.cumsum() - 1, pa.int32(), mask=~has_clip)
    table = table.set_column(table.column_names.index("clip"), "clip", clip)
    if context.embedders is not None:
        embedded = table.filter(pc.equal(table["excluded"], KEPT))
        write_embeddings(screen.embeddings(well), embedded, context.embedders.collect(pending), context.fingerprint)
    write_table(screen.cells(well), table, CELLS, context.fingerprint)


# --- plates ----------------------------------------------------------------------------------


def _plate_forms(inputs: Inputs) -> dict[str, SiteForm]:
    """What the sites of each plate have in common: what most of a few of them have; nothing of unreadable plates."""
    names = list(inputs.plates)
    forms = spread(_plate_form, [(inputs.plates[name], _wells_of(inputs.plates[name], inputs)) for name in names])
    return {name: form for name, form in zip(names, forms, strict=True) if form is not None}


def _plate_form(plate_and_wells: tuple[Plate, list[str]]) -> SiteForm | None:
    plate, wells = plate_and_wells
    images = [image for well in _evenly(wells, _SAMPLED_FORMS) for image in islice(_images(plate, well), 1)]
    found = Counter(SiteForm(image.channels, image.shape) for image in images)
    return found.most_common(1)[0][0] if found else None


def _check_forms(config: SegmentConfig, inputs: Inputs, forms: Mapping[str, SiteForm]) -> None:
    """Find before the work what no site of a plate could make good."""
    named = config.channels
    wanted = [
        *((setting, getattr(named, setting)) for setting in ("nucleus", "cytoplasm", "network")),
        *(("clips", channel) for channel in named.clips or ()),
    ]
    first = next(iter(forms), "")
    for name, form in forms.items():
        url = inputs.plates[name].url
        for setting, channel in wanted:
            if channel is not None and channel not in form.channels:
                near = suggest(channel, form.channels)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise InputError(
                    f"{url}: has no channel {channel!r}; its channels are {list(form.channels)}: mend "
                    f"segment.channels.{setting}{hint}"
                )
        try:
            choose_frames(form.shape[0], config.clips)
            if isinstance(config.clips.scaling, FixedScaling):
                config.clips.scaling.ends(len(named.clips or form.channels))
        except InputError as error:
            raise InputError(f"{url}: {error}") from error
        if named.clips is None and form.channels != forms[first].channels:
            raise InputError(
                f"{url}: has the channels {list(form.channels)}, {inputs.plates[first].url} has "
                f"{list(forms[first].channels)}: say by segment.channels.clips which ones the clips are made of, in "
                "which order"
            )


def _check_network(config: RunConfig, inputs: Inputs, forms: Mapping[str, SiteForm]) -> None:
    """Find before the work that the network was trained on other channels."""
    assert config.segment is not None, "as in segment"
    assert config.network is not None, "as in segment"
    wanted = read_manifest(config.network).channels
    for name, form in forms.items():
        channels = config.segment.channels.clips or form.channels
        if tuple(channels) != tuple(wanted):
            raise InputError(
                f"{inputs.plates[name].url}: its clips have the channels {list(channels)}, and the network of "
                f"{config.network} was trained on {list(wanted)}: say by segment.channels.clips which to take"
            )


def _calibrate_plates(config: RunConfig, inputs: Inputs, screen: Screen, forms: Mapping[str, SiteForm]) -> list[str]:
    """Calibrate plates of which something is left to do: sites that could not be read may be readable by now."""
    assert config.segment is not None, "as in segment"
    done = screen.done_units("segment") - screen.failed_units("segment")
    unfinished = {well.plate for well in inputs.wells if well not in done}
    calibrate_one = ray.remote(
        num_cpus=config.resources.segment_cpus, max_retries=config.resources.attempts, retry_exceptions=[StoreError]
    )(_calibrate_plate)
    tasks = [
        calibrate_one.remote(config.segment, plate, _wells_of(plate, inputs), forms[plate.name], screen)
        for plate in inputs.plates.values()
        if plate.name in unfinished and plate.name in forms
    ]
    ray.get(tasks)
    if config.segment.illumination.method == "none":
        return []
    names = list(inputs.plates)
    corrected = spread(_is_corrected, [screen.calibration(name) for name in names])
    return [
        f"plate {name}: illumination not corrected, it has fewer sites than segment.illumination.min_sites"
        for name, found in zip(names, corrected, strict=True)
        if found is False
    ]


def _is_corrected(url: str) -> bool | None:
    """Whether a plate's illumination is corrected; None if it could not be calibrated."""
    return FLAT_FIELD in read_calibration(url) if exists(url) else None


def _calibrate_plate(config: SegmentConfig, plate: Plate, wells: list[str], form: SiteForm, screen: Screen) -> None:
    cv2.setNumThreads(1)  # as in segment_well: plates are calibrated side by side
    scaling = config.clips.scaling
    percentiles = (scaling.low, scaling.high) if isinstance(scaling, PlateScaling) else (1.0, 99.8)
    try:
        # One thread here too: a plate holds one frame at a time.
        with dask.config.set(scheduler="synchronous"):
            found = calibrate(_sample(config, plate, wells, form), config.illumination, percentiles)
    except InputError as error:
        if is_passing(error):
            raise
        # Nothing of the sample can be used: its wells will say so one by one, and other plates go on.
        return
    stored = _stored(found)
    url = screen.calibration(plate.name)
    if exists(url):
        old = read_calibration(url)
        if old.keys() == stored.keys() and all(np.array_equal(old[k], stored[k], equal_nan=True) for k in old):
            return
    # What was cut with another calibration would not compare with what is to be cut.
    screen.remove_cells(plate.name)
    write_calibration(url, stored)


def _stored(calibration: Calibration) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """A calibration as it is on disk."""
    usual = calibration.quality
    fields = {
        FLAT_FIELD: calibration.flat_field,
        "offset": calibration.offset,
        "low": calibration.low,
        "high": calibration.high,
        "focus": usual.focus,
        "saturated": usual.saturated,
        "glare": usual.glare,
        "sd": usual.sd,
    }
    return {name: values.astype(np.float32) for name, values in fields.items() if values is not None}


def open_calibration(url: str) -> Calibration:
    """A plate's calibration, as it was found."""
    fields = read_calibration(url)
    usual = PlateQuality(*(fields[name].astype(np.float64) for name in ("focus", "saturated", "glare", "sd")))
    return Calibration(fields.get(FLAT_FIELD), fields["offset"], fields["low"], fields["high"], usual)


def _sample(config: SegmentConfig, plate: Plate, wells: list[str], form: SiteForm) -> list[da.Array]:
    """A few frames of sites spread evenly over the plate's wells, read when they are wanted."""
    picked = _evenly(wells, _SAMPLED_SITES)
    per_well = -(-_SAMPLED_SITES // len(picked))
    stacks = []
    for well in picked:
        for image in islice(_images(plate, well), per_well):
            try:
                check_form(SiteForm(image.channels, image.shape), form, config)
            except SiteError:
                continue  # the well's own unit will meet the same error and record it, as for those not readable
            last = image.shape[0] - 1
            frames = sorted({round(last * i / (_SAMPLED_FRAMES - 1)) for i in range(_SAMPLED_FRAMES)})
            shape = (1, len(form.channels), *image.shape[2:])
            read = partial(_read_frame, image, form.channels, config.projection)
            reads = [dask.delayed(partial(read, frame))() for frame in frames]
            stacks.append(da.concatenate([da.from_delayed(task, shape, np.float32) for task in reads]))
    return stacks


def _read_frame(
    image: SiteImage, channels: Sequence[str], projection: Projection, frame: int
) -> np.ndarray[Any, np.dtype[Any]]:
    """A frame (1, C, H, W), all NaN if it was never taken or is lost: it says nothing of the plate."""
    try:
        pixels = image.read(channels, [frame], projection)
    except SchemaError:
        pixels = None
    if pixels is None or pixels.min() == pixels.max():
        return np.full((1, len(channels), *image.shape[2:]), np.nan, np.float32)
    return pixels


def _wells_of(plate: Plate, inputs: Inputs) -> list[str]:
    return sorted(inputs.plate_map.loc[inputs.plate_map["plate"] == plate.name, "well"])


def _evenly(wells: Sequence[str], n: int) -> list[str]:
    """At most ``n`` of the wells, evenly spread."""
    return [wells[i] for i in np.unique(np.linspace(0, len(wells) - 1, min(len(wells), n)).astype(int))]


def _images(plate: Plate, well: str) -> Iterator[SiteImage]:
    """The sites of a well that can be opened, opened when they are asked for."""
    with _unless_unusable():
        for url in plate.sites(well).values():
            with _unless_unusable():
                yield open_site(url)


@contextmanager
def _unless_unusable() -> Iterator[None]:
    """Go past what cannot be used, but not past a store that does not answer for now."""
    try:
        yield
    except InputError as error:
        if is_passing(error):
            raise


# --- tables ----------------------------------------------------------------------------------


def _cells_table(key: SiteKey, site: Site) -> pa.Table:
    tracks, selection = site.tracks, site.selection
    present = tracks.present
    n_tracks, n_frames = present.shape
    parent = pd.Series(site.parents["parent"].to_numpy(), index=site.parents["track"].to_numpy())
    frame = pd.DataFrame(
        {
            "plate": key.plate,
            "well": key.well,
            "site": key.site,
            "track": selection["track"],
            "parent": parent.reindex(selection["track"]).astype("Int32").reset_index(drop=True),
            "first_frame": present.argmax(axis=1),
            "last_frame": n_frames - 1 - present[:, ::-1].argmax(axis=1),
            "n_frames": present.sum(axis=1),
            "n_missing": selection["n_missing"],
            "n_repaired": selection["n_repaired"],
            "excluded": selection["excluded"],
            "clip": selection["clip"],
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


def _quality_table(key: SiteKey, site: Site, channels: Sequence[str]) -> pd.DataFrame:
    return site.quality.assign(
        plate=key.plate,
        well=key.well,
        site=key.site,
        channel=[channels[c] for c in site.quality["channel"]],
    )


def _count(inputs: Inputs, screen: Screen) -> Counts:
    """Count what the done units hold and what failed, so that a resumed run counts the same; only key columns are read.

    Objects are counted twice, as they were found in the frames and as they were followed in tracks, and sites, tracks
    and objects by what became of them: the sums must agree.
    """
    done = screen.done_units("segment") & set(inputs.wells)
    failed = screen.failed_units("segment") & set(inputs.wells)
    assert done | failed == set(inputs.wells), "every well is done or recorded as failed"
    counts = Counter({"wells": len(inputs.wells), "done": len(done), "failed": len(failed - done)})
    counts.update(dict.fromkeys(("sites", "sites done", "frames", "frames flagged"), 0))
    counts.update(dict.fromkeys(("objects", "objects in clips", "tracks", "clips"), 0))
    for found in spread(partial(_count_well, screen), sorted(done)):
        counts.update(found)
    wells = {str(well) for well in failed}
    for failure in screen.failures("segment"):
        if failure.unit in wells:
            counts[f"wells failed: {failure.kind}"] += 1
        elif failure.unit.rpartition("/")[0] in wells:
            counts.update({"sites": 1, f"sites failed: {failure.kind}": 1})

    def total(*beginnings: str) -> int:
        return sum(n for name, n in counts.items() if name.startswith(beginnings))

    assert counts["sites"] == total("sites done", "sites flagged: ", "sites failed: "), "no site is lost"
    assert counts["objects"] == total("objects in clips", "objects excluded: "), "no object is lost"
    assert counts["tracks"] == total("clips", "tracks excluded: "), "no track is lost"
    # Reasons come last and in order, not as the wells happened to bring them.
    return dict(sorted(counts.items(), key=lambda item: item[0] if ":" in item[0] else ""))


def _count_well(screen: Screen, well: WellKey) -> Counter[str]:
    keys = ["plate", "well", "site", "frame"]
    measures = open_table(screen.quality(well), QUALITY, [*keys, "flags", "bad", "n_nuclei", "site_flag"]).to_pandas()
    cells = open_table(screen.cells(well), CELLS, ["n_frames", "excluded"]).to_pandas()
    frames = measures.drop_duplicates(keys)
    sites = frames.drop_duplicates("site")["site_flag"]
    counts = Counter(
        {
            "sites": len(sites),
            "frames": len(frames),
            "frames flagged": int(frames["bad"].sum()),
            "objects": int(frames["n_nuclei"].sum()),
            "tracks": len(cells),
        }
    )
    counts.update(f"sites flagged: {flag}" if flag else "sites done" for flag in sites)
    counts.update(f"frames flagged: {flag}" for flag in flags_of_frames(measures)["flag"])
    counts.update(f"tracks excluded: {reason}" if reason else "clips" for reason in cells["excluded"])
    for reason, objects in cells.groupby("excluded")["n_frames"].sum().items():
        counts[f"objects excluded: {reason}" if reason else "objects in clips"] += int(objects)
    return counts
