"""What retrieval metrics cost beside a loop over queries, and whether the numbers are the same.

Run: ``OMP_NUM_THREADS=1 python benchmarks/retrieval.py [QUERIES GALLERY [LOOPED]]``. One process, one thread, CPU
seconds. The loop is the usual one of re-identification code: a row of distances to a query, the gallery sorted by it,
the query's own group masked, and a list of the precisions at every place, from a running sum. Beside it the same loop
with that list as one numpy expression. Both go through LOOPED queries only, spread over as many turns as
:func:`screening.retrieval.rank` has; their times for all queries are in proportion. Without arguments: the memory of
1,000 × 200,000, then 5,000 × 20,000 against the loops.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from screening.retrieval import rank

DIMENSIONS, MOAS, COMPOUNDS, ROUNDS = 512, 38, 12, 3
Array = npt.NDArray[Any]


class Cells(NamedTuple):
    """Embeddings (n, 512) float32, an MOA and a compound of it each."""

    embedding: Array
    moa: Array
    group: Array


def draw(n: int, centres: Array, rng: np.random.Generator) -> Cells:
    """Cells about the centres of their MOAs, with far more noise than signal."""
    moa = rng.integers(0, MOAS, n)
    noise = rng.standard_normal((n, DIMENSIONS), dtype=np.float32)
    noise += np.float32(0.3) * centres[moa]
    return Cells(noise, moa, moa * COMPOUNDS + rng.integers(0, COMPOUNDS, n))


def listed(hits: Array) -> Array:
    """Precision at every place, entry by entry."""
    return np.asarray([hit / (place + 1.0) for place, hit in enumerate(hits.cumsum())])


def vectorised(hits: Array) -> Array:
    """The same in numpy."""
    return np.asarray(hits.cumsum() / np.arange(1, hits.size + 1))


def loop(query: Cells, unit_gallery: Array, gallery: Cells, precision: Callable[[Array], Array]) -> list[float]:
    """Average precision of each query that has a match; the gallery's vectors are float64 of length 1."""
    found = []
    for vector, moa, group in zip(*query, strict=True):
        unit = vector.astype(np.float64)
        distance = 1 - unit_gallery @ (unit / np.linalg.norm(unit))
        order = np.argsort(distance, kind="stable")
        order = order[gallery.group[order] != group]
        hits = (gallery.moa[order] == moa).astype(np.int64)
        if hits.any():
            found.append(float((precision(hits) * hits).sum() / hits.sum()))
    return found


def seconds(function: Any, *arguments: Any) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned."""
    start = time.process_time()
    found = function(*arguments)
    return time.process_time() - start, found


def compile_loops() -> None:
    """Let numba compile what is timed later."""
    few = Cells(np.eye(10, DIMENSIONS, dtype=np.float32), np.zeros(10, int), np.arange(10))
    rank(*few, *few)


def compare(n: int, n_gallery: int, looped: int) -> None:
    """Print both in turn, and by how much their average precisions differ."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((MOAS, DIMENSIONS), dtype=np.float32)
    query, gallery = draw(n, centres, rng), draw(n_gallery, centres, rng)
    unit_gallery = gallery.embedding.astype(np.float64)
    unit_gallery /= np.linalg.norm(unit_gallery, axis=1, keepdims=True)
    ours, theirs, better, product, precisions = [], [], [], [], []
    for turn in range(ROUNDS):
        share = slice(turn * looped // ROUNDS, (turn + 1) * looped // ROUNDS)
        part = Cells(*(column[share] for column in query))
        spent, found = seconds(loop, part, unit_gallery, gallery, listed)
        theirs.append(spent / len(part.moa))
        spent, _ = seconds(loop, part, unit_gallery, gallery, vectorised)
        better.append(spent / len(part.moa))
        precisions += found
        spent, ranking = seconds(rank, *query, *gallery)
        ours.append(spent / n)
        spent, _ = seconds(np.matmul, query.embedding[:800], gallery.embedding.T)
        product.append(spent / min(n, 800))
    fast = statistics.median(ours)
    difference = np.abs(ranking.average_precision[ranking.n_matches > 0][: len(precisions)] - precisions).max()
    print(f"{n:,} queries × {n_gallery:,} × {DIMENSIONS}, medians of {ROUNDS} turns; loops in proportion from {looped}")
    rows = {"loop": theirs, "loop, numpy within": better, "screening.retrieval": ours, "float32 product": product}
    for name, times in rows.items():
        spent = statistics.median(times)
        print(f"{name:<20} {1e3 * spent:8.2f} ms a query {n * spent:8.1f} s {spent / fast:8.1f} × screening.retrieval")
    print(f"largest difference of an average precision: {difference:.1e}")


def measure_memory(n: int, n_gallery: int) -> None:
    """Print the time and the most memory that the process has held."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((MOAS, DIMENSIONS), dtype=np.float32)
    query, gallery = draw(n, centres, rng), draw(n_gallery, centres, rng)
    spent, _ = seconds(rank, *query, *gallery)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{n:,} queries × {n_gallery:,} × {DIMENSIONS}: {1e3 * spent / n:.2f} ms a query; the process held at most")
    print(f"{peak:.2f} GiB, {gallery.embedding.nbytes / 2**30:.2f} of them the gallery it was given")


if __name__ == "__main__":
    compile_loops()
    sizes = [int(argument) for argument in sys.argv[1:]]
    if len(sizes) > 1:
        compare(sizes[0], sizes[1], sizes[2] if len(sizes) > 2 else 60)
    elif sizes == []:
        # The memory first: what a process has held at most never falls.
        measure_memory(1000, 200_000)
        compare(5000, 20_000, 60)
    else:
        sys.exit(__doc__)
