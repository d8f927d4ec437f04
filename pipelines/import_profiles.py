"""Profiles made elsewhere become a screen: tables in; plate map, compounds, profiles and index out. No Ray, no torch.

Metadata are read first and all checked; then measurements go through block by block, so that memory holds one block
and, to process them, the profiles themselves.
"""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import Field

from pipelines.indexing import build_index
from pipelines.profiles import write_profiles
from pipelines.vectors import vector_column
from screening.profile_import import (
    KEYS,
    OF_COMPOUND,
    Wells,
    add_compounds,
    interpret,
    settle,
    without_effect_of_controls,
)
from screening.profiles import ProfilesConfig, process
from screening.similarity import AutoIndex, IndexConfig
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.profile_sources import Source, open_source
from storage_schemas.screen import PROFILES_IMPORT, STAGES, Manifest, Screen, Stage, StageRecord, fingerprint
from storage_schemas.tables import (
    COMPOUNDS,
    FEATURES,
    METADATA_PREFIX,
    PLATE_MAP,
    raw_profiles_form,
    write_table,
    write_tables,
)

OUTPUT_VERSION = 3  # raised when the same tables give other files

_OF_PROFILES: tuple[Stage, ...] = ("statistics", "evaluate", "report")  # stages that come of them

_SOFTWARE = ("screening", "numpy", "pandas", "pyarrow", "faiss-cpu")


class ImportProfilesConfig(Config):
    """What is imported, and what its columns mean."""

    tables: tuple[str, ...] = Field(min_length=1, description="tables of profiles: .csv, .csv.gz, .parquet or .h5ad")
    columns: dict[str, str] = Field({}, description=f"key -> column, or columns joined by +, of {', '.join(KEYS)}")
    controls: tuple[str, ...] = Field((), description="negative controls: compounds, or COLUMN=VALUE")
    positive_controls: tuple[str, ...] = Field((), description="positive controls likewise")
    features: tuple[str, ...] = Field((), description="names of measurements, * for anything")
    compounds: str | None = Field(None, description="table of compounds with their MOA, target, SMILES, …")
    profiles: ProfilesConfig = Field(ProfilesConfig(), description="what is done with the profiles")
    index: IndexConfig = Field(AutoIndex(), description="how `screening query` searches")


@dataclass(frozen=True)
class Imported:
    """What an import has done.

    Attributes:
        meaning: key, columns and whether the key was guessed, a row a key.
        counts: rows = wells + rows left out; features = features kept + features left out.
        notes: what a reader should know.
    """

    meaning: pd.DataFrame
    counts: dict[str, int]
    notes: tuple[str, ...]


class _Plan(NamedTuple):
    """All that is known before a measurement is read."""

    sources: list[Source]
    features: list[str]
    wells: Wells
    compounds: pd.DataFrame
    meaning: pd.DataFrame
    notes: list[str]


def parse_meanings(texts: Sequence[str]) -> dict[str, str]:
    """Keys and columns from ``KEY=COLUMN``, one or several with commas.

    Raises:
        InputError: for anything else.
    """
    found = {}
    # A column's own name may hold commas.
    for part in (part for text in texts for part in re.split(rf",(?=(?:{'|'.join(KEYS)})=)", text)):
        key, equals, column = part.partition("=")
        if not equals or not column:
            raise InputError(f"--map {part!r}: expected KEY=COLUMN, with a key of {', '.join(KEYS)}")
        found[key.strip()] = column
    return found


def import_profiles(out: str, config: ImportProfilesConfig, *, update: bool = False) -> Imported:
    """Bring tables of profiles into a screen that all commands on profiles work on.

    Args:
        out: the screen's folder or object-store prefix.
        config: what is imported.
        update: replace what another import has left there.

    Raises:
        InputError: whatever the user can mend; no screen is left that is not whole, and what is to be replaced stays
            as it is if a table or the recipe is at fault.
    """
    start = time.monotonic()
    screen = Screen(store.absolute(out))
    _check_folder(screen, update)
    plan = _plan(config)
    _require_controls(plan, config.profiles)
    if screen.exists():
        _rehearse(plan, config.profiles)
    is_new = not store.exists(screen.url)
    mark = fingerprint("profiles", OUTPUT_VERSION, config.model_dump(mode="json"), plan.features)
    try:
        found, notes = _write(screen, plan, config, mark)
    except InputError:
        # What stood there was to be replaced; half of what was to come is of no use.
        for url in (screen.manifest_url, screen.plate_map, screen.compounds):
            store.remove(url)
        screen.remove_stage("index")
        if is_new and not store.list_names(screen.url):
            store.remove(screen.url)
        raise
    rows, written = len(plan.wells.kept), len(plan.wells.plate_map)
    counts = {"rows": rows, "rows left out": rows - written, **found}
    notes = [*plan.notes, *plan.wells.notes, *notes]
    _record(screen, mark, counts, notes, time.monotonic() - start)
    return Imported(plan.meaning, counts, tuple(notes))


def _write(screen: Screen, plan: _Plan, config: ImportProfilesConfig, mark: str) -> tuple[dict[str, int], list[str]]:
    """Everything but the record that it is done."""
    for stage in STAGES:
        screen.remove_stage(stage)
    store.remove(screen.added())
    store.remove_partial(screen.url)
    screen.write_manifest(
        Manifest(
            software={name: importlib.metadata.version(name) for name in _SOFTWARE},
            config={PROFILES_IMPORT: config.model_dump(mode="json")},
            inputs=mark,
        )
    )
    write_table(screen.plate_map, plan.wells.plate_map, PLATE_MAP, mark)
    write_table(screen.compounds, plan.compounds, COMPOUNDS, mark)
    features = pd.DataFrame({"feature": plan.features, "excluded": ""})
    write_table(screen.profiles("features"), features, FEATURES, mark)
    form = raw_profiles_form(len(plan.features))
    written = write_tables(screen.profiles("raw"), _raw_tables(plan), form, mark)
    assert written == len(plan.wells.plate_map), "every well has its profile"
    made, notes = write_profiles(screen, config.profiles, mark)
    indexed, searched = build_index(screen, config.index, [])
    return {**indexed, **made}, [*notes, *searched]


def reprocess(url: str, config: ProfilesConfig) -> tuple[dict[str, int], list[str]]:
    """Process a screen's imported profiles by another recipe, and index them again.

    Raises:
        InputError: if there is no such screen, its profiles were not imported, or the recipe cannot be followed.
    """
    start = time.monotonic()
    screen = Screen.open(url)
    manifest = screen.read_manifest()
    if not manifest.has_imported_profiles:
        raise InputError(
            f"{url}: its profiles were not imported but made by a run: give the recipe to `screening run … --set "
            "profiles.recipe.method=… --update`"
        )
    before = ImportProfilesConfig.model_validate(manifest.settings)
    now = before.model_copy(update={"profiles": config})
    mark = fingerprint(manifest.inputs, config.model_dump(mode="json"))
    made, notes = write_profiles(screen, config, mark)
    for stage in _OF_PROFILES:
        screen.remove_stage(stage)
    # Before the index is built: plates that were added to it follow the recipe that the manifest names.
    changed = {"config": {PROFILES_IMPORT: now.model_dump(mode="json")}, "stages": {}}
    screen.write_manifest(manifest.model_copy(update=changed))
    indexed, searched = build_index(screen, now.index, [])
    old: dict[str, int] = manifest.stages["index"].counts if "index" in manifest.stages else {}
    rows = {name: old[name] for name in ("rows", "rows left out") if name in old}
    counts = rows | indexed | made
    notes += searched
    _record(screen, mark, counts, notes, time.monotonic() - start)
    return counts, notes


def _record(screen: Screen, mark: str, counts: dict[str, int], notes: list[str], seconds: float) -> None:
    record = StageRecord(fingerprint=mark, done=True, output=mark, counts=counts, notes=notes, seconds=seconds)
    screen.write_record("index", record)


def _check_folder(screen: Screen, update: bool) -> None:
    if not screen.exists():
        if names := screen.foreign_names():
            raise InputError(f"{screen.url}: holds {names[:5]} but no screen; choose a new or empty folder")
        return
    if not screen.read_manifest().has_imported_profiles:
        raise InputError(f"{screen.url}: holds a screen that was not imported from profiles; choose another folder")
    if not update:
        raise InputError(f"{screen.url}: holds imported profiles; choose another folder, or replace them with --update")


# --- what there is -------------------------------------------------------------------------------


def _plan(config: ImportProfilesConfig) -> _Plan:
    sources = [open_source(url) for url in config.tables]
    notes: list[str] = []
    columns = []
    # What is empty in one table is a measurement if it is one in another.
    numbers = frozenset[str]().union(*(source.numbers for source in sources))
    elsewhere = set() if config.compounds is None else set(open_source(config.compounds).columns)
    for source in sources:
        # What only the table of compounds has is looked for there.
        here = {
            key: name
            for key, name in config.columns.items()
            if key not in OF_COMPOUND or name in source.columns or name not in elsewhere
        }
        try:
            known = source.numbers | (source.empty & numbers)
            found = interpret(source.columns, known, here, config.features, source.variables)
        except InputError as error:
            raise InputError(f"{source.url}: {error}") from error
        columns.append(found)
        if found.not_numbers:
            notes.append(
                f"{len(found.not_numbers)} column(s) of {source.url} are called as measurements are and hold text, "
                f"or nothing, rather than numbers: {', '.join(found.not_numbers[:5])}; they are no features"
            )
    first = columns[0]
    for source, found in zip(sources, columns, strict=True):
        if found.keys != first.keys:
            raise InputError(
                f"{source.url}: its columns mean something else than those of {sources[0].url}: {found.keys} and "
                f"{first.keys}; import them one by one, or say with --map what they mean"
            )
    common = set.intersection(*(set(found.features) for found in columns))
    features = [name for name in first.features if name in common]
    if not features:
        raise InputError(f"the tables {list(config.tables)} have no measurement in common")
    for source in sources:
        source.require_numbers(features)
    every = set.union(*(set(found.features) for found in columns))
    if len(every) > len(features):
        notes.append(f"{len(every) - len(features)} feature(s) that are not in every table are left out")

    named = {name for names in first.keys.values() for name in names}
    frames = [
        source.read([name for name in source.columns if name in named or name in found.further])
        for source, found in zip(sources, columns, strict=True)
    ]
    # Errors name a row by its place in its own file.
    metadata = frames[0] if len(frames) == 1 else pd.concat(frames, keys=config.tables, names=["table", "row"])
    try:
        wells = settle(metadata, first.keys, config.controls, config.positive_controls)
        compounds = wells.compounds
        if config.compounds is not None:
            compounds, said = _with_compounds(compounds, config.compounds, config.columns)
            compounds = without_effect_of_controls(compounds, wells.plate_map)
            notes += said
    except SchemaError:
        raise
    except InputError as error:
        raise InputError(f"{', '.join(config.tables)}: {error}") from error
    meaning = pd.DataFrame(
        [
            (key, " + ".join(first.keys[key]), "guessed" if key in first.guessed else "as given")
            for key in KEYS
            if key in first.keys
        ],
        columns=["key", "column", "source"],
    )
    return _Plan(sources, features, wells, compounds, meaning, notes)


def _with_compounds(compounds: pd.DataFrame, url: str, given: dict[str, str]) -> tuple[pd.DataFrame, list[str]]:
    source = open_source(url)
    try:
        return add_compounds(compounds, source.read(source.columns), given)
    except InputError as error:
        raise InputError(f"{url}: {error}") from error


def _require_controls(plan: _Plan, config: ProfilesConfig) -> None:
    if not config.needs_controls:
        return
    plate_map = plan.wells.plate_map
    controlled = set(plate_map.loc[plate_map["role"] == "negative_control", "plate"])
    without = sorted(set(plate_map["plate"]) - controlled)
    if without:
        names = plate_map["compound"].value_counts().index[:5].tolist()
        raise InputError(
            f"{len(without)} of {plate_map['plate'].nunique()} plates have no negative control, such as {without[0]}: "
            f"name them with --control COMPOUND or --control COLUMN=VALUE (the commonest compounds are {names}), or "
            "compare wells with their whole plate: --recipe '{method: sphered, reference: plate}'"
        )


# --- measurements --------------------------------------------------------------------------------


def _raw_tables(plan: _Plan) -> Iterator[pa.Table]:
    """The raw profiles of the wells that are taken, block by block, with their keys and further metadata."""
    keys = plan.wells.plate_map[["plate", "well"]]
    further = plan.wells.further.rename(columns=lambda name: f"{METADATA_PREFIX}{name}")
    described = pa.Table.from_pandas(pd.concat([keys, further], axis=1), preserve_index=False)
    described = described.append_column("n_cells", pa.nulls(len(described), pa.int32()))
    start = 0
    for taken in _taken(plan):
        yield described.slice(start, len(taken)).append_column("profile", vector_column(taken))
        start += len(taken)


def _rehearse(plan: _Plan, config: ProfilesConfig) -> None:
    """Follow the recipe in memory only, so that one that cannot be followed costs no screen.

    Raises:
        InputError: if it cannot be, or a table cannot be read to its end.
    """
    values = np.empty((len(plan.wells.plate_map), len(plan.features)), np.float32)
    start = 0
    for taken in _taken(plan):
        values[start : start + len(taken)] = taken
        start += len(taken)
    known = plan.wells.plate_map.merge(plan.compounds[["compound", "moa", "target"]], on="compound", how="left")
    process(values, pd.concat([known, plan.wells.further], axis=1), config.recipe, plan.features, overwrite=True)


def _taken(plan: _Plan) -> Iterator[npt.NDArray[np.float32]]:
    """Measurements of the wells that are taken, block by block.

    Raises:
        InputError: if there are not as many rows as there were.
    """
    row = 0
    for values in _blocks(plan.sources, plan.features):
        yield values[plan.wells.kept[row : row + len(values)]]
        row += len(values)
    if row != len(plan.wells.kept):
        raise InputError(f"the tables had {len(plan.wells.kept)} rows and now have {row}: they change while being read")


def _blocks(sources: Sequence[Source], features: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
    for source in sources:
        yield from source.blocks(features)
