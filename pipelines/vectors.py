"""Reading embeddings and profiles back as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import (
    COMPOUNDS,
    METADATA_PREFIX,
    PLATE_MAP,
    column_names,
    compound_profiles_form,
    embeddings_form,
    open_table,
    open_vectors,
    raw_profiles_form,
    row_count,
    treatment_profiles_form,
    vector_dimension,
    well_profiles_form,
    write_table,
)

CELL_KEYS = ["plate", "well", "site", "track"]


class EmbeddedCells:
    """The embedded cells of a screen, a row each in the order of wells; they are read only where they are asked for.

    Attributes:
        wells: those that have been embedded, in the order given.
        counts: (n_wells,) int64 cells of each.
    """

    def __init__(self, screen: Screen, wells: Sequence[WellKey]) -> None:
        """Count the cells.

        Args:
            screen: where they are.
            wells: in order.

        Raises:
            SchemaError: if none of the wells has been embedded.
        """
        done = screen.done_units("embed")
        self.wells = [well for well in wells if well in done]
        if not self.wells:
            raise SchemaError(screen.url, "has no embeddings: run the stage `embed` first")
        self._urls = [screen.embeddings(well) for well in self.wells]
        self._dimension = vector_dimension(self._urls[0], "embedding")
        self._form = embeddings_form(self._dimension)
        self.counts = np.array(list(ahead(partial(row_count, form=self._form), self._urls)), np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def per_well(self) -> pd.DataFrame:
        """plate, well and n_cells of each well."""
        table = pd.DataFrame(self.wells, columns=["plate", "well"])
        return table.assign(n_cells=self.counts)

    def keys(self) -> pd.DataFrame:
        """plate, well, site and track of every cell."""
        tables = ahead(partial(open_table, form=self._form, columns=CELL_KEYS), self._urls)
        return pa.concat_tables(tables).to_pandas()

    def read(self, rows: npt.NDArray[np.int64] | None = None) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
        """Keys (plate, well, site, track) and (n, D) embeddings.

        Args:
            rows: (n,) in ascending order; all by default.
        """
        rows = np.arange(len(self)) if rows is None else rows
        ends = np.cumsum(self.counts)
        at = np.searchsorted(ends, rows, side="right")
        wells, starts, lengths = np.unique(at, return_index=True, return_counts=True)
        tables = ahead(partial(open_table, form=self._form), (self._urls[well] for well in wells), most=4)
        keys = [self._form.schema.empty_table().select(CELL_KEYS)]
        values = np.empty((len(rows), self._dimension), np.float32)
        for well, start, length, table in zip(wells, starts, lengths, tables, strict=True):
            here = slice(start, start + length)
            of_well = rows[here] - (ends[well] - self.counts[well])
            values[here] = vectors(table["embedding"])[of_well]
            keys.append(table.select(CELL_KEYS).take(of_well))
        return pa.concat_tables(keys).to_pandas(), values


def rows_of(counts: npt.NDArray[np.int64], which: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The rows of some groups of rows that stand one after the other.

    Args:
        counts: (g,) rows of each group.
        which: (g,) the groups wanted.

    Returns:
        (n,) in ascending order.
    """
    return _rows_at(counts, which, np.arange(counts[which].sum()))


def sample_rows(
    counts: npt.NDArray[np.int64], which: npt.NDArray[np.bool_], most: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Rows drawn evenly from such groups; memory goes by what is drawn.

    Args:
        counts: (g,) rows of each group.
        which: (g,) the groups that are drawn from.
        most: rows to draw; all if there are no more.
        rng: draws.

    Returns:
        (min(most, rows there are),) in ascending order.
    """
    total = int(counts[which].sum())
    return _rows_at(counts, which, np.sort(rng.choice(total, min(most, total), replace=False)))


def _rows_at(
    counts: npt.NDArray[np.int64], which: npt.NDArray[np.bool_], places: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Rows among all of those at some places among the groups wanted."""
    ends = np.cumsum(counts[which])
    skipped = np.cumsum(counts)[which] - ends
    return places + skipped[np.searchsorted(ends, places, side="right")]


def read_profiles(
    screen: Screen, level: Literal["well", "treatment", "compound"] = "well", processed: bool = True
) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
    """Profiles, and all that is known of what they are of, of a screen that was run or whose profiles were imported.

    Args:
        screen: with profiles.
        level: of wells, of treatments (``profiles.treatment``) or of compounds.
        processed: after the recipe of the screen's configuration (``profiles``); else wells as they were summed up from
            cells or imported, whose values may be NaN.

    Returns:
        plate, well, compound, role, concentration, unit, replicate, moa, target, n_cells, and every further column that
        was imported, a row a profile; missing ones are None or NaN. Of treatments and compounds those hold what all
        their wells share, beside n_wells. And the (n, D) profiles in the same order.

    Raises:
        SchemaError: if there are no profiles.
        InputError: for treatments or compounds that are not processed.
    """
    if level != "well" and not processed:
        raise InputError(f"profiles of {level}s are made of processed wells; ask for processed ones, or for wells")
    raw_url = screen.profiles("raw")
    if not store.exists(raw_url):
        raise SchemaError(screen.url, "has no profiles: run the stage `index` first, or import some")
    form = raw_profiles_form(vector_dimension(raw_url, "profile"))
    if not processed:
        table, values = open_vectors(raw_url, form, "profile")
        return _metadata(screen, table.to_pandas()), values
    further = [name for name in column_names(raw_url) if name.startswith(METADATA_PREFIX)]
    wells = open_table(raw_url, form, ["plate", "well", "n_cells", *further]).to_pandas()
    metadata = _metadata(screen, wells)
    url = screen.profiles(level)
    table, values = open_vectors(url, _FORMS[level](vector_dimension(url, "profile")), "profile")
    if level != "well":
        keys = ["compound", *(n.removeprefix(METADATA_PREFIX) for n in table.column_names if n.startswith("metadata_"))]
        metadata = _shared(metadata, keys).assign(n_wells=table["n_wells"].to_numpy())
    assert len(metadata) == len(values), "raw and processed profiles are written together"
    return metadata, values


_FORMS = {"well": well_profiles_form, "treatment": treatment_profiles_form, "compound": compound_profiles_form}


def _metadata(screen: Screen, wells: pd.DataFrame) -> pd.DataFrame:
    """What the plate map, the table of compounds and an import say of wells, in their order."""
    names = [str(name) for name in wells]
    further = {name: name.removeprefix(METADATA_PREFIX) for name in names if name.startswith(METADATA_PREFIX)}
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    compounds = open_table(screen.compounds, COMPOUNDS, ["compound", "moa", "target"]).to_pandas()
    known = wells[["plate", "well"]].merge(plate_map, on=["plate", "well"], how="left", validate="one_to_one")
    known = known.merge(compounds, on="compound", how="left", validate="many_to_one")
    return pd.concat([known, wells[["n_cells", *further]].rename(columns=further)], axis=1)


def _shared(wells: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row a key: of each column what all its wells have in common, missing where they differ; cells are added up."""
    groups = wells.groupby(keys, sort=True, dropna=False)
    same = groups.nunique(dropna=False) == 1
    shared = groups.first().where(same)
    return shared.assign(n_cells=groups["n_cells"].sum(min_count=1)).reset_index()[list(wells.columns)]


def vectors(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """A fixed-size-list column as an (n, D) array."""
    array = column.combine_chunks()
    flat: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(array), array.type.list_size)


def vector_column(values: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    """An (n, D) array as a fixed-size-list column."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values, np.float32).ravel()), values.shape[1]
    )


def write_embeddings(url: str, cells: pa.Table, values: npt.NDArray[np.float32], fingerprint: str) -> None:
    """Write the embeddings of a well's cells that have one, in their order; commits the well's unit of `embed`."""
    assert len(cells) == len(values), "every embedding is of a cell"
    table = cells.select(CELL_KEYS).append_column("embedding", vector_column(values))
    write_table(url, table, embeddings_form(values.shape[1]), fingerprint)
