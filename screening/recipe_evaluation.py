"""How good profiles are: does a well find its replicates on other plates, and a treatment its class by other compounds.

Both are retrieval by cosine as of :mod:`screening.retrieval`; intervals resample compounds, not wells, since wells of a
compound are not independent evidence.

Shapes: w wells or treatments, D dimensions, c compounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from screening import retrieval
from screening.cosines import Floats
from screening.retrieval import Ranking
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Test = Literal["replicate", "replicate or control", "class"]

_INTERVAL = (0.025, 0.975)


class RecipeEvaluationConfig(Config):
    """What is looked up where."""

    match: tuple[str, ...] = Field(
        ("compound", "concentration", "unit", "time", "cell_line"),
        min_length=1,
        description="columns of the metadata, of those that there are, that a well shares with those it should find",
    )
    across: str = Field("plate", description="column of the metadata: wells that share it are not looked among")
    label: str = Field("moa", description="column of the metadata that holds the classes of compounds")
    linear_folds: int = Field(
        0, ge=0, description="also tell classes by linear discriminants, fitted without a share of compounds; 0: do not"
    )
    n_bootstrap: int = Field(1000, ge=1, description="bootstrap samples of compounds an interval")
    seed: int = Field(0, ge=0, description="of the bootstrap and of the folds")


class Score(NamedTuple):
    """One number of a test; value, low, high and chance are NaN where nothing could be looked up."""

    test: Test
    metric: str
    value: float
    low: float
    high: float
    chance: float
    n_queries: int
    n_compounds: int
    n_left_out: int


def replicate_scores(profiles: npt.NDArray[Any], wells: pd.DataFrame, config: RecipeEvaluationConfig) -> list[Score]:
    """Does a well find wells of the same treatment among those of other plates?

    The test ``replicate`` is among treated wells alone; in ``replicate or control`` negative controls are looked up and
    found too, as one treatment for each combination of what treatments are matched by. A well that has no replicate
    elsewhere is left out of the queries, not of the candidates.

    Args:
        profiles: (w, D) finite.
        wells: metadata, a row a well.
        config: what is matched, and across what.

    Returns:
        ``top1``, the share of wells whose nearest candidate is a replicate, and ``map``, mean average precision, of
        each test, with 95 % intervals and what candidates in random order would reach.

    Raises:
        InputError: for columns that are not there.
    """
    keys = matching(wells, config.match, "--match")
    matching(wells, [config.across], "--across")
    treated = (wells["role"] != "negative_control").to_numpy()
    label = np.asarray(wells.groupby(keys, dropna=False, sort=True).ngroup(), np.int64)
    scores = []
    tests: list[tuple[Test, npt.NDArray[np.bool_]]] = [("replicate", treated)]
    if not treated.all():
        tests.append(("replicate or control", np.ones(len(wells), bool)))
    for test, taken in tests:
        group = wells.loc[taken, config.across].tolist()
        scores += _retrieved(test, profiles[taken], label[taken], group, wells.loc[taken, "compound"], config)
    return scores


def class_scores(profiles: npt.NDArray[Any], treatments: pd.DataFrame, config: RecipeEvaluationConfig) -> list[Score]:
    """Is a treatment's class that of the nearest treatment of another compound?

    Args:
        profiles: (w, D) finite, of treatments.
        treatments: metadata, a row a treatment. Those without a class, negative controls, and those of a class of one
            compound, which no other could tell, are left out.
        config: which column holds the classes.

    Returns:
        ``nearest``: accuracy by the nearest treatment of another compound; ``linear`` (if asked for): by shrunk linear
        discriminants that saw nothing of the compound; ``map`` among other compounds' treatments. Chance of accuracies
        is the share of the commonest class.

    Raises:
        InputError: if there is no such column.
    """
    matching(treatments, [config.label], "--class")
    known = treatments[config.label].notna() & (treatments["role"] != "negative_control")
    compounds_of = treatments[known].groupby(config.label)["compound"].nunique()
    taken = (known & treatments[config.label].isin(compounds_of.index[compounds_of > 1])).to_numpy()
    n_left_out = int(known.sum() - taken.sum())
    own = treatments[taken]
    label, compound = own[config.label].astype(str), own["compound"]
    codes = np.asarray(pd.factorize(label)[0], np.int64)
    scores = _retrieved("class", profiles[taken], codes, compound.tolist(), compound, config)
    commonest = float(np.bincount(codes).max() / len(codes)) if len(codes) else float("nan")
    names = {"top1": "nearest", "map": "map"}
    scores = [
        score._replace(
            metric=names[score.metric],
            n_left_out=n_left_out,
            chance=commonest if score.metric == "top1" else score.chance,
        )
        for score in scores
    ]
    if config.linear_folds and len(compounds_of[compounds_of > 1]) > 1:
        correct = linear_hits(profiles[taken], codes, compound.to_numpy(), config.linear_folds, config.seed)
        value, low, high = _bootstrapped(correct[:, None].astype(np.float64), compound, config)
        count = (len(codes), compound.nunique(), n_left_out)
        scores.append(Score("class", "linear", float(value[0]), float(low[0]), float(high[0]), commonest, *count))
    return scores


def linear_hits(
    profiles: npt.NDArray[Any], codes: npt.NDArray[np.int64], compound: npt.NDArray[Any], folds: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Whether shrunk linear discriminants, fitted on the compounds of other folds, tell each treatment's class.

    Args:
        profiles: (w, D) finite.
        codes: (w,) class of each.
        compound: (w,) compound of each; one is never in two folds.
        folds: how many, at most one a compound.
        seed: of who is in which.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    names = np.unique(compound.astype(str))
    number = np.random.default_rng(seed).permutation(len(names)) % min(folds, len(names))
    fold = number[np.searchsorted(names, compound.astype(str))]
    # Directions, as by cosine: how strong an effect is tells doses apart rather than classes.
    units = retrieval.unit_rows(profiles)
    correct = np.zeros(len(codes), bool)
    for one in np.unique(fold):
        learnt, asked = fold != one, fold == one
        classes = np.unique(codes[learnt])
        if len(classes) < 2:
            continue
        even = np.full(len(classes), 1 / len(classes))
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=even)
        correct[asked] = model.fit(units[learnt], codes[learnt]).predict(units[asked]) == codes[asked]
    return correct


def matching(
    metadata: pd.DataFrame, columns: Sequence[str], option: str, renamed: Mapping[str, str] | None = None
) -> list[str]:
    """The columns that there are of those that are asked for; one that is alone must be there.

    Args:
        metadata: that should have them.
        columns: names.
        option: by which they were asked for.
        renamed: what columns of another table are called here.

    Raises:
        InputError: if none is there, with near names.
    """
    from screening.similarity import suggest

    found = [name for name in columns if name in metadata]
    if not found:
        near = suggest(columns[0], [str(name) for name in metadata])
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {list(metadata)[:12]}"
        if renamed and columns[0] in renamed:
            hint = f"the import took it for {renamed[columns[0]]}: {option} {renamed[columns[0]]}"
        raise InputError(f"{option} {columns[0]!r}: the metadata have no such column; {hint}")
    return found


def _retrieved(
    test: Test,
    profiles: npt.NDArray[Any],
    label: npt.NDArray[np.int64],
    group: Sequence[Any],
    compound: pd.Series[Any],
    config: RecipeEvaluationConfig,
) -> list[Score]:
    ranking = retrieval.rank(profiles, label, group, profiles, label, group, max_rank=1)
    counted = ranking.n_matches > 0
    count = (int(counted.sum()), int(compound[counted].nunique()), int((~counted).sum()))
    if not counted.any():
        nothing = float("nan")
        return [Score(test, metric, nothing, nothing, nothing, nothing, *count) for metric in ("top1", "map")]
    values, low, high = _bootstrapped(_per_query(ranking, counted), compound[counted], config)
    chances = _chances(ranking, counted)
    return [
        Score(test, metric, float(values[i]), float(low[i]), float(high[i]), chances[i], *count)
        for i, metric in enumerate(("top1", "map"))
    ]


def _per_query(ranking: Ranking, counted: npt.NDArray[np.bool_]) -> Floats:
    """(queries, 2): whether the nearest candidate matches, and the average precision."""
    return np.column_stack([ranking.first_match[counted] == 1, ranking.average_precision[counted]])


def _chances(ranking: Ranking, counted: npt.NDArray[np.bool_]) -> tuple[float, float]:
    candidates, matches = ranking.n_candidates[counted], ranking.n_matches[counted]
    first = retrieval.chance_cmc(candidates, matches, 1)[0]
    return float(first), float(retrieval.chance_average_precision(candidates, matches).mean())


def _bootstrapped(
    per_query: Floats, compound: pd.Series[Any], config: RecipeEvaluationConfig
) -> tuple[Floats, Floats, Floats]:
    """Means over (queries, metrics), and bounds of their bootstrap over compounds; NaN with one compound."""
    codes, names = pd.factorize(compound)
    sizes = np.bincount(codes, minlength=len(names))
    totals = np.stack([np.bincount(codes, column, len(names)) for column in per_query.T], axis=1)
    values = totals.sum(axis=0) / sizes.sum()
    if len(names) < 2:
        return values, np.full_like(values, np.nan), np.full_like(values, np.nan)
    rng = np.random.default_rng(config.seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), config.n_bootstrap).astype(np.float64)
    low, high = np.quantile((drawn @ totals) / (drawn @ sizes)[:, None], _INTERVAL, axis=0)
    return values, low, high
