"""Similarity search: the nearest vectors by cosine, exactly, through FAISS.

FAISS is imported by the functions that need it, so that importing this module costs nothing, and
none of its global settings is touched.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from screening.retrieval import lengths
from storage_schemas.errors import InputError

if TYPE_CHECKING:
    import faiss

Vectors = npt.NDArray[np.float32]

# In the header of a serialised flat index, after a four-letter tag and the dimension.
_COUNT_OFFSET = 8


def build(vectors: npt.ArrayLike) -> faiss.IndexFlatIP:
    """Index vectors for exact search by cosine.

    Args:
        vectors: (n, D), D at least 1; kept at unit length, a zero vector is similar to nothing (0).

    Returns:
        An exact inner-product index over the unit vectors, positions in the order of the rows.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    import faiss

    unit = _unit(vectors)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    return index


def search(index: faiss.IndexFlatIP, vectors: npt.ArrayLike, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """Find the k nearest indexed vectors of each query vector.

    Args:
        index: from :func:`build` or :func:`deserialise`.
        vectors: (q, D) of any length.
        k: how many; all of them when the index holds fewer.

    Returns:
        (q, min(k, n)) float32 cosines, descending, and their int64 positions in the index.

    Raises:
        InputError: k below 1, another dimension than the index, or values that are not finite.
    """
    if k < 1:
        raise InputError(f"k is {k}; ask for at least one neighbour")
    unit = _unit(vectors)
    if unit.shape[1] != index.d:
        raise InputError(
            f"the query has {unit.shape[1]} dimensions and the index {index.d}; "
            "embed the query with the model that made the index"
        )
    k = min(k, index.ntotal)
    if not k or not len(unit):
        return np.empty((len(unit), k), np.float32), np.empty((len(unit), k), np.int64)
    scores, positions = index.search(unit, k)
    # Rounding can carry the product of two unit vectors just past 1.
    return np.clip(scores, -1, 1), positions


def serialise(index: faiss.IndexFlatIP) -> bytes:
    """Write the index in FAISS's own file format."""
    import faiss

    return bytes(faiss.serialize_index(index).tobytes())


def deserialise(data: bytes, n: int, dim: int) -> faiss.IndexFlatIP:
    """Read an index that :func:`serialise` wrote.

    The bytes are never handed to FAISS's own reader, which trusts the sizes it finds: the header
    is compared with the one such an index must have, and only vectors are taken from the rest.

    Args:
        data: the bytes.
        n: how many vectors it must hold.
        dim: how many dimensions they must have.

    Raises:
        InputError: anything else than a whole flat inner-product index of that size.
    """
    import faiss

    if n < 0 or dim < 1:
        raise InputError(f"an index of {n} vectors of {dim} dimensions cannot be")
    header = bytearray(serialise(faiss.IndexFlatIP(dim)))
    struct.pack_into("<q", header, _COUNT_OFFSET, n)
    struct.pack_into("<Q", header, len(header) - 8, n * dim)
    expected = len(header) + 4 * n * dim
    if len(data) != expected or data[: len(header)] != header:
        raise InputError(
            f"not an exact index of {n} vectors of {dim} dimensions ({len(data)} bytes, expected "
            f"{expected}): it is truncated, of another screen or of another FAISS version; "
            "run the index stage again"
        )
    vectors = np.frombuffer(data, "<f4", offset=len(header)).reshape(n, dim)
    if not np.isfinite(vectors).all():
        raise InputError("the index holds vectors that are not finite; run the index stage again")
    index = faiss.IndexFlatIP(dim)
    index.add(vectors.astype(np.float32, copy=False))
    return index


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


def _unit(vectors: npt.ArrayLike) -> Vectors:
    """(n, D) contiguous float32 rows of length 1; zero rows stay zero."""
    rows: npt.NDArray[Any] = np.asarray(vectors, np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise InputError(f"vectors have shape {rows.shape}; expected (vectors, dimensions)")
    return np.ascontiguousarray(rows / lengths(rows, "vectors").astype(np.float32)[:, None])
