"""Splits: nothing tested on was trained on, whatever the screen looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.splits import (
    CELL,
    TESTS,
    ByCell,
    ByCompound,
    ByReplicate,
    ByWell,
    FromTable,
    Split,
    SplitConfig,
    check_leaks,
    parts_of,
    split,
    unit,
)
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.tables import PARTS, SPLIT, read_split


def screen(moas: dict[str | None, int], replicates: int = 3, controls: int = 2) -> tuple[pd.DataFrame, pd.DataFrame]:
    names = [(f"{moa}-{i}", moa) for moa, n in moas.items() for i in range(n)]
    rows = []
    for replicate in range(1, replicates + 1):
        roles = [(name, "treatment") for name, _ in names] + [("DMSO", "negative_control")] * controls
        for i, (name, role) in enumerate(roles):
            rows.append((f"plate{replicate}", f"A{i + 1:02d}", name, role, str(replicate)))
    plate_map = pd.DataFrame(rows, columns=["plate", "well", "compound", "role", "replicate"])
    compounds = pd.DataFrame([*names, ("DMSO", None)], columns=["compound", "moa"])
    return plate_map, compounds


def run(moas: dict[str | None, int], seed: int = 0, config: SplitConfig | None = None, **form: int) -> Split:
    return split(*screen(moas, **form), config or ByCompound(), seed)


def test_a_whole_screen() -> None:
    table, notes = run({"a": 5, "b": 4})
    check_leaks(table, "compound")
    assert list(table.columns) == SPLIT.schema.names
    assert table[["site", "track"]].isna().all(axis=None)
    by_compound = table[table["replicate"] == "1"].set_index("compound")["split"]
    for moa, n in {"a": 5, "b": 4}.items():
        parts = [by_compound[f"{moa}-{i}"] for i in range(n)]
        assert sorted(parts) == ["test_compound", *["train"] * (n - 2), "validation"]
    assert set(by_compound["DMSO"]) == {"train"}
    held_out = table[table["replicate"] == "3"]
    trained = held_out["compound"].map(lambda name: name != "DMSO" and by_compound[name] == "train")
    assert (held_out["split"] == trained.map({True: "test_replicate", False: "unused"})).all()
    assert notes == ["Replicate 3 is held out: nothing in it is trained on."]


@settings(max_examples=60, deadline=None)
@given(
    moas=st.dictionaries(st.sampled_from(["a", "b", "c", None]), st.integers(1, 7), max_size=4),
    replicates=st.integers(1, 4),
    controls=st.integers(0, 2),
    seed=st.integers(0, 99),
    validation=st.sampled_from([0.0, 0.2, 0.6]),
    test=st.sampled_from([0.0, 0.25, 0.9]),
    hold_out=st.booleans(),
)
def test_any_screen_goes_through_without_a_leak(
    moas: dict[str | None, int],
    replicates: int,
    controls: int,
    seed: int,
    validation: float,
    test: float,
    hold_out: bool,
) -> None:
    config = ByCompound(validation_share=validation, test_share=test, hold_out_replicate=hold_out)
    table, notes = run(moas, seed, config, replicates=replicates, controls=controls)
    check_leaks(table, "compound")
    assert set(table["split"]) <= set(PARTS)
    assert len(table) == replicates * (sum(moas.values()) + controls)
    for moa in set(moas) - {None}:
        assert "train" in set(table["split"][table["moa"] == moa])
    assert (table["split"][table["moa"].isna() & (table["role"] == "treatment")] == "unused").all()
    if moas and validation > 0 and "validation" not in set(table["split"]):
        assert any("no validation" in note for note in notes)


def test_the_draw_follows_the_seed_and_not_the_order_of_rows() -> None:
    plate_map, compounds = screen({"a": 6, "b": 6})
    first = split(plate_map, compounds, ByCompound(), 1).table
    shuffled = split(plate_map.sample(frac=1, random_state=0), compounds.iloc[::-1], ByCompound(), 1).table.sort_index()
    pd.testing.assert_frame_equal(first, shuffled)
    assert any(not first.equals(split(plate_map, compounds, ByCompound(), seed).table) for seed in (2, 3))


def test_the_last_replicate_is_the_last_by_number() -> None:
    table, _ = run({"a": 4}, replicates=10)
    assert set(table["replicate"][table["split"] == "test_replicate"]) == {"10"}


def test_a_plate_of_three_wells_says_what_cannot_be_tested() -> None:
    table, notes = run({"a": 1, "b": 1}, replicates=1, controls=1)
    assert set(table["split"]) == {"train"}
    assert len(notes) == 3
    assert "one replicate" in notes[0]


def test_a_compound_without_wells_in_training_is_not_tested_on_the_replicate() -> None:
    plate_map, compounds = screen({"a": 1, "b": 2}, replicates=2)
    plate_map = plate_map[(plate_map["compound"] != "a-0") | (plate_map["replicate"] == "2")]
    table, _ = split(plate_map, compounds, ByCompound(), 0)
    assert set(table["split"][table["compound"] == "a-0"]) == {"unused"}


def test_a_compound_that_is_not_listed_is_named() -> None:
    plate_map, compounds = screen({"a": 2})
    with pytest.raises(InputError, match="a-1"):
        split(plate_map, compounds[compounds["compound"] != "a-1"], ByCompound(), 0)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", "test", "unknown parts"),
        ("well", "A01", "more than once"),
    ],
)
def test_a_broken_table_is_refused(column: str, value: str, message: str) -> None:
    table = run({"a": 5}).table
    table[column] = value
    with pytest.raises(InputError, match=message):
        check_leaks(table, "compound")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("test_compound", "compound .* is in test_compound and in train"),
        ("validation", "compound .* is in validation and in train"),
        ("test_replicate", "replicate 1 is in test_replicate and in train"),
    ],
)
def test_a_leak_is_refused(part: str, message: str) -> None:
    table = run({"a": 6}).table
    row = table.index[(table["split"] == "train") & (table["role"] == "treatment")][0]
    table.loc[row, "split"] = part
    with pytest.raises(InputError, match=message):
        check_leaks(table, "compound")


def test_a_compound_without_a_mechanism_is_trained_on_only_where_compounds_are_told_apart() -> None:
    plate_map = pd.DataFrame(
        {
            "plate": ["p1", "p1", "p2", "p2"],
            "well": ["A01", "A02", "A01", "A02"],
            "compound": ["both", "first", "both", "last"],
            "role": "treatment",
            "replicate": ["1", "1", "2", "2"],
        }
    )
    compounds = pd.DataFrame({"compound": ["both", "first", "last"], "moa": None})
    by_moa = split(plate_map, compounds, ByCompound(), seed=0).table
    by_compound = split(plate_map, compounds, ByCompound(), seed=0, label="compound").table
    assert set(by_moa["split"]) == {"unused"}
    # In the held-out replicate there is no mechanism to find.
    assert by_compound["split"].tolist() == ["train", "train", "unused", "unused"]


# --- by well, replicate and cell, and as a table says -----------------------------------------------


def cells_of(plate_map: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    rows = [
        (plate, well, str(i % 2), i + 1)
        for plate, well in zip(plate_map["plate"], plate_map["well"], strict=True)
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=CELL)


def parts(table: pd.DataFrame, compound: str) -> list[str]:
    return sorted(table["split"][table["compound"] == compound])


@settings(max_examples=40, deadline=None)
@given(
    moas=st.dictionaries(st.sampled_from(["a", "b", None]), st.integers(1, 4), min_size=1, max_size=3),
    replicates=st.integers(2, 4),
    seed=st.integers(0, 99),
    config=st.sampled_from([ByCompound(), ByReplicate(), ByWell(), ByCell(), ByCell(gallery_share=0)]),
)
def test_no_method_leaks_and_each_tests_what_it_is_called_by(
    moas: dict[str | None, int], replicates: int, seed: int, config: SplitConfig
) -> None:
    plate_map, compounds = screen(moas, replicates)
    table, notes = split(plate_map, compounds, config, seed, cells=cells_of(plate_map))
    check_leaks(table, unit(config))
    trained, queried = table[table["split"] == "train"], table[table["split"].isin(TESTS)]
    assert not queried["moa"].isna().any()
    keys = CELL if isinstance(config, ByCell) else ["plate", "well"]
    assert not queried.merge(trained, on=keys).size
    assert len(table) == len(plate_map) * (5 if isinstance(config, ByCell) else 1)
    assert any("optimistic" in note for note in notes) == isinstance(config, ByCell)
    again = split(
        plate_map.sample(frac=1, random_state=1),
        compounds.iloc[::-1],
        config,
        seed,
        cells=cells_of(plate_map).sample(frac=1, random_state=2),
    ).table
    pd.testing.assert_frame_equal(table, again.sort_index())


def test_wells_of_a_compound_are_divided() -> None:
    table = run({"a": 2, None: 1}, config=ByWell(), replicates=5).table
    assert parts(table, "a-0") == ["test_well", "train", "train", "train", "validation"]
    assert set(parts(table, "DMSO")) == {"train"}
    assert set(parts(table, "None-0")) == {"unused"}
    assert set(run({"a": 2, None: 1}, config=ByWell(test_share=0), replicates=5).table["split"]) == {
        "train",
        "validation",
        "unused",
    }
    assert any("test_well is empty" in note for note in run({"a": 2}, config=ByWell(), replicates=1).notes)


def test_replicates_are_divided() -> None:
    table, notes = run({"a": 2}, config=ByReplicate(), replicates=3)
    assert parts(table, "a-1") == ["test_replicate", "train", "validation"]
    assert parts(table, "DMSO") == ["train", "train", *["unused"] * 4]
    assert notes == ["Replicate 3 is held out: nothing in it is trained on."]
    assert "no validation" in run({"a": 2}, config=ByReplicate(), replicates=2).notes[1]
    with pytest.raises(InputError, match="needs two replicates"):
        run({"a": 2}, config=ByReplicate(), replicates=1)


def test_cells_are_divided_within_compounds_and_told_apart_by_their_keys() -> None:
    plate_map, compounds = screen({"a": 2}, replicates=2)
    cells = cells_of(plate_map, 10)
    table = split(plate_map, compounds, ByCell(), 0, cells=cells).table
    count = pd.Series(parts(table, "a-0")).value_counts().to_dict()
    assert count == {"train": 8, "test_cell": 4, "gallery": 4, "validation": 4}
    shuffled = cells.sample(frac=1, random_state=3).assign(extra=1)
    found = parts_of(shuffled, table)
    assert found["extra"].eq(1).all()
    by_key = {tuple(row[:4]): row[4] for row in table[[*CELL, "split"]].itertuples(index=False)}
    assert [by_key[tuple(row)] for row in shuffled[CELL].itertuples(index=False)] == found["split"].tolist()
    assert parts_of(cells.assign(track=99), table)["split"].isna().all()
    with pytest.raises(InputError, match="segment first"):
        split(plate_map, compounds, ByCell(), 0)


def written(folder: Path, text: str) -> pd.DataFrame:
    path = folder / "split.csv"
    path.write_text(text)
    return read_split(str(path))


def test_a_table_that_was_edited_is_the_split(tmp_path: Path) -> None:
    plate_map, compounds = screen({"a": 3, "b": 3})
    made = split(plate_map, compounds, ByCompound(), 0).table
    made.loc[made["split"] == "test_replicate", "split"] = "query"
    given = written(tmp_path, made.drop(columns=["site", "track"]).to_csv(index=False))
    table, notes = split(plate_map, compounds, FromTable(unit="replicate"), 0, given=given)
    pd.testing.assert_frame_equal(table, made, check_dtype=False)
    assert notes == []
    fewer = given[given["split"] != "unused"]
    table, notes = split(plate_map, compounds, FromTable(), 0, given=fewer)
    assert table["split"].tolist() == made["split"].tolist()
    assert "are unused" in notes[0]


def test_a_table_of_cells_may_divide_wells_only_where_cells_are_the_unit(tmp_path: Path) -> None:
    plate_map, compounds = screen({"a": 2}, replicates=1, controls=0)
    given = written(
        tmp_path,
        "plate,well,site,track,split\nplate1,a1,0,1,train\nplate1,A01,0,2,query\nplate1,A2,0,1,train\n",
    )
    table, notes = split(plate_map, compounds, FromTable(unit="cell"), 0, given=given)
    assert table["track"].tolist() == [1, 2, 1]
    assert any("optimistic" in note for note in notes)
    check_leaks(table, "cell")
    for level in ("well", "compound"):
        what = {"well": "well plate1/A01", "compound": "compound a-0"}[level]
        with pytest.raises(InputError, match=f"{what} is in query and in train"):
            check_leaks(table, level)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plate,well\np,A01\n", r"no column \['split'\]"),
        ("plate,well,split\np,A01,test\n", r"line\(s\) \[2\]: split \['test'\] is unknown: expected one of"),
        ("plate,well,split\np,A01,train\np,a1,query\n", r"\[3\]: well \['p/A01'\] stands there more than once"),
        ("plate,well,split\np,A01,\n", r"column 'split' is empty in line\(s\) \[2\]"),
        ("plate,well,split\np,17,train\n", "line 2: well '17' is not a well name"),
        ("plate,well,site,track,split\np,A01,0,,train\n", "'track' is empty"),
        ("plate,well,site,track,split\np,A01,0,x,train\n", "track .* is not a track's number"),
        ("plate,well,site,track,split\np,A1,0,1,train\np,A1,0,1,query\n", "cell .*p/A01/0/1.* more than once"),
    ],
)
def test_a_table_that_is_not_usable_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=message):
        written(tmp_path, text)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("plate9", "A01", "train")], "names wells that the plate map has not: plate9/A01"),
        ([("plate1", "A01", "query")], "nothing to train on"),
    ],
)
def test_a_table_that_does_not_fit_the_screen_is_refused(rows: Any, message: str) -> None:
    given = pd.DataFrame(rows, columns=["plate", "well", "split"]).assign(site=None, track=None)
    with pytest.raises(InputError, match=message):
        split(*screen({"a": 2}), FromTable(), 0, given=given)


@pytest.mark.parametrize(
    ("part", "level", "leaks"),
    [
        ("query", "well", False),
        ("query", "compound", True),
        ("query", "replicate", True),
        ("test_well", "compound", False),
        ("gallery", "compound", False),
        ("validation", "well", False),
        ("validation", "replicate", True),
    ],
)
def test_what_leaks_depends_on_the_unit(part: str, level: Any, leaks: bool) -> None:
    plate_map, compounds = screen({"a": 2}, replicates=2, controls=0)
    table = split(plate_map, compounds, ByWell(validation_share=0, test_share=0), 0).table
    table["split"] = np.where((table["compound"] == "a-0") & (table["replicate"] == "1"), part, "train")
    if leaks:
        with pytest.raises(InputError, match=f"{level} .* is in {part} and in train"):
            check_leaks(table, level)
    else:
        check_leaks(table, level)
