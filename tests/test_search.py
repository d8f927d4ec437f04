from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from ray.tune.schedulers import ASHAScheduler

from pipelines.config import ConfigError, RunConfig, load, override, parse
from storage_schemas.tables import SEARCH_RESULTS, SWEEP_RESULTS, open_table, write_table
from tests.runs import Run, times
from tune import search
from tune.search import Sample, _claim, _scheduler, _Search, _with_one_split
from tune.search_results import figure, markdown, ranking
from tune.searchers import FromOptuna, Listed
from tune.space import (
    DEFAULT_SPACE,
    Choice,
    LogUniform,
    RandInt,
    SearchConfig,
    Uniform,
    apply,
    check_space,
    draw,
    load_search,
)

MIXED = {
    "train.optimizer.lr": LogUniform(loguniform=(1e-4, 1e-2)),
    "train.margin": Uniform(uniform=(0.1, 0.6)),
    "train.p": RandInt(randint=(2, 4)),
    "train.freeze": Choice(choice=([], ["stem"])),
}


@pytest.fixture
def config() -> RunConfig:
    inputs = {"plates": ["p.zarr"], "plate_map": "plate_map.csv"}
    return parse({"inputs": inputs, "segment": {"channels": {"nucleus": "nucleus"}}}, "test")


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[str], SearchConfig]:
    """Reads a search from the text of a file."""

    def read(text: str) -> SearchConfig:
        path = tmp_path / "search.yaml"
        path.write_text(text, encoding="utf-8")
        return load_search(str(path))

    return read


# --- the space -----------------------------------------------------------------------------------


def test_a_search_is_read_from_yaml(loaded: Callable[[str], SearchConfig]) -> None:
    read = loaded(
        "samples: 5\nsearcher: optuna\nspace:\n"
        "  train.optimizer.lr: {loguniform: [1e-4, 1e-2]}\n"
        "  train.margin: {uniform: [0.1, 0.6]}\n"
        "  train.p: {randint: [2, 4]}\n"
        "  train.freeze: {choice: [[], [stem]]}\n"
    )
    assert read == SearchConfig(samples=5, searcher="optuna", space=MIXED)
    assert loaded("samples: 3") == SearchConfig(samples=3, space=DEFAULT_SPACE)
    assert load_search("default") == SearchConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample: 3", "sample: unknown key; did you mean 'samples'"),
        ("samples: 0", "samples: Input should be greater than or equal to 1"),
        ("space: {}", "space: Dictionary should have at least 1 item"),
        ("space: {train.p: {choic: [2]}}", r"space.train.p: expected one of \{choice: \[a, b\]\}"),
        ("space: {train.p: 3}", r"space.train.p: expected one of .* \(found 3\)"),
        ("space: {train.p: {choice: []}}", "space.train.p.choice: .* at least 1 item"),
        ("space: {train.margin: {uniform: [2, 1]}}", "from 2.0 to 1.0: the first has to be smaller"),
        ("space: {train.margin: {loguniform: [0, 1]}}", "a logarithm needs bounds above 0"),
        ("space: {train.margin: {uniform: [0, 1, 2]}}", "space.train.margin.uniform: .* at most 2 items"),
        ("space: {train.p: {randint: [1.5, 2]}}", "a valid integer"),
        ("- 1", "expected a YAML mapping with some of samples, searcher"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_search_is_said(loaded: Callable[[str], SearchConfig], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(text)


def test_a_search_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; `--search default` needs no file"):
        load_search(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("key", "domain", "message"),
    [
        ("train.optimizer.rl", Uniform(uniform=(1, 2)), r"train.optimizer.*rl: unknown key; did you mean 'lr'"),
        ("trian.p", Choice(choice=(2,)), "trian: unknown key; did you mean 'train'"),
        ("train.p", Choice(choice=(8, 1)), "train.p: Input should be greater than or equal to 2"),
        ("train.p", RandInt(randint=(1, 8)), "train.p: Input should be greater than or equal to 2"),
        ("train.label_smoothing", Uniform(uniform=(0, 1.5)), "train.label_smoothing: Input should be less than 1"),
        ("seed", RandInt(randint=(0, 9)), "seed: cannot be searched: only settings of model, augment, pretrain, train"),
        ("split.test_share", Uniform(uniform=(0, 0.5)), "split.test_share: cannot be searched"),
        ("train.validation_clips", Choice(choice=(8,)), "it says what trials are compared by"),
    ],
)
def test_a_space_that_does_not_fit_the_configuration_is_an_error(
    config: RunConfig, key: str, domain: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space({"train.margin": Uniform(uniform=(0.1, 0.6)), key: domain}, config)


def test_the_default_space_fits_the_default_configuration(config: RunConfig) -> None:
    check_space(DEFAULT_SPACE, config)
    assert {key.partition(".")[0] for key in DEFAULT_SPACE} == {"train", "augment"}


def test_draws_keep_to_the_space_and_to_three_digits(config: RunConfig) -> None:
    drawn = pd.DataFrame([draw(MIXED, 0, number) for number in range(400)])
    assert drawn["train.optimizer.lr"].between(1e-4, 1e-2).all()
    assert abs(np.log10(drawn["train.optimizer.lr"]).mean() + 3) < 0.1
    assert drawn["train.margin"].between(0.1, 0.6).all()
    assert abs(drawn["train.margin"].mean() - 0.35) < 0.05
    assert set(drawn["train.p"]) == {2, 3, 4}
    assert {tuple(value) for value in drawn["train.freeze"]} == {(), ("stem",)}
    assert (drawn["train.margin"] == drawn["train.margin"].map("{:.3g}".format).astype(float)).all()
    for settings in drawn.head(20).to_dict("records"):
        applied = apply(config, settings)
        assert (applied.train.p, applied.train.margin) == (settings["train.p"], settings["train.margin"])
        assert list(applied.train.freeze) == settings["train.freeze"]
        assert applied.train.optimizer.lr == settings["train.optimizer.lr"]


def test_a_draw_is_a_function_of_seed_and_number() -> None:
    assert draw(MIXED, 0, 3) == draw(MIXED, 0, 3)
    assert draw(MIXED, 0, 3) != draw(MIXED, 0, 4)
    assert draw(MIXED, 0, 3) != draw(MIXED, 1, 3)


def test_a_choice_of_a_union_goes_before_what_is_set_in_it(config: RunConfig) -> None:
    applied = apply(config, {"train.optimizer.lr": 0.5, "train.optimizer.method": "sgd"})
    assert (applied.train.optimizer.method, applied.train.optimizer.lr) == ("sgd", 0.5)


# --- proposals -----------------------------------------------------------------------------------


def test_listed_samples_come_first_and_are_recorded() -> None:
    started: list[tuple[int, Mapping[str, Any]]] = []
    listed = Listed({0: {}, 2: {"train.p": 4}}, None, 3, lambda number, settings: started.append((number, settings)))
    assert [listed.suggest("a"), listed.suggest("b")] == [
        {"number": 0, "settings": {}},
        {"number": 2, "settings": {"train.p": 4}},
    ]
    assert listed.suggest("c") == "FINISHED"
    assert started == [(0, {}), (2, {"train.p": 4})]


def test_optuna_learns_from_what_was_seen_before_and_since() -> None:
    pytest.importorskip("optuna")

    def score(settings: Mapping[str, Any]) -> float:
        return -abs(float(settings["train.margin"]) - 0.5) - (settings["train.freeze"] == [])

    seen = [(settings, score(settings)) for settings in (draw(MIXED, 0, number) for number in range(15))]
    optuna = FromOptuna(MIXED, 0, [({}, 0.1), *seen])
    listed = Listed({0: {}}, optuna, 16, lambda number, settings: None)
    assert listed.suggest("first") == {"number": 0, "settings": {}}
    listed.on_trial_complete("first", {"best": 0.1})
    found = []
    for number in range(20):
        sample = listed.suggest(str(number))
        assert isinstance(sample, dict)
        assert sample["number"] == 16 + number
        found.append(sample["settings"])
        failed = number == 3
        listed.on_trial_complete(str(number), None if failed else {"best": score(sample["settings"])}, failed)
    assert all(2 <= settings["train.p"] <= 4 and 1e-4 <= settings["train.optimizer.lr"] <= 1e-2 for settings in found)
    assert np.mean([score(settings) for settings in found]) > np.mean([value for _, value in seen]) + 0.2


# --- halving -------------------------------------------------------------------------------------


def halving(config: RunConfig, closed: Mapping[int, list[tuple[int, float]]]) -> ASHAScheduler:
    nine = override(config, ["train.epochs=9"])
    return _scheduler(_Search(nine, SearchConfig(grace=1, reduction=3), "search"), closed)


def test_a_worse_sample_is_stopped_by_what_earlier_commands_saw(config: RunConfig) -> None:
    class Trial:
        trial_id = "new"

    for value, fate in ((0.1, "STOP"), (0.9, "CONTINUE")):
        scheduler = halving(config, {0: [(1, 0.5), (2, 0.4)], 1: [(1, 0.6)], 2: [(1, 0.7)]})
        scheduler.on_trial_add(None, Trial)
        assert scheduler.on_trial_result(None, Trial, {"epoch": 1, "best": value}) == fate
    fresh = halving(config, {})
    fresh.on_trial_add(None, Trial)
    assert fresh.on_trial_result(None, Trial, {"epoch": 1, "best": 0.1}) == "CONTINUE"
    # It ends by itself, or its checkpoint would be lost.
    assert fresh.on_trial_result(None, Trial, {"epoch": 9, "best": 0.1}) == "CONTINUE"


@pytest.mark.slow
def test_samples_that_are_stopped_are_recorded_and_those_that_fail_are_told_of(
    config: RunConfig,
    tmp_path: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def pretend(space: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        from ray import tune as ray_tune

        number = space["number"]
        if number == 2:
            return {"failed": "the loss is not finite"}
        value = 0.125 if number == 1 else 0.875
        for epoch in range(1, 10):
            ray_tune.report({"epoch": epoch, "validation_map": value, "best": value})
        return {"ended": 1.0, "best": value}

    monkeypatch.setattr(search, "_try", pretend)
    plan = SearchConfig(samples=2, grace=3, space={"train.margin": Uniform(uniform=(0.1, 0.6))})
    one = _Search(override(config, ["train.epochs=9"]), plan, str(tmp_path / "search"))
    search._sample(one, 0, str(tmp_path / "tune"), 1)
    assert [(sample.number, sample.stopped) for sample in one.samples()] == [
        (0, None),
        (1, ((1, 0.125), (2, 0.125), (3, 0.125))),
        (2, None),
    ]
    said = capsys.readouterr().err
    assert "search: 3 samples, 0 done before" in said
    assert "sample-000: done, validation mAP 0.875" in said
    assert "sample-001: stopped after 3 epochs, validation mAP 0.125" in said
    assert "sample-002: failed: the loss is not finite" in said


def test_another_search_in_the_folder_is_refused_unless_told(config: RunConfig, tmp_path: Path) -> None:
    folder = str(tmp_path / "search")
    _claim(folder, config, SearchConfig(samples=2), update=False)
    one = _Search(config, SearchConfig(samples=2), folder)
    samples = [Sample(0, {}), Sample(1, {"train.p": 4}, ((1, 0.5), (2, 0.25)))]
    for sample in samples:
        one.write(sample)
    _claim(folder, config, SearchConfig(samples=20, finalists=1), update=False)
    assert one.samples() == samples
    other = SearchConfig(space={"train.p": Choice(choice=(2, 4))})
    with pytest.raises(ConfigError, match=r"search\.space\.train\.k\.choice: \[2, 4\] → None"):
        _claim(folder, config, other, update=False)
    with pytest.raises(ConfigError, match=r"config\.train\.epochs: 60 → 5"):
        _claim(folder, override(config, ["train.epochs=5"]), SearchConfig(), update=False)
    _claim(folder, config, other, update=True)
    assert one.samples() == []


# --- the split -----------------------------------------------------------------------------------


def test_all_seeds_of_a_search_divide_the_screen_alike(small_screen: Path, tmp_path: Path) -> None:
    config = load(str(small_screen / "run.yaml"))
    fixed = _with_one_split(config, str(tmp_path))
    assert (fixed.split.method, fixed.inputs.split) == ("table", str(tmp_path / "split.csv"))
    table = pd.read_csv(tmp_path / "split.csv")
    assert {"train", "validation", "test_compound"} <= set(table["split"])
    assert _with_one_split(fixed, str(tmp_path)) == fixed


def test_a_search_without_validation_wells_is_refused(small_screen: Path, tmp_path: Path) -> None:
    config = load(str(small_screen / "run.yaml"), ["split.validation_share=0"])
    with pytest.raises(ConfigError, match="a search needs validation wells"):
        _with_one_split(config, str(tmp_path))


# --- what is shown -------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> pd.DataFrame:
    rows = [
        (0, "{}", 0, "done", 1, 0.2),
        (0, "{}", 0, "done", 2, 0.3),
        (1, '{"train.p": 4}', 0, "stopped", 1, 0.9),
        (2, '{"train.p": 8}', 0, "done", 1, 0.5),
        (2, '{"train.p": 8}', 0, "done", 2, 0.4),
        (2, '{"train.p": 8}', 1, "done", 1, 0.7),
        (3, '{"train.p": 2}', 0, "done", 2, 0.6),
    ]
    url = str(tmp_path / "search.parquet")
    write_table(url, pd.DataFrame(rows, columns=SEARCH_RESULTS.schema.names), SEARCH_RESULTS)
    return open_table(url, SEARCH_RESULTS).to_pandas()


def test_the_chosen_sample_stands_first_and_the_stopped_ones_last(results: pd.DataFrame) -> None:
    assert [sample.sample for sample in ranking(results, 2)] == [2, 3, 0, 1]
    tests = SWEEP_RESULTS.schema.empty_table().to_pandas()
    title, _, *table = markdown(results, 2, tests).splitlines()
    assert "4 samples, 1 stopped early; sample 2 was chosen" in title
    assert table[:6] == [
        "| sample | train.p | epochs | seeds | validation mAP |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 2 | 8 | 2 | 2 | 60.0 ± 14.1 |",
        "| 3 | 2 | 2 | 1 | 60.0 |",
        "| 0 | as configured | 2 | 1 | 30.0 |",
        "| 1 | 4 | 1, stopped | 1 | 90.0 |",
    ]


def test_the_plot_names_the_chosen_sample(results: pd.DataFrame) -> None:
    texts = {"".join(element.itertext()).strip() for element in ElementTree.fromstring(figure(results, 2)).iter()}
    assert {"sample 2, chosen", "as configured", "others", "epoch"} <= texts


# --- the whole -----------------------------------------------------------------------------------


def test_options_that_do_not_go_together_are_refused(command: Any, small_screen: Path, tmp_path: Path) -> None:
    out = command("sweep", small_screen / "run.yaml", "--out", tmp_path / "s", "--search", "default", "--depths", "18")
    assert out.code == 2
    assert "is not for --ablations or --depths" in out.err


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_its_best_can_be_run(small_screen: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "sweep", tmp_path / "search.yaml"
    space = {"train.optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "augment.shift": {"uniform": [0, 0.1]}}
    plan.write_text(yaml.safe_dump({"samples": 1, "reduction": 2, "finalists": 1, "space": space}), encoding="utf-8")
    command = (
        *("sweep", small_screen / "run.yaml", "--out", out, "--search", plan, "--seeds", "0", "--concurrency", "1"),
        *("--set", "model.width=4", "--set", "train.epochs=2", "--set", "train.p=3", "--set", "train.k=2"),
        *("--set", "evaluation.n_bootstrap=20", "--set", "resources.cpus=2"),
    )
    first = Run(tmp_path / "log", *command, RAY_USAGE_STATS_ENABLED="0")
    first.wait_until((out / "search" / "sample-001.json").exists)
    first.kill("tree")
    trained = times(out, "search/sample-000-depth10-seed0/checkpoint")
    assert trained

    again = Run(tmp_path / "log", *command, RAY_USAGE_STATS_ENABLED="0")
    assert again.wait() == 0, again.said()
    assert "search: 2 samples, 1 done before" in again.said()
    assert times(out, "search/sample-000-depth10-seed0/checkpoint") == trained
    results = open_table(str(out / "search.parquet"), SEARCH_RESULTS).to_pandas()
    assert set(results["sample"]) == {0, 1}
    tested = open_table(str(out / "best.parquet"), SWEEP_RESULTS).to_pandas()
    best = str(tested["ablation"].iloc[0])
    number = int(best.removeprefix("sample-"))
    finished = results[results["state"] == "done"]
    assert number == finished.loc[finished["validation_map"].idxmax(), "sample"]
    chosen = load(str(out / "best.yaml"))
    settings = json.loads((out / "search" / f"{best}.json").read_text(encoding="utf-8"))["settings"]
    assert apply(chosen, settings) == chosen
    assert chosen.inputs.split == str(out / "search" / "split.csv")
    ElementTree.parse(out / "search.svg")
    # Nothing but the chosen sample has been tested.
    assert [path.parent.name for path in out.rglob("evaluation.json")] == [f"{best}-depth10-seed0"]
    assert "| sample |" in again.said()
