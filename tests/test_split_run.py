"""Splits through the command line: made, edited, given back, trained on and tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import Command

from pipelines.config import parse
from pipelines.evaluate import _asked
from screening.splits import TESTS

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def on_its_cells(finished_screen: Path, small_settings: list[str], tmp_path: Path) -> list[str]:
    """A configuration that takes the finished screen's cells, and settings that make it quick."""
    config = tmp_path / "run.yaml"
    config.write_text(f"inputs: {{cells: {finished_screen}}}\n")
    settings = [setting for setting in small_settings[1::2] if not setting.startswith("segment.")]
    settings += ["train.epochs=1"]
    return [str(config), *(part for setting in settings for part in ("--set", setting))]


@pytest.fixture
def trained(finished_screen: Path) -> tuple[str, str]:
    """A setting that takes the finished screen's network, so that none is trained."""
    return "--set", f"network={finished_screen}/checkpoint"


@pytest.mark.slow
def test_cells_are_divided_and_the_reader_is_warned(
    on_its_cells: list[str], finished_screen: Path, command: Command, tmp_path: Path
) -> None:
    screen, by_cell = tmp_path / "screen", ("--set", "split.method=cell")
    made = command("split", *on_its_cells, "--out", tmp_path / "cells.csv", *by_cell)
    assert made.code == 0, made.err
    assert "scores are optimistic" in made.out
    done = command("run", *on_its_cells, "--out", screen, "--stages", "train,embed,evaluate", *by_cell)
    assert done.code == 0, done.err
    table = pd.read_parquet(screen / "split.parquet")
    listed = pd.read_csv(tmp_path / "cells.csv", dtype={"site": str})
    assert listed["split"].tolist() == table["split"].tolist()
    embedded = sum(len(pd.read_parquet(path)) for path in (screen / "embeddings").rglob("*.parquet"))
    assert len(table) == embedded
    (test,) = json.loads((screen / "evaluation.json").read_text()).items()
    count = table["split"].value_counts()
    with_moa = table[(table["split"] == "gallery") & table["moa"].notna()]
    assert (test[0], test[1]["n_gallery"]) == ("cell", len(with_moa))
    assert test[1]["n_queries"] + test[1]["n_left_out"]["queries_without_match"] == count["test_cell"]
    stages = json.loads((screen / "manifest.json").read_text())["stages"]
    assert any("optimistic" in note for note in stages["train"]["notes"])
    assert stages["train"]["counts"]["cells: train"] == count["train"] == stages["train"]["counts"]["clips"]
    assert not any("no validation" in note for note in stages["train"]["notes"])


@pytest.mark.parametrize("method", ["compound", "cell"])
def test_of_many_cells_some_are_drawn_and_the_reader_is_told(
    method: str, on_its_cells: list[str], trained: tuple[str, str], command: Command, tmp_path: Path
) -> None:
    screen = tmp_path / "screen"
    settings = (*trained, "--set", f"split.method={method}", "--set", "evaluation.max_cells=5")
    done = command("run", *on_its_cells, "--out", screen, "--stages", "train,embed,evaluate", *settings)
    assert done.code == 0, done.err
    for test in json.loads((screen / "evaluation.json").read_text()).values():
        assert test["n_gallery"] == 5
        assert test["n_queries"] + test["n_left_out"]["queries_without_match"] == 5
    record = json.loads((screen / "manifest.json").read_text())["stages"]["evaluate"]
    assert any(re.match("5 of [0-9]+ of the gallery's cells were drawn", note) for note in record["notes"])
    assert any(re.search(": 5 of [0-9]+ of the queries were drawn", note) for note in record["notes"])


@pytest.mark.parametrize(("held_out", "tests"), [(True, {"compound", "replicate"}), (False, {"compound"})])
def test_a_replicate_is_a_test_only_if_it_is_held_out(held_out: bool, tests: set[str]) -> None:
    config = parse({"inputs": {"cells": "cells"}, "split": {"hold_out_replicate": held_out}}, "test")
    nothing = pd.DataFrame({"split": ["train"]})
    assert {TESTS[part] for part in _asked(config, nothing)} == tests


def test_a_table_is_edited_and_given_back(
    on_its_cells: list[str], trained: tuple[str, str], command: Command, tmp_path: Path
) -> None:
    path, screen = tmp_path / "split.csv", tmp_path / "screen"
    assert command("split", *on_its_cells, "--out", path).code == 0
    again = command("split", *on_its_cells, "--out", path)
    assert again.code == 1
    assert "is there already" in again.err
    table = pd.read_csv(path)
    table.loc[table["split"] == "test_replicate", "split"] = "query"
    table.to_csv(path, index=False)
    given = (*trained, "--set", "split.method=table", "--set", f"inputs.split={path}")
    done = command("run", *on_its_cells, "--out", screen, "--stages", "train,embed,evaluate", *given)
    assert done.code == 0, done.err
    assert pd.read_parquet(screen / "split.parquet")["split"].tolist() == table["split"].tolist()
    assert set(json.loads((screen / "evaluation.json").read_text())) == {"compound", "query"}
    # An edited table is another input.
    table.loc[table["split"] == "query", "split"] = "unused"
    table.to_csv(path, index=False)
    changed = command("run", *on_its_cells, "--out", screen, "--stages", "evaluate", *given)
    assert changed.code == 2
    assert "table" in changed.err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"well": "H12"}, 1, "names wells that the plate map has not"),
        (None, 2, "go together"),
    ],
)
def test_a_table_that_does_not_fit_is_named(
    change: dict[str, str] | None, code: int, message: str, on_its_cells: list[str], command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "given.csv"
    pd.DataFrame([{"plate": "replicate_1", "well": "B02", "split": "train"} | (change or {})]).to_csv(path, index=False)
    given = ("--set", "split.method=table", *(() if change is None else ("--set", f"inputs.split={path}")))
    said = command("split", *on_its_cells, "--out", tmp_path / "split.csv", *given)
    assert said.code == code
    assert message in said.err
    assert change is None or str(path) in said.err
    assert not (tmp_path / "split.csv").exists()
