"""Parquet files that others wrote: how much they may become is known before memory is taken for it.

A page says one number and a count; a dictionary holds a text once for all rows. So a file of kilobytes may become
terabytes. Its footer says how many values it has, and so do its pages, which a reader believes: both are added up.
Text is read as a dictionary and written out only if it is known to be of a bounded size.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Sequence
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage_schemas.errors import InputError, SchemaError
from storage_schemas.limits import check_size

# What a page may be, and the field of its header that says first how many numbers it has; parquet.thrift lists them.
_DICTIONARY_PAGE = 2
_NUMBERED_PAGES = {0: 5, _DICTIONARY_PAGE: 7, 3: 8}
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
_LEVELS = 4  # bytes a value, of how it is nested and whether it is there


def read_table(url: str, source: BinaryIO, columns: Sequence[str] | None = None, *, near: bool = True) -> pa.Table:
    """A table, text as plain strings; at most as large as :func:`storage_schemas.limits.read_limit` says.

    Args:
        url: of the file, for errors.
        source: the file, seekable.
        columns: in this order, those that it has; all by default.
        near: whether its pages can be looked at without a request for each.

    Raises:
        SchemaError: if it would be larger, or a page is damaged.
        pyarrow.ArrowException: if it is no Parquet.
    """
    schema = pq.read_schema(source)
    source.seek(0)
    doubled = sorted(name for name, n in Counter(schema.names).items() if n > 1)
    if doubled:
        raise SchemaError(url, f"columns {doubled[:5]} stand there more than once")
    file = pq.ParquetFile(source, read_dictionary=[field.name for field in schema if _is_text(field.type)])
    names = schema.names if columns is None else [name for name in columns if name in schema.names]
    check_claims(url, source if near else None, file, names)
    return _plain(url, file.read(names).select(names), schema)


def check_claims(url: str, source: BinaryIO | None, file: pq.ParquetFile, columns: Collection[str]) -> None:
    """Refuse columns that would take more memory than a read may, but for text that stands there once for many rows.

    Args:
        url: of the file.
        source: of the file, whose pages are looked at; None to believe its footer.
        file: the same, opened.
        columns: by name.

    Raises:
        SchemaError: if they would, or a page is damaged.
    """
    size, inner = 0, {}
    for field in file.schema_arrow:
        # Of a list that is null there is one value in the file, and all of them in memory.
        outer, inner[field.name] = _list_sizes(field.type)
        size += file.metadata.num_rows * outer * 4 if field.name in columns else 0
    for place, (numbers, unpacked, _) in claims(url, source, file, columns).items():
        column, name = file.schema.column(place), _owners(file.schema_arrow)[place]
        if column.physical_type == "BYTE_ARRAY" and pa.types.is_nested(file.schema_arrow.field(name).type):
            raise SchemaError(url, f"column {name!r} holds lists or structures of text, which no table here has")
        width = _WIDTHS.get(column.physical_type, column.length or 1)
        size += numbers * inner[name] * (width + _LEVELS) + unpacked
    check_size(url, "the table", size)


def _list_sizes(kind: pa.DataType) -> tuple[int, int]:
    """How many values each row has in memory at least, and each of these again, by lists of fixed size."""
    outer = kind.list_size if pa.types.is_fixed_size_list(kind) else 1
    inner = 1
    while pa.types.is_nested(kind) and kind.num_fields == 1:
        kind = kind.field(0).type
        inner *= kind.list_size if pa.types.is_fixed_size_list(kind) else 1
    return outer, inner


def _is_text(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def check_pages(url: str, source: BinaryIO, file: pq.ParquetFile, columns: Collection[str]) -> None:
    """Refuse columns that cannot be read in stretches, a page of each at a time, by what a read may take.

    Raises:
        SchemaError: if they cannot, or a page is damaged.
    """
    check_size(url, "a page of each column", sum(page for _, _, page in claims(url, source, file, columns).values()))


def claims(
    url: str, source: BinaryIO | None, file: pq.ParquetFile, columns: Collection[str]
) -> dict[int, tuple[int, int, int]]:
    """How many values, and bytes without compression, the columns of a file may have, whatever its footer says.

    Args:
        url: of the file.
        source: of the file, whose pages are looked at; None to believe its footer.
        file: the same, opened.
        columns: by name.

    Returns:
        Of each leaf below one of the columns, by its place in the file: values, bytes, and bytes of its largest page.

    Raises:
        SchemaError: if the header of a page is damaged.
    """
    places = [place for place, owner in enumerate(_owners(file.schema_arrow)) if owner in columns]
    found = dict.fromkeys(places, (0, 0, 0))
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for place in places:
            column, (numbers, size, page) = group.column(place), found[place]
            try:
                of_pages = _of_pages(source, column) if source is not None else (0, 0, 0)
            except InputError as error:
                raise SchemaError(url, f"the Parquet table cannot be read: {error}") from error
            found[place] = (
                numbers + max(column.num_values, of_pages[0]),
                size + max(column.total_uncompressed_size, of_pages[1]),
                max(page, of_pages[2]),
            )
    if source is not None:
        source.seek(0)
    return found


def _owners(schema: pa.Schema) -> list[str]:
    """The column that each leaf of a file is of; names alone do not tell, since they may hold the dot that joins."""
    return [field.name for field in schema for _ in range(_n_leaves(field.type))]


def _n_leaves(kind: pa.DataType) -> int:
    return sum(_n_leaves(kind.field(i).type) for i in range(kind.num_fields)) if pa.types.is_nested(kind) else 1


def _plain(url: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Text out of its dictionaries, if that is not more than a read may take."""
    size = 0
    for column in table.columns:
        for chunk in column.chunks:
            if pa.types.is_dictionary(column.type) and _is_text(column.type.value_type):
                lengths = pc.cast(pc.binary_length(chunk.dictionary), pa.int64())
                size += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    check_size(url, "the text of the table", size)
    for i, name in enumerate(table.column_names):
        if table.schema.field(i).type != schema.field(name).type:
            table = table.set_column(i, schema.field(name), table.column(i).cast(schema.field(name).type))
    return table.replace_schema_metadata(schema.metadata)


# --- pages ---------------------------------------------------------------------------------------


def _of_pages(stream: BinaryIO, column: pq.ColumnChunkMetaData) -> tuple[int, int, int]:
    """Numbers, bytes, and bytes of the largest, that the headers of those pages claim that a reader would read."""
    numbers = size = largest = seen = 0
    end = stream.seek(0, io.SEEK_END)
    at = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
    while seen < column.num_values:
        stream.seek(at)
        page = _thrift(stream)
        kind, unpacked, packed = (page.numbers.get(i, -1) for i in (1, 2, 3))
        within = {i: page.structs[i].numbers.get(1, -1) for i in _NUMBERED_PAGES.values() if i in page.structs}
        # What has no such header, an index, holds no numbers.
        here = within.get(_NUMBERED_PAGES.get(kind, 0), 0)
        if min(unpacked, packed, here) < 0 or stream.tell() + packed > end:
            raise InputError("a page is truncated or damaged")
        numbers += here
        size += unpacked
        largest = max(largest, unpacked)
        seen += here if kind != _DICTIONARY_PAGE else 0
        at = stream.tell() + packed
    return numbers, size, largest


class _Struct(NamedTuple):
    """The fields of a Thrift struct that are 32-bit integers or structs themselves, by their number."""

    numbers: dict[int, int]
    structs: dict[int, _Struct]


def _thrift(stream: BinaryIO, depth: int = 0) -> _Struct:
    """A struct in Thrift's compact protocol, as far as the header of a Parquet page needs it.

    Raises:
        InputError: for anything that such a header does not have.
    """
    found = _Struct({}, {})
    field = 0
    while head := _byte(stream):
        field = field + (head >> 4) if head >> 4 else _integer(stream)
        kind = head & 15
        if kind == 5:
            found.numbers[field] = _integer(stream)
        elif kind in (4, 6):
            _integer(stream)
        elif kind == 8:
            stream.seek(min(_varint(stream), 2**31), io.SEEK_CUR)
        elif kind == 12 and depth < 4:
            found.structs[field] = _thrift(stream, depth + 1)
        elif kind not in (1, 2):
            raise InputError("the header of a page is damaged")
    return found


def _byte(stream: BinaryIO) -> int:
    read = stream.read(1)
    if not read:
        raise InputError("it ends within the header of a page")
    return read[0]


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise InputError("the header of a page is damaged")


def _integer(stream: BinaryIO) -> int:
    value = _varint(stream)
    return (value >> 1) ^ -(value & 1)
