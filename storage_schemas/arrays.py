"""Zarr at any URL: opening groups and arrays with errors that name the path, and the one choice of compression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from storage_schemas import codecs, store
from storage_schemas.errors import InputError, SchemaError, StoreError
from storage_schemas.remote import describe, passes_on_disk

T = TypeVar("T")

# Fast to decode and, by the bit shuffle, small on 16-bit planes, which plain lz4 hardly shrinks. Blosc itself
# decodes truncated and altered chunks to other pixels without a word, hence the checksum.
COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle), Crc32cCodec())


def zarr_store(url: str, *, read_only: bool = False) -> Store:
    """The zarr store of a local path or any fsspec URL."""
    if store.is_local(url):
        return LocalStore(store.filesystem(url)[1], read_only=read_only)
    # What a store refuses is raised by its file system, through Zarr, as a StoreError: a chunk that cannot be read is
    # never taken for one that is not there, which would read as zeros.
    fs, path = store.filesystem(url, asynchronous=True)
    return FsspecStore(fs, path=path, read_only=read_only)


def open_group(url: str) -> zarr.Group:
    """An existing zarr group, v2 or v3, for reading.

    Raises:
        SchemaError: if there is none.
        StoreError: if the store or disk does not give it.
    """
    try:
        return _opened(zarr.open_group, url)
    except Exception as error:  # zarr and its codecs have errors of their own
        _raise_refusal(url, error)
        raise SchemaError(
            url, f"is not a readable Zarr group ({describe(error)}); expected OME-Zarr v0.4 or v0.5"
        ) from error


def open_array(url: str) -> zarr.Array[Any]:
    """An existing zarr array, v2 or v3, for reading.

    Raises:
        SchemaError: if there is none, or it is written in a way that is not let in (see :mod:`storage_schemas.codecs`).
        StoreError: if the store or disk does not give it.
    """
    try:
        return codecs.guarded(url, _opened(zarr.open_array, url))
    except InputError:
        raise
    except Exception as error:
        _raise_refusal(url, error)
        raise SchemaError(url, f"is not a readable Zarr array ({describe(error)})") from error


def existing(url: str, form: Mapping[str, Any]) -> zarr.Array[Any] | None:
    """The array that is there, to be written over; None unless it has just that form.

    Args:
        url: of the array.
        form: as for ``zarr.create_array``, of Zarr v3.

    Raises:
        StoreError: if the store or disk does not say.
    """
    try:
        found = zarr.open_array(zarr_store(url), mode="r+", zarr_format=3)
    except Exception as error:  # there is none, or something else
        _raise_refusal(url, error)
        return None
    wanted = zarr.create_array(MemoryStore(), **form)
    return found if found.metadata.to_dict() == wanted.metadata.to_dict() else None


def read(url: str, array: zarr.Array[Any], selection: Any) -> NDArray[Any]:
    """Part of an array, orthogonally indexed.

    Raises:
        SchemaError: if a chunk is truncated or corrupt, or more is asked for than memory holds.
        StoreError: if the store or disk does not give it.
    """
    codecs.check_selection(url, array, selection)
    try:
        return np.asarray(array.oindex[selection])
    except Exception as error:
        _raise_refusal(url, error)
        raise SchemaError(
            url,
            f"cannot be read: a chunk is truncated or corrupt ({describe(error)}); write it again from its source",
        ) from error


@contextmanager
def writing(url: str, *, keep: bool = False) -> Iterator[None]:
    """Write arrays and groups beneath a folder; it is removed where they cannot be written whole.

    Where a store does not answer, what is there of them is left: it would not remove it either.

    Args:
        url: the folder.
        keep: whether it is left also then, as where what is written was there before.

    Raises:
        StoreError: if the store or disk does not take them.
    """
    try:
        yield
    except Exception as error:
        if not keep and (not isinstance(error, StoreError) or error.lasting):
            with suppress(StoreError):
                store.remove(url)
        if isinstance(error, OSError):
            raise store.refused(url, error) from error
        raise


def stretches(positions: Sequence[int]) -> list[slice]:
    """Positions in their order, as slices of neighbours, to read one after the other.

    Zarr takes listed positions out of its chunks pixel by pixel, many times slower than slices.
    """
    if not positions:
        return [slice(0, 0)]
    starts = [i for i, position in enumerate(positions) if i == 0 or position != positions[i - 1] + 1]
    return [slice(positions[a], positions[b - 1] + 1) for a, b in pairwise([*starts, len(positions)])]


def _opened(open_: Callable[..., T], url: str) -> T:
    # Not told which, Zarr asks a store for the files of all its formats at once, of which most are not there.
    source = zarr_store(url, read_only=True)
    try:
        return open_(source, mode="r", zarr_format=3)
    except FileNotFoundError:
        return open_(source, mode="r", zarr_format=2)


def _raise_refusal(url: str, error: Exception) -> None:
    """Tell a store or disk that does not give what it has from data that are not as they should be."""
    if isinstance(error, StoreError):
        raise error
    if isinstance(error, OSError) and (isinstance(error, PermissionError) or passes_on_disk(error)):
        raise StoreError(
            url, f"cannot be read ({describe(error)})", lasting=isinstance(error, PermissionError)
        ) from error
