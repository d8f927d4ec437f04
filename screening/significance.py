"""How much of a finding could be chance: permutation p-values, false discovery rates and enrichment.

A permutation p-value counts how many relabelings score at least as high as what was observed. Where there are few of
them all are gone through, else a sample is drawn; which ones depends on the seed and the numbers of labels alone, so
that a p-value does not depend on what else is tested (Phipson & Smyth 2010, "Permutation P-values should never be
zero", for the one that is added).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screening.cosines import Floats
from storage_schemas.errors import InputError

# Scores nearer than this are equal: sums of the same numbers in another order.
TIE = 1e-12

ENRICHMENT_COLUMNS = ("label", "n_found", "n_drawn", "n_label", "n_total", "fold", "p_value", "q_value")


class Draws(NamedTuple):
    """Relabelings.

    Attributes:
        members: (draws, k) int32, which entries carry the label in each.
        complete: whether these are all there are, what was observed among them.
    """

    members: npt.NDArray[np.int32]
    complete: bool


def subsets(strata: Sequence[tuple[int, int]], n_draws: int, seed: int) -> Draws:
    """Ways to choose as many entries of each stratum as were observed.

    Args:
        strata: how many are chosen and how many there are, for each stratum; entries are numbered through.
        n_draws: all subsets are returned where there are no more than that, else a sample of that many, with
            replacement.
        seed: of the sample.

    Raises:
        InputError: more are to be chosen than there are.
    """
    starts = itertools.accumulate((size for _, size in strata), initial=0)
    placed = [(start, *stratum) for start, stratum in zip(starts, strata, strict=False)]
    if math.prod(math.comb(size, chosen) for chosen, size in strata) <= n_draws:
        within = [itertools.combinations(range(start, start + size), chosen) for start, chosen, size in placed]
        every = [[*itertools.chain(*parts)] for parts in itertools.product(*within)]
        return Draws(np.array(every, np.int32), complete=True)
    # Strata of one size must not be drawn from alike.
    parts = [
        start + arrangements(chosen, size, n_draws, (seed, number))
        for number, (start, chosen, size) in enumerate(placed)
    ]
    return Draws(np.concatenate(parts, axis=1, dtype=np.int32), complete=False)


def arrangements(chosen: int, size: int, n_draws: int, seed: Sequence[int]) -> npt.NDArray[np.int32]:
    """Entries drawn without replacement, in random order.

    Args:
        chosen: how many; the first of more are the same as fewer.
        size: out of how many.
        n_draws: how often.
        seed: of the draws.

    Returns:
        (n_draws, chosen) different numbers from 0 to ``size - 1``.

    Raises:
        InputError: more are to be chosen than there are.
    """
    from screening.relabelings import shuffle  # compiled; a query need not wait for it

    if chosen > size:
        raise InputError(f"{chosen} entries cannot be chosen out of {size}")
    rng = np.random.default_rng([*seed, n_draws, size])
    steps = [rng.integers(size - i, size=n_draws, dtype=np.int32) for i in range(chosen)]
    return shuffle(np.array(steps, np.int32).reshape(chosen, n_draws), size)


def p_value(observed: float, null: npt.ArrayLike, complete: bool) -> float:
    """The share of relabelings that score at least as high as the observed one.

    Args:
        observed: the score.
        null: (draws,) scores of relabelings.
        complete: whether they are all there are; of a sample, the observed one is added: (count + 1) / (draws + 1).

    Returns:
        In (0, 1]; NaN for an observed NaN or without relabelings.
    """
    scores = np.asarray(null, np.float64)
    if np.isnan(observed) or not scores.size:
        return float("nan")
    count = int(np.count_nonzero(scores >= observed - TIE))
    return count / scores.size if complete else (count + 1) / (scores.size + 1)


def benjamini_hochberg(p_values: npt.ArrayLike) -> Floats:
    """False discovery rate at which each test would be called (Benjamini & Hochberg 1995).

    Args:
        p_values: (n,); NaN is no test.

    Returns:
        (n,) q-values: the least over all p at least as large of ``p * tests / rank``; NaN where there is no test.

    Raises:
        InputError: a p-value outside of [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    tested = ~np.isnan(p)
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise InputError("p-values lie between 0 and 1")
    order = np.argsort(p[tested], kind="stable")
    n = order.size
    scaled = p[tested][order] * n / np.arange(1, n + 1)
    least = np.minimum.accumulate(scaled[::-1])[::-1]
    found = np.empty(n)
    found[order] = np.minimum(least, 1)
    q = np.full(p.shape, np.nan)
    q[tested] = found
    return q


def enrichment(drawn: Sequence[Sequence[str]], background: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Is a label more frequent in a list than in what the list was drawn from?

    The p-value is that of the hypergeometric distribution: at least as many with the label among as many drawn without
    replacement (the one-sided test of Fisher), in exact fractions.

    Args:
        drawn: labels of each entry of the list, such as the mechanisms of a compound's neighbours; none where empty.
        background: labels of each entry that the list could have been drawn from, those of the list among them.

    Returns:
        A row a label of the list: ``n_found`` of ``n_drawn`` have it, and ``n_label`` of ``n_total`` in the background;
        ``fold`` how much more than expected; p_value and q_value. By p-value, then label.

    Raises:
        InputError: a label is more frequent in the list than in the background.
    """
    found, known = (Counter(label for labels in side for label in set(labels)) for side in (drawn, background))
    n_drawn, n_total = len(drawn), len(background)
    rows = []
    for label, count in found.items():
        n_label = known[label]
        if count > n_label or n_drawn > n_total:
            raise InputError(f"{label!r} is in the list more often than in what the list was drawn from")
        p = at_least(count, n_drawn, n_label, n_total)
        rows.append((label, count, n_drawn, n_label, n_total, count * n_total / (n_drawn * n_label), p))
    table = pd.DataFrame(rows, columns=list(ENRICHMENT_COLUMNS[:-1]))
    table["q_value"] = benjamini_hochberg(table["p_value"])
    return table.sort_values(["p_value", "label"], ignore_index=True)


def at_least(n_found: int, n_drawn: int, n_label: int, n_total: int) -> float:
    """Chance that of ``n_drawn`` out of ``n_total`` at least ``n_found`` are among the ``n_label`` (hypergeometric)."""
    ways = sum(
        math.comb(n_label, i) * math.comb(n_total - n_label, n_drawn - i)
        for i in range(n_found, min(n_drawn, n_label) + 1)
    )
    return float(Fraction(ways, math.comb(n_total, n_drawn)))
