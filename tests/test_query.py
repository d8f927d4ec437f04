from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from conftest import Command
from indexed_screens import write_screen

from pipelines.indexing import build_index
from pipelines.inputs import well_keys
from pipelines.query import COLUMNS, Searcher, nearest_compounds
from pipelines.vectors import EmbeddedCells, vectors
from screening.similarity import ExactIndex
from storage_schemas.errors import InputError
from storage_schemas.index import LEVELS, Level
from storage_schemas.screen import Screen
from storage_schemas.tables import (
    PLATE_MAP,
    compound_profiles_form,
    open_table,
    vector_dimension,
    well_profiles_form,
)

COMPOUND = "uncoupler-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("indexed") / "screen"
    write_screen(where)
    return where


@pytest.fixture(scope="module")
def screen(folder: Path) -> Screen:
    return Screen(str(folder))


def level_vectors(screen: Screen, level: Level) -> tuple[pd.Series[str], npt.NDArray[np.float64]]:
    """Compound and vector of each thing at a level, from the tables and not from the index."""
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    if level == "cell":
        keys, values = EmbeddedCells(screen, well_keys(plate_map)).read()
        merged = keys.merge(plate_map, on=["plate", "well"], how="left")
        return merged["compound"], values.astype(np.float64)
    url = screen.profiles(level)
    dimension = vector_dimension(url, "profile")
    form = well_profiles_form(dimension) if level == "well" else compound_profiles_form(dimension)
    table = open_table(url, form)
    return table["compound"].to_pandas(), vectors(table["profile"]).astype(np.float64)


def unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


# --- query -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searcher(screen: Screen) -> Searcher:
    return Searcher(screen)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_the_nearest_by_cosine(searcher: Searcher, level: Level) -> None:
    compounds, values = level_vectors(searcher.screen, level)
    own = (compounds == COMPOUND).to_numpy()
    directions = unit(values)
    expected = directions[~own] @ unit(directions[own].mean(axis=0))
    found = searcher.query(compound=COMPOUND, k=len(values), level=level)
    assert len(found) == (~own).sum()
    np.testing.assert_allclose(found["similarity"], np.sort(expected)[::-1], atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_ordered_and_never_the_compound_itself(searcher: Searcher, level: Level) -> None:
    found = searcher.query(compound=COMPOUND, k=5, level=level)
    assert tuple(found.columns) == COLUMNS
    assert found["rank"].tolist() == list(range(1, 6))
    assert found["similarity"].is_monotonic_decreasing
    assert COMPOUND not in set(found["compound"])
    assert found["id"].is_unique
    pd.testing.assert_frame_equal(found, searcher.query(compound=COMPOUND, k=10, level=level).head(5))


def test_ids_say_which_thing_it_is(searcher: Searcher) -> None:
    assert (found := searcher.query(compound=COMPOUND, k=3))["id"].equals(found["compound"])
    wells = searcher.query(compound=COMPOUND, k=3, level="well")["id"]
    assert wells.str.fullmatch(r"plate-[12]/[A-B]0\d").all()
    cells = searcher.query(compound=COMPOUND, k=3, level="cell")["id"]
    assert cells.str.fullmatch(r"plate-[12]/[A-B]0\d/0/\d+").all()


def test_more_answers_than_there_are(searcher: Searcher) -> None:
    found = searcher.query(compound=COMPOUND, k=1000)
    assert len(found) == 6
    assert set(found["compound"]) | {COMPOUND} == set(level_vectors(searcher.screen, "compound")[0])


def test_a_well_is_asked_about_at_every_level(searcher: Searcher) -> None:
    ids = searcher.ids("well")
    row = int(np.flatnonzero(ids["compound"] == COMPOUND)[0])
    name, (_, profiles) = ids["id"].iloc[row], level_vectors(searcher.screen, "well")
    at_well = searcher.query(well=name, k=100)
    assert name not in set(at_well["id"])
    assert len(at_well) == len(ids) - 1
    assert COMPOUND in set(at_well["compound"])
    assert searcher.query(well=name.lower().replace("plate", "plate"), k=100).equals(at_well)

    compounds, of_compounds = level_vectors(searcher.screen, "compound")
    at_compound = searcher.query(well=name, level="compound", k=100).set_index("compound")["similarity"]
    assert COMPOUND in at_compound.index
    cosines = pd.Series(unit(of_compounds) @ unit(profiles[row]), index=compounds)
    np.testing.assert_allclose(at_compound, cosines[at_compound.index], atol=1e-5)

    at_cell = searcher.query(well=name, level="cell", k=1000)
    assert not at_cell["id"].str.startswith(name + "/").any()
    assert len(at_cell) == (~searcher.ids("cell")["id"].str.startswith(name + "/")).sum()
    for level in LEVELS:
        found = searcher.query(well=name, level=level, k=1000, exclude_same_compound=True)
        assert COMPOUND not in set(found["compound"])
        assert len(found) == (searcher.ids(level)["compound"] != COMPOUND).sum()


def test_a_cell_is_asked_about_among_cells(searcher: Searcher) -> None:
    ids = searcher.ids("cell")
    _, values = level_vectors(searcher.screen, "cell")
    for row in (0, len(ids) // 2, len(ids) - 1):
        found = searcher.query(cell=ids["id"].iloc[row], k=5)
        expected = np.delete(unit(values) @ unit(values[row]), row)
        np.testing.assert_allclose(found["similarity"], np.sort(expected)[::-1][:5], atol=1e-5)
        assert ids["id"].iloc[row] not in set(found["id"])
        others = searcher.query(cell=ids["id"].iloc[row], k=5, exclude_same_compound=True)
        assert ids["compound"].iloc[row] not in set(others["compound"])
    with pytest.raises(InputError, match="cannot be compared with the normalised profiles of the level 'well'"):
        searcher.query(cell=ids["id"].iloc[0], level="well")


def test_vectors_are_asked_about_one_by_one(searcher: Searcher) -> None:
    for level in LEVELS:
        _, values = level_vectors(searcher.screen, level)
        # Not the first: of compounds that is DMSO, which profiles are centred on.
        found = searcher.query(vectors=values[1:4], level=level, k=4)
        assert tuple(found.columns) == ("query", *COLUMNS)
        assert found["query"].tolist() == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
        for number, of_one in found.groupby("query"):
            assert of_one["id"].iloc[0] == searcher.ids(level)["id"].iloc[int(number) + 1]
            assert of_one["rank"].tolist() == [1, 2, 3, 4]
            cosines = np.sort(unit(values) @ unit(values[int(number) + 1]))[::-1]
            np.testing.assert_allclose(of_one["similarity"], cosines[:4], atol=1e-5)
    assert searcher.query(vectors=values[:1], names=["mine"], k=2, level=level)["query"].tolist() == ["mine"] * 2
    assert searcher.query(vectors=values[:0], level=level).empty


@pytest.mark.parametrize("level", LEVELS)
def test_filters_leave_as_many_answers_as_there_are(searcher: Searcher, level: Level) -> None:
    everything = searcher.query(compound=COMPOUND, k=1000, level=level)
    by_moa = searcher.query(compound=COMPOUND, k=1000, level=level, moa=["potassium ionophore"])
    expected = everything[everything["moa"] == "potassium ionophore"]
    assert len(expected) >= 3
    assert by_moa["id"].tolist() == expected["id"].tolist()
    assert by_moa["rank"].tolist() == list(range(1, len(expected) + 1))
    both = searcher.query(compound=COMPOUND, k=1000, level=level, moa=["potassium ionophore", "uncoupler"])
    assert both["id"].tolist() == everything.loc[everything["moa"].notna(), "id"].tolist()
    if level == "compound":
        with pytest.raises(InputError, match="of all its plates"):
            searcher.query(compound=COMPOUND, plate=["plate-1"])
        return
    on_plate = searcher.query(compound=COMPOUND, k=1000, level=level, plate=["plate-2"])
    assert on_plate["id"].tolist() == everything.loc[everything["id"].str.startswith("plate-2/"), "id"].tolist()
    nearest = searcher.query(compound=COMPOUND, k=2, level=level, plate=["plate-2"], moa=["uncoupler"])
    expected = on_plate[on_plate["moa"] == "uncoupler"].head(2)
    assert nearest["id"].tolist() == expected["id"].tolist()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "ask by one of compound, well, cell, vectors, not by none"),
        ({"compound": COMPOUND, "well": "plate-1/A01"}, "not by compound and well"),
        ({"well": "plate-1/H12"}, "well 'plate-1/H12' is not in the index; did you mean plate-1/"),
        ({"well": "plate-1"}, "'plate-1' is not of the form plate/well"),
        ({"well": "plate-1/nowhere"}, "is not a well name"),
        ({"cell": "plate-1/A01"}, "not of the form plate/well/site/track"),
        (
            {"cell": "plate-1/A01/0/99999"},
            "cell 'plate-1/A01/0/99999' is not in the index; did you mean plate-1/A01/0/",
        ),
        ({"compound": COMPOUND, "moa": ["uncouple"]}, "MOA 'uncouple' is not in the index; did you mean uncoupler?"),
        ({"compound": COMPOUND, "level": "well", "plate": ["plate1"]}, "did you mean plate-1"),
        ({"compound": COMPOUND, "k": 0}, "k is 0"),
        ({"vectors": np.ones((1, 3))}, "the query has 3 dimensions and the index"),
        ({"vectors": np.ones(3)}, "expected .vectors, dimensions."),
        ({"vectors": np.full((1, 64), np.nan)}, "not finite"),
        ({"vectors": np.ones((2, 3)), "names": ["one"]}, "1 names for 2 vectors"),
        ({"vectors": np.ones((1, 3)), "exclude_same_compound": True}, "no compound that could be left out"),
    ],
)
def test_questions_that_cannot_be_answered(searcher: Searcher, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        searcher.query(**arguments)


def test_a_searcher_goes_on_while_the_screen_is_indexed_anew(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "screen")
    screen = Screen(str(tmp_path / "screen"))
    old, late = Searcher(screen), Searcher(screen)
    expected = {level: old.query(compound=COMPOUND, level=level) for level in LEVELS}
    build_index(screen, ExactIndex(), well_keys(open_table(screen.plate_map, PLATE_MAP).to_pandas()))
    with pytest.raises(InputError, match="indexed anew since it was opened: open it again"):
        late.query(compound=COMPOUND)
    new = Searcher(screen.url)
    assert new.build != old.build
    for level in LEVELS:
        pd.testing.assert_frame_equal(old.query(compound=COMPOUND, level=level), expected[level])
        pd.testing.assert_frame_equal(new.query(compound=COMPOUND, level=level), expected[level])


def test_nearest_compounds_agree_with_queries(searcher: Searcher) -> None:
    table = nearest_compounds(searcher.screen, 3)
    for compound, of_compound in table.groupby("compound"):
        expected = searcher.query(compound=str(compound), k=3)
        assert of_compound["neighbour"].tolist() == expected["compound"].tolist()
        np.testing.assert_allclose(of_compound["similarity"], expected["similarity"], atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_formats_say_the_same(folder: Path, searcher: Searcher, command: Command, level: Level) -> None:
    arguments = ("query", folder, "--compound", COMPOUND, "-k", 4, "--level", level, "--format")
    expected = searcher.query(compound=COMPOUND, k=4, level=level)
    said = {form: command(*arguments, form) for form in ("json", "csv", "table")}
    assert {(done.code, done.err) for done in said.values()} == {(0, "")}

    rows: list[dict[str, Any]] = json.loads(said["json"].out)
    assert [row["id"] for row in rows] == expected["id"].tolist()
    assert [row["moa"] for row in rows] == [None if pd.isna(moa) else moa for moa in expected["moa"]]
    np.testing.assert_allclose([row["similarity"] for row in rows], expected["similarity"], atol=1e-6)

    read = list(csv.DictReader(io.StringIO(said["csv"].out)))
    assert [row["id"] for row in read] == expected["id"].tolist()
    np.testing.assert_allclose([float(row["similarity"]) for row in read], expected["similarity"], rtol=1e-6)

    header, *lines = said["table"].out.splitlines()
    assert header.split() == ["rank", "id", "compound", "moa", "similarity"]
    assert len(lines) == 4
    for line, (_, row) in zip(lines, expected.iterrows(), strict=True):
        assert line.split()[:3] == [str(row["rank"]), row["id"], row["compound"]]
        assert line.split()[-1] == f"{row['similarity']:.3f}"


def test_the_command_asks_as_the_searcher_does(folder: Path, searcher: Searcher, command: Command) -> None:
    well, cell = searcher.ids("well")["id"].iloc[3], searcher.ids("cell")["id"].iloc[3]
    for options, arguments in (
        (["--well", well, "--exclude-same-compound"], {"well": well, "exclude_same_compound": True}),
        (["--cell", cell, "--plate", "plate-2"], {"cell": cell, "plate": ["plate-2"]}),
        (
            ["--compound", COMPOUND, "--level", "well", "--moa", "uncoupler", "--moa", "potassium ionophore"],
            {"compound": COMPOUND, "level": "well", "moa": ["uncoupler", "potassium ionophore"]},
        ),
    ):
        done = command("query", folder, *options, "--format", "json")
        assert done.code == 0, done.err
        assert [row["id"] for row in json.loads(done.out)] == searcher.query(**arguments)["id"].tolist()
    for options in ([], ["--well", well, "--cell", cell]):
        done = command("query", folder, *options)
        assert done.code == 2
        assert "give one of --compound" in done.err


def test_unknown_compound_is_answered_with_names_near_it(folder: Path, command: Command) -> None:
    for name, near in (("uncoupler1", "uncoupler-1"), ("dmso", "DMSO"), ("potasium-ionophore-2", "ionophore-2")):
        done = command("query", folder, "--compound", name)
        assert (done.code, done.out) == (1, "")
        assert f"compound {name!r} is not in the index; did you mean " in done.err
        assert near in done.err
    assert "it has DMSO, " in command("query", folder, "--compound", "zzzz").err


# --- screens that cannot answer --------------------------------------------------------------


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of what an answer is read from."""
    copy = tmp_path / "screen"
    shutil.copytree(folder / "index", copy / "index")
    for name in ("manifest.json", "split.parquet"):
        shutil.copy(folder / name, copy / name)
    return copy


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_truncated_index(damaged: Path, command: Command, level: Level, kept: float) -> None:
    (file,) = (damaged / "index").glob(f"*/{level}.vectors.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    done = command("query", damaged, "--compound", COMPOUND, "--level", level)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {file}: ")
    assert "run the stage `index` again" in done.err.replace("\n", " ")
    assert "Traceback" not in done.err


def test_truncated_ids(damaged: Path, command: Command) -> None:
    (file,) = (damaged / "index").glob("*/compound.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    done = command("query", damaged, "--compound", COMPOUND)
    assert (done.code, done.out) == (1, "")
    assert f"{file}: is not what the manifest says" in done.err


def test_screen_without_an_index(damaged: Path) -> None:
    # The manifest is written last: without it the rest is of an index that was never finished.
    (damaged / "index" / "manifest.json").unlink()
    with pytest.raises(InputError, match=f"{damaged}: has no index: run the stage `index` first"):
        Searcher(Screen(str(damaged)))
