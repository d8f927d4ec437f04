"""Profiles of a screen: what its wells were summed up to or imported as goes through the configured recipe."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipelines.vectors import read_profiles, vector_column
from screening.profiles import Aggregate, Basis, ProfilesConfig, consensus_profiles, process, sum_up
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import (
    FEATURES,
    METADATA_PREFIX,
    NORMALISATION,
    TableForm,
    compound_profiles_form,
    open_table,
    raw_profiles_form,
    treatment_profiles_form,
    well_profiles_form,
    write_table,
)

Profiles = npt.NDArray[np.float32]


def feature_names(screen: Screen, dimension: int) -> list[str]:
    """Names of the raw profiles' features: those that were imported, or numbers of an embedding's."""
    url = screen.profiles("features")
    if store.exists(url):
        return list(open_table(url, FEATURES)["feature"].to_pylist())
    return [f"embedding_{i}" for i in range(dimension)]


def write_raw(
    screen: Screen, wells: Iterable[tuple[WellKey, pd.DataFrame, Profiles]], how: Aggregate, fingerprint: str
) -> None:
    """Sum the embeddings of one well after another up to its raw profile; a well without cells has none.

    Raises:
        InputError: for an embedding that is not finite, or if no well has a cell.
    """
    keys, profiles = [], []
    for well, _, cells in wells:
        if len(cells):
            keys.append((well.plate, well.well, len(cells)))
            profiles.append(sum_up(cells, how))
    if not profiles:
        raise InputError(f"{screen.url}: no well has a cell with an embedding; `screening status` says what was lost")
    values = np.stack(profiles)
    table = pd.DataFrame(keys, columns=["plate", "well", "n_cells"])
    _write(screen.profiles("raw"), table, values, raw_profiles_form(values.shape[1]), fingerprint)


def write_profiles(screen: Screen, config: ProfilesConfig, fingerprint: str) -> tuple[dict[str, int], list[str]]:
    """Process the raw profiles of a screen's wells, and sum them up to treatments and compounds.

    Args:
        screen: with a plate map, compounds and raw profiles.
        config: the recipe, and how replicates agree on a profile.
        fingerprint: of the stage.

    Returns:
        Counts: ``features`` = ``features kept`` + ``features left out``; and notes for the reader.

    Raises:
        InputError: if the recipe cannot be followed.
    """
    metadata, raw = read_profiles(screen, processed=False)
    names = feature_names(screen, raw.shape[1])
    done = process(raw, metadata, config.recipe, names, overwrite=True)
    del raw
    dimension = done.values.shape[1]
    wells = metadata[["plate", "well", "compound", "role", "n_cells"]]
    _write(screen.profiles("well"), wells, done.values, well_profiles_form(dimension), fingerprint)

    keys = ["compound", *(name for name in config.treatment if name in metadata and name != "compound")]
    treatments, of_treatment = consensus_profiles(done.values, metadata[keys], config.consensus)
    treatments = treatments.rename(columns={name: f"{METADATA_PREFIX}{name}" for name in keys[1:]})
    form = treatment_profiles_form(dimension)
    _write(screen.profiles("treatment"), treatments, of_treatment, form, fingerprint)

    compounds, of_compound = consensus_profiles(done.values, metadata[["compound"]], config.consensus)
    known = metadata.groupby("compound", sort=True)
    compounds["role"] = known["role"].first().to_numpy()
    compounds["n_cells"] = known["n_cells"].sum(min_count=1).astype("Int32").to_numpy()
    _write(screen.profiles("compound"), compounds, of_compound, compound_profiles_form(dimension), fingerprint)

    features = pd.DataFrame({"feature": names, "excluded": done.excluded})
    write_table(screen.profiles("features"), features, FEATURES, fingerprint)
    write_table(screen.profiles("normalisation"), _basis_table(done.basis), NORMALISATION, fingerprint)
    counts = {
        "treatments": len(treatments),
        "features": len(names),
        "features kept": len(done.kept),
        "features left out": len(names) - len(done.kept),
    }
    return counts, list(done.notes)


def _basis_table(basis: tuple[Basis, ...]) -> pa.Table:
    vectors = pa.list_(pa.float32())
    return pa.table(
        {
            "step": pa.array([row.step for row in basis], pa.int32()),
            "plate": pa.array([row.plate for row in basis], pa.string()),
            "n_reference": pa.array([row.n_reference for row in basis], pa.int32()),
            "center": pa.array([row.center for row in basis], vectors),
            "scale": pa.array([row.scale for row in basis], vectors),
        }
    )


def _write(url: str, keys: pd.DataFrame, values: Profiles, form: TableForm, fingerprint: str) -> None:
    table = pa.Table.from_pandas(keys, preserve_index=False)
    table = table.append_column("profile", vector_column(values))
    write_table(url, table, form, fingerprint)
