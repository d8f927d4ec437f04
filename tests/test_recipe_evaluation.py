"""Recipes tested on profiles: against loops, on simulated plates whose truth is known, and on real Cell Painting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from conftest import Command

from pipelines.evaluate_recipes import evaluate_recipes, parse_recipes, wide, write_scores
from pipelines.import_profiles import ImportProfilesConfig, import_profiles
from screening.profiles import NAMED_RECIPES, Raw, Sphered
from screening.recipe_evaluation import RecipeEvaluationConfig, Score, class_scores, linear_hits, replicate_scores
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen
from storage_schemas.tables import RECIPES, open_table

Floats = npt.NDArray[np.float64]


def plates(seed: int = 0) -> tuple[Floats, pd.DataFrame]:
    """Three plates: six compounds of three classes at two doses, one of them on one plate only, and four controls."""
    rng = np.random.default_rng(seed)
    of_class = rng.normal(size=(3, 10)) * 2
    of_compound = of_class[np.arange(6) % 3] + rng.normal(size=(6, 10))
    rows, values = [], []
    for plate in "pqr":
        for compound in range(6):
            for dose in (1.0, 10.0):
                if (compound, dose) == (0, 1.0) and plate != "p":
                    continue
                rows.append((plate, f"c{compound}", dose, "treatment", "abc"[compound % 3]))
                values.append(of_compound[compound] * (1 + 0.3 * (dose > 1)) + rng.normal(size=10))
        rows += [(plate, "DMSO", np.nan, "negative_control", None)] * 4
        values += list(rng.normal(size=(4, 10)) * 0.5)
    wells = pd.DataFrame(rows, columns=["plate", "compound", "concentration", "role", "moa"])
    return np.array(values), wells


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5)


def by_loop(values: Floats, label: list[Any], group: list[Any]) -> tuple[list[bool], list[float]]:
    """Whether the nearest candidate matches, and the average precision, of each query that has a match."""
    first, precision = [], []
    for i in range(len(values)):
        candidates = [j for j in range(len(values)) if group[j] != group[i]]
        candidates.sort(key=lambda j: -cosine(values[i], values[j]))
        hits = [label[j] == label[i] for j in candidates]
        if any(hits):
            first.append(hits[0])
            precision.append(np.mean([sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit]))
    return first, precision


def scores_of(found: list[Score]) -> dict[tuple[str, str], Score]:
    return {(score.test, score.metric): score for score in found}


def test_replicates_are_looked_up_as_the_loop_does() -> None:
    values, wells = plates()
    found = scores_of(replicate_scores(values, wells, RecipeEvaluationConfig(n_bootstrap=50)))
    for test, taken in (("replicate", wells["role"] == "treatment"), ("replicate or control", wells["role"] != "")):
        own = wells[taken]
        label = [str(key) for key in zip(own["compound"], own["concentration"], strict=True)]
        first, precision = by_loop(values[taken.to_numpy()], label, own["plate"].tolist())
        for metric, expected in (("top1", first), ("map", precision)):
            score = found[test, metric]
            np.testing.assert_allclose(score.value, np.mean(expected), rtol=1e-12)
            assert score.low <= score.value <= score.high
            assert (score.n_queries, score.n_left_out) == (len(first), 1)
    assert found["replicate", "top1"].n_compounds == 6
    # A well has 24 candidates on the two other plates at most, two of which match.
    assert 2 / 25 < found["replicate", "top1"].chance < 2 / 21


def test_classes_are_told_by_other_compounds_as_the_loop_does() -> None:
    values, wells = plates()
    treatments = wells.copy()
    alone = treatments["compound"] == "c5"
    treatments.loc[alone, "moa"] = "of one compound"
    config = RecipeEvaluationConfig(linear_folds=3, n_bootstrap=50)
    found = scores_of(class_scores(values, treatments, config))
    own = (treatments["role"] == "treatment") & ~alone
    first, precision = by_loop(
        values[own.to_numpy()], treatments["moa"][own].tolist(), treatments["compound"][own].tolist()
    )
    # Class c has lost c5, and with it the only other compound of its class.
    counted = treatments[own & (treatments["moa"] != "c")]
    assert len(counted) == found["class", "nearest"].n_queries
    without = (own & (treatments["moa"] != "c")).to_numpy()
    first, precision = by_loop(values[without], counted["moa"].tolist(), counted["compound"].tolist())
    np.testing.assert_allclose(found["class", "nearest"].value, np.mean(first), rtol=1e-12)
    np.testing.assert_allclose(found["class", "map"].value, np.mean(precision), rtol=1e-12)
    assert found["class", "nearest"].n_left_out == 12
    assert found["class", "nearest"].chance == counted["moa"].value_counts(normalize=True).max()
    assert found["class", "linear"].n_queries == len(counted)


def test_discriminants_see_nothing_of_the_compound_they_are_asked_about() -> None:
    rng = np.random.default_rng(0)
    compound = np.repeat([f"c{i}" for i in range(12)], 10)
    # Wells of a compound are all alike, and classes are drawn by lot: what is learnt is of no use elsewhere.
    values = np.repeat(rng.normal(size=(12, 8)), 10, axis=0) + 0.01 * rng.normal(size=(120, 8))
    shares = []
    for seed in range(20):
        codes = np.repeat(np.random.default_rng(seed).permutation(12) % 2, 10)
        shares.append(linear_hits(values, codes, compound, 12, 0).mean())
    assert 0.3 < np.mean(shares) < 0.6
    told = np.repeat(np.arange(12) % 2, 10)
    assert linear_hits(values + 3 * (2 * told - 1)[:, None], told, compound, 6, 0).mean() > 0.95


def test_numbers_are_the_same_each_time_and_for_any_order_of_rows() -> None:
    values, wells = plates()
    config = RecipeEvaluationConfig(n_bootstrap=50)
    found = replicate_scores(values, wells, config)
    assert found == replicate_scores(values, wells, config)
    order = np.random.default_rng(1).permutation(len(values))
    again = replicate_scores(values[order], wells.iloc[order], config)
    np.testing.assert_allclose([s.value for s in again], [s.value for s in found], rtol=1e-12)


def test_what_cannot_be_looked_up_is_no_number() -> None:
    values, wells = plates()
    one = (wells["plate"] == "p").to_numpy()
    score = replicate_scores(values[one], wells[one], RecipeEvaluationConfig())[0]
    assert np.isnan(score.value)
    assert (score.n_queries, score.n_left_out) == (0, 12)
    with pytest.raises(InputError, match=r"--match 'compund': .*did you mean 'compound'"):
        replicate_scores(values, wells, RecipeEvaluationConfig(match=("compund",)))
    with pytest.raises(InputError, match="--across 'day'"):
        replicate_scores(values, wells, RecipeEvaluationConfig(across="day"))


def test_recipes_are_named_or_written_out() -> None:
    assert list(parse_recipes(["all"])) == [recipe().method for recipe in NAMED_RECIPES]
    assert parse_recipes(["{method: sphered, regularisation: 2}", "raw"]) == {
        "{method: sphered, regularisation: 2}": Sphered(regularisation=2),
        "raw": Raw(),
    }
    with pytest.raises(InputError, match="is not YAML"):
        parse_recipes(["{method"])


# --- real data -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def injuries(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Screen:
    """Real Cell Painting wells of compounds that injure cells, imported."""
    out = str(tmp_path_factory.mktemp("injuries") / "screen")
    table = str(real_data / "profiles_cell_injury" / "fs_plate_holdout.csv.gz")
    done = import_profiles(out, ImportProfilesConfig(tables=(table,), columns={"moa": "injury_type"}))
    assert (done.counts["rows"], done.counts["rows left out"], done.counts["wells"]) == (1948, 1, 1947)
    assert done.counts["features"] == 352
    return Screen.open(out)


def test_real_wells_find_their_replicates_and_their_class(injuries: Screen) -> None:
    config = RecipeEvaluationConfig(n_bootstrap=100)
    found = evaluate_recipes(injuries, parse_recipes(["raw", "sphered", "contrasted"]), config)
    value = found.scores.set_index(["recipe", "test", "metric"])["value"]
    # Controls count: same compound, dose and time on another plate.
    assert value["contrasted", "replicate or control", "top1"] >= 0.60
    assert value["contrasted", "replicate or control", "map"] >= 0.50
    assert value["contrasted", "replicate", "top1"] > value["raw", "replicate", "top1"]
    assert value["contrasted", "replicate", "map"] > value["raw", "replicate", "map"] > 0.4
    assert value["sphered", "class", "nearest"] > 0.50
    assert value["sphered", "class", "nearest"] > value["raw", "class", "nearest"]
    chance = found.scores.set_index(["recipe", "test", "metric"])["chance"]
    assert chance["raw", "class", "nearest"] < 0.25
    assert found.scores["n_left_out"].max() < 400


def test_the_command_prints_and_writes_the_same_numbers(injuries: Screen, tmp_path: Path, command: Command) -> None:
    arguments = ("profiles", "evaluate", injuries.url, "--recipe", "robust", "--match", "compound,concentration,time")
    shown = command(*arguments, "--out", tmp_path / "scores.parquet")
    assert shown.code == 0, shown.err
    table = open_table(str(tmp_path / "scores.parquet"), RECIPES).to_pandas()
    rows = json.loads(command(*arguments, "--format", "json").out)
    np.testing.assert_allclose([row["value"] for row in rows], table["value"], atol=1e-6)
    assert f"{table['value'][0]:.3f} [{table['low'][0]:.2f}, {table['high'][0]:.2f}]" in shown.out
    assert "(chance)" in shown.out
    assert "note: robust: 3 of 352 features are left out" in shown.out
    wrong = command("profiles", "evaluate", injuries.url, "--class", "injury")
    assert wrong.code == 1
    assert "did you mean 'injury_code'" in wrong.err


@pytest.mark.parametrize("label", ["time", "compound", "role"])
def test_a_class_may_be_what_treatments_are_matched_by(injuries: Screen, label: str) -> None:
    scores = evaluate_recipes(injuries, {"raw": Raw()}, RecipeEvaluationConfig(label=label, n_bootstrap=1)).scores
    nearest = scores.set_index(["test", "metric"]).loc[("class", "nearest")]
    assert (nearest["n_queries"] > 0) == (label != "compound"), "no other compound has a compound's name"


def test_scores_are_written_by_the_name_of_the_file(tmp_path: Path, injuries: Screen) -> None:
    found = evaluate_recipes(injuries, parse_recipes(["raw"]), RecipeEvaluationConfig(n_bootstrap=5))
    write_scores(str(tmp_path / "s.json"), found)
    assert json.loads((tmp_path / "s.json").read_text())["scores"][0]["recipe"] == "raw"
    assert wide(found.scores)["recipe"].tolist() == ["raw", "(chance)"]
    with pytest.raises(InputError, match=r"ends in \.parquet or \.json"):
        write_scores(str(tmp_path / "s.txt"), found)


def test_a_screen_that_was_run_is_tested_by_the_same_command(finished_screen: Path, command: Command) -> None:
    done = command(
        "profiles", "evaluate", finished_screen, "--recipe", "raw", "--recipe", "sphered", "--format", "json"
    )
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert {row["recipe"] for row in rows} == {"raw", "sphered"}
    assert {row["test"] for row in rows} == {"replicate", "replicate or control", "class"}
    refused = command("profiles", "process", finished_screen, "--recipe", "raw")
    assert refused.code == 1
    assert "were not imported but made by a run" in refused.err
