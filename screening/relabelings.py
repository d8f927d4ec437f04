"""What relabelings score: compiled loops for :mod:`screening.statistics` and :mod:`screening.prediction`.

A set of profiles is tight if each finds the others among its nearest, which is its mean average precision. What is near
does not depend on labels, so that a pool is ranked once and each relabeling only looks up ranks.

Ranks are doubled, to be whole numbers: entries at the same distance share their mean rank.

Shapes: N profiles of a pool, k members of a set.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from screening.cosines import Ints

# Average precisions are added up as multiples of 2**-50, so that the order of the additions is of no matter.
UNIT = 2.0**-50


def doubled_ranks(steps: npt.NDArray[Any], first: int) -> npt.NDArray[np.int32]:
    """Twice the rank of every other profile by similarity, equal ones at their mean rank.

    Args:
        steps: (rows, N) similarities of some profiles to all; changed.
        first: which of the N the first row is; a profile has no rank for itself.

    Returns:
        (rows, N) int32 from 2, 0 for the profile itself.
    """
    rows = np.arange(len(steps))
    steps[rows, first + rows] = np.inf
    np.negative(steps, out=steps)
    return _walk(steps, np.argsort(steps, axis=1))


@numba.njit(cache=True, nogil=True)
def _walk(distance: npt.NDArray[Any], order: Ints) -> npt.NDArray[np.int32]:
    """Ranks along sorted rows, whose first entry is the profile itself."""
    n_rows, n = distance.shape
    ranks = np.zeros((n_rows, n), np.int32)
    for i in range(n_rows):
        start = 1
        while start < n:
            end = start + 1
            while end < n and distance[i, order[i, end]] == distance[i, order[i, start]]:
                end += 1
            for at in range(start, end):
                # Places start..end - 1 (from 1) have the mean (start + end - 1) / 2.
                ranks[i, order[i, at]] = start + end - 1
            start = end
    return ranks


@numba.njit(cache=True, nogil=True)
def add_precisions(
    ranks: npt.NDArray[np.int32],
    first: int,
    drawn: npt.NDArray[np.int32],
    n_members: int,
    excluded: Ints,
    bounds: Ints,
    total: Ints,
) -> None:
    """Add the average precisions of members whose rows are here to the total of their draw.

    Args:
        ranks: (rows, N) doubled ranks of part of the pool.
        first: which of the pool the first row is.
        drawn: (draws, slots) which of the pool stands in each slot; the first are the members of the set.
        n_members: how many are, k; at least 2.
        excluded: slots that are no candidates of a member, member by member.
        bounds: (k + 1,) where in ``excluded`` those of each begin.
        total: (draws,) in multiples of :data:`UNIT`; added to.
    """
    found = np.empty(n_members - 1, np.int32)
    others = np.empty(np.diff(bounds).max(), np.int32)
    for d in range(drawn.shape[0]):
        for a in range(n_members):
            row = drawn[d, a] - first
            if row < 0 or row >= ranks.shape[0]:
                continue
            n_others = bounds[a + 1] - bounds[a]
            for e in range(n_others):
                others[e] = ranks[row, drawn[d, excluded[bounds[a] + e]]]
            n = 0
            for b in range(n_members):
                if b == a:
                    continue
                own = ranks[row, drawn[d, b]]
                # Those that are no candidates go from before it, and half from beside it.
                before = np.int32(0)
                for e in range(n_others):
                    before += np.int32(others[e] < own) + np.int32(others[e] <= own)
                found[n] = own - before
                n += 1
            _sort(found)
            precision = 0.0
            for i in range(n):
                precision += 2.0 * (i + 1) / found[i]
            total[d] += np.int64(np.rint(precision / n / UNIT))


@numba.njit(cache=True, nogil=True)
def _sort(values: npt.NDArray[np.int32]) -> None:
    """Sort in place; most sets are so small that inserting is fastest."""
    if values.size > 32:
        values.sort()
        return
    for i in range(1, values.size):
        value, j = values[i], i
        while j and values[j - 1] > value:
            values[j] = values[j - 1]
            j -= 1
        values[j] = value


@numba.njit(cache=True, nogil=True)
def shuffle(steps: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.int32]:
    """Begin to shuffle the numbers below ``size`` as Fisher and Yates do, once for each column.

    Args:
        steps: (k, draws) how far from its place the number for each place is fetched.
        size: how many numbers there are.

    Returns:
        (draws, k) the numbers at the first k places.
    """
    chosen, n_draws = steps.shape
    deck = np.arange(size).astype(np.int32)
    drawn = np.empty((n_draws, chosen), np.int32)
    for d in range(n_draws):
        for i in range(chosen):
            j = i + steps[i, d]
            deck[i], deck[j] = deck[j], deck[i]
        drawn[d] = deck[:chosen]
        # Each draw begins with the same deck: taking the swaps back is cheaper than a new one.
        for i in range(chosen - 1, -1, -1):
            j = i + steps[i, d]
            deck[i], deck[j] = deck[j], deck[i]
    return drawn


@numba.njit(cache=True, nogil=True)
def count_shares(
    weights: npt.NDArray[np.float64],
    drawn: npt.NDArray[np.int32],
    labels: Ints,
    observed: npt.NDArray[np.float64],
    tie: float,
) -> Ints:
    """In how many relabelings does each label get at least as much weight as it was observed to get?

    Args:
        weights: (k,) of the entries that are labelled.
        drawn: (draws, slots) which of ``labels`` the entries get; the first k slots are used.
        labels: (N,) codes from 0.
        observed: (M,) weight of each label.
        tie: what is counted as equal.

    Returns:
        (M,) of the draws.
    """
    count = np.zeros(observed.size, np.int64)
    total = np.empty(observed.size)
    for d in range(drawn.shape[0]):
        total[:] = 0
        for i in range(weights.size):
            total[labels[drawn[d, i]]] += weights[i]
        for m in range(observed.size):
            count[m] += total[m] >= observed[m] - tie
    return count
