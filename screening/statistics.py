"""Is a compound active, do compounds of a mechanism look alike, and are the plates good enough to tell?

Phenotypic activity and consistency are the mean average precision (mAP) of Kalinin et al. 2025, "A versatile
information retrieval framework for evaluating profile strength and similarity" (Nature Communications 16, 5181). Their
p-values come from relabelings: other wells of the same plates are called the compound's, other compounds the
mechanism's. docs/statistics.md has all definitions, and what was measured.

Shapes: n profiles, D dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from screening.cosines import COSINE_STEPS, Floats, Ints
from screening.profiles import Raw, Robust, Standardised
from screening.relabelings import UNIT, add_precisions, doubled_ranks
from screening.retrieval import Members, chance_average_precision, unit_rows
from screening.significance import Draws, arrangements, benjamini_hochberg, p_value, subsets
from storage_schemas.base import Config
from storage_schemas.errors import InputError

# Similarities of one chunk of rows: the memory that is needed beyond the profiles and the relabelings.
_CHUNK_BYTES = 2**25

_MAD_TO_SD = 1.4826  # of a normal distribution


class StatisticsConfig(Config):
    """What is tested, and how often labels are drawn anew."""

    n_permutations: int = Field(10_000, ge=100, description="relabelings a p-value; fewer where there are no more")
    fdr: float = Field(0.05, gt=0, lt=1, description="false discovery rate below which a finding is called one")
    recipe: Raw | Standardised | Robust = Field(
        Standardised(),
        discriminator="method",
        description="what profiles go through before they are compared with controls: no whitening, which tells the "
        "controls that it is fitted to from all other wells",
    )
    active_only: bool = Field(False, description="test consistency among the compounds that are active only")
    separator: str = Field("|", min_length=1, description="what stands between several mechanisms or targets of one")


# --- activity ------------------------------------------------------------------------------------


def activity(
    profiles: npt.ArrayLike,
    perturbation: Ints,
    plate: npt.ArrayLike,
    is_control: npt.ArrayLike,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Do the replicates of a perturbation resemble each other more than the negative controls of their plates?

    Each replicate looks for the others among these and all controls of the plates that replicates are on, by cosine;
    the mAP is the mean of their average precisions. Wells of the pool are first centred plate by plate on their common
    mean: profiles that were centred on the controls alone would make replicates on one plate look alike for the
    controls' error. A relabeling calls as many wells of each plate replicates, out of the controls and the replicates.

    Args:
        profiles: (n, D) finite.
        perturbation: (n,) which perturbation each well has, from 0; those of controls are not used.
        plate: (n,) plate of each.
        is_control: (n,) bool, the negative controls.
        n_permutations: relabelings; all there are where these are no more.
        seed: of the relabelings.

    Returns:
        A row a perturbation, in order: ``n_replicates`` and ``n_controls`` that took part; mean_average_precision;
        expected_precision in random order; normalised_precision (see :func:`normalised`); p_value; n_relabelings; and
        ``excluded``: why there is no result, or None.

    Raises:
        InputError: columns of different lengths, or profiles that are not finite.
    """
    values = _finite(profiles, perturbation=perturbation, plate=plate, is_control=is_control)
    control = np.asarray(is_control, bool)
    plates = pd.factorize(np.asarray(plate, object))[0].astype(np.int64)
    wells = _grouped(perturbation, ~control)
    controls = [np.flatnonzero(control & (plates == p)) for p in range(plates.max(initial=-1) + 1)]

    @lru_cache(maxsize=1)
    def gram_of_controls(of_plates: tuple[int, ...]) -> tuple[Ints, Floats]:
        own = np.concatenate([controls[p] for p in of_plates])
        return own, values[own] @ values[own].T

    has_controls = np.array([own.size > 0 for own in controls], bool)[plates]
    rows: list[dict[str, Any]] = []
    on_plates: dict[int, tuple[int, ...]] = {}
    for code, own in enumerate(wells):
        replicates = own[has_controls[own]]
        rows.append({"n_replicates": replicates.size, "n_controls": 0, "excluded": None})
        if replicates.size > 1:
            on_plates[code] = tuple(np.unique(plates[replicates]).tolist())
        elif replicates.size < own.size:
            rows[code]["excluded"] = "no negative control on its plates"
        else:
            rows[code]["excluded"] = "one replicate only"
    # Perturbations on the same plates follow each other, and share what is known of the controls.
    for code in sorted(on_plates, key=lambda code: on_plates[code]):
        others, gram = gram_of_controls(on_plates[code])
        replicates = wells[code][has_controls[wells[code]]]
        pool = np.concatenate([others, replicates])
        across = values[replicates] @ values[pool].T
        gram = np.block([[gram, across[:, : others.size].T], [across]])
        ranks = doubled_ranks(_cosine_steps(_centred(gram, plates[pool])), 0)
        is_replicate = np.arange(pool.size) >= others.size
        rows[code]["n_controls"] = others.size
        rows[code] |= _tightness(ranks, plates[pool], is_replicate, n_permutations, seed)
    return _typed(pd.DataFrame(rows, columns=["n_replicates", "n_controls", *PRECISION_COLUMNS, "excluded"]))


PRECISION_COLUMNS = (
    "mean_average_precision",
    "expected_precision",
    "normalised_precision",
    "p_value",
    "n_relabelings",
)


def _tightness(
    ranks: npt.NDArray[np.int32], stratum: Ints, is_member: npt.NDArray[np.bool_], n_permutations: int, seed: int
) -> dict[str, Any]:
    """The mAP of the members of a pool beside that of other members of the same strata."""
    sizes = [(int(is_member[stratum == s].sum()), int((stratum == s).sum()), int(s)) for s in np.unique(stratum)]
    sizes.sort()  # strata of the same sizes have the same relabelings, whatever they are called
    slots = np.concatenate([np.flatnonzero(stratum == s) for _, _, s in sizes])
    members = np.flatnonzero(is_member)
    draws = subsets([(chosen, size) for chosen, size, _ in sizes], n_permutations, seed)
    drawn = np.concatenate([members[None], slots[draws.members]]).astype(np.int32)
    total = np.zeros(len(drawn), np.int64)
    everyone, bounds = np.zeros(0, np.int64), np.zeros(members.size + 1, np.int64)
    add_precisions(ranks, 0, drawn, members.size, everyone, bounds, total)
    n_candidates = np.full(members.size, len(ranks) - 1)
    return _compared(total, members.size, draws.complete, n_candidates)


def _compared(total: Ints, n_members: int, complete: bool, n_candidates: Ints) -> dict[str, Any]:
    """What was observed (the first) beside its chance and its relabelings (the others)."""
    scores = total * (UNIT / n_members)
    expected = float(chance_average_precision(n_candidates, np.full(n_members, n_members - 1)).mean())
    return {
        "mean_average_precision": scores[0],
        "expected_precision": expected,
        "normalised_precision": normalised(scores[0], expected),
        "p_value": p_value(scores[0], scores[1:], complete),
        "n_relabelings": len(scores) - 1,
    }


def normalised(precision: float, expected: float) -> float:
    """(precision - expected) / (1 - expected): 0 as chance has it, 1 for perfect; NaN where chance is perfect.

    The correction for chance of Cohen 1960 ("A coefficient of agreement for nominal scales"); copairs has it under the
    name of normalised average precision.
    """
    return (precision - expected) / (1 - expected) if expected < 1 else float("nan")


def _centred(gram: Floats, group: Ints) -> Floats:
    """Inner products of profiles after the mean of each group has been taken off."""
    means = np.zeros((group.max() + 1, len(group)))
    means[group, np.arange(len(group))] = 1
    means = means[means.any(axis=1)]
    means /= means.sum(axis=1, keepdims=True)
    which = np.unique(group, return_inverse=True)[1]
    gram = gram - (means @ gram)[which]
    return np.asarray(gram - (gram @ means.T)[:, which])


def _cosine_steps(gram: Floats) -> Floats:
    """Cosines in whole steps; those of what has no length are 0."""
    square = np.diag(gram)
    # What is left of a profile that is its plate's mean is rounding.
    there = square > 1e-12 * max(float(square.max(initial=0)), 0)
    scale = np.where(there, 1 / np.sqrt(np.where(there, square, 1)), 0)
    return np.asarray(np.rint(gram * scale[:, None] * scale * COSINE_STEPS))


# --- consistency ---------------------------------------------------------------------------------


def consistency(
    profiles: npt.ArrayLike,
    labels: Sequence[Iterable[str]],
    n_permutations: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Do the profiles that share a label resemble each other more than those that do not?

    Each profile with the label looks for the others with it, by cosine, among all that have labels; those that share
    another label with it are not among its candidates. A relabeling gives whole sets of labels to other profiles.

    Args:
        profiles: (n, D) finite, one a compound.
        labels: its mechanisms or targets; a compound without any takes no part.
        n_permutations: relabelings; all there are where these are no more.
        seed: of the relabelings.

    Returns:
        A row a label, sorted: label, n_compounds, the columns of :data:`PRECISION_COLUMNS`, and ``excluded``: why there
        is no result, or None.

    Raises:
        InputError: lengths that differ, or profiles that are not finite.
    """
    sets = [frozenset(each) for each in labels]
    values = _finite(profiles, labels=sets)
    known = [i for i, each in enumerate(sets) if each]
    unit = unit_rows(values[known])
    tests = _tests([sets[i] for i in known])
    drawn = _relabelings(tests, len(known), n_permutations, seed)
    observed = {test.label: np.zeros(1, np.int64) for test in tests}
    # Labels of as many compounds have the same relabelings and, where nothing is left out, the same scores.
    null = {test.structure: np.zeros(len(drawn[test.structure].members), np.int64) for test in tests}
    rows = max(1, _CHUNK_BYTES // (24 * max(len(unit), 1)))
    for first in range(0, len(unit), rows):
        ranks = doubled_ranks(np.rint(unit[first : first + rows] @ unit.T * COSINE_STEPS), first)
        for test in tests:
            test.add(ranks, first, test.slots[None], observed[test.label])
        for structure, test in {test.structure: test for test in tests}.items():
            test.add(ranks, first, drawn[structure].members, null[structure])
    found = []
    for test in tests:
        row: dict[str, Any] = {"label": test.label, "n_compounds": test.n_members, "excluded": test.excluded}
        if test.excluded is None:
            total = np.concatenate([observed[test.label], null[test.structure]])
            n_candidates = len(unit) - 1 - np.diff(test.bounds)
            row |= _compared(total, test.n_members, drawn[test.structure].complete, n_candidates)
        found.append(row)
    return _typed(pd.DataFrame(found, columns=["label", "n_compounds", *PRECISION_COLUMNS, "excluded"]))


@dataclass(frozen=True)
class _Test:
    """A label to test.

    Attributes:
        label: which.
        n_members: compounds with the label.
        slots: (k,) int32, these, then those that share another label with one of them.
        left_out: slots that are no candidates of a member, member by member.
        bounds: (n_members + 1,) where in ``left_out`` those of each begin.
        excluded: why the label is not tested.
    """

    label: str
    n_members: int
    slots: npt.NDArray[np.int32]
    left_out: Ints
    bounds: Ints
    excluded: str | None

    @property
    def structure(self) -> tuple[Any, ...]:
        """What the scores of relabelings depend on."""
        return self.n_members, self.slots.size, self.left_out.tobytes(), self.bounds.tobytes()

    def add(self, ranks: npt.NDArray[np.int32], first: int, drawn: npt.NDArray[np.int32], total: Ints) -> None:
        """Add what some of the rows contribute to the totals."""
        if self.excluded is None:
            add_precisions(ranks, first, drawn, self.n_members, self.left_out, self.bounds, total)


def _tests(sets: Sequence[frozenset[str]]) -> list[_Test]:
    """One for each label that compounds have."""
    found = []
    with_label: dict[str, list[int]] = {}
    for i, labels in enumerate(sets):
        for label in labels:
            with_label.setdefault(label, []).append(i)
    for label, members in sorted(with_label.items()):
        relatives = [
            sorted({j for other in sets[i] - {label} for j in with_label[other] if label not in sets[j]})
            for i in members
        ]
        also = sorted(set(itertools.chain(*relatives)))
        slot = {compound: len(members) + i for i, compound in enumerate(also)}
        excluded = None
        if len(members) == 1:
            excluded = "one compound only"
        elif len(members) == len(sets):
            excluded = "no compound without it"
        found.append(
            _Test(
                label,
                len(members),
                np.array([*members, *also], np.int32),
                np.array([slot[j] for own in relatives for j in own], np.int64),
                np.cumsum([0, *map(len, relatives)]),
                excluded,
            )
        )
    return found


def _relabelings(tests: Sequence[_Test], n: int, n_permutations: int, seed: int) -> dict[Any, Draws]:
    """Which compounds stand in the slots of each structure; larger ones go on where smaller ones end."""
    found: dict[Any, Draws] = {}
    longest = max((test.slots.size for test in tests if test.excluded is None), default=0)
    sampled = arrangements(longest, n, n_permutations, (seed,))
    for test in tests:
        k = test.slots.size
        if test.excluded is not None:
            found[test.structure] = Draws(np.zeros((0, k), np.int32), complete=False)
        elif k == test.n_members and math.comb(n, k) <= n_permutations:
            found[test.structure] = subsets([(k, n)], n_permutations, seed)
        else:
            found[test.structure] = Draws(sampled[:, :k], complete=False)
    return found


# --- reproducibility -----------------------------------------------------------------------------


def reproducibility(
    profiles: npt.ArrayLike, perturbation: Ints, n_permutations: int = 10_000, seed: int = 0, share: float = 0.95
) -> pd.DataFrame:
    """How well do replicates of a perturbation correlate, beside wells of different perturbations?

    The median of the Pearson correlations of all pairs of replicates, and the same of as many wells of as many
    perturbations, drawn at random; a perturbation replicates if it is above that ``share`` of these ("percent
    replicating", Way et al. 2022, "Morphology and gene expression profiling provide complementary information for
    mapping cell state").

    Args:
        profiles: (n, D) finite; controls are left away.
        perturbation: (n,) which perturbation each well has, from 0.
        n_permutations: groups of non-replicates that are drawn for each number of replicates.
        seed: of these.
        share: of them that a perturbation must exceed to replicate.

    Returns:
        A row a perturbation, in order: ``replicate_correlation``, ``replicate_p_value`` and ``replicates`` (None
        with one replicate only, or where there are no more perturbations than replicates).

    Raises:
        InputError: columns of different lengths, or profiles that are not finite.
    """
    values = _finite(profiles, perturbation=perturbation)
    unit = unit_rows(values - values.mean(axis=1, keepdims=True))
    wells = Members(np.asarray(perturbation, np.int64))
    sizes = np.diff(wells.bounds)
    there = np.flatnonzero(sizes)

    @cache
    def null(size: int) -> Floats:
        # Not all there are of these where they are few: each leaves many choices of wells.
        groups = arrangements(size, there.size, n_permutations, (seed, 0))
        rng = np.random.default_rng([seed, size, there.size, 1])
        picked = wells.bounds[there[groups]] + rng.integers(0, sizes[there[groups]])
        return np.concatenate(
            [
                _median_correlation(unit, wells.order[picked[start : start + 500]])
                for start in range(0, len(picked), 500)
            ]
        )

    rows: list[tuple[float, float, bool | None]] = []
    for code, size in enumerate(sizes):
        if size < 2 or size > there.size:
            rows.append((np.nan, np.nan, None))
            continue
        median = float(_median_correlation(unit, wells.of(code)[None])[0])
        p = p_value(median, null(int(size)), complete=False)
        rows.append((median, p, bool(median > np.quantile(null(int(size)), share))))
    table = pd.DataFrame(rows, columns=["replicate_correlation", "replicate_p_value", "replicates"])
    return table.astype({"replicates": "boolean"})


def _median_correlation(unit: Floats, groups: Ints) -> Floats:
    """(groups,) median over the pairs of each of (groups, k) wells."""
    k = groups.shape[1]
    vectors = unit[groups]
    left, right = np.triu_indices(k, 1)
    correlations = np.einsum("gad,gbd->gab", vectors, vectors, optimize=True)[:, left, right]
    return np.asarray(np.median(correlations, axis=1))


# --- quality of plates ---------------------------------------------------------------------------


def separation(profiles: npt.ArrayLike, is_negative: npt.ArrayLike, is_positive: npt.ArrayLike) -> dict[str, float]:
    """How far are the positive controls of a plate from its negative ones?

    Along the line between their means, 0 at the negative and 1 at the positive controls. A well is placed on the line
    between the means of the others: with more features than wells, its own share in the line would set it apart.

    Args:
        profiles: (n, D) finite wells of one plate.
        is_negative: (n,) bool.
        is_positive: (n,) bool.

    Returns:
        ``z_prime`` (Zhang, Chung & Oldenburg 1999): 1 - 3 (sd of one + sd of other) / |difference of means|; ``ssmd``
        (Zhang 2007): difference of means / root of the sum of variances; and both with medians and scaled median
        absolute deviations. NaN with fewer than three of either, or where nothing varies.

    Raises:
        InputError: columns of different lengths, or profiles that are not finite.
    """
    values = _finite(profiles, is_negative=is_negative, is_positive=is_positive)
    negative, positive = (values[np.asarray(which, bool)] for which in (is_negative, is_positive))
    names = ("z_prime", "ssmd", "z_prime_robust", "ssmd_robust")
    if min(len(negative), len(positive)) < 3:
        return dict.fromkeys(names, float("nan"))
    low, high = _place(negative, positive)
    moments: Callable[[Floats], tuple[float, float]] = lambda x: (float(x.mean()), float(x.std(ddof=1)))  # noqa: E731
    found = [*_separation(moments(low), moments(high)), *_separation(_robust(low), _robust(high))]
    return dict(zip(names, found, strict=True))


def _place(negative: Floats, positive: Floats) -> tuple[Floats, Floats]:
    """Where wells stand on the line between the means of the other negative and the other positive controls."""
    means = negative.mean(axis=0), positive.mean(axis=0)
    placed = []
    for side, wells in enumerate((negative, positive)):
        others = (wells.sum(axis=0) - wells) / (len(wells) - 1)
        start, end = (others, means[1]) if side == 0 else (means[0], others)
        line = end - start
        length = np.einsum("nd,nd->n", line, line)
        along = np.einsum("nd,nd->n", wells - start, line)
        placed.append(np.divide(along, length, out=np.full(len(wells), np.nan), where=length > 0))
    return placed[0], placed[1]


def _robust(values: Floats) -> tuple[float, float]:
    centre = float(np.median(values))
    return centre, _MAD_TO_SD * float(np.median(np.abs(values - centre)))


def _separation(low: tuple[float, float], high: tuple[float, float]) -> tuple[float, float]:
    """Z' and SSMD of two (centre, spread)."""
    difference, spread = high[0] - low[0], np.hypot(low[1], high[1])
    z_prime = 1 - 3 * (low[1] + high[1]) / abs(difference) if difference else float("nan")
    return z_prime, float(difference / spread) if spread else float("nan")


# --- doses ---------------------------------------------------------------------------------------


def control_distance(profiles: npt.ArrayLike, plate: npt.ArrayLike, is_control: npt.ArrayLike) -> Floats:
    """How far each well is from the mean of its plate's negative controls: the root mean square over the features.

    A control is measured from the mean of the others. In profiles that are standardised to controls, the unit is the
    controls' standard deviation.

    Args:
        profiles: (n, D) finite.
        plate: (n,) plate of each.
        is_control: (n,) bool.

    Returns:
        (n,) float64; NaN on a plate without controls, and for a control that is alone.

    Raises:
        InputError: columns of different lengths, or profiles that are not finite.
    """
    values = _finite(profiles, plate=plate, is_control=is_control)
    control = np.asarray(is_control, bool)
    wells = Members(pd.factorize(np.asarray(plate, object))[0].astype(np.int64))
    distance = np.full(len(values), np.nan)
    for code in range(len(wells.bounds) - 1):
        own = wells.of(code)
        controls = own[control[own]]
        left = controls.size - control[own]
        measured = own[left > 0]
        total = values[controls].sum(axis=0) - values[measured] * control[measured, None]
        mean = total / left[left > 0, None]
        distance[measured] = np.sqrt(np.square(values[measured] - mean).mean(axis=1))
    return distance


def dose_response(
    compound: Ints, concentration: npt.ArrayLike, effect: npt.ArrayLike, n_permutations: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Does the effect of a compound grow with its dose?

    Spearman's correlation of the wells' effects with their concentrations, equal ones at their mean rank; the p-value
    is the share of relabelings (concentrations dealt anew to the compound's wells) with a correlation as high.

    Args:
        compound: (n,) which compound each well has, from 0.
        concentration: (n,) in one unit a compound; wells without one (NaN) take no part.
        effect: (n,) such as :func:`control_distance`; wells without one (NaN) take no part.
        n_permutations: relabelings; all there are where these are no more.
        seed: of the relabelings.

    Returns:
        A row a compound, in order: ``n_wells`` and ``n_doses`` that took part, ``spearman``, ``p_value``,
        ``n_relabelings`` and ``excluded``: why there is no result, or None.

    Raises:
        InputError: columns of different lengths.
    """
    dose, measured = np.asarray(concentration, np.float64), np.asarray(effect, np.float64)
    codes = np.asarray(compound, np.int64)
    if not dose.shape == measured.shape == codes.shape:
        raise InputError(f"{codes.size} compounds, {dose.size} concentrations and {measured.size} effects differ")
    wells = Members(codes)
    rows = []
    for code in range(len(wells.bounds) - 1):
        own = wells.of(code)
        own = own[~np.isnan(dose[own]) & ~np.isnan(measured[own])]
        n_doses = np.unique(dose[own]).size
        row: dict[str, Any] = {"n_wells": own.size, "n_doses": n_doses}
        if n_doses < 3:
            rows.append(row | {"excluded": "fewer than three doses"})
            continue
        ranks = [_standard_ranks(column[own]) for column in (dose, measured)]
        if not ranks[1].any():
            rows.append(row | {"excluded": "all its wells have the same effect"})
            continue
        orders, complete = _orders(own.size, n_permutations, seed)
        scores = ranks[1][orders] @ ranks[0]
        observed = float(ranks[1] @ ranks[0])
        p = p_value(observed, scores, complete)
        rows.append(row | {"spearman": observed, "p_value": p, "n_relabelings": len(orders)})
    return _typed(
        pd.DataFrame(rows, columns=["n_wells", "n_doses", "spearman", "p_value", "n_relabelings", "excluded"])
    )


def _standard_ranks(values: Floats) -> Floats:
    """Mean ranks, centred and of length 1; zeros where all are equal."""
    ranks = pd.Series(values).rank().to_numpy()
    ranks = ranks - ranks.mean()
    length = np.linalg.norm(ranks)
    return np.asarray(ranks / length if length > 0 else ranks)


@lru_cache(maxsize=64)
def _orders(n: int, n_permutations: int, seed: int) -> tuple[Ints, bool]:
    """Orders of n things: all, where these are few enough."""
    if n <= 12 and np.prod(np.arange(1.0, n + 1)) <= n_permutations:
        return np.array(list(itertools.permutations(range(n))), np.int64), True
    rng = np.random.default_rng([seed, n_permutations, n])
    return rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1), False


# --- shared --------------------------------------------------------------------------------------


def with_fdr(table: pd.DataFrame, fdr: float, verdict: str) -> pd.DataFrame:
    """Add the false discovery rate of the p-values, and whether it is below a limit.

    Args:
        table: with ``p_value``.
        fdr: the limit.
        verdict: name of the column that says so; missing where there is no p-value.

    Returns:
        The table with ``q_value`` and ``verdict`` behind the p-value.
    """
    q = benjamini_hochberg(table["p_value"])
    found = table.assign(q_value=q)
    found[verdict] = pd.Series(q <= fdr, index=table.index, dtype="boolean").mask(np.isnan(q))
    at = list(table).index("p_value") + 1
    return found[[*table.columns[:at], "q_value", verdict, *table.columns[at:]]]


def _finite(profiles: npt.ArrayLike, **columns: Any) -> Floats:
    """(n, D) float64."""
    values = np.asarray(profiles, np.float64)
    if values.ndim != 2:
        raise InputError(f"profiles have shape {values.shape}; expected (rows, dimensions)")
    for name, column in columns.items():
        if len(column) != len(values):
            raise InputError(f"{name} has {len(column)} entries for {len(values)} profiles")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise InputError(
            f"{bad.size} of {len(values)} profiles are not finite (the first is row {bad[0]}); leave them out, or "
            "the features that are not"
        )
    return values


def _grouped(codes: npt.ArrayLike, which: npt.NDArray[np.bool_]) -> list[Ints]:
    """The positions of each code among some of the profiles, for codes from 0 to the highest there is."""
    positions = np.flatnonzero(which)
    members = Members(np.asarray(codes, np.int64)[positions])
    return [positions[members.of(code)] for code in range(len(members.bounds) - 1)]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Counts as whole numbers, scores as floats, missing ones included."""
    numbers = {str(name) for name in table.columns} - {"label", "excluded"}
    table = table.astype({name: "Int64" if name.startswith("n_") else "float64" for name in numbers})
    table["excluded"] = table["excluded"].astype(object).where(table["excluded"].notna(), None)
    return table
