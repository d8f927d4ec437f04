"""Profiles read back with all that is known of them; embeddings read where they are asked for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.vectors import EmbeddedCells, read_profiles, rows_of, sample_rows, vector_column
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import (
    COMPOUNDS,
    PLATE_MAP,
    compound_profiles_form,
    embeddings_form,
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


@given(
    groups=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12),
    most=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_rows_are_drawn_from_their_groups_alone(groups: list[tuple[int, bool]], most: int, seed: int) -> None:
    counts, which = np.array([n for n, _ in groups], np.int64), np.array([wanted for _, wanted in groups], bool)
    belongs = [i for i, (n, _) in enumerate(groups) for _ in range(n)]
    expected = [row for row, group in enumerate(belongs) if which[group]]
    assert rows_of(counts, which).tolist() == expected
    drawn = sample_rows(counts, which, most, np.random.default_rng(seed)).tolist()
    assert drawn == sorted(set(drawn) & set(expected))
    assert len(drawn) == min(most, len(expected))


def test_every_row_is_drawn_as_often() -> None:
    counts, which = np.array([3, 4, 0, 5]), np.array([True, False, True, True])
    rng = np.random.default_rng(0)
    drawn = np.concatenate([sample_rows(counts, which, 2, rng) for _ in range(4000)])
    rows, times = np.unique(drawn, return_counts=True)
    assert rows.tolist() == [0, 1, 2, 7, 8, 9, 10, 11]
    assert (abs(times - 1000) < 5 * np.sqrt(1000)).all()


@pytest.fixture
def embedded(tmp_path: object) -> tuple[Screen, list[WellKey], np.ndarray]:
    """Wells of 3, 0, 4 and 1 cells, and one that has not been embedded."""
    screen = Screen(f"{tmp_path}/embedded")
    wells = [WellKey("p", f"A{i:02d}") for i in range(1, 6)]
    values = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    start = 0
    for well, n in zip(wells, [3, 0, 4, 1], strict=False):
        of_well = {
            "plate": ["p"] * n,
            "well": [well.well] * n,
            "site": ["0"] * n,
            "track": pa.array(range(n), pa.int32()),
        }
        table = pa.table(of_well, schema=pa.schema(list(embeddings_form(2).schema)[:4]))
        table = table.append_column("embedding", vector_column(values[start : start + n]))
        write_table(screen.embeddings(well), table, embeddings_form(2), "mark")
        start += n
    return screen, wells, values


@pytest.mark.parametrize("rows", [None, [], [0], [2, 3], [0, 1, 3, 6, 7], [7]])
def test_rows_of_embeddings_are_read_where_they_are(
    embedded: tuple[Screen, list[WellKey], np.ndarray], rows: list[int] | None
) -> None:
    screen, wells, values = embedded
    cells = EmbeddedCells(screen, wells)
    assert len(cells) == 8
    assert cells.per_well().to_numpy().tolist() == [
        ["p", f"A{i:02d}", n] for i, n in zip(range(1, 5), [3, 0, 4, 1], strict=True)
    ]
    keys, found = cells.read(None if rows is None else np.array(rows, np.int64))
    wanted = range(8) if rows is None else rows
    np.testing.assert_array_equal(found, values[list(wanted)])
    every = [("A01", 0), ("A01", 1), ("A01", 2), *(("A03", i) for i in range(4)), ("A04", 0)]
    assert [*zip(keys["well"], keys["track"], strict=True)] == [every[row] for row in wanted]
    assert cells.keys()["track"].tolist() == [track for _, track in every]


def test_without_embeddings_the_stage_is_named(tmp_path: object) -> None:
    with pytest.raises(SchemaError, match="run the stage `embed` first"):
        EmbeddedCells(Screen(f"{tmp_path}/none"), [WellKey("p", "A01")])
