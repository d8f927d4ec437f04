"""Plates of another screen, embedded by a screen's own network: added to its index, or looked up in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import ConfigDict

from pipelines import events
from pipelines.cluster import cluster, embedding_actors
from pipelines.config import ResourcesConfig, RunConfig
from pipelines.embed import EmbedContext, EmbedWells
from pipelines.indexing import (
    added_screens,
    build_index,
    embedder,
    index_config,
    joint_compounds,
    joint_wells,
    profiles_config,
    read_cells,
)
from pipelines.inputs import well_keys
from pipelines.profiles import feature_names, write_raw
from pipelines.query import Searcher
from pipelines.units import Work, run_units
from pipelines.vectors import read_profiles, write_embeddings
from screening.embedding import EmbedConfig
from screening.profiles import sum_up
from screening.similarity import Index, Vectors, to_unit
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.index import Level, index_exists, read_manifest
from storage_schemas.keys import WellKey, check_name
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, open_table, write_table


class _Settings(Config):
    """How a screen was embedded, and how many of its wells were allowed to fail at that."""

    model_config = ConfigDict(extra="ignore")
    embed: EmbedConfig = EmbedConfig()
    max_failed_share: float = RunConfig.model_fields["max_failed_share"].default


def _settings(screen: Screen) -> _Settings:
    return _Settings.model_validate(screen.read_manifest().config)


def add(url: str, other_url: str, cpus: int | None = None) -> tuple[dict[str, int], list[str]]:
    """Add the plates of another screen to a screen's index.

    Their clips are embedded by the screen's own network, a well at a time, so that an interrupted command goes on. What
    the index has of cells stays as it is, with its codes, and the new ones are appended; profiles of wells and
    compounds are processed anew from all plates together. What was added before is kept.

    Args:
        url: a screen with an index and a network; or one of imported profiles.
        other_url: a screen whose plates have been segmented; or profiles of the same features, imported.
        cpus: to use; all by default.

    Returns:
        How many compounds, wells and cells the index has now, and notes for the reader.

    Raises:
        InputError: if the plates are in the index already, or cannot be compared with it.
    """
    screen, other = Screen.open(store.absolute(url)), Screen.open(store.absolute(other_url))
    if not index_exists(screen.index):
        raise SchemaError(screen.url, "has no index to add to: run the stage `index` first")
    own = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    made_by = embedder(screen)
    name = check_name(other.url.rpartition("/")[2], "screen")
    _check_plates(screen, other, name, own, made_by)
    target = Screen(screen.added(name), other.segmented or other)
    if target.exists() and target.read_manifest().inputs != made_by:
        store.remove(target.url)
    source = Manifest(software={}, config={}, inputs=made_by, cells=other.url)
    notes = []
    if store.exists(screen.checkpoint):
        embedded = _is_embedded(other, made_by)
        if not embedded:
            _require_clips(other)
        _copy_tables(other, target, source)
        if embedded:
            _copy_embeddings(other, target, made_by)
        missing = target.done_units("segment") - target.done_units("embed")
        if missing and (not embedded or (other.segmented or other).kept_clips == "all"):
            _embed(screen, target, made_by, cpus)
        elif missing:
            notes.append(
                f"{len(missing)} well(s) of {other.url} are not embedded and left out: run it, and add it again"
            )
        _sum_up(screen, target, made_by)
    else:
        _copy_profiles(screen, other, target, source)
    wells = well_keys(own) if store.exists(screen.checkpoint) else []
    # What was added before and has changed, as where wells had failed, is not at the end.
    extend = target.url not in {entry.screen for entry in read_manifest(screen.index).added}
    counts, told = build_index(screen, index_config(screen), wells, extend=extend)
    notes += told
    failed = len(target.failures("embed"))
    if failed:
        notes.append(f"{failed} well(s) of {other.url} could not be embedded: see {target.url}/failures; add it again")
    return counts, notes


def rebuild(url: str) -> tuple[dict[str, int], list[str]]:
    """Build the index of a screen anew, from its vectors and those of plates that were added.

    Raises:
        InputError: if there are none.
    """
    screen = Screen.open(store.absolute(url))
    has_cells = store.exists(screen.checkpoint)
    wells = well_keys(open_table(screen.plate_map, PLATE_MAP).to_pandas()) if has_cells else []
    return build_index(screen, index_config(screen), wells)


def ask_clips(searcher: Searcher, url: str, level: Level | None = None, **filters: Any) -> pd.DataFrame:
    """What resembles clips that are not in the index, embedded by the screen's network?

    Args:
        searcher: of the screen.
        url: clips of a well, a Zarr array as in ``SCREEN/clips``; or a screen whose wells have been segmented.
        level: what to compare with. Clips without a screen can be compared with cells only; the wells of a screen are
            compared with wells and compounds by profiles that are processed together with the index's.
        filters: as :meth:`pipelines.query.Searcher.query` takes them.

    Returns:
        As of :meth:`pipelines.query.Searcher.query`, a question a well: by the mean of its cells, or by its profile.

    Raises:
        InputError: if the screen has no network, or clips cannot be embedded by it.
    """
    screen = searcher.screen
    if not store.exists(screen.checkpoint):
        raise InputError(f"{screen.url}: has no network to embed clips with: its profiles were imported")
    level = level or "cell"
    # In this process: a question starts no Ray.
    worker = EmbedWells(EmbedContext(screen, _settings(screen).embed, "", torch.get_num_threads(), screen.checkpoint))
    if not Screen(url).exists():
        if level != "cell":
            raise InputError(
                f"{url}: clips alone can be compared with cells only (--level cell): profiles are normalised to the "
                "controls of a plate; give a screen"
            )
        vectors = worker.vectors(url)
        if not len(vectors):
            raise SchemaError(url, "holds no clip")
        name = url.rstrip("/").rpartition("/")[2]
        return searcher.query(vectors=_mean(vectors), names=[name], level=level, **filters)
    other = Screen.open(url)
    wells = sorted(other.done_units("segment"))
    found = {}
    if _is_embedded(other, searcher.manifest.embedder):
        found = {well: vectors for well, _, vectors in read_cells(other, wells)}
    else:
        _require_clips(other)
    if (other.segmented or other).kept_clips == "all":
        found |= {well: worker.vectors(other.clips(well)) for well in wells if well not in found}
    embedded = [(well, found[well]) for well in wells if well in found and len(found[well])]
    if not embedded:
        raise SchemaError(url, "has no cell with a clip")
    if left_out := sorted(set(wells) - {well for well, _ in embedded}):
        events.note(f"{len(left_out)} well(s) of {url} are left out, such as {left_out[0]}: not embedded, or empty")
    names = [str(well) for well, _ in embedded]
    if level == "cell":
        rows = np.concatenate([_mean(vectors) for _, vectors in embedded])
        return searcher.query(vectors=rows, names=names, level=level, **filters)
    rows = _in_one_space(searcher, other, embedded, level)
    return searcher.query(vectors=rows, names=names, level=level, **filters)


def _in_one_space(searcher: Searcher, other: Screen, embedded: list[tuple[WellKey, Vectors]], level: Level) -> Vectors:
    """Profiles of new wells; the searcher then compares with profiles that were processed together with them."""
    screen = searcher.screen
    how = profiles_config(screen).aggregate
    raw = np.stack([sum_up(vectors, how) for _, vectors in embedded]).astype(np.float32)
    plate_map = open_table(other.plate_map, PLATE_MAP).to_pandas().set_index(["plate", "well"])
    keys = [(well.plate, well.well) for well, _ in embedded]
    known = plate_map.loc[keys].reset_index().assign(n_cells=[len(vectors) for _, vectors in embedded])
    # A plate of the index may have the same name: each is compared with its own controls. No name holds a slash.
    known["plate"] = "asked/" + known["plate"]
    added, _ = added_screens(screen, searcher.manifest.embedder)
    others = [read_profiles(each, processed=False) for each in added]
    wells, values, _ = joint_wells(screen, [*others, (known.assign(moa=None, target=None), raw)])
    mine, new = values[: -len(raw)], values[-len(raw) :]
    if level == "compound":
        mine = joint_compounds(screen, wells.iloc[: len(mine)], mine)[1]
    searcher.compare_with(level, Index(to_unit(mine)))
    return new


def _mean(vectors: Vectors) -> Vectors:
    """(1, D): as a compound is asked about by the mean of its cells' directions."""
    return to_unit(vectors).mean(axis=0, dtype=np.float64)[None].astype(np.float32)


def _check_plates(screen: Screen, other: Screen, name: str, own: pd.DataFrame, made_by: str) -> None:
    taken = {plate: screen.url for plate in own["plate"]}
    for each in added_screens(screen, made_by)[0]:
        if each.url != screen.added(name):
            taken |= dict.fromkeys(open_table(each.plate_map, PLATE_MAP)["plate"].to_pylist(), each.url)
        elif each.read_manifest().cells != other.url:
            raise InputError(
                f"another screen called {name!r} was added before ({each.read_manifest().cells}); rename one"
            )
    plates = set(open_table(other.plate_map, PLATE_MAP)["plate"].to_pylist())
    if twice := sorted(plates & set(taken)):
        raise InputError(f"{other.url}: plate(s) {twice[:5]} are in the index of {screen.url} already; rename them")


def _is_embedded(other: Screen, made_by: str) -> bool:
    """Whether a screen's cells have been embedded by that network, so that there is nothing left to do."""
    record = other.read_manifest().stages.get("embed")
    return record is not None and record.done and embedder(other) == made_by


def _copy_embeddings(other: Screen, target: Screen, made_by: str) -> None:
    for well, cells, values in read_cells(other, sorted(other.done_units("embed"))):
        write_embeddings(target.embeddings(well), pa.Table.from_pandas(cells, preserve_index=False), values, made_by)


def _require_clips(other: Screen) -> None:
    owner = other.segmented or other
    record = owner.read_manifest().stages.get("segment")
    if record is None or not record.done:
        raise InputError(f"{owner.url}: its stage 'segment' is not done: there are no clips to embed; finish it")
    if owner.kept_clips != "all":
        raise InputError(
            f"{owner.url}: has been run with segment.clips.store={owner.kept_clips} and another network than this "
            "screen's: there are no clips to embed; run it with this screen's (network=SCREEN/checkpoint)"
        )


def _copy_tables(other: Screen, target: Screen, source: Manifest) -> None:
    """What is on the plates, so that it is known when the other screen is gone."""
    write_table(target.plate_map, open_table(other.plate_map, PLATE_MAP), PLATE_MAP)
    write_table(target.compounds, open_table(other.compounds, COMPOUNDS), COMPOUNDS)
    target.write_manifest(source)


def _embed(screen: Screen, target: Screen, made_by: str, cpus: int | None) -> None:
    resources, settings = ResourcesConfig(cpus=cpus), _settings(screen)
    wells = _mapped(target, target.done_units("segment"))
    with cluster(resources):
        actors, each = embedding_actors(resources)
        context = EmbedContext(target, settings.embed, made_by, each.threads, screen.checkpoint)
        work = Work(EmbedWells, (context,), num_cpus=each.asked, actors=actors)
        run_units(target, "embed", wells, work, settings.max_failed_share)


def _mapped(target: Screen, wells: set[WellKey]) -> list[WellKey]:
    """Those of the wells that the plate map names, in order."""
    return sorted(wells & set(well_keys(open_table(target.plate_map, PLATE_MAP).to_pandas())))


def _sum_up(screen: Screen, target: Screen, made_by: str) -> None:
    wells = _mapped(target, target.done_units("embed"))
    write_raw(target, read_cells(target, wells), profiles_config(screen).aggregate, made_by)


def _copy_profiles(screen: Screen, other: Screen, target: Screen, source: Manifest) -> None:
    """Imported profiles have no network: they must be of the same features."""
    if not other.read_manifest().has_imported_profiles:
        raise InputError(f"{screen.url}: has no network to embed clips with; add profiles that were imported")
    mine, theirs = feature_names(screen, 0), feature_names(other, 0)
    if mine != theirs:
        differing = sorted(set(mine) ^ set(theirs))
        raise InputError(
            f"{other.url}: its {len(theirs)} features are not the {len(mine)} of {screen.url}"
            f"{f', such as {differing[:3]}' if differing else ': their order differs'}; import both tables at once"
        )
    _copy_tables(other, target, source)
    store.write_bytes(target.profiles("raw"), store.read_bytes(other.profiles("raw")))
