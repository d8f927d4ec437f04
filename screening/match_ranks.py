"""Ranks of matches among a query's candidates, without sorting: compiled loops for :mod:`screening.retrieval`.

A match's rank is one more than the number of candidates before it. A float32 product places all candidates on a fine
grid; those in cells above the match are counted, and the few that are too near to it for float32 to tell are compared
in float64.

Not settled here are queries for which float32 is off by more than :mod:`screening.cosines` allows, and those with so
many near ties that sorting is cheaper.

Shapes: N gallery entries, D dimensions; a chunk is some queries.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from screening.cosines import COSINE_STEPS, Exact, Floats, Ints, off

_off = numba.njit(cache=True, nogil=True)(off)


_GRID_CELLS = 2**14  # their counts fit a core's cache, and few entries share a cell


@numba.njit(cache=True, nogil=True)
def score(
    block: npt.NDArray[np.float32],
    highest: npt.NDArray[np.float32],
    exact: Exact,
    code: Ints,
    order: Ints,
    bounds: Ints,
) -> tuple[Ints, Ints, Ints, Floats, npt.NDArray[np.bool_]]:
    """Nearest candidate, number of matches, rank of the first and average precision of a chunk's queries.

    Args:
        block: (chunk, N) similarities.
        highest: (chunk,) the largest of each row.
        exact: what they are looked at more closely with.
        code: (chunk,) labels.
        order: gallery positions by label.
        bounds: where each label's begin in it.

    Returns:
        Four arrays (chunk,), and which queries are settled: of the others, ranks and nearest are not to be used.
    """
    n, n_gallery = block.shape
    nearest, settled = closest(block, highest, exact)
    n_matches, first_match = np.zeros(n, np.int64), np.zeros(n, np.int64)
    average_precision = np.full(n, np.nan)
    ends = np.empty(_GRID_CELLS + 3, np.int32)
    cell, entries = np.empty(n_gallery, np.int32), np.empty(n_gallery, np.int32)
    is_rank = np.zeros(n_gallery + 1, np.bool_)
    for i in range(n):
        row, unit, shift, tolerance = block[i], exact.query[i], exact.shift[i], exact.tolerance[i]
        members = order[bounds[code[i]] : bounds[code[i] + 1]]
        lowest = np.inf
        for match in members:
            if row[match] > -np.inf:
                n_matches[i] += 1
                lowest = min(lowest, row[match])
        if n_matches[i] == 0 or not settled[i]:
            continue
        top = highest[i] + 3 * _off(tolerance, highest[i])
        cells_a_unit = _GRID_CELLS / (top - lowest + 4 * _off(tolerance, lowest))
        _fill_grid(row, top, cells_a_unit, cell, entries, ends)
        last = _mark_ranks(
            members, row, unit, exact.gallery, exact.scale, shift, tolerance, top, cells_a_unit, entries, ends, is_rank
        )
        if last < 0:
            settled[i] = False
            is_rank[:] = False
            continue
        found, precision = 0, 0.0
        for rank in range(1, last + 1):
            if is_rank[rank]:
                is_rank[rank] = False
                found += 1
                precision += found / rank
                if found == 1:
                    first_match[i] = rank
        average_precision[i] = precision / n_matches[i]
    return nearest, n_matches, first_match, average_precision, settled


@numba.njit(cache=True, nogil=True)
def closest(
    block: npt.NDArray[np.float32], highest: npt.NDArray[np.float32], exact: Exact
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """(chunk,) nearest candidates, -1 where there is none, and which of them are settled."""
    n, n_gallery = block.shape
    nearest, settled = np.full(n, -1), np.ones(n, np.bool_)
    for i in range(n):
        row, tolerance = block[i], exact.tolerance[i]
        if highest[i] == -np.inf:
            continue
        most = -np.inf
        near = highest[i] - 2 * _off(tolerance, highest[i])
        for j in range(n_gallery):
            if row[j] >= near:
                steps, fits = _steps(
                    exact.query[i], exact.gallery[j], exact.scale[j], exact.shift[i], tolerance, row[j]
                )
                settled[i] &= fits
                if steps > most:
                    nearest[i], most = j, steps
    return nearest, settled


@numba.njit(cache=True, nogil=True)
def _fill_grid(
    row: npt.NDArray[np.float32],
    top: float,
    cells_a_unit: float,
    cell: npt.NDArray[np.int32],
    entries: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int32],
) -> None:
    """Sort a row's entries by cell (a counting sort): cell 0 is the highest, the last holds all below the grid."""
    for j in range(row.size):
        cell[j] = _cell(row[j], top, cells_a_unit)
    ends[:] = 0
    for j in range(row.size):
        ends[cell[j] + 1] += 1
    for c in range(1, ends.size):
        ends[c] += ends[c - 1]
    # Beginnings until each has gone past its last entry.
    for j in range(row.size):
        entries[ends[cell[j]]] = j
        ends[cell[j]] += 1


@numba.njit(cache=True, nogil=True)
def _cell(value: float, top: float, cells_a_unit: float) -> np.int32:
    cells = (np.float32(top) - np.float32(value)) * np.float32(cells_a_unit)
    return np.int32(min(max(cells, np.float32(0)), np.float32(_GRID_CELLS + 1)))


@numba.njit(cache=True, nogil=True)
def _mark_ranks(
    members: Ints,
    row: npt.NDArray[np.float32],
    unit: Floats,
    gallery: npt.NDArray[Any],
    scale: Floats,
    shift: float,
    tolerance: float,
    top: float,
    cells_a_unit: float,
    entries: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int32],
    is_rank: npt.NDArray[np.bool_],
) -> int:
    """Mark the ranks of a query's matches; the largest, or -1 where sorting the row in float64 is called for.

    Cells are looked through a bit farther than entries are compared, for the rounding of the cells themselves.
    """
    largest = 0
    left = row.size // 4  # cosines; more are dearer than sorting
    for match in members:
        similar = row[match]
        if similar == -np.inf:
            continue
        off = _off(tolerance, similar)
        above, below = similar + 2 * off, similar - 2 * off
        first = _cell(above + off, top, cells_a_unit)
        last = _cell(below - off, top, cells_a_unit)
        start = ends[first - 1] if first > 0 else 0
        before = start
        own, fits = np.nan, True
        for at in range(start, ends[last]):
            j = entries[at]
            if row[j] > above:
                before += 1
            elif row[j] >= below and j != match:
                if own != own:
                    own, fits = _steps(unit, gallery[match], scale[match], shift, tolerance, similar)
                steps, fits_too = _steps(unit, gallery[j], scale[j], shift, tolerance, row[j])
                left -= 1
                if left < 0 or not (fits and fits_too):
                    return -1
                before += steps > own or (steps == own and j < match)
        is_rank[before + 1] = True
        largest = max(largest, before + 1)
    return largest


@numba.njit(cache=True, nogil=True)
def _steps(
    unit: Floats, vector: npt.NDArray[Any], scale: float, shift: float, tolerance: float, similar: float
) -> tuple[float, bool]:
    """A cosine in steps, in float64, and whether the float32 value is as near to it as it should be."""
    cosine = _dot(unit, vector) * scale
    return np.rint(cosine * COSINE_STEPS), abs(cosine - shift - similar) <= _off(tolerance, similar) / 2


@numba.njit(cache=True, nogil=True)
def all_steps(exact: Exact, i: int) -> Floats:
    """(N,) the cosines of one query in steps."""
    steps = np.empty(len(exact.gallery))
    for j in range(len(exact.gallery)):
        steps[j], _ = _steps(exact.query[i], exact.gallery[j], exact.scale[j], 0.0, 0.0, 0.0)
    return steps


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(a: Floats, b: npt.NDArray[Any]) -> float:
    # Always in this order, so that equal vectors have equal products.
    total = 0.0
    for d in range(a.size):
        total += a[d] * b[d]
    return total
