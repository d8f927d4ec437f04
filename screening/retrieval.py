"""Retrieval metrics of re-identification: CMC (Rank-k), mean average precision, and their chance.

Cosine distance, as MitoReID (Nature Computational Science 2024) evaluates: candidates of a query
are the gallery entries outside its own group (there: the same experiment and drug), ordered by
distance with ties by gallery position, and only queries that have a match among them count.

Shapes: n queries, N gallery entries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage_schemas.errors import InputError

Labels = Sequence[Hashable] | npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Similarities of one chunk of queries; memory beyond the gallery itself stays near twice this.
_CHUNK_BYTES = 2**26
# Cosines are kept as integer multiples of 2**-40: a matrix product rounds the last bits of equal
# vectors differently by their place in a block, and equal vectors must tie.
_COSINE_STEPS = 2.0**40


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

    Exact, in float64; queries go through in chunks, so memory is the gallery's plus a constant.
    Cosines closer than about 1e-12 are ties.

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
    if max_rank < 1:
        raise InputError(f"max_rank is {max_rank}; a CMC curve needs at least rank 1")
    scorer = _Scorer(query, query_group, gallery, gallery_group)
    query_code, gallery_code = encode(query_label, gallery_label, scorer.shape, "label")
    same_label = Members(gallery_code)

    n = scorer.shape[0]
    average_precision = np.full(n, np.nan)
    first_match, closest, n_matches = (np.zeros(n, np.int64) for _ in range(3))
    for start, block in scorer.blocks():
        closest[start : start + len(block)] = _closest(block)
        for i, row in enumerate(block, start):
            positions = same_label.of(query_code[i])
            positions = positions[row[positions] > -np.inf]
            if not positions.size:
                continue
            ranks = _ranks(row, positions)
            n_matches[i] = ranks.size
            first_match[i] = ranks[0]
            average_precision[i] = np.mean(np.arange(1, ranks.size + 1) / ranks)

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
    found = np.zeros(scorer.shape[0], np.int64)
    for start, block in scorer.blocks():
        found[start : start + len(block)] = _closest(block)
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
    """

    def __init__(self, codes: Ints) -> None:
        self._order = np.argsort(codes, kind="stable")
        self._bounds = np.searchsorted(codes[self._order], np.arange(codes.max(initial=-1) + 2))

    def of(self, code: int) -> Ints:
        """Positions with that code; none for a code that does not occur."""
        if code + 1 >= len(self._bounds):
            return self._order[:0]
        return self._order[self._bounds[code] : self._bounds[code + 1]]


class _Scorer:
    """Cosines of queries to gallery, chunk by chunk; the query's own group is at minus infinity."""

    def __init__(
        self,
        query: npt.ArrayLike,
        query_group: Labels,
        gallery: npt.ArrayLike,
        gallery_group: Labels,
    ) -> None:
        # Query and gallery are scaled by their lengths around the product: a float64 gallery
        # is then never copied.
        self._query = np.asarray(query)
        self._gallery = np.asarray(gallery, dtype=np.float64)
        for name, rows in (("query", self._query), ("gallery", self._gallery)):
            if rows.ndim != 2:
                raise InputError(f"{name} has shape {rows.shape}; expected (vectors, dimensions)")
        if self._query.shape[1] != self._gallery.shape[1]:
            raise InputError(
                f"query vectors have {self._query.shape[1]} dimensions, gallery vectors "
                f"{self._gallery.shape[1]}; embed both with the same model"
            )
        self._query_length = lengths(self._query, "query")
        self._gallery_scale = _COSINE_STEPS / lengths(self._gallery, "gallery")
        self.shape = len(self._query), len(self._gallery)
        self._query_group, codes = encode(query_group, gallery_group, self.shape, "group")
        self._same_group = Members(codes)
        own = np.array([self._same_group.of(code).size for code in self._query_group], np.int64)
        self.n_candidates = self.shape[1] - own

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """(first query, (chunk, N) cosines in steps); the array is reused, take nothing along."""
        n, n_gallery = self.shape
        size = max(1, min(n, _CHUNK_BYTES // (8 * max(n_gallery, 1))))
        buffer = np.empty((size, n_gallery))
        for start in range(0, n, size):
            chunk = slice(start, min(start + size, n))
            block = buffer[: chunk.stop - start]
            # Division by a float64 length makes float64 of any query.
            scaled = self._query[chunk] / self._query_length[chunk, None]
            np.matmul(scaled, self._gallery.T, out=block)
            block *= self._gallery_scale
            np.rint(block, out=block)
            for row, group in zip(block, self._query_group[chunk], strict=True):
                row[self._same_group.of(group)] = -np.inf
            yield start, block


def _ranks(row: Floats, matches: Ints) -> Ints:
    """Ascending ranks (from 1) of the matches in descending ``row``, ties by position."""
    ordered = np.sort(row)
    not_above = np.searchsorted(ordered, np.sort(row[matches])[::-1], side="right")
    # Sorting values is cheaper than sorting positions, which only ties need.
    if np.any(ordered[not_above - 1] == ordered[not_above - 2]):
        is_match = np.zeros(row.size, bool)
        is_match[matches] = True
        return np.flatnonzero(is_match[np.argsort(-row, kind="stable")]) + 1
    return np.asarray(row.size - not_above + 1)


def _closest(block: Floats) -> Ints:
    if not block.shape[1]:
        return np.full(len(block), -1)
    found = block.argmax(axis=1)
    return np.where(block[np.arange(len(block)), found] > -np.inf, found, -1)
