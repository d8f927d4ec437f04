"""`screening compare`: MitoReID's table of methods for a finished screen.

Hand-made features, with and without a classifier, and a network trained with the classifier's loss alone (IDE) stand
beside the screen's own network (ReID). Each rival is a screen of its own below the screen's folder, on the same cells
and the same split: its vectors are its embeddings, and the stage `evaluate` scores all alike. What is done is known
from these screens alone, so that a command that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import evaluate, events
from pipelines.config import ConfigError, RunConfig, configuration_of, differences, override, with_cells_of
from pipelines.inputs import Inputs, open_inputs
from pipelines.run import is_done, run
from pipelines.stage import do_stage
from pipelines.train import identities
from pipelines.units import Counts
from pipelines.vectors import CELL_KEYS, vector_column
from screening.baselines import BaselineConfig, Classifier, Scaler, log_ratios, summarise
from screening.clips import KEPT
from screening.evaluation import ALL_MOAS, score_table
from screening.markdown import table as markdown_table
from screening.markdown import text as markdown_text
from screening.splits import parts_of
from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.clips import frame_numbers, open_clips
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen, Stage, fingerprint
from storage_schemas.tables import (
    CELLS,
    COMPARISON,
    FEATURE_PREFIX,
    SPLIT,
    embeddings_form,
    open_table,
    write_table,
)

OUTPUT_VERSION = 1  # raised when the same configuration gives other vectors of features

RESULTS = "results.parquet"
TABLE = "results.md"

# What MitoReID calls IDE: the network with the classifier's loss alone and no neck.
IDE = ("train.triplet_weight=0", "train.center_weight=0", "model.neck=false")

METHODS = {
    "features": "hand-made features",
    "ipp": "IPP: hand-made features and a classifier",
    "ide": "IDE: the network with the classifier's loss only",
    "reid": "ReID: the network as trained",
}
_OWN_SETTINGS = ("baseline.", "resources.", "max_failed_share")
_TRAINED: tuple[Stage, ...] = ("train", "embed", "evaluate")


@dataclass(frozen=True)
class Comparison:
    """What `screening compare` found.

    Attributes:
        scores: columns of :data:`storage_schemas.tables.COMPARISON`.
        notes: what a reader should know, a sentence each.
        failed: wells that failed in IDE, and are recorded there.
    """

    scores: pd.DataFrame
    notes: tuple[str, ...]
    failed: int


def compare(url: str, overrides: Sequence[str] = ()) -> Comparison:
    """Score the screen's network beside its rivals, or go on with that, and write the table of all.

    Args:
        url: of a screen that has been trained and evaluated; the rivals go into its folder ``compare``.
        overrides: settings of the groups baseline and resources, as for :func:`pipelines.config.load`.

    Raises:
        ConfigError: if other settings are overridden: rivals are trained as the screen was.
        InputError: if the screen is not trained and evaluated, tests nothing, or whatever else the user can mend.
    """
    screen = Screen.open(store.absolute(url))
    config = _settings(screen, overrides)
    if not store.read_json(screen.evaluation):
        raise InputError(f"{screen.url}: its split has no queries, so there is nothing to compare methods by")
    shared = with_cells_of(config, screen.url)
    inputs = open_inputs(shared.inputs)
    screens = {"reid": screen}
    notes = []
    if _has_features(screen, inputs):
        for method in ("features", "ipp"):
            screens[method] = _score_features(method, config, inputs, screen)
        notes += _notes_on_features(screens["ipp"])
    else:
        notes.append("The cells have no hand-made features (they were imported), so the rows of these are missing.")
    failed = 0
    plain = override(shared, IDE)
    if plain == shared:
        notes.append("The screen itself was trained with the classifier's loss only: it is IDE, and there is no ReID.")
        screens["ide"] = screens.pop("reid")
    else:
        screens["ide"] = Screen(store.join(screen.comparison, "ide"), inputs.cells)
        failed = _train(plain, screens["ide"])
        _check_same_split(screen, screens["ide"])
    scores = pd.concat([_scores(method, screens[method]) for method in METHODS if method in screens], ignore_index=True)
    notes = [*_notes_on_tests(scores), *notes]
    write_table(store.join(screen.comparison, RESULTS), scores, COMPARISON)
    store.write_bytes(store.join(screen.comparison, TABLE), markdown(scores, notes).encode())
    return Comparison(scores, tuple(notes), failed)


def _settings(screen: Screen, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a screen that is trained and evaluated, with settings that its network does not know."""
    made_with = configuration_of(screen)
    config = override(made_with, overrides)
    changed = differences(made_with.model_dump(mode="json"), config.model_dump(mode="json"))
    foreign = [line for line in changed if not line.startswith(_OWN_SETTINGS)]
    if foreign:
        raise ConfigError(
            f"--set {foreign[0]}: all methods are compared as the screen was made; only settings of baseline and "
            "resources, and max_failed_share, can be set here"
        )
    if not is_done(made_with, screen.url, ("evaluate",)):
        raise InputError(f"{screen.url}: its stage 'evaluate' is not done: finish it with `screening run`")
    return config


# --- hand-made features --------------------------------------------------------------------------


class _Summaries(NamedTuple):
    """Cells and the statistics of their features: keys (n rows) and (n, D)."""

    keys: pd.DataFrame
    values: npt.NDArray[np.float64]


def _score_features(method: str, config: RunConfig, inputs: Inputs, screen: Screen) -> Screen:
    """The screen of a rival whose embeddings are made of features, scored."""
    assert inputs.cells is not None, "rivals take the screen's cells"
    rival = Screen(store.join(screen.comparison, method), inputs.cells)
    manifest = screen.read_manifest()
    settings = config.baseline.model_dump(mode="json")
    segmented = inputs.cells.read_manifest().stages["segment"]
    before = rival.read_manifest().stages if rival.exists() else {}
    own = {
        "config": {**manifest.config, "baseline": settings},
        "cells": inputs.cells.url,
        "stages": {**before, "segment": segmented},
    }
    rival.write_manifest(manifest.model_copy(update=own))
    events.info("method", f"{METHODS[method]}:", method=method)
    # The split is that of the screen's training, whose record tells one from another.
    split_by = manifest.stages["train"].fingerprint
    mark = fingerprint(method, OUTPUT_VERSION, settings, segmented.output, split_by)
    work = partial(_embed, method, config.baseline, inputs, screen, rival, mark)
    do_stage(rival, "embed", mark, work, {"wells": len(inputs.wells)}, whole=True)
    mark = fingerprint(
        "evaluate", evaluate.OUTPUT_VERSION, mark, config.seed, config.evaluation.model_dump(mode="json")
    )
    do_stage(rival, "evaluate", mark, partial(evaluate.evaluate, config, inputs, rival, mark), {}, whole=True)
    return rival


def _embed(
    method: str, config: BaselineConfig, inputs: Inputs, screen: Screen, rival: Screen, mark: str
) -> tuple[Counts, list[str]]:
    """Write vectors of features as embeddings; fitted on the training cells alone."""
    store.write_bytes(rival.split, store.read_bytes(screen.split))
    keys, summary = read_summaries(rival, inputs.wells, config)
    label = _training_labels(keys, open_table(rival.split, SPLIT).to_pandas())
    trained = label.notna().to_numpy()
    try:
        scaler = Scaler.fit(summary[trained])
        vectors = scaler.apply(summary)
        if method == "ipp":
            classifier = Classifier.fit(vectors[trained], label[trained].to_numpy(), config)
            vectors = log_ratios(classifier.probabilities(vectors))
    except InputError as error:
        raise InputError(f"{screen.url}: {error}") from error
    form = embeddings_form(vectors.shape[1])
    groups = keys.groupby(keys["plate"] + "/" + keys["well"], sort=False).indices
    for well, rows in groups.items():
        cells = pa.Table.from_pandas(keys.iloc[rows], preserve_index=False)
        cells = cells.append_column("embedding", vector_column(vectors[rows]))
        write_table(rival.embeddings(WellKey.parse(str(well))), cells, form, mark)
    counts = {"wells": len(groups), "cells": len(keys), "trained on": int(trained.sum())}
    undefined = int((~np.isfinite(summary)).sum())
    return counts, [
        f"{undefined:,} of {summary.size:,} statistics of features are not defined and count as the mean of the "
        f"training cells; {(scaler.scale == 0).sum()} of {len(scaler.scale)} do not vary among these and are left out."
    ]


def read_summaries(screen: Screen, wells: Sequence[WellKey], config: BaselineConfig) -> _Summaries:
    """Statistics of the features of every cell that is cut out, over the frames that its clip is made of.

    Raises:
        SchemaError: if a well has other features than the first.
    """
    done = screen.done_units("segment")
    keys, values = [], []
    names: list[str] = []
    there = [well for well in wells if well in done]
    for well, table in zip(
        there, ahead(partial(open_table, form=CELLS), map(screen.cells, there), most=4), strict=True
    ):
        table = table.filter(pc.equal(table["excluded"], KEPT))
        found = _feature_columns(table)
        names = names or found
        if found != names:
            odd = sorted(set(found) ^ set(names))
            raise SchemaError(screen.cells(well), f"has other features than the wells before: {odd[:5]}")
        if not len(table):
            continue
        courses = np.stack([_padded(table[name]) for name in names], axis=1)
        frames = frame_numbers(open_clips(screen.clips(well)))
        time = np.arange(courses.shape[2]) if frames is None else np.asarray(frames)
        keys.append(table.select(CELL_KEYS).to_pandas())
        values.append(summarise(courses[:, :, time], time, config.statistics))
    assert keys, "a screen that is evaluated has cells"
    return _Summaries(pd.concat(keys, ignore_index=True), np.concatenate(values))


def _has_features(screen: Screen, inputs: Inputs) -> bool:
    done = screen.done_units("segment")
    first = next(well for well in inputs.wells if well in done)
    return bool(_feature_columns(open_table(screen.cells(first), CELLS)))


def _feature_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(FEATURE_PREFIX)]


def _padded(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """A column of lists as (n, T) float32, T that of the longest; NaN after the end of a shorter one."""
    lists = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    padded = np.full((len(lists), lengths.max(initial=0)), np.nan, np.float32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return padded


def _training_labels(keys: pd.DataFrame, split: pd.DataFrame) -> pd.Series[str]:
    """MOA of each training cell, as the network is taught it; null for other cells."""
    cells = parts_of(keys, split)
    return identities(cells, "moa").where(cells["split"] == "train")


# --- the network without metric losses -----------------------------------------------------------


def _train(config: RunConfig, rival: Screen) -> int:
    """Train and test the rival, unless that is done; how many wells failed."""
    events.info("method", f"{METHODS['ide']}:", method="ide")
    if is_done(config, rival.url, _TRAINED):
        events.info("stages_done_before", "train, embed, evaluate: done before", stages=_TRAINED)
        return 0
    # The folder is this command's own: of a screen that has changed it keeps what does not depend on the change.
    return run(config, rival.url, _TRAINED, update=True)


def _check_same_split(screen: Screen, rival: Screen) -> None:
    one, other = (open_table(each.split, SPLIT) for each in (screen, rival))
    if not one.equals(other):
        raise InputError(f"{screen.split} is not the split that its configuration gives, {rival.split}: train it again")


# --- the table -----------------------------------------------------------------------------------


def _scores(method: str, screen: Screen) -> pd.DataFrame:
    """A row a metric of each test and contrast."""
    results = store.read_json(screen.evaluation)
    scores = score_table(results).assign(method=method)
    of = [results[test] if name == ALL_MOAS else results[test]["contrasts"][name] for test, name in _tests(scores)]
    return scores.assign(n_queries=[part["n_queries"] for part in of], n_compounds=[p["n_compounds"] for p in of])


def _tests(scores: pd.DataFrame) -> Iterator[tuple[str, str]]:
    return zip(scores["test"], scores["contrast"], strict=True)


def table(scores: pd.DataFrame, test: str) -> pd.DataFrame:
    """MitoReID's table of one test, ready to print: a row a method, chance last, in percent with intervals.

    Args:
        scores: columns of :data:`storage_schemas.tables.COMPARISON`.
        test: what was held out.
    """
    of_test = scores[(scores["test"] == test) & (scores["contrast"] == ALL_MOAS)]
    found = of_test["metric"].unique().tolist()
    metrics = [*[name for name in ("accuracy", "auc") if name in found], *[n for n in found if n.startswith("rank")]]
    metrics.append("map")
    by_key = of_test.set_index(["method", "metric"])
    rows = [
        {"method": METHODS[method], **{_title(name): _percent(by_key.loc[(method, name)]) for name in metrics}}
        for method in of_test["method"].unique()
    ]
    chance = of_test.groupby("metric")["chance"].mean()
    rows.append({"method": "chance", **{_title(name): _number(chance[name]) for name in metrics}})
    return pd.DataFrame(rows)


def heading(test: str) -> str:
    """What the queries of a test are called; those of a table made by hand are just queries."""
    return "queries" if test == "query" else f"held-out {test}s"


def _title(metric: str) -> str:
    return {"auc": "AUC", "map": "mAP"}.get(metric, metric.replace("rank", "Rank-"))


def _percent(score: Any) -> str:
    if np.isnan(score["low"]):
        return _number(score["value"])
    return f"{_number(score['value'])} ({_number(score['low'])}–{_number(score['high'])})"


def _number(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f}"


def markdown(scores: pd.DataFrame, notes: Sequence[str]) -> str:
    """The tables of all tests, and the notes.

    Args:
        scores: columns of :data:`storage_schemas.tables.COMPARISON`.
        notes: a sentence each.
    """
    lines = ["Percent, with the 95 % interval of a bootstrap over compounds.", ""]
    for test in scores["test"].unique():
        rows = table(scores, test)
        header = [heading(test), *rows.columns[1:]]
        lines += [markdown_table(header, rows.to_numpy().tolist()), ""]
    return "\n".join([*lines, *(f"- {markdown_text(note)}" for note in notes), ""])


def _notes_on_tests(scores: pd.DataFrame) -> list[str]:
    """What stands behind the numbers of each test."""
    notes = []
    whole = scores[scores["contrast"] == ALL_MOAS]
    for test, of_test in whole.groupby("test", sort=False):
        sizes = of_test[["method", "n_queries", "n_compounds"]].drop_duplicates()
        first = sizes.iloc[0]
        name = heading(str(test)).capitalize()
        notes.append(
            f"{name}: {first['n_queries']:,} cells of {first['n_compounds']} compounds are looked up; "
            "what counts for the intervals are the compounds."
        )
        if len(sizes[["n_queries", "n_compounds"]].drop_duplicates()) > 1:
            shown = ", ".join(f"{row.method} {row.n_queries:,}" for row in sizes.itertuples())
            notes.append(f"{name}: not all methods have the same cells ({shown}).")
    return notes


def _notes_on_features(rival: Screen) -> list[str]:
    return [
        "Hand-made features are measured inside the same masks, in the frames that the clips are made of; classifier "
        "and z-scores are fitted on the training cells alone.",
        "Features are compared by the cosine of their z-scores, IPP by that of its classes' log-probabilities.",
        *rival.read_manifest().stages["embed"].notes,
    ]
