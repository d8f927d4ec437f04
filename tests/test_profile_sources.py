"""Tables of profiles of every kind read the same, and what is wrong with one is said."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from storage_schemas.errors import SchemaError
from storage_schemas.profile_sources import open_source

FEATURES = ["Cells_a", "Cells_b", "Nuclei_c"]
METADATA = ["Metadata_Plate", "Metadata_Well", "Metadata_dose"]


def table(n: int = 5000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(n, 3)).astype(np.float32), columns=FEATURES)
    frame.loc[1, "Cells_a"] = np.nan
    frame.loc[2, "Cells_b"] = np.inf
    frame.insert(0, "Metadata_Plate", "007")
    frame.insert(1, "Metadata_Well", [f"w, {i}" for i in range(n)])
    frame.insert(2, "Metadata_dose", [None if i % 3 == 0 else i / 8 for i in range(n)])
    return frame


def write_csv(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def write_tsv_gz(frame: pd.DataFrame, folder: Path) -> Path:
    with gzip.open(folder / "t.tsv.gz", "wt", encoding="utf-8-sig") as file:
        frame.to_csv(file, index=True, sep="\t", na_rep="NaN")  # with pandas' nameless index
    return folder / "t.tsv.gz"


def write_parquet(frame: pd.DataFrame, folder: Path) -> Path:
    frame.assign(listed=[[1]] * len(frame)).set_index("Metadata_Plate", drop=False).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def write_h5ad(frame: pd.DataFrame, folder: Path, sparse: bool = False) -> Path:
    """As AnnData lays a file out: strings, categories with codes, values with a mask."""
    path = folder / f"t{sparse}.h5ad"
    with h5py.File(path, "w") as file:
        obs, var = file.create_group("obs"), file.create_group("var")
        obs.attrs["column-order"] = METADATA
        plates = obs.create_group("Metadata_Plate")
        plates["categories"] = np.array(["007"], object)
        plates["codes"] = np.zeros(len(frame), np.int8)
        obs["Metadata_Well"] = frame["Metadata_Well"].to_numpy(object)
        dose = obs.create_group("Metadata_dose")
        dose["values"], dose["mask"] = frame["Metadata_dose"].fillna(0).to_numpy(), frame["Metadata_dose"].isna()
        var.attrs["_index"] = "names"
        var["names"] = np.array(FEATURES, object)
        values = frame[FEATURES].to_numpy(np.float32)
        if sparse:
            x = file.create_group("X")
            x.attrs["encoding-type"], x.attrs["shape"] = "csr_matrix", values.shape
            rows, columns = np.nonzero(values)
            x["data"], x["indices"] = values[rows, columns], columns
            x["indptr"] = np.searchsorted(rows, np.arange(len(values) + 1))
        else:
            file["X"] = values
    return path


WRITERS = [write_csv, write_tsv_gz, write_parquet, write_h5ad, lambda frame, folder: write_h5ad(frame, folder, True)]


@pytest.mark.parametrize("write", WRITERS, ids=["csv", "tsv.gz", "parquet", "h5ad", "sparse h5ad"])
def test_every_kind_reads_the_same(write: Callable[[pd.DataFrame, Path], Path], tmp_path: Path) -> None:
    frame = table()
    source = open_source(str(write(frame, tmp_path)))
    assert source.columns == (*METADATA, *FEATURES)
    assert set(FEATURES) <= source.numbers
    assert "Metadata_Well" not in source.numbers
    wanted = [FEATURES[2], FEATURES[0], FEATURES[1]]
    blocks = list(source.blocks(wanted))
    assert all(block.dtype == np.float32 for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), frame[wanted].to_numpy(np.float32))
    read = source.read(["Metadata_Well", "Metadata_Plate", "Metadata_dose"])
    assert read["Metadata_Well"].tolist() == frame["Metadata_Well"].tolist()
    assert read["Metadata_Plate"].unique().tolist() == ["007"]
    dose = pd.to_numeric(read["Metadata_dose"])
    np.testing.assert_array_equal(dose.to_numpy(float), frame["Metadata_dose"].to_numpy(float))


def test_large_tables_come_in_blocks(tmp_path: Path) -> None:
    frame = table()
    assert len(list(open_source(str(write_parquet(frame, tmp_path))).blocks(FEATURES))) > 2
    assert len(list(open_source(str(write_h5ad(frame, tmp_path))).blocks(FEATURES))) > 2


@pytest.mark.parametrize("row", [0, 4, 999, 1000, 4000, 4999])
def test_text_among_measurements_is_named_wherever_it_stands(row: int, tmp_path: Path) -> None:
    frame = table().astype({"Cells_b": object})
    frame.loc[row, "Cells_b"] = "oops"
    source = open_source(str(write_csv(frame, tmp_path)))
    assert set(FEATURES) <= source.numbers
    source.require_numbers(["Cells_a", "Nuclei_c"])
    with pytest.raises(
        SchemaError, match=rf"t\.csv: column 'Cells_b', row {row + 1:,} \(.*\): 'oops' is no number; mend"
    ):
        list(source.blocks(FEATURES))


def test_marks_of_missing_values_are_missing_in_whatever_block_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = ["#DIV/0!", "#N/A", "#NUM!", "#VALUE!", "nan", "NAN", "null", " ", "", " #div/0! ", "inf", "-Inf"]
    frame = table(200).fillna({"Cells_a": 1.5})
    text = frame.astype({"Cells_a": object})
    places = np.linspace(0, 199, len(marks)).astype(int)
    text.loc[places, "Cells_a"] = marks
    text.loc[50, "Cells_a"], frame.loc[50, "Cells_a"] = " +2.5e0 ", 2.5
    monkeypatch.setattr("storage_schemas.profile_sources._BLOCK_BYTES", 1024)
    source = open_source(str(write_csv(text, tmp_path)))
    assert set(FEATURES) <= source.numbers
    assert not source.strays
    blocks = list(source.blocks(FEATURES))
    assert len(blocks) > 5
    frame.loc[places, "Cells_a"] = [np.nan] * 10 + [np.inf, -np.inf]
    np.testing.assert_array_equal(np.concatenate(blocks), frame[FEATURES].to_numpy(np.float32))


def test_a_column_holds_what_most_of_its_values_are(tmp_path: Path) -> None:
    lines = ["few,most,half,none,words", *["1,1,1,,a", "x,2,x,#N/A,b", "y,y,,nan,3"] * 1000, ",z,,,", "1,4,,,"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "t.csv"))
    assert source.numbers == {"most"}, "no more numbers than text is text; nothing at all is no number"
    assert source.empty == {"none"}
    assert source.strays == {"most": (3, "y", 1001)}
    with pytest.raises(SchemaError, match=r"row 3 .*'y' is no number \(and 1,000 more\)"):
        source.require_numbers(["most"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"a,b,a\n1,2,3\n", r"columns \['a'\] stand there more than once"),
        ("t.csv", b"a,b\n1,2,3\n1,2,3\n", "cannot be read|names of columns"),
        ("t.csv", b"a,b\n\xff\xfe,2\n", "cannot be read as a table of profiles"),
        ("t.csv.gz", b"no gzip", "cannot be read as a table of profiles"),
        ("t.parquet", b"no parquet", "cannot be read as a table of profiles"),
        ("t.h5ad", b"no hdf5", "cannot be read as a table of profiles"),
        ("t.npy", b"", "expected a table of profiles"),
    ],
)
def test_what_is_no_table_is_said(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SchemaError, match=message):
        list(open_source(str(tmp_path / name)).blocks(["a"]))


def test_a_file_that_is_not_there_or_of_another_layout_is_said(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="no such file"):
        open_source(str(tmp_path / "none.csv"))
    with h5py.File(tmp_path / "t.h5ad", "w") as file:
        file["X"] = np.zeros((2, 2))
    with pytest.raises(SchemaError, match=r"is no AnnData file: it lacks \['obs', 'var'\]"):
        open_source(str(tmp_path / "t.h5ad"))
