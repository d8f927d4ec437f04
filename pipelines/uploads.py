"""Vectors from a file that somebody sends: Parquet or NumPy, of a bounded size whatever the file claims.

Nothing is unpickled. The sizes that a file claims are checked before memory is taken for them: those in the header of
a NumPy file; those in a Parquet file's footer and, since these may differ, those of its pages. That the libraries which
decode what is within these bounds have no faults is trusted.
"""

from __future__ import annotations

import io
import tokenize
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.errors import InputError
from storage_schemas.parquet import claims

MAX_ROWS = 1000
"""Vectors in one file: each is a question of its own."""
MAX_NUMBERS = 2**24
"""Numbers in one file, once it is decompressed: a Parquet table of a few KB may claim as many as it likes."""

_VECTOR_COLUMNS = ("embedding", "profile", "vector")


def read_vectors(content: bytes, max_rows: int = MAX_ROWS, max_numbers: int = MAX_NUMBERS) -> npt.NDArray[np.float32]:
    """The (q, D) vectors of a file, from its bytes.

    Args:
        content: a NumPy file (``.npy``) of a matrix of numbers; or a Parquet table with a column ``embedding``,
            ``profile`` or ``vector`` of lists of equal length, as the tables of a screen have.
        max_rows: vectors that it may hold.
        max_numbers: numbers that these may have together.

    Raises:
        InputError: anything else, more vectors or numbers than that, or numbers that are not finite.
    """
    if content.startswith(b"\x93NUMPY"):
        found = _read_npy(content, max_rows, max_numbers)
    elif content.startswith(b"PAR1"):
        found = _read_parquet(content, max_rows, max_numbers)
    else:
        raise InputError("the file is neither Parquet nor NumPy (.npy)")
    if found.ndim != 2 or not found.size:
        raise InputError(f"the file holds numbers of shape {found.shape}; expected (vectors, dimensions)")
    _check_rows(len(found), max_rows)
    vectors = np.ascontiguousarray(found, np.float32)
    if not np.isfinite(vectors).all():
        raise InputError("the file holds numbers that are not finite")
    return vectors


def _check_rows(n: int, most: int) -> None:
    if n > most:
        raise InputError(f"the file holds {n:,} vectors; ask with {most:,} at a time at most")


def _check_numbers(n: int, most: int) -> None:
    if n > most:
        raise InputError(f"the file holds {n:,} numbers; at most {most:,} are taken")


def _numbers(content: bytes, file: pq.ParquetFile, name: str) -> int:
    """How many numbers a column may become in memory, however small its file is, and whatever its footer says."""
    found = claims("the file", io.BytesIO(content), file, [name]).values()
    return max(sum(numbers for numbers, *_ in found), sum(size for _, size, _ in found) // 8)


def _read_npy(content: bytes, max_rows: int, max_numbers: int) -> npt.NDArray[Any]:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(stream)
    except (ValueError, KeyError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise InputError(f"the NumPy file cannot be read: {error}") from error
    if dtype.kind not in "fiu" or len(shape) != 2:
        raise InputError(f"the NumPy file holds {dtype} of shape {shape}; expected a matrix of numbers")
    _check_rows(shape[0], max_rows)
    start = stream.tell()
    # As Python's integers, which do not overflow.
    numbers = int(shape[0]) * int(shape[1])
    if numbers * dtype.itemsize != len(content) - start:
        raise InputError(f"the NumPy file is truncated or damaged: it does not hold {shape} numbers of {dtype}")
    _check_numbers(numbers, max_numbers)
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _read_parquet(content: bytes, max_rows: int, max_numbers: int) -> npt.NDArray[Any]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_rows(file.metadata.num_rows, max_rows)
        names = [name for name in _VECTOR_COLUMNS if name in file.schema_arrow.names]
        if not names:
            raise InputError(f"the Parquet table has none of the columns {', '.join(_VECTOR_COLUMNS)}")
        # Before it is read: text that stands in the file once would take memory for every row of the table.
        kind = file.schema_arrow.field(names[0]).type
        is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise InputError(f"the column {names[0]!r} holds {kind}; expected lists of floating-point numbers")
        _check_numbers(_numbers(content, file, names[0]), max_numbers)
        column = file.read(columns=names[:1]).column(0).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"the Parquet table cannot be read: {error}") from error
    values = column.flatten()
    if column.null_count or values.null_count:
        raise InputError(f"the column {names[0]!r} must hold lists of floating-point numbers without gaps")
    if not len(column) or len(values) % len(column):
        raise InputError(f"the lists of the column {names[0]!r} are not of one length")
    lengths = column.value_lengths().unique() if pa.types.is_list(column.type) else [column.type.list_size]
    if len(lengths) != 1:
        raise InputError(f"the lists of the column {names[0]!r} are not of one length")
    flat: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1)
