"""The table of methods: rivals on the same cells and split, resumed, and fitted to training cells alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import Command
from runs import times

from pipelines import compare
from pipelines.compare import METHODS, markdown, read_summaries, table
from pipelines.config import parse, with_cells_of
from pipelines.inputs import Inputs, open_inputs
from pipelines.vectors import EmbeddedCells
from screening.baselines import BaselineConfig
from storage_schemas import store
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, COMPARISON, FEATURE_PREFIX, SPLIT, open_table, write_table


@pytest.fixture
def screen(finished_screen: Path, tmp_path: Path) -> Screen:
    """A copy of the finished screen, to write into."""
    return Screen(str(shutil.copytree(finished_screen, tmp_path / "screen")))


def inputs_of(screen: Screen) -> Inputs:
    config = parse(screen.read_manifest().config, "test")
    return open_inputs(with_cells_of(config, screen.url).inputs)


@pytest.mark.slow
def test_the_table_of_methods_is_made_once(screen: Screen, command: Command, local_ray: None) -> None:
    done = command("compare", screen.url)
    assert done.code == 0, done.err
    folder = Path(screen.comparison)
    scores = open_table(str(folder / "results.parquet"), COMPARISON).to_pandas()
    assert set(scores["method"]) == set(METHODS)
    assert set(scores["test"]) == {"compound", "replicate"}
    # The same cells are looked up by all, so that chance is the same too.
    by_test = scores.groupby(["test", "contrast", "metric"])
    assert (by_test[["n_queries", "n_compounds", "chance"]].nunique() == 1).all(axis=None)

    evaluation = store.read_json(screen.evaluation)
    reid = scores[(scores["method"] == "reid") & (scores["contrast"] == "all MOAs")].set_index(["test", "metric"])
    for test, result in evaluation.items():
        for metric in ("rank1", "map", "accuracy"):
            assert reid.loc[(test, metric), "value"] == result[metric]["value"]
            assert reid.loc[(test, metric), "low"] == result[metric]["low"]

    ide = Screen.open(str(folder / "ide"))
    assert ide.segmented == screen
    assert store.read_json(f"{ide.checkpoint}/manifest.json")["model"]["neck"] is False
    assert open_table(ide.split, SPLIT).equals(open_table(screen.split, SPLIT))
    assert "Held-out compounds" in done.out
    assert "same masks" in done.out
    written = (folder / "results.md").read_text(encoding="utf-8")
    for title in METHODS.values():
        assert f"| {title} |" in written
        assert title in done.out

    files = times(folder, "features/embeddings", "features/evaluation.json", "ipp/evaluation.json", "ide")
    again = command("compare", screen.url, "--format", "json")
    assert again.code == 0, again.err
    assert len(json.loads(again.out)) == len(scores)
    assert times(folder, "features/embeddings", "features/evaluation.json", "ipp/evaluation.json", "ide") == files

    other = command("compare", screen.url, "--set", "baseline.classifier.method=logistic")
    assert other.code == 0, other.err
    changed = times(folder, "ide/checkpoint", "ipp/embeddings")
    assert {path for path, time in changed.items() if files.get(path) == time} == set(times(folder, "ide/checkpoint"))


def test_what_is_fitted_knows_training_cells_only(screen: Screen, tmp_path: Path) -> None:
    """Features of a cell that is not trained on change its own vector and no other."""
    inputs = inputs_of(screen)
    split = open_table(screen.split, SPLIT).to_pandas()
    tested = WellKey(*split.loc[split["split"] == "test_compound", ["plate", "well"]].iloc[0])
    mark = "mark"
    found = {}
    for name in ("before", "after"):
        for method in ("features", "ipp"):
            rival = Screen(str(tmp_path / name / method), screen)
            counts, notes = compare._embed(method, BaselineConfig(), inputs, screen, rival, mark)
            found[name, method] = EmbeddedCells(rival, inputs.wells).read()
        cells = open_table(screen.cells(tested), CELLS)
        for position, column in enumerate(cells.column_names):
            if column.startswith(FEATURE_PREFIX):
                shifted = pa.array([[1000 + 3 * value for value in row] for row in cells[column].to_pylist()])
                cells = cells.set_column(position, column, shifted.cast(pa.list_(pa.float32())))
        write_table(screen.cells(tested), cells, CELLS)
    trained = int((split["split"] == "train").sum())
    assert 0 < counts["trained on"] < counts["cells"]
    assert counts["wells"] > trained
    assert "are not defined" in notes[0]
    for method in ("features", "ipp"):
        (keys, one), (same, other) = found["before", method], found["after", method]
        pd.testing.assert_frame_equal(keys, same)
        own = (keys["plate"] + "/" + keys["well"] == str(tested)).to_numpy()
        assert own.any()
        np.testing.assert_array_equal(one[~own], other[~own])
        assert not np.array_equal(one[own], other[own])


def test_features_are_those_of_the_frames_of_the_clips(screen: Screen) -> None:
    inputs = inputs_of(screen)
    config = BaselineConfig(statistics=("last", "first"))
    keys, values = read_summaries(screen, inputs.wells, config)
    names = [name for name in open_table(screen.cells(inputs.wells[0]), CELLS).column_names if "feature_" in name]
    assert values.shape == (len(keys), 2 * len(names))
    checked = 0
    for (plate, well), rows in keys.groupby(["plate", "well"]).indices.items():
        cells = open_table(screen.cells(WellKey(plate, well)), CELLS).to_pandas().set_index(["site", "track"])
        for row in rows[:2]:
            cell = cells.loc[(keys["site"][row], keys["track"][row])]
            assert cell["clip"] >= 0
            for feature, name in enumerate(names):
                course = [value for value in cell[name] if np.isfinite(value)]
                expected = [course[-1], course[0]] if course else [np.nan, np.nan]
                np.testing.assert_array_equal(values[row, [feature, len(names) + feature]], expected)
                checked += len(course) > 0
    assert checked


def test_cells_without_features_leave_their_rows_out(
    screen: Screen, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_feature_columns", lambda table: [])
    monkeypatch.setattr(compare, "_train", lambda config, rival: 0)
    shutil.copytree(screen.url, f"{screen.comparison}/ide", ignore=shutil.ignore_patterns("compare"))
    found = compare.compare(screen.url)
    assert set(found.scores["method"]) == {"ide", "reid"}
    assert any("no hand-made features" in note for note in found.notes)


def test_a_screen_that_is_not_tested_is_an_error(
    screen: Screen, small_screen: Path, tmp_path: Path, command: Command
) -> None:
    manifest = screen.read_manifest()
    screen.write_manifest(manifest.model_copy(update={"stages": {"segment": manifest.stages["segment"]}}))
    done = command("compare", screen.url)
    assert done.code == 1
    assert "its stage 'evaluate' is not done: finish it with `screening run`" in done.err
    done = command("compare", small_screen)
    assert done.code == 1
    assert "is not a screen" in done.err


def test_a_screen_without_queries_is_an_error(screen: Screen, command: Command) -> None:
    store.write_json(screen.evaluation, {})
    done = command("compare", screen.url)
    assert done.code == 1
    assert "its split has no queries" in done.err
    assert not Path(screen.comparison).exists()


def test_settings_of_the_network_are_refused(screen: Screen, command: Command) -> None:
    done = command("compare", screen.url, "--set", "train.epochs=9")
    assert done.code == 2
    assert "train.epochs: 2 → 9" in done.err
    assert "baseline" in done.err
    assert command("compare", screen.url, "--set", "baseline.classifier.method=forest").code == 2
    assert not Path(screen.comparison).exists()


def test_one_class_in_training_is_an_error(screen: Screen, tmp_path: Path) -> None:
    inputs = inputs_of(screen)
    split = open_table(screen.split, SPLIT).to_pandas()
    alone = split["role"] == "negative_control"
    write_table(screen.split, split.assign(split=np.where(alone, "train", "unused")), SPLIT)
    with pytest.raises(ValueError, match=r"screen: the training cells are of 1 class\(es\) \['negative control'\]"):
        compare._embed("ipp", BaselineConfig(), inputs, screen, Screen(str(tmp_path / "ipp"), screen), "mark")


def test_the_printed_table_is_in_percent_with_chance_last() -> None:
    rows = [
        ("features", "rank1", 0.5, 0.25, 0.75, 0.125),
        ("features", "rank10", 1.0, 1.0, 1.0, 0.5),
        ("features", "map", 0.4, None, None, 0.2),
        ("features", "auc", 0.9, 0.8, 1.0, 0.5),
        ("features", "accuracy", 0.5, 0.0, 1.0, 0.125),
        ("reid", "rank1", 0.75, 0.7, 0.8, 0.125),
        ("reid", "rank10", 1.0, 1.0, 1.0, 0.5),
        ("reid", "map", None, None, None, None),
        ("reid", "auc", None, None, None, None),
        ("reid", "accuracy", 1.0, None, None, 0.125),
    ]
    scores = pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "chance"])
    scores = scores.astype(dict.fromkeys(["value", "low", "high", "chance"], float))
    scores = scores.assign(test="compound", contrast="all MOAs", n_queries=9, n_compounds=2)
    found = table(scores, "compound")
    assert found.to_numpy().tolist() == [
        [
            "hand-made features",
            "50.0 (0.0–100.0)",
            "90.0 (80.0–100.0)",
            "50.0 (25.0–75.0)",
            "100.0 (100.0–100.0)",
            "40.0",
        ],
        ["ReID: the network as trained", "100.0", "–", "75.0 (70.0–80.0)", "100.0 (100.0–100.0)", "–"],
        ["chance", "12.5", "50.0", "12.5", "50.0", "20.0"],
    ]
    assert list(found.columns) == ["method", "accuracy", "AUC", "Rank-1", "Rank-10", "mAP"]
    text = markdown(scores, ["A note."])
    assert "| held-out compounds | accuracy | AUC | Rank-1 | Rank-10 | mAP |\n| --- | ---: | ---: |" in text
    assert text.endswith("\n- A note.\n")
