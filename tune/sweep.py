"""`screening sweep`: train and test again without one part or another, over several seeds.

The plates are segmented once. Each trial (an ablation with a seed) is a screen of its own that takes the cells of that
and goes through the stages that depend on training. Ray Tune runs the trials; what is done is known from the
screens alone, so that a command that was cut off goes on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import ray
from ray import tune as ray_tune

from pipelines.cluster import cluster, quiet_ray_data
from pipelines.config import ConfigError, RunConfig, override, with_cells_of
from pipelines.progress import console
from pipelines.run import is_done, run
from screening.evaluation import ALL_MOAS, score_table
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen, Stage
from storage_schemas.tables import SWEEP_RESULTS, write_table
from tune.ablations import ABLATIONS

RESULTS = "results.parquet"
TABLE = "results.md"

_STAGES: tuple[Stage, ...] = ("train", "embed", "evaluate")
_TRIAL_BYTES = 512 * 2**20  # that a trial's own process asks for


@dataclass(frozen=True)
class Trial:
    """An ablation with a seed.

    Attributes:
        ablation: its name.
        seed: of everything random, the split too: trials of one seed hold out the same compounds.
        config: with both applied, on the cells that all trials share.
        screen: where it is kept.
    """

    ablation: str
    seed: int
    config: RunConfig
    screen: Screen

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.ablation}-seed{self.seed}"

    def is_done(self) -> bool:
        """Whether it has been trained and tested with this configuration."""
        return is_done(self.config, self.screen.url, _STAGES)


def sweep(
    config: RunConfig,
    out: str,
    ablations: Sequence[str],
    seeds: Sequence[int],
    *,
    concurrency: int = 1,
    update: bool = False,
) -> int:
    """Run every ablation with every seed, or go on with them, and write the table of their held-out tests.

    Args:
        config: what is ablated.
        out: folder or object-store prefix of the sweep.
        ablations: names from :data:`tune.ablations.ABLATIONS`.
        seeds: of the trials, instead of the configuration's.
        concurrency: how many trials train at once.
        update: accept that the folder holds a sweep of another configuration, and do again what depends on the change.

    Returns:
        How many wells or trials failed; a trial that failed is left out of the table.

    Raises:
        InputError: whatever the user can mend.
    """
    out = store.absolute(out)
    shared = store.join(out, "screen")
    trials = plan(config if config.inputs.cells else with_cells_of(config, shared), out, ablations, seeds)
    with cluster(config.resources):
        _check_room(config, concurrency)
        failed = 0 if config.inputs.cells else run(config, shared, ("segment",), update=update)
        left = [trial for trial in trials if not trial.is_done()]
        console.print(f"sweep: {len(trials)} trials, {len(trials) - len(left)} done before", soft_wrap=True)
        if left:
            _run_trials(left, store.join(out, "tune"), concurrency, update)
    done = [trial for trial in trials if trial.is_done()]
    results = pd.concat([_empty(), *(_scores(trial) for trial in done)], ignore_index=True)
    write_table(store.join(out, RESULTS), results, SWEEP_RESULTS)
    store.write_bytes(store.join(out, TABLE), markdown(results).encode())
    return failed + len(trials) - len(done)


def plan(config: RunConfig, out: str, ablations: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """The trials; an ablation that changes nothing in this configuration is said so and left out.

    Raises:
        ConfigError: if there is no such ablation, or nothing to run.
    """
    unknown = sorted(set(ablations) - set(ABLATIONS))
    if unknown:
        raise ConfigError(f"no ablation is called {unknown}; there are {', '.join(ABLATIONS)}")
    trials = []
    for name in dict.fromkeys(ablations):
        overrides = ABLATIONS[name].overrides
        ablated = override(config, overrides)
        if overrides and ablated == config:
            console.print(f"note: {name} left out: the configuration has {', '.join(overrides)} already")
            continue
        for seed in dict.fromkeys(seeds):
            screen = Screen(store.join(out, "trials", f"{name}-seed{seed}"))
            trials.append(Trial(name, seed, override(ablated, [f"seed={seed}"]), screen))
    if not trials:
        raise ConfigError("there is nothing to run: name an ablation that changes the configuration, and a seed")
    return trials


def markdown(results: pd.DataFrame) -> str:
    """The table of MitoReID's form: a row an ablation, mean ± standard deviation over seeds in percent.

    Args:
        results: columns of :data:`storage_schemas.tables.SWEEP_RESULTS`.
    """
    held_out = results[results["test"] == "compound"]
    contrasts = [name for name in held_out["contrast"].unique() if name != ALL_MOAS]
    columns = {(ALL_MOAS, "rank1"): "Rank-1", (ALL_MOAS, "map"): "mAP"}
    columns |= {(name, "rank1"): f"Rank-1, {name}".replace("|", r"\|") for name in contrasts}
    values = dict(list(held_out.groupby(["ablation", "contrast", "metric"])["value"]))
    by_chance = dict(list(held_out.groupby(["contrast", "metric"])["chance"]))
    rows = [["", "seeds", *columns.values()], ["---", *["---:"] * (len(columns) + 1)]]
    for name, seeds in results.groupby("ablation", sort=False)["seed"].nunique().items():
        cells = [_mean_sd(values.get((name, *key))) for key in columns]
        rows.append([ABLATIONS[str(name)].sentence, str(seeds), *cells])
    rows.append(["chance", "", *(_mean_sd(by_chance.get(key), sd=False) for key in columns)])
    title = "Cells of held-out compounds looked up among trained ones; mean ± sd over seeds, %."
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _mean_sd(shares: pd.Series[float] | None, *, sd: bool = True) -> str:
    percent = pd.Series(dtype=float) if shares is None else 100 * shares.dropna()
    if percent.empty:
        return "–"
    return f"{percent.mean():.1f}" + (f" ± {percent.std():.1f}" if sd and len(percent) > 1 else "")


def _check_room(config: RunConfig, concurrency: int) -> None:
    """Refuse more trials than the cluster holds: their readers would wait for ever for CPUs that workers keep."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    each = config.resources.train_workers * (1 + config.resources.train_readers)
    room = max(1, cpus // each)
    if concurrency > room:
        raise ConfigError(f"--concurrency {concurrency}: {cpus} CPUs have room for {room} trial(s) of {each} CPUs each")


def _run_trials(trials: Sequence[Trial], storage: str, concurrency: int, update: bool) -> None:
    """Run the trials in Ray Tune; one that fails does not stop the others."""
    # An interruption ends the command like any other, instead of Tune's waiting for its trials.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The narration that Tune prints whatever its verbosity: standard output is for the table.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Tune's records are of one command.
    store.remove(storage)
    named = {trial.name: trial for trial in trials}
    # A trial's process only waits for its stages, which ask for CPUs themselves.
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(_run_trial, trials=named, update=update), {"memory": _TRIAL_BYTES}
    )
    tuner = ray_tune.Tuner(
        trainable,
        param_space={"trial": ray_tune.grid_search(list(named))},
        tune_config=ray_tune.TuneConfig(max_concurrent_trials=concurrency),
        run_config=ray_tune.RunConfig(
            name="sweep", storage_path=storage, verbose=0, callbacks=[_Progress(len(trials))]
        ),
    )
    tuner.fit()


def _run_trial(space: Mapping[str, str], trials: Mapping[str, Trial], update: bool) -> dict[str, float | str]:
    """One trial, in a process of its own; what it scored, or what its user should mend."""
    quiet_ray_data()
    trial = trials[space["trial"]]
    try:
        wells = run(trial.config, trial.screen.url, _STAGES, update=update)
    except InputError as error:
        return {"failed": str(error)}
    if wells:
        return {"failed": f"{wells} well(s), see screening status {trial.screen.url}"}
    first = next(iter(store.read_json(trial.screen.evaluation).values()), None)
    value = None if first is None else first["map"]["value"]
    return {"map": math.nan if value is None else value}


class _Progress(ray_tune.Callback):
    """A line for each trial that ends."""

    def __init__(self, total: int) -> None:
        self._ended = 0
        self._total = total

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        self._show(trial, f"failed: {result['failed']}" if "failed" in result else f"mAP {result['map']:.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "failed, see above")

    def _show(self, trial: Any, outcome: str) -> None:
        self._ended += 1
        console.print(f"sweep: {self._ended}/{self._total} {trial.config['trial']}: {outcome}", soft_wrap=True)


def _scores(trial: Trial) -> pd.DataFrame:
    """A row a metric of each test and contrast of a trial that is done."""
    table = score_table(store.read_json(trial.screen.evaluation))
    return table.assign(ablation=trial.ablation, seed=trial.seed)


def _empty() -> pd.DataFrame:
    return pd.DataFrame(SWEEP_RESULTS.schema.empty_table().to_pandas())
