"""How well embeddings find cells of the same mechanism of action (MOA), with intervals and chance.

Rank-k, mAP and the per-compound vote are MitoReID's (Nature Computational Science 2024). Intervals
resample compounds, not cells: cells of one compound are not independent evidence for its MOA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, field_validator

from screening import retrieval
from screening.cosines import Floats
from screening.prediction import tally
from screening.retrieval import Ranking
from storage_schemas.base import Config
from storage_schemas.errors import InputError

_INTERVAL = (0.025, 0.975)
_ROC_POINTS = 101

ALL_MOAS = "all MOAs"


class EvaluationConfig(Config):
    """What is scored and how its uncertainty is estimated."""

    n_bootstrap: int = Field(1000, ge=1, description="bootstrap samples of compounds an interval")
    max_cells: int = Field(
        100_000, ge=1, description="cells of each test, and of the gallery, at most; of more, so many are drawn"
    )
    ranks: tuple[int, ...] = Field((1, 5, 10), description="the k of every Rank-k to report")
    max_rank: int = Field(50, ge=1, description="length of the CMC curve, in ranks")
    exclude: Literal["replicate_and_compound", "well", "compound"] = Field(
        "replicate_and_compound",
        description="gallery cells a query never sees: those that share this with it (MitoReID's: the experiment and "
        "the drug)",
    )
    contrasts: tuple[tuple[str, ...], ...] = Field(
        (), description="sets of two or more MOAs among which retrieval is repeated on its own"
    )

    @field_validator("ranks")
    @classmethod
    def _ranks_start_at_one(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not ranks or min(ranks) < 1:
            raise ValueError("name at least one rank, each 1 or more")
        return ranks

    @field_validator("contrasts")
    @classmethod
    def _contrasts_compare(cls, contrasts: tuple[tuple[str, ...], ...]) -> Any:
        for moas in contrasts:
            if len(set(moas)) < 2 or len(set(moas)) < len(moas):
                raise ValueError(f"a contrast needs two or more different MOAs, not {moas}")
        return contrasts


@dataclass(frozen=True)
class Cells:
    """Embedded cells and where they come from.

    Attributes:
        embedding: (n, D) finite float.
        moa: (n,) MOA of the cell's compound; None or NaN where it has none.
        compound: (n,) compound.
        plate: (n,) plate.
        well: (n,) well on the plate.
        replicate: (n,) replicate of the plate.

    Raises:
        InputError: columns of different lengths.
    """

    embedding: npt.NDArray[Any]
    moa: npt.NDArray[Any]
    compound: npt.NDArray[Any]
    plate: npt.NDArray[Any]
    well: npt.NDArray[Any]
    replicate: npt.NDArray[Any]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in vars(self).items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"cells have columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.moa)

    def take(self, which: npt.NDArray[Any]) -> Cells:
        """Those cells only.

        Args:
            which: (n,) bool, or positions.
        """
        return Cells(**{name: column[which] for name, column in vars(self).items()})


def evaluate(query: Cells, gallery: Cells, config: EvaluationConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Score retrieval and prediction of MOAs.

    Cells without an MOA take no part; a query counts when its MOA occurs among its candidates
    (gallery cells that ``config.exclude`` leaves); values are means over the counted queries,
    ``accuracy`` and ``auc`` are over their compounds.

    ``auc`` is the area under the ROC curve of each MOA against the rest, averaged over the MOAs of
    the queries (macro): how often a compound of the MOA has a higher score for it than a compound
    of another one, ties half. Compounds are scored as MitoReID's rule sorts their predictions, by
    the share of votes and, where that is equal, by the mean cosine distance. That it is an average
    of comparisons is Hanley & McNeil 1982, "The meaning and use of the area under a receiver
    operating characteristic (ROC) curve".

    Chance is exact for candidates in random order: :func:`screening.retrieval.chance_cmc`,
    :func:`screening.retrieval.chance_average_precision`; for ``accuracy`` it is the expected share
    of a compound's votes for its own MOA, so that of a compound whose cells vote as one; for
    ``auc`` it is a half.

    Args:
        query: the cells that are looked up.
        gallery: the cells among which they are looked up.
        config: what to report.
        rng: draws the bootstrap samples.

    Returns:
        A JSON-safe dictionary: ``rank{k}`` for every k, ``map``, ``accuracy`` and ``auc``, each
        ``{"value", "low", "high", "chance"}`` with the 95 % percentile interval of a bootstrap
        over compounds; ``n_queries`` and ``n_compounds`` counted, ``n_gallery``, ``n_left_out``
        (queries and gallery cells without an MOA, queries without a match); ``cmc`` and
        ``cmc_chance``, ``max_rank`` shares each; ``confusion``: ``moas``, ``compounds`` (counts,
        [true][voted]) and ``neighbours`` (share of a true MOA's cells whose nearest cell is of the
        other MOA, None for an MOA that was not queried); ``roc``: ``fpr`` and ``tpr``, the ROC curve
        of ``auc``, averaged over the MOAs at equal shares of false positives (Fawcett 2006, "An
        introduction to ROC analysis"), or None where there is no AUC; ``note``, which says why
        values are None, or None; ``contrasts``: the same for every set of MOAs, by ``"A vs B"``.

    Raises:
        InputError: embeddings that are not finite or whose dimensions differ.
    """
    result = _score(query, gallery, config, rng)
    result["contrasts"] = {
        " vs ".join(moas): _score(_among(query, moas), _among(gallery, moas), config, rng) for moas in config.contrasts
    }
    return result


def score_table(results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The scores of several tests, a row a metric.

    Args:
        results: name of a test -> what :func:`evaluate` returned.

    Returns:
        test, contrast (:data:`ALL_MOAS` or ``"A vs B"``), metric, and float value, low, high and chance (NaN where
        nothing could be scored); Rank-k by k first.
    """
    rows = [
        {"test": test, "contrast": contrast, "metric": metric, **part[metric]}
        for test, result in results.items()
        for contrast, part in {ALL_MOAS: result, **result["contrasts"]}.items()
        for metric in sorted(part, key=lambda name: (not name.startswith("rank"), len(name), name))
        if isinstance(part[metric], Mapping) and "chance" in part[metric]
    ]
    numbers = ["value", "low", "high", "chance"]
    table = pd.DataFrame(rows, columns=["test", "contrast", "metric", *numbers])
    return table.astype(dict.fromkeys(numbers, float))


def _score(query: Cells, gallery: Cells, config: EvaluationConfig, rng: np.random.Generator) -> dict[str, Any]:
    """One set of metrics, without contrasts."""
    asked, offered = len(query), len(gallery)
    query, gallery = _with_moa(query), _with_moa(gallery)
    left_out = {
        "queries_without_moa": asked - len(query),
        "gallery_without_moa": offered - len(gallery),
        "queries_without_match": len(query),
    }
    empty = _why_empty(query, gallery)
    if empty:
        return _empty(config, len(gallery), left_out, empty)

    depth = max(config.max_rank, *config.ranks)
    query_group, gallery_group = _groups(query, config.exclude), _groups(gallery, config.exclude)
    ranking = retrieval.rank(
        query.embedding,
        query.moa,
        query_group,
        gallery.embedding,
        gallery.moa,
        gallery_group,
        max_rank=depth,
    )
    counted = ranking.n_matches > 0
    left_out["queries_without_match"] -= int(counted.sum())
    if not counted.any():
        return _empty(config, len(gallery), left_out, "no query has a gallery cell of its MOA to find")
    query = query.take(counted)
    query_group = [group for group, counts in zip(query_group, counted, strict=True) if counts]
    nearest = ranking.nearest[counted]
    votes = tally(
        nearest,
        query.embedding,
        query.compound,
        query_group,
        gallery.embedding,
        gallery.moa,
        gallery_group,
    )

    compound_code, compounds = pd.factorize(query.compound)
    true = pd.Series(query.moa).groupby(compound_code).first().to_numpy()
    # The first row of a compound is its verdict, and compounds come in order of appearance too.
    chosen = votes.drop_duplicates("compound")["moa"].to_numpy()
    chance_curve, chance = _chances(ranking, counted, compound_code, config.ranks, depth)
    sums = _sums(ranking, counted, compound_code, true == chosen, config)
    scores_of = _places(votes)
    wins = _wins(scores_of, true)
    values = _weighted(sums, wins, np.ones((1, len(compounds))))[0]
    low = high = np.full(len(values), np.nan)
    if len(compounds) > 1:
        drawn = rng.multinomial(len(compounds), np.full(len(compounds), 1 / len(compounds)), config.n_bootstrap)
        low, high = _interval(_weighted(sums, wins, drawn.astype(np.float64)))
    numbers = zip(*map(_or_none, (values, low, high, chance)), strict=True)
    scores = [dict(zip(("value", "low", "high", "chance"), of_metric, strict=True)) for of_metric in numbers]
    return {
        **dict(zip(_metric_names(config), scores, strict=True)),
        "n_queries": len(query),
        "n_compounds": len(compounds),
        "n_gallery": len(gallery),
        "n_left_out": left_out,
        "cmc": ranking.cmc[: config.max_rank].tolist(),
        "cmc_chance": chance_curve[: config.max_rank].tolist(),
        "confusion": _confusion(true, chosen, query.moa, gallery.moa[nearest], gallery.moa),
        "roc": _roc(scores_of, true) if wins else None,
        "note": _note(len(compounds), bool(wins)),
    }


def _metric_names(config: EvaluationConfig) -> list[str]:
    return [*(f"rank{k}" for k in config.ranks), "map", "accuracy", "auc"]


def _note(n_compounds: int, has_auc: bool) -> str | None:
    if n_compounds == 1:
        return "one compound only, so there is no interval and no AUC"
    return None if has_auc else "the queries are of one MOA only, so there is no AUC"


class _Sums(NamedTuple):
    """What the metrics that are means are made of: (compounds, metrics) sums and numbers of what was summed."""

    totals: Floats
    sizes: Floats


class _Wins(NamedTuple):
    """The comparisons of one MOA's compounds with those of others: positions of both, and (own, others) 1, 0.5 or 0."""

    own: npt.NDArray[Any]
    others: npt.NDArray[Any]
    won: Floats


def _sums(
    ranking: Ranking,
    counted: npt.NDArray[np.bool_],
    compound_code: npt.NDArray[Any],
    correct: npt.NDArray[Any],
    config: EvaluationConfig,
) -> _Sums:
    first = ranking.first_match[counted]
    per_query = [*(first <= k for k in config.ranks), ranking.average_precision[counted]]
    n_compounds = len(correct)
    sums = [np.bincount(compound_code, scores, n_compounds) for scores in per_query]
    sizes = np.bincount(compound_code, minlength=n_compounds)
    return _Sums(
        np.stack([*sums, correct.astype(np.float64)], axis=1),
        np.stack([*[sizes] * len(sums), np.ones(n_compounds)], axis=1),
    )


def _places(votes: pd.DataFrame) -> pd.DataFrame:
    """Scores of compounds (rows, in order of appearance) for MOAs (columns): whole numbers in the order of (share,
    nearness), equal where both are.

    Args:
        votes: as :func:`screening.prediction.tally` gives them.
    """
    keys = np.column_stack([votes["share"], -votes["mean_distance"].fillna(np.inf)])
    place = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    scores = votes.assign(place=place).pivot(index="compound", columns="moa", values="place")
    return scores.loc[votes["compound"].unique()]


def _roc(scores: pd.DataFrame, true: npt.NDArray[Any]) -> dict[str, list[float]]:
    """The curves of all MOAs that have one, averaged at :data:`_ROC_POINTS` equal steps of false positives."""
    grid = np.linspace(0, 1, _ROC_POINTS).round(12)
    curves = []
    for moa in pd.unique(true):
        own = true == moa
        score = scores[moa].to_numpy()
        levels = np.sort(np.unique(score))[::-1]
        hits, alarms = ((score[part, None] >= levels).mean(axis=0) for part in (own, ~own))
        tpr, fpr = np.concatenate([[0.0], hits]), np.concatenate([[0.0], alarms]).round(12)
        # The last point that is not to the right: the top of the step where the curve is steep.
        left = np.searchsorted(fpr, grid, side="right") - 1
        right = np.minimum(left + 1, len(fpr) - 1)
        width = fpr[right] - fpr[left]
        way = np.divide(grid - fpr[left], width, out=np.zeros_like(grid), where=width > 0)
        curves.append(tpr[left] + way * (tpr[right] - tpr[left]))
    return {"fpr": grid.tolist(), "tpr": np.mean(curves, axis=0).tolist()}


def _wins(scores: pd.DataFrame, true: npt.NDArray[Any]) -> list[_Wins]:
    """Comparisons for every MOA of the queries; none where there is but one.

    Args:
        scores: of :func:`_places`.
        true: MOA of each compound, in order of appearance.
    """
    found = []
    for moa in pd.unique(true):
        is_own = true == moa
        if is_own.all():
            break
        score = scores[moa].to_numpy()
        difference = score[is_own, None] - score[~is_own]
        found.append(_Wins(np.flatnonzero(is_own), np.flatnonzero(~is_own), (np.sign(difference) + 1) / 2))
    return found


def _weighted(sums: _Sums, wins: Sequence[_Wins], weights: Floats) -> Floats:
    """(samples, metrics) in the order of the metrics' names; NaN where there is no AUC.

    Args:
        sums: of the metrics that are means.
        wins: of the AUC.
        weights: (samples, compounds), how often a compound is in a sample.
    """
    means = (weights @ sums.totals) / (weights @ sums.sizes)
    total, n_moas = np.zeros(len(weights)), np.zeros(len(weights))
    for own, others, won in wins:
        pairs = weights[:, own].sum(axis=1) * weights[:, others].sum(axis=1)
        here = pairs > 0
        total[here] += ((weights[:, own] @ won) * weights[:, others]).sum(axis=1)[here] / pairs[here]
        n_moas += here
    auc = np.divide(total, n_moas, out=np.full(len(weights), np.nan), where=n_moas > 0)
    return np.column_stack([means, auc])


def _interval(samples: Floats) -> tuple[Floats, Floats]:
    """Bounds of each metric; samples in which it is not defined are left out."""
    bounds = [
        np.quantile(column[~np.isnan(column)], _INTERVAL) if not np.isnan(column).all() else np.full(2, np.nan)
        for column in samples.T
    ]
    low, high = np.transpose(bounds)
    return low, high


def _or_none(values: npt.ArrayLike) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in np.asarray(values, np.float64)]


def _chances(
    ranking: Ranking,
    counted: npt.NDArray[np.bool_],
    compound_code: npt.NDArray[Any],
    ranks: Sequence[int],
    depth: int,
) -> tuple[Floats, list[float]]:
    """Compute the CMC in random order, and each metric's chance in the order of their names."""
    n_candidates, n_matches = ranking.n_candidates[counted], ranking.n_matches[counted]
    curve = retrieval.chance_cmc(n_candidates, n_matches, depth)
    average_precision = retrieval.chance_average_precision(n_candidates, n_matches).mean()
    own_share = pd.Series(n_matches / n_candidates).groupby(compound_code).mean().mean()
    return curve, [
        *(float(curve[k - 1]) for k in ranks),
        float(average_precision),
        float(own_share),
        0.5,
    ]


def _confusion(
    compound_moa: npt.NDArray[Any],
    voted_moa: npt.NDArray[Any],
    cell_moa: npt.NDArray[Any],
    nearest_moa: npt.NDArray[Any],
    gallery_moa: npt.NDArray[Any],
) -> dict[str, Any]:
    """Count what each MOA's compounds vote for and its cells are nearest to."""
    moas = sorted({*map(str, cell_moa), *map(str, gallery_moa)})
    compounds = _crosstab(compound_moa, voted_moa, moas)
    cells = _crosstab(cell_moa, nearest_moa, moas)
    return {
        "moas": moas,
        "compounds": compounds.tolist(),
        "neighbours": [(row / row.sum()).tolist() if row.any() else None for row in cells],
    }


def _crosstab(true: npt.NDArray[Any], found: npt.NDArray[Any], moas: list[str]) -> npt.NDArray[np.int64]:
    position = {moa: i for i, moa in enumerate(moas)}
    counts = np.zeros((len(moas), len(moas)), np.int64)
    rows, columns = ([position[str(moa)] for moa in side] for side in (true, found))
    np.add.at(counts, (rows, columns), 1)
    return counts


def _groups(cells: Cells, exclude: str) -> list[Any]:
    """What a query must not share with its candidates."""
    if exclude == "compound":
        return list(cells.compound)
    if exclude == "well":
        return list(zip(cells.plate, cells.well, strict=True))
    return list(zip(cells.replicate, cells.compound, strict=True))


def _with_moa(cells: Cells) -> Cells:
    return cells.take(~np.asarray(pd.isna(cells.moa), bool))


def _among(cells: Cells, moas: Sequence[str]) -> Cells:
    return cells.take(np.isin(cells.moa.astype(object), list(moas)))


def _why_empty(query: Cells, gallery: Cells) -> str | None:
    if not len(query):
        return "no query cell has an MOA"
    if not len(gallery):
        return "no gallery cell has an MOA"
    return None


def _empty(config: EvaluationConfig, n_gallery: int, left_out: dict[str, int], note: str) -> dict[str, Any]:
    """The result when nothing can be scored: every value None, and a note that says why."""
    nothing = {"value": None, "low": None, "high": None, "chance": None}
    return {
        **{name: dict(nothing) for name in _metric_names(config)},
        "n_queries": 0,
        "n_compounds": 0,
        "n_gallery": n_gallery,
        "n_left_out": left_out,
        "cmc": [None] * config.max_rank,
        "cmc_chance": [None] * config.max_rank,
        "confusion": {"moas": [], "compounds": [], "neighbours": []},
        "roc": None,
        "note": note,
    }
