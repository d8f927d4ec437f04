"""Bytes at any fsspec URL, local paths included; nothing here or above assumes a local disk.

A write is one whole object: on a local disk a temporary file renamed over the old one, elsewhere a single put or an
upload in parts that is completed at its end. A reader therefore sees the old bytes or the new ones, never a part.

What a store or disk refuses is a :class:`storage_schemas.errors.StoreError`; elsewhere than on a local disk it has then
been asked for about a minute (see :mod:`storage_schemas.remote`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from storage_schemas import npz
from storage_schemas.errors import DISK_FULL, InputError, SchemaError, StoreError
from storage_schemas.limits import check_size
from storage_schemas.remote import (
    ChangedError,
    RemoteFileSystem,
    describe,
    has_secrets,
    passes_on_disk,
    remote,
    without_secrets,
)

_BLOCK = 64 * 2**20  # bytes that are copied at once
_CHANGES = 20  # times that a document is read again which others change at the same time


def filesystem(url: str, *, asynchronous: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URL or local path, and the path on it.

    Args:
        url: of a file or folder.
        asynchronous: whether the coroutines of one that is not local are awaited by the caller.

    Raises:
        InputError: if the URL's protocol is unknown or its driver is not installed, or it holds a password or token.
    """
    if has_secrets(url):
        raise InputError(
            f"{without_secrets(url)}: holds a password or token, which would be written wherever this place is named; "
            "give it without, and the credentials by the environment"
        )
    if "://" not in url or url.startswith(("file://", "local://")):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    try:
        return remote(url, asynchronous=asynchronous)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: cannot be opened ({error}); expected a local path or a URL that fsspec knows, and for s3:// "
            "the extra: pip install 'screening[s3]'"
        ) from error


def is_local(url: str) -> bool:
    """Whether a URL lies on this machine's file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def absolute(url: str, base: str = "") -> str:
    """A URL as it is; a local path made absolute, relative ones against ``base`` (a folder or URL)."""
    if "://" in url:
        return filesystem(url)[1] if is_local(url) else url
    url = os.path.expanduser(url)
    if base and not os.path.isabs(url):
        if not is_local(base):
            return join(base, url)
        url = os.path.join(base, url)
    return os.path.abspath(url)


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or local path."""
    return "/".join([url.rstrip("/"), *parts])


def parent(url: str) -> str:
    """The folder that a URL or path lies in."""
    return url.rstrip("/").rpartition("/")[0]


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def list_names(url: str) -> list[str]:
    """Names (not paths) of what a folder holds, sorted; empty if there is no such folder."""
    fs, path = filesystem(url)
    try:
        entries = [entry.rstrip("/") for entry in fs.ls(path, detail=False, refresh=True)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A file lists itself, and so does an object that stands for a folder.
    names = {entry.rpartition("/")[2] for entry in entries if entry != path.rstrip("/")}
    return sorted(name for name in names if name and not name.endswith(".partial"))


def list_times(url: str) -> dict[str, float]:
    """Path below a folder -> when it was last written, in seconds since the epoch, of every file; by one listing."""
    fs, path = filesystem(url)
    found = {}
    if isinstance(fs, LocalFileSystem):
        for folder, _, names in os.walk(path):
            for name in names:
                with suppress(FileNotFoundError):  # a writer has renamed it meanwhile
                    file = os.path.join(folder, name)
                    found[os.path.relpath(file, path)] = os.stat(file).st_mtime
        return found
    with suppress(FileNotFoundError):
        for entry, info in fs.find(path, detail=True, refresh=True).items():
            # What it is called differs among drivers.
            written = next(info[name] for name in ("LastModified", "last_modified", "mtime", "created") if name in info)
            found[entry[len(path) :].strip("/")] = written.timestamp() if hasattr(written, "timestamp") else written
    return found


def read_bytes(url: str) -> bytes:
    """The whole content of a file.

    Raises:
        SchemaError: if the file is missing, or no memory holds it.
        StoreError: if the store or disk does not give it.
    """
    fs, path = filesystem(url)
    with _reading(url):
        if isinstance(fs, LocalFileSystem):
            check_size(url, "the file", fs.size(path))
        return bytes(fs.cat_file(path))


@contextmanager
def open_file(url: str) -> Iterator[BinaryIO]:
    """A file to read parts of.

    Raises:
        SchemaError: if the file is missing.
        StoreError: if the store or disk does not give it, then or while it is read.
    """
    fs, path = filesystem(url)
    with _reading(url):
        file = fs.open(path, "rb")
    with file:
        yield file


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A file on this machine's disk: itself, or a copy that is removed at the end, when it may have been mapped.

    Raises:
        SchemaError: if the file is missing.
        StoreError: if the store does not give it, or there is no room for it here.
    """
    if is_local(url):
        yield Path(filesystem(url)[1])
        return
    with open_file(url) as source, tempfile.NamedTemporaryFile() as target:
        with _writing(f"{url} (a copy in {tempfile.gettempdir()})"):
            shutil.copyfileobj(source, target, _BLOCK)
            target.flush()
        yield Path(target.name)


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise SchemaError(url, "no such file") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise SchemaError(url, f"cannot be read: {error}") from error
    except OSError as error:
        raise StoreError(url, f"cannot be read: {error}", lasting=not passes_on_disk(error)) from error


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Tell a full disk from all else that may go wrong while a file on this machine is written."""
    try:
        yield
    except OSError as error:
        raise refused(url, error) from error


def refused(url: str, error: OSError) -> StoreError:
    """What a disk's error means to those who were writing to it."""
    if error.errno in DISK_FULL:
        return StoreError(url, f"{DISK_FULL[error.errno]}: make room, then go on", lasting=True)
    return StoreError(url, f"cannot be written: {describe(error)}", lasting=not passes_on_disk(error))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file at once; a reader sees the old content or all of the new.

    Raises:
        StoreError: if the store or disk does not take it; what was there is left.
    """
    fs, path = filesystem(url)
    if isinstance(fs, RemoteFileSystem):
        fs.pipe_file(path, data)
        return
    with open_new(url) as file:
        file.write(data)


@contextmanager
def open_new(url: str) -> Iterator[BinaryIO]:
    """A file to write piece by piece; a reader sees the old content until it is closed without an error.

    Elsewhere than on a local disk it is put together on this machine first: an upload that is begun is of a whole file,
    and can be begun again.

    Raises:
        StoreError: if the store or disk does not take it; what was there is left.
    """
    fs, path = filesystem(url)
    if isinstance(fs, RemoteFileSystem):
        with _writing(f"{url} (put together in {tempfile.gettempdir()})"), tempfile.NamedTemporaryFile() as spooled:
            yield cast(BinaryIO, spooled)
            spooled.flush()
            fs.put_file(spooled.name, path)
        return
    target = Path(path)
    # Beside the target, so that the rename stays on one file system; unique, so that two writers never share it.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with _writing(url):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def update_json(url: str, change: Callable[[Any], Any]) -> None:
    """Replace a JSON document by what is made of it.

    Where the store can tell (S3 by ``If-Match``), nothing is lost that others write between: the change is made again,
    of what they have written.

    Args:
        url: where it lies.
        change: the document -> the new one; may be called more than once.

    Raises:
        SchemaError: if the file is missing or not JSON.
        StoreError: if the store or disk does not take it, or others never stop to change it.
    """
    fs, path = filesystem(url)
    if not isinstance(fs, RemoteFileSystem):
        write_json(url, change(read_json(url)))
        return
    for _ in range(_CHANGES - 1):
        version = fs.version(path)
        data = _as_json(change(read_json(url)))
        try:
            fs.pipe_file(path, data, **({} if version is None else {"IfMatch": version}))
            return
        except ChangedError:
            continue
    raise ChangedError(url, f"others changed it each of {_CHANGES} times that it was to be changed")


def read_json(url: str) -> Any:
    """A JSON document.

    Raises:
        SchemaError: if the file is missing or not JSON.
    """
    try:
        return json.loads(read_bytes(url))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:  # the last of what is nested too deep
        raise SchemaError(url, f"is not JSON ({error})") from error


def write_json(url: str, document: Any) -> None:
    """Write a JSON document, atomically; NaN and infinities are refused, since JSON has none."""
    write_bytes(url, _as_json(document))


def _as_json(document: Any) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def read_npz(url: str) -> dict[str, NDArray[Any]]:
    """All arrays of an ``.npz`` file, by name.

    Raises:
        SchemaError: if the file is missing, truncated, holds pickled objects instead of numbers, or would take more
            memory than a read may.
    """
    data = read_bytes(url)
    try:
        return npz.read_arrays(url, data)
    except SchemaError:
        raise
    except Exception as error:  # zip, zlib and the array headers have errors of their own
        raise SchemaError(url, f"is not a readable .npz file ({error})") from error


def write_npz(url: str, fields: dict[str, NDArray[Any]]) -> None:
    """Write named arrays as one compressed ``.npz`` file, atomically."""
    sink = io.BytesIO()
    np.savez_compressed(sink, **fields)  # type: ignore[arg-type]  # its stub takes names for options
    write_bytes(url, sink.getvalue())


def remove_partial(url: str) -> None:
    """Remove what writers that were killed have left in a folder and below; nothing else may be writing there."""
    if is_local(url):
        for leftover in Path(filesystem(url)[1]).rglob("*.partial"):
            leftover.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Remove a file or a whole folder; nothing happens if it is not there."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def put_folder(folder: Path, url: str) -> None:
    """Copy the files of a local folder to a remote one."""
    fs, path = filesystem(url)
    for file in sorted(folder.iterdir()):
        fs.put_file(str(file), f"{path}/{file.name}")
