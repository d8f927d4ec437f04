"""Retrieval metrics of re-identification: CMC (Rank-k), mean average precision, and their chance.

Cosine distance, as MitoReID (Nature Computational Science 2024) evaluates: candidates of a query
are the gallery entries outside its own group (there: the same experiment and drug), ordered by
distance with ties by gallery position, and only queries that have a match among them count.

The order is that of float64, found at less than twice the cost of a float32 product where
galleries are large (:mod:`screening.match_ranks`, benchmarks/retrieval.py).

Shapes: n queries, N gallery entries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from screening import cosines
from screening.cosines import Exact, Floats, Ints
from storage_schemas.errors import InputError

Labels = Sequence[Hashable] | npt.NDArray[Any]

# Similarities of one chunk of queries: the memory that is needed beyond the gallery and its float32 copy.
_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class Ranking:
    """Where the matches of each query stand among its candidates.

    Attributes:
        cmc: (max_rank,) float64, ``cmc[k - 1]`` = share of the counted queries with a match among
            their k nearest candidates (Rank-k); NaN when no query counts.
        mean_average_precision: mean of ``average_precision`` over the counted queries; NaN without.
        average_precision: (n,) float64, NaN for a query that has no match.
        first_match: (n,) int64, rank (from 1) of the nearest match, 0 where there is none.
        nearest: (n,) int64, gallery position of the nearest candidate, -1 where there is none.
        n_candidates: (n,) int64, gallery entries outside the query's group.
        n_matches: (n,) int64, candidates with the query's label.
    """

    cmc: Floats
    mean_average_precision: float
    average_precision: Floats
    first_match: Ints
    nearest: Ints
    n_candidates: Ints
    n_matches: Ints


def rank(
    query: npt.ArrayLike,
    query_label: Labels,
    query_group: Labels,
    gallery: npt.ArrayLike,
    gallery_label: Labels,
    gallery_group: Labels,
    max_rank: int = 50,
) -> Ranking:
    """Rank the gallery for every query and score where the matches are.

    The order is that of cosines in float64; those closer than about 1e-12 are ties. Queries go
    through in chunks: memory is a float32 copy of the gallery plus a constant.

    Args:
        query: (n, D) finite vectors of any length; a zero vector has cosine 0 with everything.
        query_label: (n,) hashables; a match has the same label.
        query_group: (n,) hashables; candidates of the query's own group are left out.
        gallery: (N, D) like ``query``.
        gallery_label: (N,) like ``query_label``.
        gallery_group: (N,) like ``query_group``.
        max_rank: length of the CMC curve; beyond the number of candidates it stays flat.

    Raises:
        InputError: shapes that do not fit each other, or values that are not finite.
    """
    # Compiled loops; a prediction, which asks for the nearest alone, need not wait for numba.
    from screening.match_ranks import score

    if max_rank < 1:
        raise InputError(f"max_rank is {max_rank}; a CMC curve needs at least rank 1")
    scorer = _Scorer(query, query_group, gallery, gallery_group)
    query_code, gallery_code = encode(query_label, gallery_label, scorer.shape, "label")
    same_label = Members(gallery_code, query_code)

    n = scorer.shape[0]
    average_precision = np.full(n, np.nan)
    first_match, closest, n_matches = (np.zeros(n, np.int64) for _ in range(3))
    for chunk, block, highest, exact in scorer.blocks():
        closest[chunk], n_matches[chunk], first_match[chunk], average_precision[chunk], settled = score(
            block, highest, exact, query_code[chunk], same_label.order, same_label.bounds
        )
        for i in np.flatnonzero(~settled):
            at = chunk.start + i
            row = _in_steps(exact, int(i), block[i])
            closest[at], ranks = _sorted(row, same_label.of(query_code[at]))
            if ranks.size:
                first_match[at] = ranks[0]
                average_precision[at] = np.mean(np.arange(1, ranks.size + 1) / ranks)

    counted = first_match > 0
    n_counted = int(counted.sum())
    hits = np.bincount(first_match[counted], minlength=max_rank + 1)[1 : max_rank + 1]
    return Ranking(
        cmc=np.cumsum(hits) / n_counted if n_counted else np.full(max_rank, np.nan),
        mean_average_precision=(float(average_precision[counted].mean()) if n_counted else float("nan")),
        average_precision=average_precision,
        first_match=first_match,
        nearest=closest,
        n_candidates=scorer.n_candidates,
        n_matches=n_matches,
    )


def nearest(
    query: npt.ArrayLike,
    query_group: Labels,
    gallery: npt.ArrayLike,
    gallery_group: Labels,
) -> Ints:
    """Find each query's nearest candidate in the gallery, as :func:`rank` orders them.

    Returns:
        (n,) int64; -1 where every gallery entry is of the query's own group.

    Raises:
        InputError: as :func:`rank`.
    """
    scorer = _Scorer(query, query_group, gallery, gallery_group)
    found = np.full(scorer.shape[0], -1)
    for chunk, block, highest, exact in scorer.blocks():
        near = highest - 2 * cosines.off(exact.tolerance, highest)
        for i in np.flatnonzero(highest > -np.inf):
            positions = np.flatnonzero(block[i] >= near[i])
            steps, fits = exact.steps(int(i), positions, block[i, positions])
            if not fits:
                positions = np.flatnonzero(block[i] > -np.inf)
                steps, _ = exact.steps(int(i), positions, block[i, positions])
            found[chunk.start + i] = positions[steps.argmax()]
    return found


def chance_cmc(n_candidates: Ints, n_matches: Ints, max_rank: int = 50) -> Floats:
    """Compute the CMC expected when every query's candidates are in random order.

    A query with m matches among N candidates has one within the first k with probability
    ``1 - C(N - m, k) / C(N, k)``; the mean of that over the queries is returned.

    Args:
        n_candidates: (n,) N of each query.
        n_matches: (n,) m of each query, at least 1.
        max_rank: length of the curve.

    Returns:
        (max_rank,) float64; NaN without queries.
    """
    if not len(n_matches):
        return np.full(max_rank, np.nan)
    drawn = np.arange(max_rank)
    left = np.maximum(n_candidates[:, None] - drawn, 1)
    misses_left = np.maximum((n_candidates - n_matches)[:, None] - drawn, 0)
    found: Floats = 1 - np.cumprod(misses_left / left, axis=1)
    return np.asarray(found.mean(axis=0))


def chance_average_precision(n_candidates: Ints, n_matches: Ints) -> Floats:
    """Compute the average precision expected when the candidates are in random order.

    For m matches among N candidates it is ``(H_N + (m - 1) (N - H_N) / (N - 1)) / N`` with the
    harmonic number ``H_N``: position r holds a match with probability m/N, and each of the r - 1
    before it then holds one with probability (m - 1)/(N - 1). (Bestgen 2015, "Exact expected
    average precision of the random baseline for system evaluation".)

    Args:
        n_candidates: (n,) N of each query.
        n_matches: (n,) m of each query, at least 1.

    Returns:
        (n,) float64.
    """
    if not len(n_matches):
        return np.zeros(0)
    harmonic = np.cumsum(1 / np.arange(1, n_candidates.max() + 1))[n_candidates - 1]
    others = (n_matches - 1) / np.maximum(n_candidates - 1, 1)
    return np.asarray((harmonic + others * (n_candidates - harmonic)) / n_candidates)


def unit_rows(vectors: npt.ArrayLike) -> Floats:
    """Scale rows to Euclidean length 1, in float64; a row of zeros stays zero.

    Args:
        vectors: (n, D).

    Returns:
        (n, D) float64.

    Raises:
        InputError: a row with NaN, infinity, or a length beyond float64.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    length = lengths(rows, "the vectors")
    return np.asarray(rows / length[:, None])


def lengths(rows: npt.NDArray[Any], name: str) -> Floats:
    """Measure rows, in float64 whatever their type; a row of zeros counts as of length 1.

    Args:
        rows: (n, D).
        name: what they are, for the error.

    Returns:
        (n,) float64, all positive.

    Raises:
        InputError: a row with NaN, infinity, or a length beyond float64.
    """
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(length))
    if bad.size:
        raise InputError(
            f"{name}: {bad.size} of {len(rows)} rows are not finite (the first is row {bad[0]}); "
            "leave them out or repair the embedding"
        )
    return np.where(length > 0, length, 1.0)


def encode(query: Labels, gallery: Labels, shape: tuple[int, int], name: str) -> tuple[Ints, Ints]:
    """Code hashables as integers, equal where they are equal, over query and gallery together.

    Args:
        query: n hashables.
        gallery: N hashables.
        shape: (n, N) that is expected.
        name: what they are, for the error.

    Returns:
        (n,) and (N,) int64, numbered from 0 by first appearance, queries first.

    Raises:
        InputError: another number of them than expected, or one that is not hashable.
    """
    known: dict[Hashable, int] = {}
    codes = []
    for side, values, expected in (("query", query, shape[0]), ("gallery", gallery, shape[1])):
        items = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(items) != expected:
            raise InputError(f"{side}_{name} has {len(items)} entries for {expected} vectors")
        try:
            found = [known.setdefault(item, len(known)) for item in items]
        except TypeError as error:
            raise InputError(f"{side}_{name} must be one hashable a vector: {error}") from error
        codes.append(np.array(found, np.int64))
    return codes[0], codes[1]


class Members:
    """The positions that carry each code, in ascending order.

    Args:
        codes: (N,) codes from 0.
        asked: codes that may be asked for too, though no position carries them.

    Attributes:
        order: (N,) int64, the positions sorted by code.
        bounds: where in ``order`` the positions of each code begin, and the last ones end.
    """

    def __init__(self, codes: Ints, asked: Ints | None = None) -> None:
        top = max(codes.max(initial=-1), -1 if asked is None else asked.max(initial=-1))
        self.order = np.argsort(codes, kind="stable")
        self.bounds = np.searchsorted(codes[self.order], np.arange(top + 2))

    def of(self, code: int) -> Ints:
        """Positions with that code; none for a code that does not occur."""
        return self.order[self.bounds[code] : self.bounds[code + 1]]


class _Scorer:
    """Similarities of queries to gallery, chunk by chunk; the query's own group is at minus infinity.

    With unit vectors q and g and the mean m of the latter, ``(q - m)·(g - m) + m·(g - m) = q·g - q·m``: the same
    order for each query, and of numbers so small that float32 rounds little off embeddings that all look alike.
    """

    def __init__(
        self,
        query: npt.ArrayLike,
        query_group: Labels,
        gallery: npt.ArrayLike,
        gallery_group: Labels,
    ) -> None:
        self._query, self._gallery = _floats(query), _floats(gallery)
        for name, rows in (("query", self._query), ("gallery", self._gallery)):
            if rows.ndim != 2:
                raise InputError(f"{name} has shape {rows.shape}; expected (vectors, dimensions)")
        if self._query.shape[1] != self._gallery.shape[1]:
            raise InputError(
                f"query vectors have {self._query.shape[1]} dimensions, gallery vectors "
                f"{self._gallery.shape[1]}; embed both with the same model"
            )
        self._query_length = lengths(self._query, "query")
        self._scale = 1 / lengths(self._gallery, "gallery")
        self.shape = len(self._query), len(self._gallery)
        self._query_group, codes = encode(query_group, gallery_group, self.shape, "group")
        self._same_group = Members(codes, self._query_group)
        self.n_candidates = self.shape[1] - np.diff(self._same_group.bounds)[self._query_group]
        self._centre()

    def _centre(self) -> None:
        """Set the mean unit vector, the gallery about it in float32, and what the mean adds."""
        n, dims = self._gallery.shape
        tiles = [slice(start, start + cosines.TILE) for start in range(0, n, cosines.TILE)]
        self._mean = np.zeros(dims)
        for tile in tiles:
            self._mean += self._scale[tile] @ self._gallery[tile] / n
        self._centred = np.empty((n, dims), np.float32)
        self._along_mean = np.empty(n, np.float32)
        self._radius = 0.0
        for tile in tiles:
            rows = self._gallery[tile] * self._scale[tile, None] - self._mean
            self._centred[tile] = rows
            self._along_mean[tile] = rows @ self._mean
            self._radius = max(self._radius, float(np.linalg.norm(rows, axis=1).max()))

    def blocks(self) -> Iterator[tuple[slice, npt.NDArray[np.float32], npt.NDArray[np.float32], Exact]]:
        """Which queries, their (chunk, N) similarities, the largest of each, and what is needed to look closer.

        The array of similarities is reused.
        """
        n, n_gallery = self.shape
        size = max(1, min(n, _CHUNK_BYTES // (4 * max(n_gallery, 1))))
        buffer = np.empty((size, n_gallery), np.float32)
        for start in range(0, n, size):
            chunk = slice(start, min(start + size, n))
            block = buffer[: chunk.stop - start]
            # Division by a float64 length makes float64 of any query.
            unit = self._query[chunk] / self._query_length[chunk, None]
            about_mean = unit - self._mean
            np.matmul(about_mean.astype(np.float32), self._centred.T, out=block)
            block += self._along_mean
            for row, group in zip(block, self._query_group[chunk], strict=True):
                row[self._same_group.of(group)] = -np.inf
            highest = block.max(axis=1, initial=-np.inf)
            yield (
                chunk,
                block,
                highest,
                Exact(
                    unit,
                    self._gallery,
                    self._scale,
                    unit @ self._mean,
                    cosines.tolerance(np.linalg.norm(about_mean, axis=1) * self._radius),
                ),
            )


def _floats(values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values)
    kept = array.dtype in (np.float32, np.float64)
    return np.ascontiguousarray(array) if kept else array.astype(np.float64, order="C")


def _in_steps(exact: Exact, i: int, similar: npt.NDArray[np.float32]) -> Floats:
    """(N,) cosines of one query in steps; what is at minus infinity stays there."""
    from screening.match_ranks import all_steps

    return np.where(similar > -np.inf, all_steps(exact, i), -np.inf)


def _sorted(row: Floats, matches: Ints) -> tuple[int, Ints]:
    """The first candidate (-1: there is none) and the ascending ranks of the matches, by sorting a row."""
    order = np.argsort(-row, kind="stable")[: np.count_nonzero(row > -np.inf)]
    is_match = np.zeros(row.size, bool)
    is_match[matches] = True
    return int(order[0]) if order.size else -1, np.flatnonzero(is_match[order]) + 1
