"""`screening sweep --search`: search settings of the training by asynchronous successive halving.

ASHA (Li et al., MLSys 2020) trains many samples for a few epochs, and of those that come as far the better ones for
more. A sample is judged by its validation mAP alone; nothing is tested before one has been chosen. All trials divide
the screen alike, so that what is tested on at the end was a validation compound of none.

A sample's record says what its settings are and, if it was stopped early, what it had reached. With the screens of the
samples that ended this is all that a command that was cut off needs to go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler

from pipelines import events
from pipelines.cluster import quiet_ray_data
from pipelines.config import ConfigError, RunConfig, differences, override
from pipelines.inputs import open_inputs
from pipelines.run import run
from pipelines.split import make_split
from storage_schemas import store
from storage_schemas.checkpoint import read_manifest
from storage_schemas.errors import InputError
from storage_schemas.tables import SEARCH_RESULTS, SWEEP_RESULTS, write_table
from tune.search_results import figure, markdown
from tune.searchers import METRIC, FromOptuna, Listed, check_optuna
from tune.space import SearchConfig, Settings, apply, check_space, draw
from tune.sweep import scores
from tune.trials import (
    TRAINED,
    Progress,
    Trial,
    at_once,
    fit,
    on_shared_cells,
    run_trials,
    share_of,
    shared_cells,
    trial_cluster,
)

RESULTS = "search.parquet"
TESTS = "best.parquet"
TABLE = "search.md"
FIGURE = "search.svg"
BEST = "best.yaml"

_FOLDER = "search"
_RECORD = re.compile(r"sample-(\d+)\.json")


@dataclass(frozen=True)
class Sample:
    """Settings that are tried.

    Attributes:
        number: 0 for the configuration as it is.
        settings: what is changed in it.
        stopped: the epochs and validation mAP that it had reached when it was stopped early; None if it was not.
    """

    number: int
    settings: Settings
    stopped: tuple[tuple[int, float], ...] | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return f"sample-{self.number:03d}"


@dataclass(frozen=True)
class _Search:
    """What all trials of a search share.

    Attributes:
        config: that the settings are changed in, on the shared cells and with the shared split.
        plan: how it is searched.
        folder: of the search.
    """

    config: RunConfig
    plan: SearchConfig
    folder: str

    def trial(self, sample: Sample, seed: int, stages: Any = TRAINED) -> Trial:
        """A sample with a seed."""
        return Trial.make(sample.name, apply(self.config, sample.settings), seed, self.folder, stages)

    def write(self, sample: Sample) -> None:
        """Keep the record of a sample."""
        record = {"settings": dict(sample.settings), "stopped": sample.stopped}
        store.write_json(store.join(self.folder, f"{sample.name}.json"), record)

    def samples(self) -> list[Sample]:
        """All that have been begun."""
        found = []
        for name in sorted(store.list_names(self.folder)):
            if match := _RECORD.fullmatch(name):
                record = store.read_json(store.join(self.folder, name))
                stopped = record["stopped"]
                history = None if stopped is None else tuple((int(epoch), float(value)) for epoch, value in stopped)
                found.append(Sample(int(match[1]), record["settings"], history))
        return found


def search(
    config: RunConfig,
    out: str,
    plan: SearchConfig,
    seeds: Sequence[int],
    *,
    concurrency: int | None = None,
    update: bool = False,
) -> int:
    """Search, or go on searching, test the best on what is held out, and write its configuration.

    Args:
        config: what is searched around.
        out: folder or object-store prefix of the sweep.
        plan: how to search.
        seeds: samples are searched with the first; the best of them are trained with the others too.
        concurrency: how many trials run at once; None for as many as the cluster has room for.
        update: accept that the folder holds a search of another configuration or space, which is removed.

    Returns:
        How many wells or trials failed.

    Raises:
        InputError: whatever the user can mend.
    """
    check_space(plan.space, config)
    if plan.searcher == "optuna":
        check_optuna()
    out = store.absolute(out)
    folder = store.join(out, _FOLDER)
    seeds = list(dict.fromkeys(seeds))
    with trial_cluster(config.resources):
        together = at_once(config.resources, concurrency)
        failed = shared_cells(config, out, update=update)
        cells = override(on_shared_cells(config, out), [f"seed={seeds[0]}"])
        _claim(folder, cells, plan, update)
        one = _Search(_with_one_split(cells, folder), plan, folder)
        tune_records = store.join(out, "tune")
        _sample(one, seeds[0], tune_records, together)
        samples = one.samples()
        ended = [sample for sample in samples if sample.stopped is None and one.trial(sample, seeds[0]).is_done()]
        failed += sum(sample.stopped is None for sample in samples) - len(ended)
        if not ended:
            raise InputError(f"{out}: no sample of the search came to its end; the messages above say why")
        ended.sort(key=lambda sample: _score(one.trial(sample, seeds[0])), reverse=True)
        finalists = ended[: plan.finalists]
        again = [one.trial(sample, seed) for sample in finalists for seed in seeds[1:]]
        run_trials(again, tune_records, together, update=update)
        failed += sum(not trial.is_done() for trial in again)
        best = _best(one, finalists, seeds)
        tests = [one.trial(best, seed, ("train", "embed", "evaluate")) for seed in seeds]
        run_trials(tests, tune_records, together, update=update)
    tested = [trial for trial in tests if trial.is_done()]
    failed += len(tests) - len(tested)
    _write(out, one, samples, seeds, best, scores(tested))
    chosen = override(
        apply(config, best.settings),
        [f"seed={seeds[0]}", "split.method=table", f"inputs.split={json.dumps(one.config.inputs.split)}"],
    )
    text = yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.write_bytes(store.join(out, BEST), f"# {best.name} of the search in {out}\n{text}".encode())
    return failed


def _claim(folder: str, config: RunConfig, plan: SearchConfig, update: bool) -> None:
    """Refuse to mix searches that cannot be compared; more samples or finalists may be asked for.

    Raises:
        ConfigError: if the folder holds another search.
    """
    url = store.join(folder, "search.json")
    document = {
        "config": config.model_dump(mode="json", exclude={"resources", "logging", "max_failed_share"}),
        "search": plan.model_dump(mode="json", exclude={"samples", "finalists"}),
    }
    if store.exists(url):
        changed = differences(store.read_json(url), document)
        if changed and not update:
            shown = "\n".join(f"  {line}" for line in changed[:10])
            raise ConfigError(
                f"{folder}: holds another search:\n{shown}\n"
                "choose another folder for --out, or give --update to remove it and search anew"
            )
        if changed:
            store.remove(folder)
    store.write_json(url, document)


def _with_one_split(config: RunConfig, folder: str) -> RunConfig:
    """The configuration with the split of its seed as a table, which trials of other seeds keep.

    Raises:
        ConfigError: if nothing of it is for validation.
    """
    inputs = open_inputs(config.inputs)
    table, _ = make_split(config, inputs, inputs.cells)
    moas = {
        part: set(rows.loc[rows["role"] != "negative_control", "moa"].dropna()) for part, rows in table.groupby("split")
    }
    if not moas.get("validation", set()) & moas.get("train", set()):
        raise ConfigError(
            "a search needs validation wells to compare its samples by, and the split has none of an MOA that is "
            "trained on: give an MOA three compounds, or look at split.validation_share (`screening split` shows the "
            "split)"
        )
    if config.split.method == "table":
        return config
    url = store.join(folder, "split.csv")
    store.write_bytes(url, table.dropna(axis=1, how="all").to_csv(index=False).encode())
    return override(config, ["split.method=table", f"inputs.split={json.dumps(url)}"])


# --- samples -------------------------------------------------------------------------------------


def _sample(one: _Search, seed: int, storage: str, concurrency: int) -> None:
    """Try every sample that has not been tried to its end, as far as it is worth it."""
    tried: dict[int, Sample] = {sample.number: sample for sample in one.samples()}
    closed = {
        sample.number: sample.stopped or _history(one.trial(sample, seed))
        for sample in tried.values()
        if sample.stopped is not None or one.trial(sample, seed).is_done()
    }
    listed: dict[int, Settings] = {0: {}, **{number: sample.settings for number, sample in tried.items()}}
    optuna = None
    if one.plan.searcher == "random":
        listed |= {n: draw(one.plan.space, seed, n) for n in range(1, one.plan.samples + 1) if n not in tried}
    else:
        seen = [(tried[number].settings, max(value for _, value in history)) for number, history in closed.items()]
        optuna = FromOptuna(one.plan.space, seed, seen)
    for settings in listed.values():
        apply(one.config, settings)
    total = max(one.plan.samples + 1, len(listed))
    events.info("search", f"search: {total} samples, {len(closed)} done before", total=total, done=len(closed))
    if total == len(closed):
        return
    listed = {number: settings for number, settings in listed.items() if number not in closed}
    concurrency = min(concurrency, total - len(closed))
    searcher = Listed(
        listed, optuna, len(tried) + (0 not in tried), lambda number, settings: one.write(Sample(number, settings))
    )
    fit(
        ray_tune.with_parameters(_try, one=one, seed=seed, share=concurrency),
        storage,
        concurrency,
        [_Record(one, total - len(closed))],
        search_alg=searcher,
        scheduler=_scheduler(one, closed),
        num_samples=total - len(closed),
    )
    for sample in one.samples():
        if sample.stopped is not None:
            # All that is wanted of it stands in its record.
            store.remove(one.trial(sample, seed).screen.url)


def _scheduler(one: _Search, closed: Mapping[int, Sequence[tuple[int, float]]]) -> ASHAScheduler:
    """ASHA over the epochs, which has seen what earlier commands saw."""
    epochs = one.config.train.epochs
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=min(one.plan.grace or max(1, epochs // 9), epochs),
        reduction_factor=one.plan.reduction,
        stop_last_trials=False,  # they end by themselves, with their checkpoint written
    )
    for number, history in closed.items():
        earlier = SimpleNamespace(trial_id=f"earlier-{number}")
        scheduler.on_trial_add(None, earlier)
        best = np.maximum.accumulate([value for _, value in history])
        for (epoch, _), value in zip(history, best, strict=True):
            scheduler.on_trial_result(None, earlier, {"epoch": epoch, METRIC: float(value)})
    return scheduler


def _try(space: Mapping[str, Any], one: _Search, seed: int, share: int) -> dict[str, Any]:
    """Train a sample, in a process of its own that ASHA may end, telling of every epoch."""
    quiet_ray_data()
    trial = one.trial(Sample(space["number"], space["settings"]), seed)
    best = -np.inf

    def report(metrics: Mapping[str, Any]) -> None:
        nonlocal best
        if metrics["phase"] == "train" and "validation_map" in metrics:
            best = max(best, metrics["validation_map"])
            ray_tune.report({"epoch": metrics["epoch"], "validation_map": metrics["validation_map"], METRIC: best})

    try:
        run(share_of(trial.config, share), trial.screen.url, TRAINED, on_epoch=report)
    except InputError as error:
        return {"failed": str(error)}
    return {"ended": 1.0, METRIC: best}


class _Record(Progress):
    """Writes down the samples that ASHA stops."""

    def __init__(self, one: _Search, total: int) -> None:
        super().__init__(total, lambda space: Sample(**space).name)
        self._one = one
        self._histories: dict[str, list[tuple[int, float]]] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Called by Ray Tune."""
        if "validation_map" in result and not {"ended", "failed"} & result.keys():
            history = self._histories.setdefault(trial.trial_id, [])
            history.append((result["epoch"], result["validation_map"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray Tune."""
        if not {"ended", "failed"} & trial.last_result.keys():
            sample = Sample(**trial.config, stopped=tuple(self._histories[trial.trial_id]))
            self._one.write(sample)
        super().on_trial_complete(iteration, trials, trial, **info)

    def outcome(self, result: Mapping[str, Any]) -> str:
        """How a sample went, in words."""
        if "failed" in result:
            return super().outcome(result)
        end = "done" if "ended" in result else f"stopped after {result['epoch']} epochs"
        return f"{end}, validation mAP {result[METRIC]:.3f}"


# --- the best ------------------------------------------------------------------------------------


def _history(trial: Trial) -> tuple[tuple[int, float], ...]:
    """Epoch and validation mAP of a trial that is trained.

    Raises:
        InputError: if it has none.
    """
    history = tuple(
        (int(metrics["epoch"]), float(metrics["validation_map"]))
        for metrics in read_manifest(trial.screen.checkpoint).history
        if metrics["phase"] == "train" and "validation_map" in metrics
    )
    if not history:
        raise InputError(
            f"{trial.screen.url}: no validation cell could be looked up, so that samples cannot be compared: see in "
            "`screening status` why the validation wells have no clips"
        )
    return history


def _score(trial: Trial) -> float:
    """Validation mAP of the epoch that was kept."""
    return max(value for _, value in _history(trial))


def _best(one: _Search, finalists: Sequence[Sample], seeds: Sequence[int]) -> Sample:
    """The sample with the best mean over the seeds; one that failed with a seed is out, unless all are."""
    means = {}
    for sample in finalists:
        trials = [one.trial(sample, seed) for seed in seeds]
        if all(trial.is_done() for trial in trials):
            means[sample.number] = float(np.mean([_score(trial) for trial in trials]))
    if not means:
        return finalists[0]
    return max((sample for sample in finalists if sample.number in means), key=lambda sample: means[sample.number])


def _write(
    out: str, one: _Search, samples: Sequence[Sample], seeds: Sequence[int], best: Sample, tests: pd.DataFrame
) -> None:
    rows = []
    for sample in samples:
        settings = json.dumps(dict(sample.settings))
        trials = {seed: one.trial(sample, seed) for seed in seeds}
        histories = {seed: _history(trial) for seed, trial in trials.items() if trial.is_done()}
        if sample.stopped is not None:
            histories = {seeds[0]: sample.stopped}
        state = "done" if sample.stopped is None else "stopped"
        rows += [
            (sample.number, settings, seed, state, epoch, value)
            for seed, history in histories.items()
            for epoch, value in history
        ]
    results = pd.DataFrame(rows, columns=SEARCH_RESULTS.schema.names)
    write_table(store.join(out, RESULTS), results, SEARCH_RESULTS)
    write_table(store.join(out, TESTS), tests, SWEEP_RESULTS)
    store.write_bytes(store.join(out, TABLE), markdown(results, best.number, tests).encode())
    store.write_bytes(store.join(out, FIGURE), figure(results, best.number))
