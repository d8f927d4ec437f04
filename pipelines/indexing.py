"""Building a screen's similarity index: vectors go from Parquet to their final file well by well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.profiles import feature_names
from pipelines.vectors import CELL_KEYS, read_profiles, vectors
from screening import similarity
from screening.profiles import ProfilesConfig, consensus_profiles, process
from screening.similarity import Effort, Index, IndexConfig, Quantiser, Vectors, to_unit
from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.checkpoint import weights_digest
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.index import (
    VECTORS,
    Added,
    Build,
    Level,
    LevelManifest,
    Recall,
    new_build,
    read_array,
    read_ids,
    read_manifest,
)
from storage_schemas.index import IndexManifest as Manifest
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen, fingerprint
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, embeddings_form, open_table, vector_dimension

_ROWS = 2**16  # that are encoded at once


def read_cells(screen: Screen, wells: Sequence[WellKey]) -> Iterator[tuple[WellKey, pd.DataFrame, Vectors]]:
    """Keys and (n, D) embeddings of one well after another, of those that have been embedded, in order.

    Files are read ahead by threads; no more than a few wells are in memory.

    Raises:
        SchemaError: if no well has been embedded, or vectors have different dimensions.
    """
    done = screen.done_units("embed")
    urls = {well: screen.embeddings(well) for well in wells if well in done}
    if not urls:
        raise SchemaError(screen.url, "has no embeddings: run the stage `embed` first")
    form = embeddings_form(vector_dimension(next(iter(urls.values())), "embedding"))
    tables = ahead(partial(open_table, form=form), urls.values(), most=8)
    for well, table in zip(urls, tables, strict=True):
        yield well, table.select(CELL_KEYS).to_pandas(), vectors(table["embedding"])


@dataclass(frozen=True)
class Entries:
    """What a level of an index is made of.

    Attributes:
        dimension: of the vectors.
        blocks: (n, D) parts of the vectors one after another, each with what they are of: a row a vector of
            :data:`storage_schemas.tables.INDEX_IDS`.
    """

    dimension: int
    blocks: Callable[[], Iterator[tuple[pd.DataFrame, Vectors]]]


def cell_entries(sources: Sequence[tuple[Screen, Sequence[WellKey]]]) -> Entries:
    """The cells of screens, each with its wells."""
    screen, wells = sources[0]
    done = screen.done_units("embed")
    first = next((well for well in wells if well in done), None)
    if first is None:
        raise SchemaError(screen.url, "has no embeddings: run the stage `embed` first")
    dimension = vector_dimension(screen.embeddings(first), "embedding")

    def blocks() -> Iterator[tuple[pd.DataFrame, Vectors]]:
        for screen, wells in sources:
            compound, moa = _annotation(screen)
            for well, keys, values in read_cells(screen, wells):
                if values.shape[1] != dimension:
                    raise InputError(
                        f"{screen.url}: embeddings have {values.shape[1]} dimensions, those of {sources[0][0].url} "
                        f"{dimension}: another network made them"
                    )
                of_well = compound[well]
                text = str(well) + "/" + keys["site"] + "/" + keys["track"].astype(str)
                yield (
                    pd.DataFrame(
                        {
                            "id": text,
                            "compound": of_well,
                            "moa": moa.get(of_well),
                            "plate": well.plate,
                            "well": well.well,
                            "n_cells": 1,
                        }
                    ),
                    values,
                )

    return Entries(dimension, blocks)


def profile_entries(level: Level, known: pd.DataFrame, values: Vectors) -> Entries:
    """Profiles of wells or compounds, with what :func:`pipelines.vectors.read_profiles` says of them."""
    ids = known[["compound", "moa", "n_cells"]].copy()
    if level == "well":
        ids = ids.assign(id=known["plate"] + "/" + known["well"], plate=known["plate"], well=known["well"])
    else:
        ids = ids.assign(id=known["compound"], plate=None, well=None)
    return Entries(values.shape[1], lambda: iter([(ids, values)]))


@dataclass(frozen=True)
class Before:
    """A level as it was before it is added to.

    Attributes:
        manifest: of the level.
        ids: of its vectors.
        vectors: at unit length.
        arrays: everything else, by name.
    """

    manifest: LevelManifest
    ids: pd.DataFrame
    vectors: Vectors
    arrays: Mapping[str, npt.NDArray[Any]]


def build_level(
    build: Build, level: Level, entries: Entries, config: IndexConfig, before: Before | None = None
) -> LevelManifest:
    """Write a level of an index.

    Args:
        build: that it is part of.
        level: which.
        entries: what it is made of, read once.
        config: how it is to be searched.
        before: what is kept in front of the entries; its codes stay valid, so that only what is new is encoded.

    Raises:
        InputError: vectors that are not finite, or of another dimension than those before.
    """
    if before is not None and entries.dimension != before.vectors.shape[1]:
        raise InputError(
            f"level {level!r}: vectors to add have {entries.dimension} dimensions, those of the index "
            f"{before.vectors.shape[1]}"
        )
    tables: list[pd.DataFrame] = [] if before is None else [before.ids]

    def units() -> Iterator[Vectors]:
        for ids, values in entries.blocks():
            tables.append(ids)
            yield to_unit(values)

    kept = [] if before is None else _blocks(before.vectors)
    arrays = {VECTORS: build.write_array(level, VECTORS, (entries.dimension,), "float32", chain(kept, units()))}
    known_as = _joined(tables)
    ids = build.write_ids(level, known_as)
    count = arrays[VECTORS].shape[0]
    method, reason = similarity.choose(config, count, entries.dimension)
    if method.method == "exact":
        return LevelManifest(method="exact", reason=reason, arrays=arrays, ids=ids)

    mapped = build.open_array(level, VECTORS, arrays[VECTORS])
    encoded: dict[str, npt.NDArray[Any]] = {}
    if before is not None and before.manifest.method == method.method:
        quantiser = quantiser_of(before.arrays)
        encoded = {name: before.arrays[name] for name in ("codes", "lists") if name in before.arrays}
    else:
        size = similarity.training_size(method, count)
        chosen = np.sort(np.random.default_rng(0).choice(count, size, replace=False))
        quantiser = similarity.train(mapped[chosen], method, count)
    known = len(encoded["codes"]) if encoded else 0
    parts = [encoded] if encoded else []
    parts += [quantiser.encode(np.ascontiguousarray(block)) for block in _blocks(mapped[known:])]
    encoded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, array in {**encoded, **_quantiser_arrays(quantiser)}.items():
        arrays[name] = build.write_array(level, name, array.shape[1:], array.dtype.name, [array])

    # Cells of a well are alike: what others find is harder to find.
    group = _well_codes(known_as) if level == "cell" else None
    tuning = similarity.tune(Index(mapped, quantiser, encoded), method, group)
    return LevelManifest(
        method=method.method,
        reason=reason,
        depth=tuning.effort.depth,
        probes=tuning.effort.probes,
        recall=Recall(value=tuning.recall, low=tuning.low, queries=tuning.queries, target=method.recall),
        arrays=arrays,
        ids=ids,
    )


def build_index(
    screen: Screen, config: IndexConfig, wells: Sequence[WellKey], *, extend: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Index a screen's profiles, and its cells where it has embeddings; with them the plates that were added.

    Args:
        screen: with profiles, run or imported.
        config: how to search.
        wells: whose cells are indexed; none where only profiles are.
        extend: keep the cells that the index has, with their codes, and append those of plates added since.

    Returns:
        How many compounds, wells and cells; and how each level is searched, in a line for the reader.

    Raises:
        InputError: for profiles of added plates that cannot be processed together with the screen's own.
    """
    made_by = embedder(screen)
    added, notes = added_screens(screen, made_by)
    before = read_manifest(screen.index) if extend else None
    if before is not None and before.embedder != made_by:
        before = None
    there = {entry.screen for entry in before.added} if before is not None else set()
    new = [other for other in added if other.url not in there]
    if not new:
        before = None
    if added:
        known, values, said = joint_wells(screen, [read_profiles(other, processed=False) for other in added])
        of_wells, of_compounds = (known, values), joint_compounds(screen, known, values)
        notes += said
    else:
        of_wells, of_compounds = read_profiles(screen, "well"), read_profiles(screen, "compound")
    levels: dict[Level, Entries] = {
        "compound": profile_entries("compound", *of_compounds),
        "well": profile_entries("well", *of_wells),
    }
    sources: list[tuple[Screen, Sequence[WellKey]]] = [
        (other, done_wells(other)) for other in (new if before is not None else added)
    ]
    if before is None:
        sources.insert(0, (screen, wells))
    sources = [(each, keys) for each, keys in sources if keys]
    if sources:
        levels["cell"] = cell_entries(sources)
    with new_build(screen.index) as build:
        built = {}
        for level, entries in levels.items():
            kept = read_before(screen.index, before, level) if before is not None and level == "cell" else None
            built[level] = build_level(build, level, entries, config, kept)
        build.manifest = Manifest(
            embedder=made_by, build=build.name, levels=built, added=tuple(_added(other) for other in added)
        )
    counts = {f"{level}s": held.count for level, held in built.items()}
    return counts, [*notes, *(describe(level, held) for level, held in built.items() if held.method != "exact")]


def added_screens(screen: Screen, made_by: str) -> tuple[list[Screen], list[str]]:
    """The plates that were added to a screen, as screens of their own, and a note on those of another network."""
    found, notes = [], []
    for name in store.list_names(screen.added()):
        other = Screen(screen.added(name))
        if other.exists() and other.read_manifest().inputs == made_by and store.exists(other.profiles("raw")):
            found.append(other)
        else:
            notes.append(f"{other.url}: was not added to the end, or by another network; add it again")
    return found, notes


def done_wells(screen: Screen) -> list[WellKey]:
    """The wells that have embeddings, in order."""
    return sorted(screen.done_units("embed"))


def profiles_config(screen: Screen) -> ProfilesConfig:
    """What a screen's profiles have gone through."""
    return ProfilesConfig.model_validate(screen.read_manifest().settings.get("profiles", {}))


def index_config(screen: Screen) -> IndexConfig:
    """How a screen's vectors are to be searched."""
    settings = screen.read_manifest().settings
    found: IndexConfig = TypeAdapter(IndexConfig).validate_python(settings.get("index", {"method": "auto"}))
    return found


def joint_wells(
    screen: Screen, others: Sequence[tuple[pd.DataFrame, Vectors]]
) -> tuple[pd.DataFrame, Vectors, tuple[str, ...]]:
    """Profiles of a screen's wells and of others, processed together: so they lie in one space.

    Args:
        screen: with profiles, whose recipe is followed.
        others: wells and their raw profiles, as of :func:`pipelines.vectors.read_profiles`.

    Returns:
        What is known of all wells, their profiles, and what the recipe left out or could not do.

    Raises:
        InputError: for profiles of different dimensions, or a recipe that cannot be followed.
    """
    parts = [read_profiles(screen, processed=False), *others]
    dimensions = [values.shape[1] for _, values in parts]
    if len(set(dimensions)) > 1:
        raise InputError(f"profiles of {dimensions} dimensions cannot be processed together")
    wells = pd.concat([known for known, _ in parts], ignore_index=True)
    raw = np.concatenate([values for _, values in parts])
    done = process(raw, wells, profiles_config(screen).recipe, feature_names(screen, raw.shape[1]))
    return wells, done.values, done.notes


def joint_compounds(screen: Screen, wells: pd.DataFrame, values: Vectors) -> tuple[pd.DataFrame, Vectors]:
    """The profiles of compounds on processed wells, with what an index says of them."""
    compounds, merged = consensus_profiles(values, wells[["compound"]], profiles_config(screen).consensus)
    groups = wells.groupby("compound", sort=True)
    cells = groups["n_cells"].sum(min_count=1).astype("Int32").to_numpy()
    return compounds.assign(moa=groups["moa"].first().to_numpy(), n_cells=cells), merged


def read_before(url: str, manifest: Manifest, level: Level) -> Before | None:
    """A level of an index, to be added to; None where it has none."""
    if level not in manifest.levels:
        return None
    held = manifest.levels[level]
    arrays = {name: read_array(url, manifest, level, name) for name in held.arrays}
    return Before(held, read_ids(url, manifest, level), arrays.pop(VECTORS), arrays)


def _added(screen: Screen) -> Added:
    plates = sorted({well.plate for well in done_wells(screen)})
    return Added(screen=screen.url, plates=tuple(plates))


def embedder(screen: Screen) -> str:
    """What made a screen's vectors: a digest of its network's weights, or of the features that were imported."""
    if store.exists(screen.checkpoint):
        return weights_digest(screen.checkpoint)
    return fingerprint("imported", vector_dimension(screen.profiles("raw"), "profile"))


def open_level(url: str, manifest: Manifest, level: Level) -> Index:
    """A level of an index, ready to be searched.

    Raises:
        SchemaError: if a file is missing or damaged.
    """
    held = manifest.levels[level]
    arrays = {name: read_array(url, manifest, level, name) for name in held.arrays}
    try:
        if held.method == "exact":
            return Index(arrays[VECTORS])
        return Index(arrays[VECTORS], quantiser_of(arrays), arrays, Effort(held.depth, held.probes))
    except (InputError, KeyError) as error:
        raise SchemaError(url, f"level {level!r}: {error}") from error


def describe(level: Level, held: LevelManifest) -> str:
    """How a level is searched, why, and how well, in a line."""
    if held.recall is None:
        return f"{level}: {held.count:,} vectors compared exactly: {held.reason}"
    found = (
        f"recall@10 {held.recall.value:.4f} (at least {held.recall.low:.4f}) over {held.recall.queries} of its vectors"
    )
    if held.recall.low < held.recall.target:
        found += f", short of index.recall={held.recall.target} with all that index.max_depth allows"
    lists = f", {held.probes} lists" if held.probes else ""
    return f"{level}: {held.count:,} vectors, {held.method}{lists}, {held.depth:,} re-ranked: {held.reason}; {found}"


def quantiser_of(arrays: Mapping[str, npt.NDArray[Any]]) -> Quantiser:
    """What compressed a level's vectors, from its arrays."""
    return Quantiser(arrays["codebook"], arrays.get("centroids"))


def _quantiser_arrays(quantiser: Quantiser) -> dict[str, Vectors]:
    arrays = {"codebook": quantiser.codebook}
    return arrays if quantiser.centroids is None else {**arrays, "centroids": quantiser.centroids}


def _joined(tables: Sequence[pd.DataFrame]) -> pa.Table:
    """The ids of all blocks; names as text, so that categories of one block do not meet those of another."""
    names = ["id", "compound", "moa", "plate", "well"]
    parts = [
        pa.Table.from_pydict(
            {
                **{name: pa.array(table[name].astype(object), pa.string(), from_pandas=True) for name in names},
                "n_cells": pa.array(table["n_cells"], pa.int32(), from_pandas=True),
            }
        )
        for table in tables
    ]
    return pa.concat_tables(parts)


def _well_codes(ids: pa.Table) -> npt.NDArray[np.int64]:
    """A number a well."""
    plate, well = (ids[name].combine_chunks().dictionary_encode() for name in ("plate", "well"))
    codes = plate.indices.to_numpy().astype(np.int64) * len(well.dictionary)
    return np.asarray(codes + well.indices.to_numpy())


def _annotation(screen: Screen) -> tuple[dict[WellKey, str], dict[str, str | None]]:
    """The compound of each well, and the MOA of each compound."""
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    compounds = open_table(screen.compounds, COMPOUNDS, ["compound", "moa"]).to_pydict()
    wells = map(WellKey, plate_map["plate"], plate_map["well"])
    return dict(zip(wells, plate_map["compound"], strict=True)), dict(
        zip(compounds["compound"], compounds["moa"], strict=True)
    )


def _blocks(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
