"""Profiles read back with all that is known of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipelines.vectors import read_profiles, vector_column
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import (
    COMPOUNDS,
    PLATE_MAP,
    compound_profiles_form,
    raw_profiles_form,
    well_profiles_form,
    write_table,
)

RAW = np.array([[1, np.nan, 3], [4, 5, 6], [7, 8, 9]], np.float32)


@pytest.fixture
def screen(tmp_path: object) -> Screen:
    """Three wells of two compounds, with a time that neither the plate map nor the compounds have a column for."""
    screen = Screen(f"{tmp_path}/screen")
    screen.write_manifest(Manifest(software={}, config={}, inputs=""))
    wells = pd.DataFrame({"plate": "p", "well": ["A01", "A02", "B01"]})
    named = wells.assign(
        compound=["dmso", "drug", "drug"],
        concentration=[np.nan, 1.0, 10.0],
        unit=[None, "uM", "uM"],
        role=["negative_control", "treatment", "treatment"],
        replicate="p",
    )
    # As on disk in any order: rows are matched by their keys.
    write_table(screen.plate_map, named.iloc[::-1], PLATE_MAP)
    compounds = pd.DataFrame(dict.fromkeys(COMPOUNDS.schema.names), index=range(2))
    write_table(screen.compounds, compounds.assign(compound=["dmso", "drug"], moa=[None, "poison"]), COMPOUNDS)
    raw = pa.table({**{name: wells[name] for name in wells}, "n_cells": pa.array([10, None, 30], pa.int32())})
    raw = raw.append_column("profile", vector_column(RAW)).append_column("metadata_time", pa.array([24.0, 24.0, 48.0]))
    write_table(screen.profiles("raw"), raw, raw_profiles_form(3))
    processed = pa.Table.from_pandas(named[["plate", "well", "compound", "role"]].assign(n_cells=1))
    processed = processed.append_column("profile", vector_column(RAW[:, [0, 2]]))
    write_table(screen.profiles("well"), processed, well_profiles_form(2))
    of_compounds = pd.DataFrame({"compound": ["dmso", "drug"], "role": "", "n_wells": [1, 2], "n_cells": 1})
    table = pa.Table.from_pandas(of_compounds).append_column("profile", vector_column(RAW[:2, [0, 2]]))
    write_table(screen.profiles("compound"), table, compound_profiles_form(2))
    return screen


def test_wells_come_with_their_metadata(screen: Screen) -> None:
    metadata, raw = read_profiles(Screen.open(screen.url), processed=False)
    np.testing.assert_array_equal(raw, RAW)
    assert raw.dtype == np.float32
    assert metadata["well"].tolist() == ["A01", "A02", "B01"]
    assert metadata["compound"].tolist() == ["dmso", "drug", "drug"]
    assert metadata["time"].tolist() == [24, 24, 48]
    assert metadata["moa"].isna().tolist() == [True, False, False]
    assert metadata["target"].isna().all()
    assert {"plate", "role", "concentration", "unit", "replicate", "n_cells"} < set(metadata)
    again, processed = read_profiles(screen)
    pd.testing.assert_frame_equal(again, metadata)
    np.testing.assert_array_equal(processed, RAW[:, [0, 2]])


def test_compounds_have_what_their_wells_share(screen: Screen) -> None:
    metadata, profiles = read_profiles(screen, "compound")
    assert profiles.shape == (2, 2)
    drug = metadata.set_index("compound").loc["drug"]
    assert (drug["moa"], drug["unit"], drug["n_wells"], drug["plate"], drug["n_cells"]) == ("poison", "uM", 2, "p", 30)
    assert pd.isna(drug["concentration"])
    assert pd.isna(drug["time"])
    assert pd.isna(drug["well"])


def test_what_is_not_there_is_said(screen: Screen) -> None:
    with pytest.raises(InputError, match="processed"):
        read_profiles(screen, "compound", processed=False)
    screen.remove_stage("index")
    with pytest.raises(SchemaError, match="has no profiles: run the stage"):
        read_profiles(screen)
