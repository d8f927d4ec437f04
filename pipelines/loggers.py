"""Where the epochs of a training are logged beside the screen: TensorBoard, MLflow, Weights & Biases.

The driver logs, as epochs arrive. Each service has a library of its own, which is an extra and imported only where it
is asked for. A run that goes on after a kill goes on in the same log, each epoch once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import Field

from pipelines import events
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError


class TensorBoard(Config):
    """Event files that TensorBoard shows: ``tensorboard --logdir SCREEN/train/tensorboard``."""

    method: Literal["tensorboard"] = Field("tensorboard", description="event files in SCREEN/train/tensorboard")


class MLflow(Config):
    """A run of an MLflow experiment."""

    method: Literal["mlflow"] = Field("mlflow", description="a run of an MLflow experiment")
    tracking_uri: str | None = Field(None, description="of the server; null: as MLFLOW_TRACKING_URI says")
    experiment: str = Field("screening", description="name of the experiment")


class WandB(Config):
    """A run of a Weights & Biases project."""

    method: Literal["wandb"] = Field("wandb", description="a run of a Weights & Biases project")
    project: str = Field("screening", description="name of the project")
    mode: Literal["online", "offline"] = Field("online", description="offline: files to send later by `wandb sync`")


LoggerConfig: TypeAlias = Annotated[TensorBoard | MLflow | WandB, Field(discriminator="method")]

_LIBRARIES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


@dataclass(frozen=True)
class Training:
    """What a log is headed with.

    Attributes:
        title: of the run.
        folder: of the screen's training, a local path or URL.
        key: of this training in this folder alone; tells its log from others when it goes on.
        config: the configuration, as plain values.
    """

    title: str
    folder: str
    key: str
    config: Mapping[str, Any]


class Log(Protocol):
    """Called for each epoch, counted from 1 over all phases, with its values; those logged before may come again."""

    def __call__(self, step: int, values: Mapping[str, float], /) -> None: ...


def check_loggers(loggers: Sequence[LoggerConfig]) -> None:
    """Find missing libraries before hours of work.

    Raises:
        InputError: naming the extra to install.
    """
    for logger in loggers:
        _library(logger.method)


@contextmanager
def open_loggers(loggers: Sequence[LoggerConfig], training: Training) -> Iterator[Log]:
    """One log that writes to all.

    A log that fails while the training goes on is dropped with a note: it must not cost the training.

    Raises:
        InputError: if one cannot be opened.
    """
    with ExitStack() as stack:
        logs: dict[str, Log] = {}
        for logger in loggers:
            try:
                logs[logger.method] = stack.enter_context(_OPENERS[logger.method](logger, training))
            except InputError:
                raise
            except Exception as error:  # each library has errors of its own
                raise InputError(f"logging: {logger.method} cannot be opened: {error}") from error

        def log(step: int, values: Mapping[str, float], /) -> None:
            for name, one in list(logs.items()):
                try:
                    one(step, values)
                except Exception as error:
                    del logs[name]
                    events.warning("logging_stopped", f"note: logging to {name} has stopped: {error}", logger=name)

        yield log


def _library(method: str) -> Any:
    try:
        return importlib.import_module(_LIBRARIES[method])
    except ImportError as error:
        raise InputError(
            f"logging: {method} needs the library {_LIBRARIES[method]} ({error}): pip install 'screening[{method}]', "
            "or leave it out of logging"
        ) from error


@contextmanager
def _tensorboard(_: TensorBoard, training: Training) -> Iterator[Log]:
    folder = store.join(training.folder, "tensorboard")
    if not store.is_local(folder):
        raise InputError(f"logging: tensorboard writes to local folders, and the screen is at {training.folder}")
    # Epochs of an earlier run come again, so that one file tells all.
    store.remove(folder)
    with _library("tensorboard").SummaryWriter(logdir=folder) as writer:

        def log(step: int, values: Mapping[str, float], /) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield log


@contextmanager
def _mlflow(config: MLflow, training: Training) -> Iterator[Log]:
    client = _library("mlflow").MlflowClient(tracking_uri=config.tracking_uri)
    experiment = client.get_experiment_by_name(config.experiment)
    number = experiment.experiment_id if experiment else client.create_experiment(config.experiment)
    found = client.search_runs([number], f"tags.`screening.training` = '{training.key}'")
    if found:
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
    else:
        tags = {"screening.training": training.key, "screening.folder": training.folder}
        run = client.create_run(number, run_name=training.title, tags=tags).info.run_id
        client.log_dict(run, dict(training.config), "config.json")
    last = int(found[0].data.tags.get("screening.epochs", 0)) if found else 0

    def log(step: int, values: Mapping[str, float], /) -> None:
        nonlocal last
        if step > last:
            for name, value in values.items():
                client.log_metric(run, name, value, step=step)
            last = step
            client.set_tag(run, "screening.epochs", str(step))

    try:
        yield log
    except BaseException:
        client.set_terminated(run, status="FAILED")
        raise
    client.set_terminated(run, status="FINISHED")


@contextmanager
def _wandb(config: WandB, training: Training) -> Iterator[Log]:
    run = _library("wandb").init(
        project=config.project,
        mode=config.mode,
        name=training.title,
        id=training.key,
        resume="allow",
        config=dict(training.config),
        settings={"silent": True},
    )
    first = run.step  # of the next epoch; those before have been logged

    def log(step: int, values: Mapping[str, float], /) -> None:
        if step >= first:
            run.log(dict(values), step=step)

    try:
        yield log
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


_OPENERS: dict[str, Callable[[Any, Training], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
