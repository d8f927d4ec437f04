"""`screening sweep`: train and test again without one part or another, over several seeds.

The plates are segmented once. Each trial (an ablation of a network with a seed) is a screen of its own that takes the
cells of that and goes through the stages that depend on training.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pipelines import events
from pipelines.config import ConfigError, RunConfig, override
from screening.evaluation import ALL_MOAS, score_table
from storage_schemas import store
from storage_schemas.tables import SWEEP_RESULTS, write_table
from tune.ablations import ABLATIONS
from tune.results import figure, markdown
from tune.trials import Trial, at_once, on_shared_cells, run_trials, shared_cells, trial_cluster

RESULTS = "results.parquet"
TABLE = "results.md"
FIGURE = "results.svg"


def sweep(
    config: RunConfig,
    out: str,
    ablations: Sequence[str],
    seeds: Sequence[int],
    depths: Sequence[int] = (),
    *,
    concurrency: int | None = None,
    update: bool = False,
) -> int:
    """Run every ablation with every seed, or go on with them, and write the table of their held-out tests.

    Args:
        config: what is ablated.
        out: folder or object-store prefix of the sweep.
        ablations: names from :data:`tune.ablations.ABLATIONS`.
        seeds: of the trials, instead of the configuration's.
        depths: of the networks, instead of the configuration's.
        concurrency: how many trials run at once; None for as many as the cluster has room for.
        update: accept that the folder holds a sweep of another configuration, and do again what depends on the change.

    Returns:
        How many wells or trials failed; a trial that failed is left out of the table.

    Raises:
        InputError: whatever the user can mend.
    """
    out = store.absolute(out)
    trials = plan(on_shared_cells(config, out), out, ablations, seeds, depths)
    with trial_cluster(config.resources):
        together = at_once(config.resources, concurrency)
        failed = shared_cells(config, out, update=update)
        run_trials(trials, store.join(out, "tune"), together, update=update)
    done = [trial for trial in trials if trial.is_done()]
    results = scores(done)
    write_table(store.join(out, RESULTS), results, SWEEP_RESULTS)
    sentences = {name: ablation.sentence for name, ablation in ABLATIONS.items()}
    store.write_bytes(store.join(out, TABLE), markdown(results, sentences).encode())
    store.write_bytes(store.join(out, FIGURE), figure(results, sentences))
    return failed + len(trials) - len(done)


def plan(
    config: RunConfig, out: str, ablations: Sequence[str], seeds: Sequence[int], depths: Sequence[int] = ()
) -> list[Trial]:
    """The trials; an ablation that changes nothing in this configuration is said so and left out.

    Raises:
        ConfigError: if there is no such ablation or depth, or nothing to run.
    """
    unknown = sorted(set(ablations) - set(ABLATIONS))
    if unknown:
        raise ConfigError(f"no ablation is called {unknown}; there are {', '.join(ABLATIONS)}")
    trials = []
    for name in dict.fromkeys(ablations):
        overrides = ABLATIONS[name].overrides
        ablated = override(config, overrides)
        if overrides and ablated == config:
            events.note(f"{name} left out: the configuration has {', '.join(overrides)} already", ablation=name)
            continue
        for depth in dict.fromkeys(depths or [config.model.depth]):
            deep = override(ablated, [f"model.depth={depth}"])
            trials += [Trial.make(name, deep, seed, store.join(out, "trials")) for seed in dict.fromkeys(seeds)]
    if not trials:
        raise ConfigError("there is nothing to run: name an ablation that changes the configuration, and a seed")
    return trials


def scores(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row a metric of each test and contrast of trials that are done, as ``SWEEP_RESULTS`` has it."""
    empty = pd.DataFrame(SWEEP_RESULTS.schema.empty_table().to_pandas())
    return pd.concat([empty, *map(_scores, trials)], ignore_index=True)


def _scores(trial: Trial) -> pd.DataFrame:
    evaluation = store.read_json(trial.screen.evaluation)
    table = score_table(evaluation)
    parts = {
        (test, contrast): part["n_queries"]
        for test, result in evaluation.items()
        for contrast, part in {ALL_MOAS: result, **result["contrasts"]}.items()
    }
    trained = trial.screen.read_manifest().stages["train"]
    return table.assign(
        ablation=trial.variant,
        network=trial.config.model.name,
        seed=trial.config.seed,
        epochs=trained.counts["epochs"],
        train_seconds=trained.seconds,
        n_queries=[parts[key] for key in zip(table["test"], table["contrast"], strict=True)],
    )
