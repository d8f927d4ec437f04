"""How much memory a file may ask for: what it claims is compared with this before the memory is taken.

A few bytes can claim an array of any shape, or hold terabytes of zeros in compressed form. Whoever reads them would be
killed by the system; here it is an error that names the file.
"""

from __future__ import annotations

import os
import resource
import zlib
from functools import cache
from pathlib import Path

import psutil

from storage_schemas.errors import InputError, SchemaError

VARIABLE = "SCREENING_READ_LIMIT_GIB"
"""Environment variable that says how much one read may take, where the limit below does not do."""
_MOST = 16 * 2**30
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def read_limit() -> int:
    """Bytes that one read may take: half of what this process can have at all, and 16 GiB at most.

    One read is a stretch of an image, a chunk, or a whole file that is decompressed: megabytes, as a rule.

    Raises:
        InputError: if the environment says something else than a number of GiB.
    """
    if said := os.environ.get(VARIABLE):
        try:
            limit = int(float(said) * 2**30)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise InputError(f"{VARIABLE}={said}: expected a number of GiB above 0")
        return limit
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(_memory() if space == resource.RLIM_INFINITY else min(_memory(), space), 2 * _MOST) // 2


@cache
def _memory() -> int:
    """Bytes that this machine has, or the container that this process runs in."""
    memory = int(psutil.virtual_memory().total)
    for file in _CGROUPS:
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            memory = min(memory, int(text))
    return memory


def check_size(path: str, what: str, size: int) -> None:
    """Refuse what would take more memory than a read may.

    Args:
        path: of the file.
        what: the part of it that is to be read, as the error calls it.
        size: bytes that it claims.

    Raises:
        SchemaError: saying how much was claimed, and how more is allowed.
    """
    limit = read_limit()
    if size > limit:
        raise SchemaError(
            path,
            f"{what} would take {_gib(size)} of memory; at most {_gib(limit)} are taken for one read. If the file is "
            f"not damaged or made up, allow more by {VARIABLE}, on a machine that has it",
        )


def inflate(path: str, data: bytes | memoryview, limit: int, wbits: int = 31) -> bytes:
    """Decompress all members of a gzip file, or a zlib stream, into a bounded number of bytes.

    Args:
        path: of the file.
        data: its bytes.
        limit: bytes that it may become.
        wbits: the container, as :func:`zlib.decompressobj` counts it: 31 for gzip, 15 for zlib.

    Raises:
        SchemaError: if it becomes more.
        zlib.error: if it is damaged.
        EOFError: if it is cut short.
    """
    parts: list[bytes] = []
    room = limit
    while data:
        stream = zlib.decompressobj(wbits)
        parts.append(stream.decompress(data, room + 1))
        room -= len(parts[-1])
        if room < 0:
            raise SchemaError(path, f"becomes more than {_gib(limit)} when it is decompressed, which is not done")
        if not stream.eof:
            raise EOFError("it is cut short")
        # Padding by zeros may follow, as gzip itself allows.
        data = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _gib(size: int) -> str:
    """A size in words; of one beyond all machines its order alone."""
    if size >= 2**60:
        return "more than a billion GiB"
    return f"{size / 2**30:,.3g} GiB" if size >= 2**20 else f"{size:,} bytes"
