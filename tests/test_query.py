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

from pipelines.inputs import well_keys
from pipelines.query import NO_EFFECT, nearest_compounds, predict, query
from pipelines.vectors import read_embeddings, vectors
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
def screen(finished_screen: Path) -> Screen:
    return Screen(str(finished_screen))


def level_vectors(screen: Screen, level: Level) -> tuple[pd.Series[str], npt.NDArray[np.float64]]:
    """Compound and vector of each thing at a level, from the tables and not from the index."""
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    if level == "cell":
        keys, values = read_embeddings(screen, well_keys(plate_map))
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


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_the_nearest_by_cosine(screen: Screen, level: Level) -> None:
    compounds, values = level_vectors(screen, level)
    own = (compounds == COMPOUND).to_numpy()
    directions = unit(values)
    expected = directions[~own] @ unit(directions[own].mean(axis=0))
    found = query(screen, COMPOUND, len(values), level)
    assert len(found) == (~own).sum()
    np.testing.assert_allclose(found["similarity"], np.sort(expected)[::-1], atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_ordered_and_never_the_compound_itself(screen: Screen, level: Level) -> None:
    found = query(screen, COMPOUND, 5, level)
    assert list(found.columns) == ["rank", "id", "compound", "moa", "similarity"]
    assert found["rank"].tolist() == list(range(1, 6))
    assert found["similarity"].is_monotonic_decreasing
    assert COMPOUND not in set(found["compound"])
    assert found["id"].is_unique
    pd.testing.assert_frame_equal(found, query(screen, COMPOUND, 10, level).head(5))


def test_ids_say_which_thing_it_is(screen: Screen) -> None:
    assert (compounds := query(screen, COMPOUND, 3))["id"].equals(compounds["compound"])
    assert query(screen, COMPOUND, 3, "well")["id"].str.fullmatch(r"plate-[12]/[A-B]0\d").all()
    assert query(screen, COMPOUND, 3, "cell")["id"].str.fullmatch(r"plate-[12]/[A-B]0\d/0/\d+").all()


def test_more_answers_than_there_are(screen: Screen) -> None:
    found = query(screen, COMPOUND, 1000)
    assert len(found) == 6
    assert set(found["compound"]) | {COMPOUND} == set(level_vectors(screen, "compound")[0])


def test_nearest_compounds_agree_with_queries(screen: Screen) -> None:
    table = nearest_compounds(screen, 3)
    for compound, of_compound in table.groupby("compound"):
        expected = query(screen, str(compound), 3)
        assert of_compound["neighbour"].tolist() == expected["compound"].tolist()
        np.testing.assert_allclose(of_compound["similarity"], expected["similarity"], atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_formats_say_the_same(finished_screen: Path, command: Command, level: Level) -> None:
    arguments = ("query", finished_screen, "--compound", COMPOUND, "-k", 4, "--level", level, "--format")
    expected = query(Screen(str(finished_screen)), COMPOUND, 4, level)
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


def test_unknown_compound_is_answered_with_names_near_it(finished_screen: Path, command: Command) -> None:
    for name, near in (("uncoupler1", "uncoupler-1"), ("dmso", "DMSO"), ("potasium-ionophore-2", "ionophore-2")):
        for arguments in (
            ("query", finished_screen, "--compound", name),
            ("predict", finished_screen, "--compound", name),
        ):
            done = command(*arguments)
            assert (done.code, done.out) == (1, "")
            assert f"compound {name!r} is not in the index; did you mean " in done.err
            assert near in done.err
    assert "it has DMSO, " in command("query", finished_screen, "--compound", "zzzz").err


# --- predict ---------------------------------------------------------------------------------


def test_votes_of_one_compound(screen: Screen) -> None:
    compounds, values = level_vectors(screen, "cell")
    votes = predict(screen, COMPOUND)
    assert set(votes["compound"]) == {COMPOUND}
    assert set(votes["moa"]) == {"uncoupler", "potassium ionophore", NO_EFFECT}
    assert votes["share"].sum() == pytest.approx(1)
    assert votes["share"].is_monotonic_decreasing
    assert (votes["n_cells"] == (compounds == COMPOUND).sum()).all()
    assert (votes["true_moa"] == "uncoupler").all()

    # A cell votes for the mechanism of the nearest cell of another compound, controls among them.
    directions = unit(values)
    own = (compounds == COMPOUND).to_numpy()
    others = ~own
    nearest = (directions[own] @ directions[others].T).argmax(axis=1)
    voted = compounds[others].iloc[nearest].str.rsplit("-", n=1).str[0].str.replace("-", " ").replace("DMSO", NO_EFFECT)
    for moa, share in votes.set_index("moa")["share"].items():
        assert share == pytest.approx((voted == moa).mean())


def test_a_negative_control_is_not_predicted(screen: Screen) -> None:
    with pytest.raises(InputError, match="'DMSO' is a negative control"):
        predict(screen, "DMSO")


def test_votes_of_all_compounds_are_their_first_choices(screen: Screen) -> None:
    table = predict(screen, None)
    assert table["compound"].is_unique
    assert set(table["compound"]) == set(level_vectors(screen, "cell")[0]) - {"DMSO"}
    for row in table.itertuples():
        first = predict(screen, str(row.compound)).iloc[0]
        assert (row.moa, row.share) == (first["moa"], first["share"])
    assert set(table["split"]) <= {"train", "validation", "test_compound"}


@pytest.mark.parametrize("arguments", [(), ("--compound", COMPOUND)])
def test_votes_on_the_command_line(finished_screen: Path, command: Command, arguments: tuple[str, ...]) -> None:
    expected = predict(Screen(str(finished_screen)), arguments[-1] if arguments else None)
    done = command("predict", finished_screen, *arguments, "--format", "json")
    assert done.code == 0
    rows = json.loads(done.out)
    assert [(row["compound"], row["moa"]) for row in rows] == list(
        zip(expected["compound"], expected["moa"], strict=True)
    )
    assert list(rows[0]) == list(expected.columns)
    assert command("predict", finished_screen, *arguments).out.count("\n") == len(expected) + 1


# --- screens that cannot answer --------------------------------------------------------------


@pytest.fixture
def damaged(finished_screen: Path, tmp_path: Path) -> Path:
    """A copy of what an answer is read from."""
    folder = tmp_path / "screen"
    shutil.copytree(finished_screen / "index", folder / "index")
    for name in ("manifest.json", "split.parquet"):
        shutil.copy(finished_screen / name, folder / name)
    return folder


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_truncated_index(damaged: Path, command: Command, level: Level, kept: float) -> None:
    file = damaged / "index" / f"{level}.faiss"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    done = command("query", damaged, "--compound", COMPOUND, "--level", level)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {damaged}/index: level {level!r}: ")
    assert "Traceback" not in done.err


def test_truncated_ids(damaged: Path, command: Command) -> None:
    file = damaged / "index" / "compound.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    done = command("query", damaged, "--compound", COMPOUND)
    assert (done.code, done.out) == (1, "")
    assert f"{file}: is not a readable Parquet file" in done.err


def test_screen_without_an_index(damaged: Path) -> None:
    # The manifest is written last: without it the rest is of an index that was never finished.
    (damaged / "index" / "manifest.json").unlink()
    for answer in (lambda screen: query(screen, COMPOUND, 3), lambda screen: predict(screen, None)):
        with pytest.raises(InputError, match=f"{damaged}: has no index: run the stage `index` first"):
            answer(Screen(str(damaged)))
