from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import store, tables
from storage_schemas.errors import InputError, SchemaError, StoreError
from storage_schemas.tables import (
    TableForm,
    open_table,
    open_vectors,
    read_compounds,
    read_plate_map,
    read_user_table,
    write_table,
    write_tables,
)

FORM = TableForm("toy", 3, pa.schema([("plate", pa.string()), ("n", pa.int32()), ("x", pa.float64())]))
OPEN_FORM = TableForm("open", 1, FORM.schema, extra_prefix="feature_")

FORMS = [
    tables.PLATE_MAP,
    tables.COMPOUNDS,
    tables.CELLS,
    tables.QUALITY,
    tables.SEQUENCES,
    tables.SPLIT,
    tables.TRAINING_METRICS,
    tables.INDEX_IDS,
    tables.embeddings_form(4),
    tables.raw_profiles_form(4),
    tables.well_profiles_form(4),
    tables.compound_profiles_form(4),
    tables.treatment_profiles_form(4),
    tables.FEATURES,
    tables.NORMALISATION,
    tables.RECIPES,
]


def toy(n: int = 2) -> pd.DataFrame:
    return pd.DataFrame({"plate": [f"p{i}" for i in range(n)], "n": range(n), "x": np.arange(n) / 3})


@given(
    st.lists(
        st.tuples(
            st.none() | st.text(max_size=5),
            st.none() | st.integers(-(2**31), 2**31 - 1),
            st.none() | st.floats(allow_nan=False),
        ),
        max_size=20,
    )
)
@settings(max_examples=40, deadline=None)
def test_values_read_back(rows: list[tuple[str | None, int | None, float | None]]) -> None:
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    table = pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, FORM.schema, strict=True)], schema=FORM.schema
    )
    write_table("memory://tables/x.parquet", table, FORM)
    assert open_table("memory://tables/x.parquet", FORM).equals(table)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_reads_back_empty_and_with_nulls(tmp_path: Path, form: TableForm) -> None:
    url = str(tmp_path / "x.parquet")
    for n in (0, 3):
        table = pa.Table.from_arrays([pa.nulls(n, field.type) for field in form.schema], schema=form.schema)
        write_table(url, table, form)
        assert open_table(url, form).equals(table)


def test_cells_keep_their_nested_columns(tmp_path: Path) -> None:
    url = str(tmp_path / "cells.parquet")
    cell = {
        "plate": "p",
        "well": "A01",
        "site": "0",
        "track": 1,
        "parent": None,
        "first_frame": 0,
        "last_frame": 1,
        "n_frames": 2,
        "centroid_y": [1.5, float("nan")],
        "centroid_x": [2.5, 3.5],
        "box": [[0, 1, 2, 3], [-1, -1, -1, -1]],
        "n_missing": 0,
        "n_repaired": 1,
        "excluded": "",
        "clip": 0,
        "feature_area": [4.0, 5.0],
    }
    write_table(url, pa.table({name: [value] for name, value in cell.items()}), tables.CELLS)
    [back] = open_table(url, tables.CELLS).to_pylist()
    assert back["box"] == cell["box"]
    assert back["parent"] is None
    assert back["feature_area"] == cell["feature_area"]
    np.testing.assert_array_equal(back["centroid_y"], cell["centroid_y"])


def test_columns_come_in_the_forms_order_and_types(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    write_table(url, toy()[["x", "plate", "n"]], FORM)
    assert open_table(url, FORM).schema.remove_metadata().equals(FORM.schema)
    assert open_table(url, FORM, columns=["x", "n"]).column_names == ["x", "n"]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (toy().drop(columns="n"), r"missing: \['n'\], unknown: \[\]"),
        (toy().assign(y=1), r"missing: \[\], unknown: \['y'\]"),
        (toy().assign(n=["a", "b"]), "wrong type"),
        (toy().assign(n=[0.5, 1.0]), "wrong type"),
        (toy().assign(n=[2**31, 0]), "wrong type"),
        (toy().assign(n=[[1], [2]]), "wrong type"),
        (toy().assign(plate=["a", 1]), "no one type"),
    ],
)
def test_a_table_of_another_shape_is_not_written(tmp_path: Path, table: pd.DataFrame, problem: str) -> None:
    url = str(tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=problem):
        write_table(url, table, FORM)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("vectors", [[[1.0, 2.0]], ["text"], [None], [1.0]])
def test_vectors_must_have_the_forms_length(tmp_path: Path, vectors: list[object]) -> None:
    frame = pd.DataFrame({"plate": "p", "well": "A01", "site": "0", "track": [1], "embedding": vectors})
    url = str(tmp_path / "x.parquet")
    if vectors == [None]:
        write_table(url, frame, tables.embeddings_form(3))
        assert open_table(url, tables.embeddings_form(3)).column("embedding").null_count == 1
        return
    with pytest.raises(SchemaError, match=r"x\.parquet"):
        write_table(url, frame, tables.embeddings_form(3))


def test_vectors_of_another_dimension_are_refused_on_opening(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    vectors = pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))
    table = pa.table({"plate": ["p"], "well": ["A01"], "site": ["0"], "track": [1], "embedding": vectors})
    write_table(url, table, tables.embeddings_form(2))
    assert tables.vector_dimension(url, "embedding") == 2
    with pytest.raises(SchemaError, match=r"x\.parquet.*wrong type"):
        open_table(url, tables.embeddings_form(3))


def test_extra_columns_need_the_forms_prefix(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    write_table(url, toy().assign(feature_a=[1.0, 2.0]), OPEN_FORM)
    assert open_table(url, OPEN_FORM).column_names == ["plate", "n", "x", "feature_a"]
    with pytest.raises(SchemaError, match="other"):
        write_table(url, toy().assign(other=1), OPEN_FORM)


def test_another_form_version_or_run_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    write_table(url, toy(), FORM, fingerprint="abc")
    assert open_table(url, FORM, fingerprint="abc").num_rows == 2
    with pytest.raises(SchemaError, match=r"expected form 'toy' version 4, found 'toy' version 3"):
        open_table(url, TableForm("toy", 4, FORM.schema))
    with pytest.raises(SchemaError, match="expected form 'other' version 3, found 'toy'"):
        open_table(url, TableForm("other", 3, FORM.schema))
    with pytest.raises(SchemaError, match="another run"):
        open_table(url, FORM, fingerprint="abd")
    with pytest.raises(SchemaError, match=r"no columns \['y'\]"):
        open_table(url, FORM, columns=["n", "y"])


def test_a_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    toy().to_parquet(url)
    with pytest.raises(SchemaError, match="was not written by screening"):
        open_table(url, FORM)


def test_a_marked_file_whose_columns_changed_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    mark = json.dumps({"form": "toy", "version": 3, "fingerprint": ""}).encode()
    pq.write_table(pa.table({"plate": ["p"]}).replace_schema_metadata({b"screening": mark}), url)
    with pytest.raises(SchemaError, match=r"missing: \['n', 'x'\]"):
        open_table(url, FORM)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(str(path), toy(200), FORM)
    whole = path.read_bytes()
    for length in (0, 3, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SchemaError, match=r"x\.parquet"):
            open_table(str(path), FORM)
    with pytest.raises(SchemaError, match="no such file"):
        open_table(str(tmp_path / "gone.parquet"), FORM)


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "x.parquet")
    write_table(url, toy(2), FORM)

    def raising(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", raising)
    with pytest.raises(StoreError, match="full"):
        write_table(url, toy(3), FORM)
    assert open_table(url, FORM).num_rows == 2
    assert store.list_names(str(tmp_path)) == ["x.parquet"]


def test_rows_are_counted_by_the_footer_of_a_table_of_that_form(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    parts = [pa.Table.from_pandas(toy(), preserve_index=False)] * 3
    tables.write_tables(url, parts, FORM)
    assert tables.row_count(url, FORM) == 3 * len(toy())
    with pytest.raises(SchemaError, match=r"x\.parquet: expected form"):
        tables.row_count(url, OPEN_FORM)
    with pytest.raises(SchemaError, match=r"gone\.parquet: no such file"):
        tables.row_count(str(tmp_path / "gone.parquet"), FORM)
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-3])
    with pytest.raises(SchemaError, match="is not a readable Parquet file"):
        tables.row_count(url, FORM)


def test_vector_dimension_needs_vectors(tmp_path: Path) -> None:
    url = str(tmp_path / "x.parquet")
    write_table(url, toy(), FORM)
    with pytest.raises(SchemaError, match="expected a fixed-size list"):
        tables.vector_dimension(url, "n")
    with pytest.raises(SchemaError, match="no readable column"):
        tables.vector_dimension(url, "embedding")
    with pytest.raises(SchemaError, match=r"gone\.parquet"):
        tables.vector_dimension(str(tmp_path / "gone.parquet"), "embedding")


# --- tables that users write -----------------------------------------------------------------

PLATE_MAP = [
    ["plate", "well", "compound", "concentration", "unit", "role", "replicate"],
    ["p1", "A02", "drug, x", "0.5", "uM", "treatment", "r1"],
    ["p1", "a1", "DMSO", "", "", "negative_control", "r1"],
]


def user_file(folder: Path, kind: str, rows: list[list[str]]) -> str:
    """The same rows as a user's program would save them."""
    path = folder / f"table.{kind}"
    if kind == "xlsx":
        pd.DataFrame(rows).replace("", None).to_excel(path, header=False, index=False)
    elif kind == "parquet":
        pd.DataFrame(rows[1:], columns=rows[0]).replace("", None).to_parquet(path)
    else:
        text = io.StringIO()
        sep = "\t" if "tsv" in kind else ";" if kind == "txt" else ","
        pd.DataFrame(rows).to_csv(text, header=False, index=False, sep=sep, lineterminator="\r\n")
        data = text.getvalue().encode("utf-8-sig")
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return str(path)


KINDS = ["csv", "CSV", "csv.gz", "tsv", "tsv.gz", "txt", "xlsx", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plate_map_is_the_same_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    frame = read_plate_map(user_file(tmp_path, kind, PLATE_MAP))
    assert frame.columns.tolist() == tables.PLATE_MAP.schema.names
    assert frame["well"].tolist() == ["A01", "A02"]
    assert frame["compound"].tolist() == ["DMSO", "drug, x"]
    assert np.isnan(frame["concentration"][0])
    assert frame["concentration"][1] == 0.5
    assert frame["unit"].tolist() == [None, "uM"]
    assert frame["role"].tolist() == ["negative_control", "treatment"]
    assert frame["replicate"].tolist() == ["r1", "r1"]
    write_table(str(tmp_path / "back.parquet"), frame, tables.PLATE_MAP)
    assert open_table(str(tmp_path / "back.parquet"), tables.PLATE_MAP).num_rows == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("compound", "", r"column 'compound' is empty in line\(s\) \[3\]"),
        ("role", "tratment", r"line\(s\) \[3\]: role \['tratment'\] is unknown.*negative_control"),
        ("well", "1A", "line 3: well '1A' is not a well name"),
        ("well", "A0", "line 3: well 'A0'.*from 1"),
        ("plate", "../p", r"line 3: plate name '\.\./p'"),
        ("concentration", "ten", r"line\(s\) \[3\]: concentration \['ten'\] is not a number"),
        ("concentration", "inf", r"line\(s\) \[3\]: concentration \['inf'\] is not a number"),
        ("well", "A2", r"line\(s\) \[3\]: well \['p1/A02'\] stands there more than once"),
    ],
)
def test_a_wrong_cell_is_named_by_its_line(tmp_path: Path, kind: str, column: str, value: str, problem: str) -> None:
    rows = [list(row) for row in PLATE_MAP]
    rows[2][rows[0].index(column)] = value
    with pytest.raises(SchemaError, match=problem) as caught:
        read_plate_map(user_file(tmp_path, kind, rows))
    assert caught.value.path == str(tmp_path / f"table.{kind}")


def test_a_sheet_of_a_workbook_is_read_by_its_name(tmp_path: Path) -> None:
    url = str(tmp_path / "book.xlsx")
    with pd.ExcelWriter(url) as book:
        pd.DataFrame({"Index": [1, 2], "flag": [1.0, np.nan]}).to_excel(book, sheet_name="one", index=False)
        pd.DataFrame({"index": ["x"]}).to_excel(book, sheet_name="two", index=False)
    assert read_user_table(url).to_dict("list") == {"index": ["1", "2"], "flag": ["1", None]}
    assert read_user_table(url, "two")["index"].tolist() == ["x"]
    with pytest.raises(SchemaError, match=r"book\.xlsx: has no sheet 'three'; its sheets are \['one', 'two'\]"):
        read_user_table(url, "three")


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx"])
def test_blank_lines_do_not_shift_the_count(tmp_path: Path, kind: str) -> None:
    blank = [""] * len(PLATE_MAP[0])
    assert len(read_plate_map(user_file(tmp_path, kind, [*PLATE_MAP[:2], blank, PLATE_MAP[2], blank]))) == 2
    wrong = [*PLATE_MAP[2][:5], "", "r1"]
    with pytest.raises(SchemaError, match=r"'role' is empty in line\(s\) \[4\]"):
        read_plate_map(user_file(tmp_path, kind, [*PLATE_MAP[:2], blank, wrong]))


def test_wholly_blank_lines_do_not_shift_the_count(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("compound,moa\n\na,x\n\n\n,y\n")
    with pytest.raises(SchemaError, match=r"line\(s\) \[6\]"):
        read_compounds(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_one_column(tmp_path: Path, kind: str) -> None:
    frame = read_compounds(user_file(tmp_path, kind, [["compound"], ["DMSO"], ["aspirin"]]))
    assert frame["compound"].tolist() == ["DMSO", "aspirin"]
    assert frame["moa"].tolist() == [None, None]
    assert frame.columns.tolist() == tables.COMPOUNDS.schema.names


def test_columns_are_found_by_name_whatever_their_case_and_order(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(" Role ,Note,WELL,Compound,Plate\ntreatment,hm, b2 ,x,p\n")
    frame = read_plate_map(str(path))
    assert frame.to_dict("records")[0] | {"concentration": None} == {
        "plate": "p",
        "well": "B02",
        "compound": "x",
        "concentration": None,
        "unit": None,
        "role": "treatment",
        "replicate": "p",
    }


def test_names_that_look_like_nothing_stay_names(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("compound,moa\nNA,None\nnull,nan\n007,1e5\n")
    frame = read_compounds(str(path))
    assert frame["compound"].tolist() == ["007", "NA", "null"]
    assert frame["moa"].tolist() == ["1e5", "None", "nan"]


def test_numbers_in_a_users_parquet_become_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"compound": [7, 9, 8], "moa": ["a", None, "b"]}).set_index("compound")
    frame.to_parquet(tmp_path / "x.parquet")
    back = read_compounds(str(tmp_path / "x.parquet"))
    assert back["compound"].tolist() == ["7", "8", "9"]
    assert back["moa"].tolist() == ["a", "b", None]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("x.csv", b"", "cannot be read"),
        ("x.csv", b"plate,well\n", r"no column \['compound', 'role'\].*found \['plate', 'well'\]"),
        ("x.csv", b"plate,well,compound,role\n", "holds no wells"),
        ("x.csv", b"plate,well,compound,role\np,A1,x,treatment,surplus\n", "line 2, saw 5"),
        ("x.csv", b"plate,well,compound,role\np,A1,x\n", r"'role' is empty in line\(s\) \[2\]"),
        ("x.csv", b"plate,well,compound,Compound,role\np,A1,x,y,treatment\n", r"\['compound'\].*more than once"),
        ("x.csv", b"plate,well,compound,compound,role\np,A1,x,y,treatment\n", r"\['compound'\].*more than once"),
        ("x.csv", b"plate,well,compound,role\np,A1,\xb5,treatment\n", "line 2 is not UTF-8 text; in a spreadsheet"),
        ("x.csv.gz", b"\x1f\x8bnonsense", "cannot be read"),
        ("x.xlsx", b"nonsense", "cannot be read"),
        ("x.parquet", b"nonsense", "cannot be read"),
        ("x.docx", b"nonsense", r"expected a \.csv"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SchemaError, match=problem) as caught:
        read_plate_map(str(tmp_path / name))
    assert caught.value.path.endswith(name)
    assert str(caught.value).startswith(caught.value.path)


def test_nested_columns_of_a_users_parquet_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"compound": ["a"], "moa": [["x", "y"]]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=r"\['moa'\] hold lists"):
        read_compounds(str(tmp_path / "x.parquet"))


def test_a_compound_stands_there_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("compound,moa\na,x\nb,y\na,z\n")
    with pytest.raises(SchemaError, match=r"line\(s\) \[4\]: compound \['a'\]"):
        read_compounds(str(tmp_path / "x.csv"))


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=3, max_size=3), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_text_in_a_csv_reads_back_stripped(rows: list[list[str]]) -> None:
    # A lone carriage return is a line's end to some programs and not to others.
    rows = [[cell.replace("\r", "").replace("\0", "") for cell in row] for row in rows]
    text = io.StringIO()
    pd.DataFrame([["a", "b", "c"], *rows]).to_csv(text, header=False, index=False)
    store.write_bytes("memory://tables/x.csv", text.getvalue().encode())
    frame = read_user_table("memory://tables/x.csv")
    expected = [[cell.strip() or None for cell in row] for row in rows]
    assert frame.to_numpy().tolist() == [row for row in expected if any(row)]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_parts_of_a_table_are_one_file_or_none(where: str, tmp_path: Path) -> None:
    url = f"{tmp_path}/t.parquet" if where == "local" else "memory://parts/t.parquet"
    form = tables.raw_profiles_form(3)

    def part(first: int, n: int) -> pa.Table:
        values = np.arange(first * 3, (first + n) * 3, dtype=np.float32)
        return pa.table(
            {
                "plate": ["p"] * n,
                "well": [f"A{i:02d}" for i in range(first + 1, first + n + 1)],
                "n_cells": pa.nulls(n, pa.int32()),
                "profile": pa.FixedSizeListArray.from_arrays(pa.array(values), 3),
                "metadata_time": [24.0] * n,
            }
        )

    def broken() -> Iterator[pa.Table]:
        yield part(0, 2)
        raise InputError("text among numbers")

    with pytest.raises(InputError, match="text among numbers"):
        write_tables(url, broken(), form)
    with pytest.raises(SchemaError, match="of no parts"):
        write_tables(url, [], form)
    assert not store.exists(url)
    assert write_tables(url, [part(0, 2), part(2, 5)], form) == 7
    others, values = open_vectors(url, form, "profile")
    np.testing.assert_array_equal(values, np.arange(21, dtype=np.float32).reshape(7, 3))
    assert others.column_names == ["plate", "well", "n_cells", "metadata_time"]
    assert others["well"].to_pylist() == [f"A{i:02d}" for i in range(1, 8)]
    with pytest.raises(SchemaError, match="expected form 'well_profiles'"):
        open_vectors(url, tables.well_profiles_form(3), "profile")
