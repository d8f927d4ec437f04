"""Trials: configurations that are trained, each a screen of its own, on cells that all share.

Ray Tune runs them, each in a process that waits for its stages. What is done is known from the screens alone, so that
a command that was cut off goes on. Trials that run at once share the CPUs out among them.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune as ray_tune

from pipelines import events
from pipelines.cluster import cluster, cluster_address, cpus_up, quiet_ray_data
from pipelines.config import ConfigError, ResourcesConfig, RunConfig, override, with_cells_of
from pipelines.run import is_done, run
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen, Stage

TESTED: tuple[Stage, ...] = ("train", "embed", "evaluate")
TRAINED: tuple[Stage, ...] = ("train",)

_PROCESS_BYTES = 512 * 2**20  # that a trial's own process asks for
_TRIAL_BYTES = 7 * 2**28  # that one more trial of a small network takes, all its processes together


@dataclass(frozen=True)
class Trial:
    """A configuration to train.

    Attributes:
        variant: what distinguishes it: the name of an ablation, or the number of a sample.
        config: with that applied, and with its seed, on the cells that all trials share.
        screen: where it is kept.
        stages: what is done of it.
    """

    variant: str
    config: RunConfig
    screen: Screen
    stages: tuple[Stage, ...] = TESTED

    @classmethod
    def make(cls, variant: str, config: RunConfig, seed: int, folder: str, stages: tuple[Stage, ...] = TESTED) -> Trial:
        """A trial of a configuration with a seed, kept in a folder of its own within another."""
        seeded = override(config, [f"seed={seed}"])
        screen = Screen(store.join(folder, f"{variant}-depth{config.model.depth}-seed{seed}"))
        return cls(variant, seeded, screen, stages)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.screen.url.rpartition("/")[2]

    def is_done(self) -> bool:
        """Whether its stages have been done with this configuration."""
        return is_done(self.config, self.screen.url, self.stages)


@contextmanager
def trial_cluster(resources: ResourcesConfig) -> Iterator[None]:
    """As :func:`pipelines.cluster.cluster`, for many processes at once."""
    # Ray's core tells of their number on standard output, which is for the table.
    with redirect_stdout(io.StringIO()), cluster(resources):
        yield


def shared_cells(config: RunConfig, out: str, *, update: bool) -> int:
    """Segment the plates of a sweep once, or go on with it; nothing to do where the configuration names cells.

    Returns:
        How many sites and wells failed.
    """
    return 0 if config.inputs.cells else run(config, _cells(out), ("segment",), update=update)


def on_shared_cells(config: RunConfig, out: str) -> RunConfig:
    """The configuration of a trial on the cells of :func:`shared_cells`, which need not be there yet."""
    return config if config.inputs.cells else with_cells_of(config, _cells(out))


def _cells(out: str) -> str:
    return store.join(out, "screen")


def at_once(resources: ResourcesConfig, wanted: int | None) -> int:
    """How many trials run at once.

    Args:
        resources: of one trial.
        wanted: at most so many; None for as many as there is room for now.

    Raises:
        ConfigError: if this machine has no room for as many as are wanted: they would wait for each other's CPUs. A
            cluster may still grow.
    """
    if wanted is not None and cluster_address():
        return wanted
    there = ray.cluster_resources()
    workers = resources.train_workers
    each = {
        "CPU": float(_least_cpus(resources)),
        "GPU": resources.train_gpus * workers,
        "memory": float(_TRIAL_BYTES + workers * resources.train_memory_mb * 2**20),
    }
    room = {name: int(there.get(name, 0.0) // asked) for name, asked in each.items() if asked}
    scarce = min(room, key=lambda name: room[name])
    fitting = max(1, room[scarce])
    if wanted is not None and wanted > fitting:
        unit = 2**30 if scarce == "memory" else 1
        what = "GiB of memory" if scarce == "memory" else f"{scarce}s"
        raise ConfigError(
            f"--concurrency {wanted}: {there.get(scarce, 0.0) / unit:.3g} {what} have room for {fitting} trial(s) of "
            f"{each[scarce] / unit:.3g} each; leave it away for as many as fit"
        )
    return fitting if wanted is None else wanted


def share_of(config: RunConfig, concurrency: int) -> RunConfig:
    """The configuration of one of several trials that run at once, with its share of the CPUs.

    It is never told fewer than it needs: on a cluster that grows the rest comes when it is asked for.
    """
    cpus = max(_least_cpus(config.resources), int(cpus_up() // concurrency))
    return override(config, [f"resources.cpus={cpus}"])


def _least_cpus(resources: ResourcesConfig) -> int:
    """CPUs that a trial cannot do without: a worker computes on one at least, and readers ask for a part of one."""
    return resources.train_workers * max(1, math.ceil(resources.train_readers / 2))


def run_trials(trials: Sequence[Trial], storage: str, concurrency: int, *, update: bool) -> None:
    """Run the trials that are not done; one that fails does not stop the others.

    Args:
        trials: all of them.
        storage: folder of Ray Tune's records, which are of one command.
        concurrency: how many run at once.
        update: accept that their folders hold runs of other configurations.
    """
    if not trials:
        return
    left = [trial for trial in trials if not trial.is_done()]
    done = len(trials) - len(left)
    events.info("sweep", f"sweep: {len(trials)} trials, {done} done before", total=len(trials), done=done)
    if not left:
        return
    concurrency = min(concurrency, len(left))
    named = {trial.name: trial for trial in left}
    fit(
        ray_tune.with_parameters(_run_trial, trials=named, share=concurrency, update=update),
        storage,
        concurrency,
        [Progress(len(left), lambda space: space["trial"])],
        param_space={"trial": ray_tune.grid_search(list(named))},
    )


def fit(
    trainable: Any,
    storage: str,
    concurrency: int,
    callbacks: list[ray_tune.Callback],
    *,
    param_space: dict[str, Any] | None = None,
    **how: Any,
) -> None:
    """Let Ray Tune run trials, with nothing of its own narration.

    Args:
        trainable: a function of the trial's parameters.
        storage: folder of Tune's records, emptied first.
        concurrency: how many run at once.
        callbacks: told of what happens.
        param_space: what the trials are.
        how: more for ``ray.tune.TuneConfig``.
    """
    # An interruption ends the command like any other, instead of Tune's waiting for its trials.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The narration that Tune prints whatever its verbosity: standard output is for the table.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # A trial that failed has no number to compare.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    store.remove(storage)
    ray_tune.Tuner(
        # A trial's process only waits for its stages, which ask for CPUs themselves.
        ray_tune.with_resources(trainable, {"memory": _PROCESS_BYTES}),
        param_space=param_space or {},
        tune_config=ray_tune.TuneConfig(max_concurrent_trials=concurrency, reuse_actors=False, **how),
        run_config=ray_tune.RunConfig(name="sweep", storage_path=storage, verbose=0, callbacks=callbacks),
    ).fit()


def _run_trial(
    space: Mapping[str, str], trials: Mapping[str, Trial], share: int, update: bool
) -> dict[str, float | str]:
    """One trial, in a process of its own; what it scored, or what its user should mend."""
    quiet_ray_data()
    trial = trials[space["trial"]]
    try:
        wells = run(share_of(trial.config, share), trial.screen.url, trial.stages, update=update)
    except InputError as error:
        return {"failed": str(error)}
    if wells:
        return {"failed": f"{wells} well(s), see screening status {trial.screen.url}"}
    if "evaluate" not in trial.stages:
        return {"ended": 1.0}
    first = next(iter(store.read_json(trial.screen.evaluation).values()), None)
    value = None if first is None else first["map"]["value"]
    return {"ended": 1.0, "mAP": math.nan if value is None else value}


class Progress(ray_tune.Callback):
    """A line for each trial that ends: how it went is what it returned as ``failed``, or else its numbers."""

    def __init__(self, total: int, name: Callable[[Mapping[str, Any]], str]) -> None:
        self._ended = 0
        self._total = total
        self._name = name

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray Tune."""
        self._show(trial, self.outcome(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray Tune."""
        self._show(trial, "failed: its process was lost; out of memory?")

    def outcome(self, result: Mapping[str, Any]) -> str:
        """How a trial went, in words."""
        if "failed" in result:
            return f"failed: {result['failed']}"
        return f"mAP {result['mAP']:.3f}" if "mAP" in result else "done"

    def _show(self, trial: Any, outcome: str) -> None:
        self._ended += 1
        name = self._name(trial.config)
        events.info(
            "trial_ended",
            f"sweep: {self._ended}/{self._total} {name}: {outcome}",
            trial=name,
            outcome=outcome,
            done=self._ended,
            total=self._total,
        )
