"""Reading embeddings and profiles back as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from storage_schemas import store
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
    treatment_profiles_form,
    vector_dimension,
    well_profiles_form,
    write_table,
)

CELL_KEYS = ["plate", "well", "site", "track"]


def read_embeddings(screen: Screen, wells: Sequence[WellKey]) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
    """Keys (plate, well, site, track) and (n, D) embeddings of the wells that have been embedded, in order.

    Raises:
        SchemaError: if none has been.
    """
    done = screen.done_units("embed")
    urls = [screen.embeddings(well) for well in wells if well in done]
    if not urls:
        raise SchemaError(screen.url, "has no embeddings: run the stage `embed` first")
    form = embeddings_form(vector_dimension(urls[0], "embedding"))
    table = pa.concat_tables([open_table(url, form) for url in urls])
    return table.select(CELL_KEYS).to_pandas(), vectors(table["embedding"])


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
