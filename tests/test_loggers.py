"""Logs of a training: one that is missing is named by its extra, and a run that goes on logs each epoch once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pipelines.loggers import LoggerConfig, Training, check_loggers, open_loggers
from storage_schemas.errors import InputError

EPOCHS = [{"train/loss": 1 / step} for step in range(1, 6)]


def configured(*documents: dict[str, Any]) -> tuple[LoggerConfig, ...]:
    return TypeAdapter(tuple[LoggerConfig, ...]).validate_python(documents)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(title="A run", folder=str(tmp_path), key="0123abcd", config={"seed": 3})


def log_epochs(config: tuple[LoggerConfig, ...], training: Training, until: int) -> None:
    """As the driver does: from the first epoch on, whatever was logged before."""
    with open_loggers(config, training) as log:
        for step, values in enumerate(EPOCHS[:until], start=1):
            log(step, values)


class FakeClient:
    """What is used of MLflow's client, and what it was told; servers are told apart by their address."""

    servers: dict[str | None, dict[str, Any]]

    def __init__(self, tracking_uri: str | None) -> None:
        self.server = self.servers.setdefault(tracking_uri, {"experiments": {}, "runs": {}})

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.server["experiments"].get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        self.server["experiments"][name] = str(len(self.server["experiments"]))
        return self.server["experiments"][name]

    def search_runs(self, experiments: list[str], query: str) -> list[Any]:
        name, _, value = query.partition(" = ")
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=run), data=SimpleNamespace(tags=told["tags"]))
            for run, told in self.server["runs"].items()
            if told["experiment"] in experiments
            and told["tags"][name.removeprefix("tags.`").rstrip("`")] == value.strip("'")
        ]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        run = f"run {len(self.server['runs'])}"
        self.server["runs"][run] = {"experiment": experiment, "name": run_name, "tags": dict(tags), "metrics": []}
        self.update_run(run, "RUNNING")
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def update_run(self, run: str, status: str) -> None:
        self.server["runs"][run]["status"] = status

    set_terminated = update_run

    def log_dict(self, run: str, values: dict[str, Any], file: str) -> None:
        self.server["runs"][run][file] = values

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.server["runs"][run]["metrics"].append((name, step, value))

    def set_tag(self, run: str, name: str, value: str) -> None:
        self.server["runs"][run]["tags"][name] = value


class FakeRun:
    """What is used of a Weights & Biases run; ``step`` is that of the next line."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.ended: int | None = None
        self.step = 0

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.step, "a step that has been"
        self.lines.append((step, values))
        self.step = step + 1

    def finish(self, exit_code: int = 0) -> None:
        self.ended = exit_code


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> dict[str | None, dict[str, Any]]:
    """What the servers of a made-up MLflow were told."""
    monkeypatch.setattr(FakeClient, "servers", {}, raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=FakeClient))
    return FakeClient.servers


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    """The runs of a made-up Weights & Biases, by id."""
    runs: dict[str, FakeRun] = {}

    def init(**options: Any) -> FakeRun:
        assert options["resume"] == "allow"
        return runs.setdefault(options["id"], FakeRun(**options))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def test_without_loggers_nothing_is_logged(training: Training, tmp_path: Path) -> None:
    log_epochs((), training, 2)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_files_lie_beside_the_screen(training: Training, tmp_path: Path) -> None:
    log_epochs(configured({"method": "tensorboard"}), training, 3)
    log_epochs(configured({"method": "tensorboard"}), training, 5)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.read_bytes().count(b"train/loss") == 5
    away = Training(**{**vars(training), "folder": "memory://screen/train"})
    with pytest.raises(InputError, match="tensorboard writes to local folders, and the screen is at memory://"):
        log_epochs(configured({"method": "tensorboard"}), away, 1)


def test_mlflow_gets_each_epoch_once(training: Training, mlflow: dict[str | None, dict[str, Any]]) -> None:
    config = configured({"method": "mlflow", "tracking_uri": "http://there", "experiment": "cells"})
    log_epochs(config, training, 3)
    log_epochs(config, training, 5)
    assert list(mlflow) == ["http://there"]
    assert mlflow["http://there"]["experiments"] == {"cells": "0"}
    (run,) = mlflow["http://there"]["runs"].values()
    assert run["metrics"] == [("train/loss", step, 1 / step) for step in range(1, 6)]
    assert (run["name"], run["status"], run["config.json"]) == ("A run", "FINISHED", {"seed": 3})
    # Another training is another run.
    log_epochs(config, Training(**{**vars(training), "key": "other"}), 1)
    assert len(mlflow["http://there"]["runs"]) == 2


def test_weights_and_biases_gets_each_epoch_once(training: Training, wandb: dict[str, FakeRun]) -> None:
    config = configured({"method": "wandb", "project": "cells", "mode": "offline"})
    log_epochs(config, training, 3)
    log_epochs(config, training, 5)
    run = wandb[training.key]
    assert run.lines == list(enumerate(EPOCHS, start=1))
    assert (run.options["project"], run.options["mode"], run.options["name"]) == ("cells", "offline", "A run")
    assert run.ended == 0


def test_a_training_that_fails_is_told_as_such(
    training: Training, mlflow: dict[str | None, dict[str, Any]], wandb: dict[str, FakeRun]
) -> None:
    with (
        pytest.raises(RuntimeError, match="lost"),
        open_loggers(configured({"method": "mlflow"}, {"method": "wandb"}), training),
    ):
        raise RuntimeError("lost")
    (run,) = mlflow[None]["runs"].values()
    assert (run["status"], wandb[training.key].ended) == ("FAILED", 1)


def test_a_log_that_fails_does_not_cost_the_training(
    training: Training, wandb: dict[str, FakeRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_loggers(configured({"method": "wandb"}, {"method": "tensorboard"}), training) as log:
        wandb[training.key].step = 3
        log(1, EPOCHS[0])
        wandb[training.key].log = None  # type: ignore[assignment]
        log(2, EPOCHS[1])
        log(3, EPOCHS[2])
    assert capsys.readouterr().err.count("note: logging to wandb has stopped") == 1
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.read_bytes().count(b"train/loss") == 3


@pytest.mark.parametrize(
    ("method", "library"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_library_names_its_extra(method: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        InputError, match=rf"{method} needs the library {library} .* pip install 'screening\[{method}\]'"
    ):
        check_loggers(configured({"method": method}))


def test_what_cannot_be_opened_says_why(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(InputError, match="logging: wandb cannot be opened: no API key"):
        log_epochs(configured({"method": "wandb"}), training, 1)


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(ValidationError, match="tensorboard"):
        configured({"method": "tensorbord"})
