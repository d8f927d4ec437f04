"""Single cells that others have cut out, as a screen whose stage `segment` is done: MitoReID's released data.

What is written is what `segment` writes, as far as it is known: the clips and the table of cells of each (virtual)
well, the plate map and the compounds. There are no images of whole fields, positions, features or quality measures.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines import events
from pipelines.inputs import annotation_identity, well_keys
from pipelines.stage import do_stage
from pipelines.units import Counts, StageError, Work, run_units
from screening import mitoreid
from screening.mitoreid import UnusableSequenceError
from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.base import Config
from storage_schemas.clips import write_clips
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import TrackKey, WellKey
from storage_schemas.screen import Failure, Manifest, Screen, fingerprint
from storage_schemas.tables import CELLS, COMPOUNDS, PLATE_MAP, SEQUENCES, open_table, read_user_table, write_table

OUTPUT_VERSION = 1  # raised when the same images give other files

ANNOTATION = "annotation.xlsx"

_SOFTWARE = ("screening", "ray", "numpy", "pillow", "zarr", "pyarrow")
_MAX_FAILED_SHARE = 0.5  # of the wells, each by its share of failed sequences; as of a run by default
_SHOWN = 5  # things left out that a note names


class ImportConfig(Config):
    """What of the data is taken, and how."""

    parts: tuple[mitoreid.Part, ...] = Field(
        ("train", "query", "gallery", "nc"), min_length=1, description="which parts of the data"
    )
    moas: Literal["chosen", "all"] = Field(
        "chosen", description="MOAs of the drugs whose moa_choose is 1, or of all whose MOA is known"
    )
    frames: int = Field(16, ge=1, description="frames of a clip: those numbered from 1 to this")
    size: int = Field(128, ge=8, description="side of a clip, px")


class _Plan(NamedTuple):
    """All that is known before an image is opened."""

    sequences: pa.Table  # as SEQUENCES
    plate_map: pd.DataFrame
    compounds: pd.DataFrame
    notes: list[str]


@dataclass(frozen=True)
class _Context:
    source: str
    config: ImportConfig
    sequences: pa.Table
    screen: Screen
    fingerprint: str


def import_cells(
    source: str, annotation: str | None, out: str, config: ImportConfig, *, update: bool = False
) -> Counts:
    """Bring MitoReID's single-cell folders into a screen, or go on with it; Ray must be running.

    A sequence that lacks frames, or has unreadable ones, is recorded as failed, and tried again by the next import; its
    row of the table of cells says why it has no clip.

    Args:
        source: the folder that holds the experiments ``l1``, ``l2``, ``l3``.
        annotation: the workbook of drugs; by default ``annotation.xlsx`` in ``source``.
        out: the screen's folder or object-store prefix.
        config: what is taken.
        update: accept that the folder holds an import of something else, and do again what depends on the change.

    Returns:
        Counts: ``sequences`` found = ``clips`` + all ``sequences failed: ...``, by reason.

    Raises:
        InputError: whatever the user can mend.
        StageError: if too much fails.
    """
    source = store.absolute(source)
    annotation = store.join(source, ANNOTATION) if annotation is None else store.absolute(annotation)
    screen = Screen(store.absolute(out))
    plan = _plan(source, annotation, config)
    # Without the frames that are there: one that was missing and has come is of a well that failed and is tried again.
    cells = plan.sequences.drop_columns("frames").to_pylist()
    mark = fingerprint("import", OUTPUT_VERSION, config.frames, config.size, cells)
    manifest = Manifest(
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
        config={"import": {"source": source, "annotation": annotation, **config.model_dump(mode="json")}},
        inputs=fingerprint(mark, annotation_identity(plan.plate_map, plan.compounds)),
    )
    manifest = _continued(screen, manifest, update)
    store.remove_partial(screen.url)
    screen.write_manifest(manifest)
    write_table(screen.plate_map, plan.plate_map, PLATE_MAP)
    write_table(screen.compounds, plan.compounds, COMPOUNDS)

    for note in plan.notes:
        events.note(note)

    units = well_keys(plan.plate_map)
    context = _Context(source, config, plan.sequences, screen, mark)
    do_stage(
        screen,
        "segment",
        mark,
        partial(_import, context, units),
        {"wells": len(units)},
        whole=set(units) <= screen.done_units("segment"),
    )
    # Also where the clips were there before and only the annotation is another.
    record = screen.read_manifest().stages["segment"].model_copy(update={"notes": plan.notes})
    screen.write_record("segment", record)
    return record.counts


def _continued(screen: Screen, manifest: Manifest, update: bool) -> Manifest:
    """The manifest with what is known of an earlier, unfinished import of the same."""
    if not screen.exists():
        if names := screen.foreign_names():
            raise InputError(f"{screen.url}: holds {names[:5]} but no screen; choose a new or empty folder")
        return manifest
    previous = screen.read_manifest()
    if previous.config.keys() != manifest.config.keys():
        raise InputError(f"{screen.url}: holds a screen that was not imported; choose a new or empty folder")
    if (previous.config, previous.inputs) != (manifest.config, manifest.inputs) and not update:
        raise InputError(
            f"{screen.url}: holds an import of other settings, images or annotation; choose another folder, or give "
            "--update to do again what depends on the change"
        )
    return manifest.model_copy(update={"stages": previous.stages})


# --- what there is -------------------------------------------------------------------------------


def _plan(source: str, annotation: str, config: ImportConfig) -> _Plan:
    try:
        found = mitoreid.parse(_names(source))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    table = found.table[found.table["part"].isin(config.parts)].reset_index(drop=True)
    if table.empty:
        there = sorted(set(found.table["part"]))
        raise InputError(f"{source}: holds cells of the parts {there}, none of {sorted(config.parts)}")
    compounds, notes = _read_annotation(annotation, table, config)
    try:
        table["compound"] = mitoreid.identify(table, set(compounds["compound"]))
    except InputError as error:
        raise InputError(f"{annotation}: {error}") from error
    try:
        mitoreid.check(table)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    table["well"] = mitoreid.virtual_wells(table["compound"], table["field"])

    plate_map = table.drop_duplicates(["plate", "well"]).sort_values(["plate", "well"], ignore_index=True)
    plate_map = plate_map[["plate", "well", "compound"]].assign(
        concentration=np.nan,
        unit=None,
        role=np.where(plate_map["compound"] == mitoreid.CONTROL, "negative_control", "treatment"),
        replicate=plate_map["plate"],
    )
    sequences = pa.table(
        {
            **{name: table[name] for name in ("plate", "well", "part", "folder")},
            "site": table["field"],
            "track": table["number"] + 1,
            "frames": [[number - 1 for number in numbers if number <= config.frames] for numbers in table["frames"]],
        }
    )
    return _Plan(
        sequences,
        plate_map,
        compounds[compounds["compound"].isin(table["compound"])].reset_index(drop=True),
        [
            f"cells were imported from {source}: wells are virtual, and there are no images of whole fields, no "
            "positions, features or quality measures",
            *notes,
            *_left_out(source, annotation, found, config),
        ],
    )


def _names(source: str) -> list[str]:
    """Paths below the source folder."""
    fs, path = store.filesystem(source)
    if not fs.isdir(path):
        raise InputError("no such folder")
    return [entry[len(path) :].lstrip("/") for entry in fs.find(path)]


def _read_annotation(url: str, table: pd.DataFrame, config: ImportConfig) -> tuple[pd.DataFrame, list[str]]:
    """A row a compound, as :data:`COMPOUNDS`, and notes."""
    fda = read_user_table(url, "FDA-list")
    novel = read_user_table(url, "Novel-list") if table["part"].isin(["nc", mitoreid.NOVEL]).any() else None
    try:
        compounds, notes = mitoreid.compounds(fda, novel, config.moas)
    except InputError as error:
        raise InputError(f"{url}: {error}") from error
    columns = COMPOUNDS.schema.names
    return compounds.reindex(columns=columns).sort_values("compound", ignore_index=True), notes


def _left_out(source: str, annotation: str, found: mitoreid.Sequences, config: ImportConfig) -> list[str]:
    """What of the folder is not taken, as it was asked for."""
    parts = found.table["part"].value_counts()
    notes = [f"part {part}: {count} sequence(s) left out" for part, count in parts.items() if part not in config.parts]
    beyond = sum(number > config.frames for numbers in found.table["frames"] for number in numbers)
    if beyond:
        notes.append(f"{beyond} image(s) after frame {config.frames} left out")
    ignored = [name for name in found.ignored if store.join(source, name) != annotation]
    if ignored:
        notes.append(f"{len(ignored)} file(s) that are of no cell left out: {_some(ignored)}")
    return notes


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# --- wells ---------------------------------------------------------------------------------------


def _import(context: _Context, wells: Sequence[WellKey]) -> tuple[Counts, list[str]]:
    """Import all wells that have not been done; counts over all."""
    screen = context.screen
    write_table(screen.sequences, context.sequences, SEQUENCES, context.fingerprint)
    run_units(screen, "segment", wells, Work(partial(import_well, context)), _MAX_FAILED_SHARE)

    done, failed = (units & set(wells) for units in (screen.done_units("segment"), screen.failed_units("segment")))
    assert done | failed == set(wells), "every well is done or recorded as failed"
    counts = Counter({"wells": len(wells), "done": len(done), "failed": len(failed - done)})
    counts.update(sequences=len(context.sequences), clips=0)
    for table in ahead(partial(open_table, form=CELLS, columns=["excluded"]), map(screen.cells, done)):
        excluded = table["excluded"].to_pylist()
        counts.update(f"sequences failed: {reason}" if reason else "clips" for reason in excluded)
    for well in failed - done:
        counts["sequences failed: with their well"] += len(_sequences_of(context, well))
    lost = sum(n for name, n in counts.items() if name.startswith("sequences failed: "))
    assert counts["sequences"] == counts["clips"] + lost, "no sequence is lost"
    if not counts["clips"]:
        first = screen.failures("segment")[0]
        raise StageError(f"none of {lost} sequences can be used; the first: {first.unit}: {first.message}")
    return dict(counts), []


def import_well(context: _Context, well: WellKey) -> float:
    """Do one well: its clips, then its table of cells, which commits it.

    Returns:
        The share of its sequences that failed.
    """
    screen, config = context.screen, context.config
    sequences = _sequences_of(context, well)
    clips = np.empty((len(sequences), len(mitoreid.CHANNELS), config.frames, config.size, config.size), np.uint8)
    reasons: list[str] = []
    failures: list[Failure] = []
    for sequence in sequences.to_pylist():
        try:
            clips[len(reasons) - len(failures)] = mitoreid.clip_of(_read_frames(context, sequence), config.size)
            reasons.append("")
        except UnusableSequenceError as error:
            reasons.append(error.reason)
            key = TrackKey(well.plate, well.well, sequence["site"], sequence["track"])
            message = f"{store.join(context.source, sequence['folder'])}: {error}"
            failures.append(Failure(str(key), error.reason, message))
    share = len(failures) / len(sequences)
    if store.exists(screen.cells(well)):
        if screen.failures("segment", well) == failures:
            return share
        screen.remove_unit(well)
    # Before the commit, so that it is true of every committed well.
    screen.write_failures("segment", well, failures)
    write_clips(screen.clips(well), clips[: len(reasons) - len(failures)], mitoreid.CHANNELS, range(config.frames))
    write_table(screen.cells(well), _cells_table(sequences, reasons, config.frames), CELLS, context.fingerprint)
    return share


def _sequences_of(context: _Context, well: WellKey) -> pa.Table:
    rows = context.sequences
    return rows.filter(pc.and_(pc.equal(rows["plate"], well.plate), pc.equal(rows["well"], well.well)))


def _read_frames(context: _Context, sequence: dict[str, Any]) -> list[bytes]:
    n_frames = context.config.frames
    mitoreid.check_frames([frame + 1 for frame in sequence["frames"]], n_frames)
    folder = store.join(context.source, sequence["folder"])
    try:
        return [store.read_bytes(store.join(folder, f"{frame + 1}.jpg")) for frame in range(n_frames)]
    except SchemaError as error:
        raise UnusableSequenceError(mitoreid.UNREADABLE, error.problem) from error


def _cells_table(sequences: pa.Table, reasons: list[str], n_frames: int) -> pa.Table:
    """A row a sequence; positions are not known, so they are those of a cell that is nowhere seen."""
    n = len(sequences)
    seen = sequences["frames"].to_pylist()
    n_seen = np.array([len(frames) for frames in seen])
    kept = np.array(reasons) == ""
    clip = pd.array(np.where(kept, kept.cumsum() - 1, -1), dtype="Int32")
    clip[~kept] = pd.NA
    frame = pd.DataFrame(
        {
            "parent": pd.array([None] * n, dtype="Int32"),
            "first_frame": pd.array([min(frames, default=None) for frames in seen], dtype="Int32"),
            "last_frame": pd.array([max(frames, default=None) for frames in seen], dtype="Int32"),
            "n_frames": n_seen,
            "n_missing": n_frames - n_seen,
            "n_repaired": 0,
            "excluded": reasons,
            "clip": clip,
        }
    )
    table = sequences.select(["plate", "well", "site", "track"])
    for column, values in {
        **{name: frame[name] for name in frame},
        "centroid_y": [[np.nan] * n_frames] * n,
        "centroid_x": [[np.nan] * n_frames] * n,
        "box": [[[-1] * 4] * n_frames] * n,
    }.items():
        table = table.append_column(column, pa.array(values))
    return table
