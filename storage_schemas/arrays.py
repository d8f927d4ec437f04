"""Zarr at any URL: opening groups and arrays with errors that name the path, and the one choice of compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from storage_schemas import codecs, store
from storage_schemas.errors import SchemaError

# Fast to decode and, by the bit shuffle, small on 16-bit planes, which plain lz4 hardly shrinks. Blosc itself
# decodes truncated and altered chunks to other pixels without a word, hence the checksum.
COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle), Crc32cCodec())


def zarr_store(url: str, *, read_only: bool = False) -> Store:
    """The zarr store of a local path or any fsspec URL."""
    if store.is_local(url):
        return LocalStore(store.filesystem(url)[1], read_only=read_only)
    return FsspecStore.from_url(url, read_only=read_only)


def open_group(url: str) -> zarr.Group:
    """An existing zarr group, v2 or v3, for reading.

    Raises:
        SchemaError: if there is none.
    """
    try:
        return zarr.open_group(zarr_store(url, read_only=True), mode="r")
    except Exception as error:  # zarr, its codecs and each store driver have errors of their own
        raise SchemaError(
            url, f"is not a readable Zarr group ({_first_line(error)}); expected OME-Zarr v0.4 or v0.5"
        ) from error


def open_array(url: str) -> zarr.Array[Any]:
    """An existing zarr array, v2 or v3, for reading.

    Raises:
        SchemaError: if there is none, or it is written in a way that is not let in (see :mod:`storage_schemas.codecs`).
    """
    try:
        return codecs.guarded(url, zarr.open_array(zarr_store(url, read_only=True), mode="r"))
    except SchemaError:
        raise
    except Exception as error:
        raise SchemaError(url, f"is not a readable Zarr array ({_first_line(error)})") from error


def existing(url: str, form: Mapping[str, Any]) -> zarr.Array[Any] | None:
    """The array that is there, to be written over; None unless it has just that form.

    Args:
        url: of the array.
        form: as for ``zarr.create_array``.
    """
    try:
        found = zarr.open_array(zarr_store(url), mode="r+")
    except Exception:  # there is none, or something else
        return None
    wanted = zarr.create_array(MemoryStore(), **form)
    return found if found.metadata.to_dict() == wanted.metadata.to_dict() else None


def read(url: str, array: zarr.Array[Any], selection: Any) -> NDArray[Any]:
    """Part of an array, orthogonally indexed.

    Raises:
        SchemaError: if a chunk is truncated, corrupt or out of reach, or more is asked for than memory holds.
    """
    codecs.check_selection(url, array, selection)
    try:
        return np.asarray(array.oindex[selection])
    except Exception as error:
        raise SchemaError(
            url,
            f"cannot be read: a chunk is truncated, corrupt or unreachable ({_first_line(error)}); write it again from "
            "its source",
        ) from error


def stretches(positions: Sequence[int]) -> list[slice]:
    """Positions in their order, as slices of neighbours, to read one after the other.

    Zarr takes listed positions out of its chunks pixel by pixel, many times slower than slices.
    """
    if not positions:
        return [slice(0, 0)]
    starts = [i for i, position in enumerate(positions) if i == 0 or position != positions[i - 1] + 1]
    return [slice(positions[a], positions[b - 1] + 1) for a, b in pairwise([*starts, len(positions)])]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
