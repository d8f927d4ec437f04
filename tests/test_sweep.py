from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pandas as pd
import pytest
import ray

from pipelines.config import ConfigError, RunConfig, differences, override, parse, with_cells_of
from storage_schemas import store
from storage_schemas.keys import WellKey
from storage_schemas.screen import Failure, Screen
from storage_schemas.tables import SWEEP_RESULTS, open_table, write_table
from tune.ablations import ABLATIONS
from tune.sweep import _check_room, markdown, plan

WELL = WellKey("plate 1", "B02")


@pytest.fixture
def config() -> RunConfig:
    inputs = {"plates": ["p.zarr"], "plate_map": "plate_map.csv"}
    return parse({"inputs": inputs, "segment": {"channels": {"nucleus": "nucleus"}}}, "test")


def rows(ablation: str, seed: int, values: dict[tuple[str, str], float | None], test: str = "compound") -> pd.DataFrame:
    frame = pd.DataFrame(
        [{"contrast": contrast, "metric": metric, "value": value} for (contrast, metric), value in values.items()]
    )
    frame["value"] = frame["value"].astype(float)
    return frame.assign(ablation=ablation, seed=seed, test=test, low=0.0, high=1.0, chance=0.25)


# --- ablations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_its_own_settings_and_no_other(config: RunConfig, name: str) -> None:
    overrides = ABLATIONS[name].overrides
    ablated = override(config, overrides)
    changed = differences(config.model_dump(mode="json"), ablated.model_dump(mode="json"))
    assert [line.partition(":")[0] for line in changed] == [text.partition("=")[0] for text in overrides]


def test_the_rows_of_the_published_table_are_there() -> None:
    sentences = [ablation.sentence for ablation in ABLATIONS.values()]
    assert sentences[:3] == [
        "full, as configured",
        "minus retained temporal dimension",
        "minus temporal dimension (image)",
    ]


def test_overriding_keeps_every_choice_of_a_union(config: RunConfig) -> None:
    sgd = override(config, ["train.optimizer.method=sgd", "train.optimizer.lr=0.5"])
    assert override(sgd, []) == sgd
    assert sgd.train.optimizer.method == "sgd"
    with pytest.raises(ConfigError, match=r"model\.necks.*did you mean 'neck'"):
        override(config, ["model.necks=false"])


# --- trials --------------------------------------------------------------------------------------


def test_trials_are_ablations_times_seeds(config: RunConfig) -> None:
    trials = plan(config, "out", ["full", "image", "full"], [3, 1])
    assert [trial.name for trial in trials] == ["full-seed3", "full-seed1", "image-seed3", "image-seed1"]
    assert [trial.config.seed for trial in trials] == [3, 1, 3, 1]
    assert [trial.config.model.temporal for trial in trials] == ["retain", "retain", "image", "image"]
    assert trials[0].screen == Screen("out/trials/full-seed3")


def test_trials_share_the_cells_that_the_sweep_segments_or_is_given(config: RunConfig) -> None:
    segmented = with_cells_of(config, "out/screen")
    given = parse({"inputs": {"cells": "imported"}}, "test")
    for shared, url in ((segmented, "out/screen"), (given, "imported")):
        (trial,) = plan(shared, "out", ["image"], [3])
        assert (trial.config.inputs.cells, trial.config.inputs.plates, trial.config.segment) == (url, None, None)


def test_an_ablation_without_effect_is_left_out(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    standard = override(config, ["model.temporal=standard"])
    trials = plan(standard, "out", ["full", "standard-time"], [0])
    assert [trial.name for trial in trials] == ["full-seed0"]
    assert "standard-time left out: the configuration has model.temporal=standard already" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(ConfigError, match="nothing to run"):
        plan(standard, "out", ["standard-time"], [0])


def test_an_unknown_ablation_is_an_error(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"\['neck'\]; there are full, .*no-neck"):
        plan(config, "out", ["neck"], [0])


def test_more_trials_than_there_is_room_for_are_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    _check_room(config, 2)
    with pytest.raises(ConfigError, match="4 CPUs have room for 2"):
        _check_room(config, 3)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    _check_room(config, 1)


# --- borrowed wells ------------------------------------------------------------------------------


def test_a_screen_borrows_segmented_wells_and_keeps_the_rest_its_own() -> None:
    owner = Screen(f"memory://{uuid.uuid4().hex}/screen")
    trial = Screen(f"{owner.url}-trial", owner)
    for url in (owner.cells(WELL), owner.embeddings(WELL)):
        store.write_bytes(url, b"1")
    owner.write_failures("segment", WELL, [Failure(f"{WELL}/0", "blank", "is")])
    assert trial.done_units("segment") == {WELL}
    assert trial.done_units("embed") == set()
    assert trial.failures("segment") == owner.failures("segment") != []
    for borrowed in ("cells", "quality", "clips"):
        assert getattr(trial, borrowed)(WELL) == getattr(owner, borrowed)(WELL)
    assert trial.calibration("plate 1") == owner.calibration("plate 1")
    for own in ("split", "checkpoint", "evaluation", "manifest_url"):
        assert getattr(trial, own).startswith(f"{trial.url}/")
    with pytest.raises(AssertionError):
        trial.remove_stage("segment")
    assert store.exists(owner.cells(WELL))


# --- the table -----------------------------------------------------------------------------------


def test_table_has_mean_and_sd_over_seeds_in_percent(tmp_path: Path) -> None:
    rank1, mean_ap, pair = ("all MOAs", "rank1"), ("all MOAs", "map"), ("a|b vs c", "rank1")
    results = pd.concat(
        [
            rows("full", 0, {rank1: 0.5, mean_ap: 0.4, ("all MOAs", "rank5"): 0.9, pair: 0.6}),
            rows("full", 1, {rank1: 0.7, mean_ap: 0.4, pair: None}),
            rows("image", 0, {rank1: 0.25, mean_ap: 0.125, pair: None}),
            rows("image", 0, {rank1: 1.0}, test="replicate"),
        ]
    )
    url = str(tmp_path / "results.parquet")
    write_table(url, results, SWEEP_RESULTS)
    title, _, *table = markdown(open_table(url, SWEEP_RESULTS).to_pandas()).splitlines()
    assert "held-out compounds" in title
    assert table == [
        r"|  | seeds | Rank-1 | mAP | Rank-1, a\|b vs c |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| full, as configured | 2 | 60.0 ± 14.1 | 40.0 ± 0.0 | 60.0 |",
        "| minus temporal dimension (image) | 1 | 25.0 | 12.5 | – |",
        "| chance |  | 25.0 | 25.0 | 25.0 |",
    ]


def test_table_of_a_sweep_in_which_all_failed() -> None:
    empty = SWEEP_RESULTS.schema.empty_table().to_pandas()
    assert markdown(empty).splitlines()[-1] == "| chance |  | – | – |"


# --- the whole -----------------------------------------------------------------------------------


def screening(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from screening.cli import main; main()", *arguments],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def sets(**settings: object) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


@pytest.mark.slow
def test_a_sweep_runs_once_and_is_not_repeated(tmp_path: Path) -> None:
    plates, out = str(tmp_path / "plates"), str(tmp_path / "sweep")
    moas = "[uncoupler, respiratory chain inhibitor]"
    small = sets(replicates=2, moas=moas, compounds_per_moa=3, controls_per_plate=2, frames=4, cells_per_site=6)
    ran = screening("simulate", plates, *small, *sets(height=192, width=192))
    assert ran.returncode == 0, ran.stderr
    command = (
        *("sweep", f"{plates}/run.yaml", "--out", out, "--ablations", "full,standard-time,image", "--seeds", "0"),
        *sets(model__width=4, train__epochs=2, train__p=2, evaluation__n_bootstrap=20),
    )
    first = screening(*command)
    assert first.returncode == 0, first.stderr
    assert "standard-time left out" in first.stderr
    assert "sweep: 2/2 image-seed0" in first.stderr
    assert first.stdout == Path(out, "results.md").read_text(encoding="utf-8")
    results = open_table(f"{out}/results.parquet", SWEEP_RESULTS).to_pandas()
    assert set(zip(results["ablation"], results["seed"], strict=True)) == {("full", 0), ("image", 0)}
    assert set(results["contrast"]) == {"all MOAs", "uncoupler vs respiratory chain inhibitor"}
    assert results["value"].dropna().between(0, 1).all()
    assert results["value"].notna().any()

    written = {path: path.stat().st_mtime_ns for path in Path(out, "trials").rglob("*") if path.is_file()}
    again = screening(*command)
    assert again.returncode == 0, again.stderr
    assert "2 trials, 2 done before" in again.stderr
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in Path(out, "trials").rglob("*") if path.is_file()} == written

    refused = screening(*command, "--set", "train.epochs=3")
    assert refused.returncode == 2
    assert "train.epochs: 2 → 3" in refused.stderr
