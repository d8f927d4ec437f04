"""Bytes at any fsspec URL, local paths included; nothing here or above assumes a local disk.

A write is one whole object: on a local disk a temporary file renamed over the old one, elsewhere a single put. A
reader therefore sees the old bytes or the new ones, never a part.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from storage_schemas import npz
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.limits import check_size


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL or local path, and the path on it.

    Raises:
        InputError: if the URL's protocol is unknown or its driver is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: cannot be opened ({error}); expected a local path or a URL that fsspec knows, and for s3:// "
            "the extra: pip install 'screening[s3]'"
        ) from error
    return fs, path


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
        SchemaError: if the file is missing or cannot be read, or no memory holds it.
    """
    fs, path = filesystem(url)
    try:
        if isinstance(fs, LocalFileSystem):
            check_size(url, "the file", fs.size(path))
        return bytes(fs.cat_file(path))
    except FileNotFoundError as error:
        raise SchemaError(url, "no such file") from error
    except (OSError, PermissionError) as error:
        raise SchemaError(url, f"cannot be read: {error}") from error


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file at once; a reader sees the old content or all of the new."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with open_new(url) as file:
        file.write(data)


@contextmanager
def open_new(url: str) -> Iterator[BinaryIO]:
    """A file to write piece by piece; a reader sees the old content until it is closed without an error."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        with fs.transaction, fs.open(path, "wb") as file:
            yield file
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system; unique, so that two writers never share it.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_bytes(url, text.encode() + b"\n")


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
    if fs.exists(path):
        fs.rm(path, recursive=True)
