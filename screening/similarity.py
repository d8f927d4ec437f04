"""Similarity search: the nearest vectors by cosine, exactly or through compressed copies of them.

Few vectors are compared one by one. Of many a compressed copy is scanned, 4 bits for every 5 dimensions (product
quantisation, Jégou et al. 2011, in the form that registers are scanned with, André et al. 2015), and the best of the
scan are compared exactly by their vectors, which may lie in a file that is mapped into memory. Of very many only the
lists nearest to the query are scanned (an inverted file). How many candidates are compared is measured when the index
is built (:func:`tune`), so that it finds what an exact search finds.

FAISS is imported by the functions that need it, so that importing this module costs nothing; none of its global
settings is touched, and its readers of files, which trust what they find, are not used.

Shapes: n vectors, q queries, D dimensions, M = ⌈D / 10⌉ · 2 sub-vectors of 5 dimensions, L lists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from screening.retrieval import lengths
from storage_schemas.base import Config
from storage_schemas.errors import InputError

if TYPE_CHECKING:
    import faiss

Vectors = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_]

NEIGHBOURS = 10  # that recall is measured on, and that `depth` is for

# Dimensions that share a code. With fewer the scan reads more, with more it finds less (benchmarks/index.py).
_SUB = 5
_CODES = 16  # values of a code
_MIB = 2**20
_BLOCK_BYTES = 2**26  # of vectors that an exact search has in hand
_QUERIES = 256  # that are answered together
_SHALLOWEST = 100
# A candidate is read from anywhere, which costs about as much as this many that are read in a row.
_SCATTERED = 8
# The lengths of vectors that were scaled to 1 and rounded to float32 differ by far less.
_ROUNDING = 1e-3


class _Compressing(Config):
    recall: float = Field(
        0.99, gt=0, le=1, description="share of the ten nearest that a search must find, measured on building the index"
    )
    max_depth: int = Field(
        50_000, ge=_SHALLOWEST, description="candidates compared exactly at most to reach that, for ten neighbours"
    )
    train_vectors: int = Field(20_000, ge=_CODES, description="vectors that the codes are learnt from")


class ExactIndex(Config):
    """Compare all vectors."""

    method: Literal["exact"] = Field("exact", description="compare all vectors")


class CompressedIndex(_Compressing):
    """Scan compressed vectors, compare the best exactly."""

    method: Literal["compressed"] = Field("compressed", description="scan compressed vectors, compare the best exactly")


class IvfIndex(_Compressing):
    """Scan the compressed vectors of the nearest lists, compare the best exactly."""

    method: Literal["ivf"] = Field("ivf", description="scan lists of compressed vectors, compare the best exactly")
    lists: int | None = Field(None, ge=1, description="how many lists; null: four times the square root of the vectors")


class AutoIndex(_Compressing):
    """Choose by size."""

    method: Literal["auto"] = Field("auto", description="choose by size: exact, compressed or ivf")
    exact_mb: int = Field(64, ge=0, description="MiB of vectors up to which the search is exact")
    scan_mb: int = Field(512, ge=0, description="MiB of codes up to which all are scanned; more: in lists (ivf)")


IndexConfig = Annotated[AutoIndex | ExactIndex | CompressedIndex | IvfIndex, Field(discriminator="method")]


def choose(config: IndexConfig, n: int, dim: int) -> tuple[ExactIndex | CompressedIndex | IvfIndex, str]:
    """How to search n vectors of D dimensions, and why."""
    held = 4 * n * dim / _MIB
    codes = n * _sub_vectors(dim) / 2 / _MIB
    size = f"{n:,} vectors of {dim} dimensions are {held:,.0f} MiB"
    if config.method == "exact":
        return config, "index.method is exact"
    if n < _CODES:
        return ExactIndex(), f"{n} vectors are too few to learn codes from"
    if config.method != "auto":
        return config, f"index.method is {config.method}"
    if held <= config.exact_mb:
        return ExactIndex(), f"{size}, at most index.exact_mb={config.exact_mb}"
    settings = config.model_dump(include=set(_Compressing.model_fields))
    if codes <= config.scan_mb:
        return CompressedIndex(**settings), f"{size}, more than index.exact_mb={config.exact_mb}"
    return IvfIndex(**settings), f"{size} and their codes {codes:,.0f}, more than index.scan_mb={config.scan_mb}"


@dataclass(frozen=True)
class Quantiser:
    """What compresses vectors.

    Attributes:
        codebook: (M, 16, 4) float32, what each code of each sub-vector stands for.
        centroids: (L, D) float32 unit vectors, the middles of the lists; None where there are no lists.
    """

    codebook: Vectors
    centroids: Vectors | None = None

    def encode(self, unit: Vectors) -> dict[str, npt.NDArray[Any]]:
        """Compress (n, D) unit vectors.

        Returns:
            ``codes`` (n, M / 2) uint8, and with lists the nearest ``lists`` (n,) int32.
        """
        import faiss

        encoded = {"codes": self._product().compute_codes(_padded(unit))}
        if self.centroids is not None:
            coarse = faiss.IndexFlatIP(self.centroids.shape[1])
            coarse.add(self.centroids)
            encoded["lists"] = coarse.search(np.ascontiguousarray(unit), 1)[1][:, 0].astype(np.int32)
        return encoded

    def _product(self) -> faiss.ProductQuantizer:
        import faiss

        m = len(self.codebook)
        product = faiss.ProductQuantizer(m * _SUB, m, 4)
        faiss.copy_array_to_vector(np.ascontiguousarray(self.codebook, np.float32).ravel(), product.centroids)
        return product


def train(sample: Vectors, config: CompressedIndex | IvfIndex, n: int, seed: int = 0) -> Quantiser:
    """Learn how to compress vectors.

    Args:
        sample: (s, D) unit vectors, at least 16.
        config: how they will be searched.
        n: vectors that there will be.
        seed: of the starting points.
    """
    import faiss

    padded = _padded(sample)
    product = faiss.ProductQuantizer(padded.shape[1], padded.shape[1] // _SUB, 4)
    product.cp.seed = seed + 1
    product.cp.min_points_per_centroid = 1  # or it writes to stderr
    product.train(padded)
    codebook = faiss.vector_to_array(product.centroids).reshape(-1, _CODES, _SUB)
    if config.method == "compressed":
        return Quantiser(codebook)
    kmeans = faiss.Clustering(sample.shape[1], _lists(config, n, len(sample)))
    kmeans.seed = seed + 1
    kmeans.min_points_per_centroid = 1
    kmeans.spherical = True
    kmeans.train(np.ascontiguousarray(sample), faiss.IndexFlatIP(sample.shape[1]))
    return Quantiser(codebook, faiss.vector_to_array(kmeans.centroids).reshape(-1, sample.shape[1]))


def training_size(config: CompressedIndex | IvfIndex, n: int) -> int:
    """How many of n vectors to train on."""
    lists = 40 * _lists(config, n, n) if config.method == "ivf" else 0
    return min(n, max(config.train_vectors, lists))


@dataclass(frozen=True)
class Effort:
    """How hard to search.

    Attributes:
        depth: candidates that are compared exactly for ten neighbours.
        probes: lists that are gone through; 0 where there are none.
    """

    depth: int
    probes: int = 0


@dataclass(frozen=True)
class Tuning:
    """What an effort was seen to find.

    Attributes:
        effort: the least that reaches the target, or the most that was allowed.
        recall: mean share of the ten nearest, found exactly, among those that are compared.
        low: two standard errors below it.
        queries: vectors that were looked up.
    """

    effort: Effort
    recall: float
    low: float
    queries: int


class Index:
    """Vectors that can be searched.

    Args:
        vectors: (n, D) float32 of length 1 or 0, kept as they are, which may be mapped from a file.
        quantiser: what compressed them; None to compare all.
        codes: of all vectors, as :meth:`Quantiser.encode` gives them.
        effort: of a search through them.

    Raises:
        InputError: for parts that do not fit each other, or that cannot be of an index.
    """

    def __init__(
        self,
        vectors: Vectors,
        quantiser: Quantiser | None = None,
        codes: Mapping[str, npt.NDArray[Any]] | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.vectors = vectors
        self.effort = effort or Effort(_SHALLOWEST)
        self._scanner = None
        if quantiser is not None:
            self._scanner = _Scanner(quantiser, codes or {}, *vectors.shape)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return int(self.vectors.shape[1])

    def search(self, vectors: npt.ArrayLike, k: int, keep: Kept | None = None) -> tuple[Vectors, Positions]:
        """Find the k nearest indexed vectors of each query vector.

        Args:
            vectors: (q, D) of any length; a zero vector is similar to nothing (0).
            k: how many; all of them when fewer are kept.
            keep: (n,) which vectors may be found; all by default.

        Returns:
            (q, min(k, kept)) float32 cosines, descending, and their int64 positions in the index; the cosines are
            exact. A compressed index finds the nearest with the recall that it was measured with, if what is left out
            lies anywhere; with less, if it is the very vectors that are nearest, since those that are left differ less.

        Raises:
            InputError: k below 1, another dimension than the index, values that are not finite, or an indexed vector
                that is not of length 1.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one neighbour")
        unit = to_unit(vectors)
        if unit.shape[1] != self.dimension:
            raise InputError(
                f"the query has {unit.shape[1]} dimensions and the index {self.dimension}; "
                "embed the query with the model that made the index"
            )
        kept = len(self) if keep is None else int(np.count_nonzero(keep))
        k = min(k, kept)
        scores, positions = np.empty((len(unit), k), np.float32), np.empty((len(unit), k), np.int64)
        if k:
            for start in range(0, len(unit), _QUERIES):
                part = slice(start, start + _QUERIES)
                self._search(unit[part], k, keep, kept, scores[part], positions[part])
        return scores, positions

    def _search(
        self, unit: Vectors, k: int, keep: Kept | None, kept: int, scores: Vectors, positions: Positions
    ) -> None:
        depth = -(-self.effort.depth * max(k, NEIGHBOURS) // NEIGHBOURS)
        fetch = depth * len(self) // kept
        found: list[Positions | None] = [None] * len(unit)
        if self._scanner is not None and fetch * _SCATTERED < kept:
            scanned = self._scanner.scan(unit, fetch, self.effort.probes)
            found = [self._candidates(*pair, fetch, depth, keep) for pair in zip(unit, scanned, strict=True)]
        all_of = [i for i, candidates in enumerate(found) if candidates is None]
        if all_of:
            for i, nearest in zip(all_of, self._nearest(unit[all_of], k, keep), strict=True):
                found[i] = nearest
        for i, candidates in enumerate(found):
            assert candidates is not None
            scores[i], positions[i] = self._settle(unit[i], candidates, k)

    def _candidates(
        self, query: Vectors, found: Positions, fetch: int, depth: int, keep: Kept | None
    ) -> Positions | None:
        """The ``depth`` best candidates that are kept, of those found in a scan for ``fetch`` or of deeper scans.

        None where comparing all costs no more than looking on.
        """
        assert self._scanner is not None
        probes = self.effort.probes
        while True:
            if keep is not None:
                found = found[keep[found]]
            if len(found) >= depth:
                return found[:depth]
            fetch, probes = 4 * fetch, 4 * probes
            if fetch * _SCATTERED >= len(self):
                return None
            found = self._scanner.scan(query[None], fetch, probes)[0]

    def _nearest(self, unit: Vectors, k: int, keep: Kept | None) -> Positions:
        """(q, k) positions of the nearest vectors, all that are kept compared, in no order."""
        best = np.full((len(unit), 0), -np.inf, np.float32)
        at = np.empty((len(unit), 0), np.int64)
        rows = max(k, _BLOCK_BYTES // (4 * self.dimension))
        for start in range(0, len(self), rows):
            block = self.vectors[start : start + rows]
            here = np.arange(start, start + len(block))
            if keep is not None:
                own = keep[start : start + rows]
                here, block = here[own], block if own.all() else block[own]
            scores = unit @ block.T
            _check(np.isfinite(scores).all())
            best = np.concatenate([best, scores], axis=1)
            at = np.concatenate([at, np.broadcast_to(here, scores.shape)], axis=1)
            if best.shape[1] > k:
                order = np.argpartition(best, -k, axis=1)[:, -k:]
                best, at = np.take_along_axis(best, order, 1), np.take_along_axis(at, order, 1)
        return at

    def _settle(self, query: Vectors, candidates: Positions, k: int) -> tuple[Vectors, Positions]:
        """The k nearest of (c,) candidates in order; equal ones among them by position."""
        candidates = np.sort(candidates)
        rows = self.vectors[candidates]
        if len(candidates) > k:
            scores = rows @ query
            _check(np.isfinite(scores).all())
            best = np.sort(np.argpartition(scores, -k)[-k:])
            candidates, rows = candidates[best], rows[best]
        exact = rows.astype(np.float64)
        squares = np.einsum("ij,ij->i", exact, exact)
        _check(((np.abs(squares - 1) < _ROUNDING) | (squares == 0)).all())
        cosines = np.clip(exact @ query.astype(np.float64), -1, 1).astype(np.float32)
        order = np.argsort(-cosines, kind="stable")
        return cosines[order], candidates[order]


def tune(
    index: Index, config: CompressedIndex | IvfIndex, group: npt.NDArray[np.int64] | None = None, seed: int = 0
) -> Tuning:
    """Find the least effort at which a compressed index finds what an exact search finds.

    Vectors of the index are looked up among those of other groups: cells of a well find each other more easily than
    what a query from elsewhere finds. The target counts as reached when the mean over them is above it by two
    standard errors.

    Args:
        index: compressed.
        config: target and limit.
        group: (n,) of each vector, such as its well; each its own by default.
        seed: of the choice of vectors.
    """
    assert index._scanner is not None, "an exact search needs no tuning"
    n = len(index)
    if group is None or (group == group[0]).all():
        group = np.arange(n)
    asked = np.sort(np.random.default_rng(seed).choice(n, min(n, _QUERIES), replace=False))
    unit = np.ascontiguousarray(index.vectors[asked])
    largest = int(np.unique(group, return_counts=True)[1].max())
    truths = []
    for query, own, near in zip(unit, asked, index._nearest(unit, min(n, NEIGHBOURS + largest), None), strict=True):
        others = near[group[near] != group[own]]
        best = np.argsort(index.vectors[others] @ query)[::-1][:NEIGHBOURS]
        truths.append(others[best])

    limit = min(config.max_depth, n)
    probes, most = index._scanner.least_probes, index._scanner.lists
    while True:
        # Where in its candidates each true neighbour stands; behind all of them if it is not there.
        scanned = index._scanner.scan(unit, min(n, limit + largest), probes)
        ranks = [
            _places(found[group[found] != group[own]], truth, limit)
            for own, found, truth in zip(asked, scanned, truths, strict=True)
        ]
        depth = _SHALLOWEST
        while True:
            depth = min(depth, limit)
            shares = np.asarray([np.mean(rank < depth) for rank in ranks])
            low = float(shares.mean() - 2 * shares.std(ddof=1) / np.sqrt(len(shares)))
            if low >= config.recall or depth == limit:
                break
            depth = -(-5 * depth // 4)
        if low >= config.recall or probes >= most:
            return Tuning(Effort(depth, probes), float(shares.mean()), low, len(asked))
        probes = min(2 * probes, most)


def _places(candidates: Positions, wanted: Positions, absent: int) -> Positions:
    """Where each of the wanted stands among the candidates, from 0; ``absent`` for those that are not there."""
    behind = np.append(candidates, -1)
    order = np.argsort(behind, kind="stable")
    at = order[np.minimum(np.searchsorted(behind, wanted, sorter=order), len(candidates))]
    return np.where(behind[at] == wanted, at, absent)


class _Scanner:
    """Codes in the order that registers go through them."""

    least_probes = 0

    def __init__(self, quantiser: Quantiser, codes: Mapping[str, npt.NDArray[Any]], n: int, dim: int) -> None:
        import faiss

        m = _sub_vectors(dim)
        packed, listed = codes.get("codes"), codes.get("lists")
        fits = (
            quantiser.codebook.shape == (m, _CODES, _SUB)
            and np.isfinite(quantiser.codebook).all()
            and packed is not None
            and packed.shape == (n, m // 2)
            and packed.dtype == np.uint8
        )
        self.lists = 0
        self._index: Any
        centroids = quantiser.centroids
        if fits and centroids is not None:
            self.lists = len(centroids)
            self.least_probes = min(8, self.lists)
            fits = (
                centroids.shape == (self.lists, dim)
                and bool(np.isfinite(centroids).all())
                and listed is not None
                and listed.shape == (n,)
                and bool(((listed >= 0) & (listed < self.lists)).all())
            )
        if not fits:
            raise InputError(
                f"codes and codebook are not those of {n} vectors of {dim} dimensions; run the stage index again"
            )
        assert packed is not None
        metric = faiss.METRIC_INNER_PRODUCT
        codebook = np.ascontiguousarray(quantiser.codebook, np.float32).ravel()
        if centroids is None:
            plain: Any = faiss.IndexPQ(m * _SUB, m, 4, metric)
            faiss.copy_array_to_vector(codebook, plain.pq.centroids)
            plain.is_trained = True
            plain.add_sa_codes(np.ascontiguousarray(packed))
            self._index = faiss.IndexPQFastScan(plain)
            return
        assert listed is not None
        coarse = faiss.IndexFlatIP(m * _SUB)
        coarse.add(_padded(centroids))
        plain = faiss.IndexIVFPQ(coarse, m * _SUB, self.lists, m, 4, metric)
        plain.by_residual = False
        faiss.copy_array_to_vector(codebook, plain.pq.centroids)
        plain.is_trained = True
        order = np.argsort(listed, kind="stable").astype(np.int64)
        sorted_codes = np.ascontiguousarray(packed[order])
        bounds = np.searchsorted(listed[order], np.arange(self.lists + 1))
        for number in range(self.lists):
            a, b = int(bounds[number]), int(bounds[number + 1])
            if a < b:
                ids, own = order[a:b], sorted_codes[a:b]
                plain.invlists.add_entries(number, b - a, faiss.swig_ptr(ids), faiss.swig_ptr(own))
        plain.ntotal = n
        self._index = faiss.IndexIVFPQFastScan(plain)
        self._coarse = coarse  # which the index refers to and does not own

    def scan(self, unit: Vectors, fetch: int, probes: int) -> list[Positions]:
        """Of each query at most ``fetch`` positions, the best by their codes first."""
        import faiss

        padded = _padded(unit)
        if not self.lists:
            found = self._index.search(padded, fetch)[1]
        else:
            params: Any = faiss.SearchParametersIVF()
            params.nprobe = max(1, min(probes, self.lists))
            found = self._index.search(padded, fetch, params=params)[1]
        return [row[row >= 0] for row in found]


def suggest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Name the known names nearest to one that is not known, for an error message.

    Args:
        name: what was asked for.
        known: names that exist.
        n: how many to return at most.

    Returns:
        Names that differ in case only or contain ``name`` first, then the most similar ones.
    """
    wanted = name.casefold()
    names = sorted(set(known))
    within = [each for each in names if wanted and wanted in each.casefold()]
    within.sort(key=len)
    folded: dict[str, list[str]] = {}
    for each in names:
        folded.setdefault(each.casefold(), []).append(each)
    close = difflib.get_close_matches(wanted, folded, n)
    return list(dict.fromkeys([*within, *(each for key in close for each in folded[key])]))[:n]


def to_unit(vectors: npt.ArrayLike) -> Vectors:
    """(n, D) contiguous float32 rows of length 1; zero rows stay zero.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    rows: npt.NDArray[Any] = np.asarray(vectors, np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise InputError(f"vectors have shape {rows.shape}; expected (vectors, dimensions)")
    length = lengths(rows, "vectors")
    # What float32 cannot divide by without losing digits.
    extreme = (length < 1e-30) | (length > 1e30)
    unit: Vectors = np.ascontiguousarray(rows / np.where(extreme, 1, length).astype(np.float32)[:, None])
    unit[extreme] = rows[extreme] / length[extreme, None]
    return unit


def _check(whole: bool | np.bool_) -> None:
    if not whole:
        raise InputError("the index holds vectors that are not of length 1: it is damaged; run the stage index again")


def _sub_vectors(dim: int) -> int:
    """An even number, so that codes fill whole bytes."""
    return -(-dim // (2 * _SUB)) * 2


def _lists(config: IvfIndex, n: int, most: int) -> int:
    return max(1, min(most, config.lists or round(4 * np.sqrt(n))))


def _padded(unit: Vectors) -> Vectors:
    """(n, 5 M) with zeros behind, which change no product."""
    missing = _sub_vectors(unit.shape[1]) * _SUB - unit.shape[1]
    rows: npt.NDArray[Any] = np.pad(unit, ((0, 0), (0, missing))) if missing else unit
    return np.ascontiguousarray(rows, np.float32)
