from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
import ray

from pipelines.cluster import usable_cpus
from pipelines.config import ConfigError, ResourcesConfig, RunConfig, differences, override, parse, with_cells_of
from storage_schemas import store
from storage_schemas.keys import WellKey
from storage_schemas.screen import Failure, Screen
from storage_schemas.tables import SWEEP_RESULTS, open_table, write_table
from tune.ablations import ABLATIONS
from tune.results import figure, markdown
from tune.sweep import plan
from tune.trials import at_once, share_of

WELL = WellKey("plate 1", "B02")
SENTENCES = {name: ablation.sentence for name, ablation in ABLATIONS.items()}


@pytest.fixture
def config() -> RunConfig:
    inputs = {"plates": ["p.zarr"], "plate_map": "plate_map.csv"}
    return parse({"inputs": inputs, "segment": {"channels": {"nucleus": "nucleus"}}}, "test")


def rows(
    ablation: str,
    seed: int,
    values: dict[tuple[str, str], float | None],
    test: str = "compound",
    network: str = "ResNet-18",
    train_seconds: float = 60.0,
) -> pd.DataFrame:
    frame = pd.DataFrame(
        [{"contrast": contrast, "metric": metric, "value": value} for (contrast, metric), value in values.items()]
    )
    frame["value"] = frame["value"].astype(float)
    told = {"network": network, "epochs": 20, "train_seconds": train_seconds, "n_queries": 1000 + seed}
    return frame.assign(ablation=ablation, seed=seed, test=test, low=0.0, high=1.0, chance=0.25, **told)


# --- ablations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_its_own_settings_and_no_other(config: RunConfig, name: str) -> None:
    overrides = ABLATIONS[name].overrides
    config = override(config, ["pretrain.epochs=5", "train.mislabel={limit: 5}"])
    ablated = override(config, overrides)
    changed = differences(config.model_dump(mode="json"), ablated.model_dump(mode="json"))
    wanted = [text.partition("=")[0] for text in overrides]
    assert changed if overrides else not changed
    assert all(line.startswith(tuple(wanted)) for line in changed)


def test_the_rows_of_the_published_table_are_there() -> None:
    sentences = [ablation.sentence for ablation in ABLATIONS.values()]
    assert sentences[:4] == [
        "full, as configured",
        "minus pretraining",
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
    names = ["full-depth18-seed3", "full-depth18-seed1", "image-depth18-seed3", "image-depth18-seed1"]
    assert [trial.name for trial in trials] == names
    assert [trial.config.seed for trial in trials] == [3, 1, 3, 1]
    assert [trial.config.model.temporal for trial in trials] == ["retain", "retain", "image", "image"]
    assert trials[0].screen == Screen("out/trials/full-depth18-seed3")


def test_trials_are_crossed_with_depths(config: RunConfig) -> None:
    trials = plan(config, "out", ["full", "image"], [0], [50, 18, 50])
    assert [(trial.variant, trial.config.model.name) for trial in trials] == [
        ("full", "ResNet-50"),
        ("full", "ResNet-18"),
        ("image", "ResNet-50"),
        ("image", "ResNet-18"),
    ]
    with pytest.raises(ConfigError, match=r"model\.depth: Input should be 10, 18"):
        plan(config, "out", ["full"], [0], [19])


def test_trials_share_the_cells_that_the_sweep_segments_or_is_given(config: RunConfig) -> None:
    segmented = with_cells_of(config, "out/screen")
    given = parse({"inputs": {"cells": "imported"}}, "test")
    for shared, url in ((segmented, "out/screen"), (given, "imported")):
        (trial,) = plan(shared, "out", ["image"], [3])
        assert (trial.config.inputs.cells, trial.config.inputs.plates, trial.config.segment) == (url, None, None)


def test_an_ablation_without_effect_is_left_out(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    standard = override(config, ["model.temporal=standard"])
    trials = plan(standard, "out", ["full", "standard-time"], [0])
    assert [trial.name for trial in trials] == ["full-depth18-seed0"]
    assert "standard-time left out: the configuration has model.temporal=standard already" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(ConfigError, match="nothing to run"):
        plan(standard, "out", ["standard-time"], [0])


def test_an_unknown_ablation_is_an_error(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"\['neck'\]; there are full, .*no-neck"):
        plan(config, "out", ["neck"], [0])


@pytest.mark.parametrize(
    ("there", "settings", "room"),
    [
        ({"CPU": 4.0, "memory": 2.0**40}, {}, 4),
        ({"CPU": 4.0, "memory": 2.0**40}, {"train_workers": 2}, 2),
        ({"CPU": 4.0, "memory": 2.0**40}, {"train_readers": 4}, 2),
        ({"CPU": 1.0, "memory": 2.0**40}, {"train_workers": 2}, 1),
        ({"CPU": 64.0, "GPU": 2.0, "memory": 2.0**40}, {"train_gpus": 1.0}, 2),
        ({"CPU": 64.0, "memory": 7.1 * 2**30}, {}, 4),
        ({"CPU": 64.0, "memory": 7.1 * 2**30}, {"train_memory_mb": 2**11}, 1),
    ],
)
def test_as_many_trials_run_at_once_as_there_is_room_for(
    there: dict[str, float], settings: dict[str, float], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    resources = ResourcesConfig.model_validate(settings)
    assert at_once(resources, None) == room
    assert at_once(resources, room) == room
    assert at_once(resources, 1) == 1
    with pytest.raises(ConfigError, match=rf"--concurrency {room + 1}: .* have room for {room} "):
        at_once(resources, room + 1)


@pytest.mark.parametrize(("cpus", "concurrency", "share"), [(16.0, 3, 5), (16.0, 16, 1), (2.0, 1, 2)])
def test_trials_that_run_at_once_share_the_cpus_out(
    config: RunConfig, cpus: float, concurrency: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    shared = share_of(config, concurrency)
    assert usable_cpus(shared.resources) == share
    assert usable_cpus(config.resources) == cpus
    assert differences(config.model_dump(), shared.model_dump()) == [f"resources.cpus: None → {share}"]


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


@pytest.fixture
def results() -> pd.DataFrame:
    rank1, mean_ap, pair = ("all MOAs", "rank1"), ("all MOAs", "map"), ("a|b vs c", "rank1")
    return pd.concat(
        [
            rows("full", 0, {rank1: 0.5, mean_ap: 0.4, ("all MOAs", "rank5"): 0.9, pair: 0.6}, train_seconds=58.0),
            rows("full", 1, {rank1: 0.7, mean_ap: 0.4, pair: None}, train_seconds=62.0),
            rows("full", 0, {rank1: 0.8, mean_ap: 0.9, pair: 1.0}, network="ResNet-50", train_seconds=200.0),
            rows("image", 0, {rank1: 0.25, mean_ap: 0.125, pair: None}),
            rows("image", 0, {rank1: 1.0}, test="replicate"),
        ]
    )


def test_table_has_mean_and_sd_over_seeds_in_percent(results: pd.DataFrame, tmp_path: Path) -> None:
    url = str(tmp_path / "results.parquet")
    write_table(url, results, SWEEP_RESULTS)
    title, _, *table = markdown(open_table(url, SWEEP_RESULTS).to_pandas(), SENTENCES).splitlines()
    assert title.startswith("Test compound: held-out cells")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    scores = ["Rank-1", "mAP", r"Rank-1, a\|b vs c"]
    assert cells[0] == [
        "",
        *(f"ResNet-18 {score}" for score in scores),
        *(f"ResNet-50 {score}" for score in scores),
        "ResNet-18 training, s",
        "ResNet-50 training, s",
        *("epochs", "seeds", "queries"),
    ]
    assert cells[2:] == [
        [
            *("full, as configured", "60.0 ± 14.1", "40.0 ± 0.0", "60.0", "80.0", "90.0", "100.0"),
            *("60 ± 3", "200", "20", "1–2", "1,000–1,001"),
        ],
        ["minus temporal dimension (image)", "25.0", "12.5", "–", "–", "–", "–", "60", "–", "20", "1", "1,000"],
        ["chance", *["25.0"] * 6, *[""] * 5],
    ]


def test_table_of_a_sweep_in_which_all_failed() -> None:
    empty = SWEEP_RESULTS.schema.empty_table().to_pandas()
    assert markdown(empty, SENTENCES).splitlines()[-1].startswith("| chance |")
    ElementTree.fromstring(figure(empty, SENTENCES))


def test_plot_names_every_row_and_network_and_is_the_same_twice(results: pd.DataFrame) -> None:
    drawn = figure(results, SENTENCES)
    texts = {"".join(element.itertext()).strip() for element in ElementTree.fromstring(drawn).iter() if element.text}
    assert {"full, as configured", "minus temporal dimension (image)"} <= texts
    assert {"ResNet-18", "ResNet-50", "chance", "Rank-1, %", "mAP, %"} <= texts
    assert figure(results, SENTENCES) == drawn


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
    assert "sweep: 2/2 " in first.stderr
    assert first.stdout == Path(out, "results.md").read_text(encoding="utf-8")
    results = open_table(f"{out}/results.parquet", SWEEP_RESULTS).to_pandas()
    assert set(zip(results["ablation"], results["seed"], strict=True)) == {("full", 0), ("image", 0)}
    assert set(results["contrast"]) == {"all MOAs", "uncoupler vs respiratory chain inhibitor"}
    assert results["value"].dropna().between(0, 1).all()
    assert results["value"].notna().any()
    assert (results["epochs"] == 2).all()
    assert (results["train_seconds"] > 0).all()
    assert (results["n_queries"] > 0).all()
    ElementTree.fromstring(Path(out, "results.svg").read_bytes())

    written = {path: path.stat().st_mtime_ns for path in Path(out, "trials").rglob("*") if path.is_file()}
    again = screening(*command)
    assert again.returncode == 0, again.stderr
    assert "2 trials, 2 done before" in again.stderr
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in Path(out, "trials").rglob("*") if path.is_file()} == written

    refused = screening(*command, "--set", "train.epochs=3")
    assert refused.returncode == 2
    assert "train.epochs: 2 → 3" in refused.stderr
