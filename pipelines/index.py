"""Stage `index`: embeddings in; well and compound profiles and a similarity index of each level out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.units import Counts
from pipelines.vectors import read_embeddings, vector_column
from screening import profiles, similarity
from storage_schemas.index import IndexManifest, Level, write_level, write_manifest
from storage_schemas.screen import Screen
from storage_schemas.tables import (
    TableForm,
    compound_profiles_form,
    normalisation_form,
    raw_profiles_form,
    well_profiles_form,
    write_table,
)

OUTPUT_VERSION = 2  # raised when the same configuration gives other files


def index(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Sum cells up to wells and compounds, normalise, and index all three levels.

    Returns:
        Counts, and notes for the reader.

    Raises:
        InputError: if a plate has no negative controls to normalise to.
    """
    keys, cells = read_embeddings(screen, inputs.wells)
    wells, raw = profiles.well_profiles(cells, keys["plate"], keys["well"], config.profiles)
    wells = wells.merge(inputs.plate_map, on=["plate", "well"], how="left", validate="one_to_one")
    is_control = (wells["role"] == "negative_control").to_numpy()
    normalised, basis = profiles.normalise(raw, wells["plate"], is_control, config.profiles)
    compounds, merged = profiles.compound_profiles(normalised, wells["compound"], config.profiles)
    of_compound = wells.groupby("compound").agg(role=("role", "first"), n_cells=("n_cells", "sum"))
    compounds = compounds.merge(of_compound, on="compound", validate="one_to_one")

    dimension = cells.shape[1]
    _write(screen.profiles("raw"), wells[["plate", "well", "n_cells"]], raw, raw_profiles_form(dimension), fingerprint)
    _write(
        screen.profiles("well"),
        wells[["plate", "well", "compound", "role", "n_cells"]],
        normalised,
        well_profiles_form(dimension),
        fingerprint,
    )
    _write(screen.profiles("compound"), compounds, merged, compound_profiles_form(dimension), fingerprint)
    table = pa.Table.from_pandas(basis[["plate", "n_reference"]], preserve_index=False)
    for column in ("center", "scale"):
        table = table.append_column(column, vector_column(np.stack(basis[column].to_list())))
    write_table(screen.profiles("normalisation"), table, normalisation_form(dimension), fingerprint)

    moa = inputs.compounds.set_index("compound")["moa"]
    of_well = wells.set_index(["plate", "well"])["compound"]
    cell_compound = of_well.loc[pd.MultiIndex.from_frame(keys[["plate", "well"]])].to_numpy()
    text = keys["plate"] + "/" + keys["well"] + "/" + keys["site"] + "/" + keys["track"].astype(str)
    levels: dict[Level, tuple[pd.DataFrame, npt.NDArray[np.float32]]] = {
        "cell": (
            pd.DataFrame({"id": text, "compound": cell_compound, "plate": keys["plate"], "n_cells": 1}),
            cells,
        ),
        "well": (
            wells.assign(id=wells["plate"] + "/" + wells["well"])[["id", "compound", "plate", "n_cells"]],
            normalised,
        ),
        "compound": (
            compounds.assign(id=compounds["compound"], plate=None)[["id", "compound", "plate", "n_cells"]],
            merged,
        ),
    }
    for level, (ids, values) in levels.items():
        ids = ids.assign(moa=ids["compound"].map(moa))
        write_level(screen.index, level, similarity.serialise(similarity.build(values)), ids)
    counts = {f"{level}s": len(ids) for level, (ids, _) in levels.items()}
    write_manifest(
        screen.index,
        IndexManifest("cosine", fingerprint, dimension, {k: len(v[0]) for k, v in levels.items()}),
    )
    few = basis.loc[basis["scale"].map(lambda scale: bool((scale == 1).all())), "plate"]
    notes = []
    if len(few) and config.profiles.normalise.method != "none":
        notes.append(
            "profiles are centred but not scaled: a plate has fewer reference wells than profiles.normalise.min_wells"
        )
    return counts, notes


def _write(
    url: str,
    keys: pd.DataFrame,
    values: npt.NDArray[np.float32],
    form: TableForm,
    fingerprint: str,
) -> None:
    table = pa.Table.from_pandas(keys, preserve_index=False)
    table = table.append_column("profile", vector_column(values))
    write_table(url, table, form, fingerprint)
