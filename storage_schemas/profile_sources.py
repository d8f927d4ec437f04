"""Tables of profiles that other software wrote, opened without being read and read block by block.

CSV (gzipped too), Parquet and AnnData (``.h5ad``, through h5py). Nothing here knows what a column means.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_schemas import parquet, store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.limits import check_size, inflate, read_limit

_BLOCK_BYTES = 2**24
_BLOCK_ROWS = 2048
_DEFLATE = 1032  # times that it makes data smaller at most
# What stands for a missing value: of R, pandas and databases, then of spreadsheets, then of C on Windows.
_NULLS = [
    *("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "none", "<NA>"),
    *("#N/A", "#N/A N/A", "#NA", "#DIV/0!", "#NUM!", "#VALUE!", "#REF!", "#NAME?", "#NULL!"),
    *("1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "1.#INF", "-1.#INF"),
]
_NUMBER = r"^[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|infinity|nan)$"


class Stray(NamedTuple):
    """Text in a column of numbers: the first, its row (from 1, the header not counted), and how many there are."""

    row: int
    value: str
    n: int


@dataclass(frozen=True)
class Source:
    """A table of profiles.

    Attributes:
        url: where it lies.
        kind: of file.
        columns: names of its columns, in order; of AnnData those of ``obs``, then the names of the variables.
        numbers: those that hold numbers, as their type says; in CSV, those that hold more numbers than other text.
        variables: those that are measurements because the file says so; none where it does not say.
        empty: columns of a CSV file that hold nothing at all, and could be anything.
        strays: what else stands in columns of numbers.
    """

    url: str
    kind: Literal["csv", "parquet", "h5ad"]
    columns: tuple[str, ...]
    numbers: frozenset[str]
    variables: tuple[str, ...] = ()
    empty: frozenset[str] = frozenset()
    strays: Mapping[str, Stray] = field(default_factory=dict)

    def require_numbers(self, columns: Sequence[str]) -> None:
        """See to it that columns of ``numbers`` hold nothing else.

        Raises:
            SchemaError: if one does, naming column, row and value.
        """
        for name in columns:
            if name in self.strays:
                raise _not_a_number(self.url, name, self.strays[name])

    def read(self, columns: Sequence[str]) -> pd.DataFrame:
        """Some columns whole; those of a CSV file as text or None.

        Raises:
            SchemaError: if the file cannot be read.
        """
        with _problems(self.url):
            if self.kind == "h5ad":
                return _read_obs(self.url, columns)
            if self.kind == "parquet":
                with _file(self.url) as file:
                    table = parquet.read_table(self.url, file, columns, near=store.is_local(self.url))
                return pd.DataFrame(table.to_pandas(ignore_metadata=True)[list(columns)])
            batches, size = [], 0
            for batch in _csv_batches(self.url, columns):
                # Text takes some times more as Python's own.
                size += 4 * batch.nbytes
                check_size(self.url, "text beside the measurements", size)
                batches.append(batch.to_pandas())
            return pd.concat(batches, ignore_index=True) if batches else pd.DataFrame(columns=list(columns))

    def blocks(self, columns: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Measurements, (rows, columns) at a time, NaN where there is none.

        Raises:
            SchemaError: if the file cannot be read, or as :meth:`require_numbers`.
        """
        with _problems(self.url):
            if self.kind == "h5ad":
                yield from _variable_blocks(self.url, self.variables, columns)
                return
            if self.kind == "parquet":
                with _file(self.url) as file:
                    table = pq.ParquetFile(file)
                    if store.is_local(self.url):
                        parquet.check_pages(self.url, file, table, columns)
                    for batch in table.iter_batches(_BLOCK_ROWS, columns=list(columns)):
                        yield _as_array(batch, columns)
                return
            self.require_numbers(columns)
            for batch in _csv_batches(self.url, columns):
                yield np.stack([_numbers(batch.column(name))[0] for name in columns], axis=1)


def open_source(url: str) -> Source:
    """Look at a table of profiles.

    Raises:
        SchemaError: if it is missing, of another kind, unreadable, or has columns of one name.
    """
    name = url.lower()
    if not store.exists(url):
        raise SchemaError(url, "no such file")
    with _problems(url):
        if name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")):
            source = _open_csv(url)
        elif name.endswith((".parquet", ".pq")):
            source = _open_parquet(url)
        elif name.endswith(".h5ad"):
            source = _open_h5ad(url)
        else:
            raise SchemaError(url, "expected a table of profiles: .csv, .csv.gz, .tsv, .parquet or .h5ad")
    _refuse_twins(url, source.columns)
    return source


def _refuse_twins(url: str, columns: Sequence[str]) -> None:
    seen = pd.Index(columns)
    if seen.has_duplicates:
        raise SchemaError(url, f"columns {sorted(set(seen[seen.duplicated()]))[:5]} stand there more than once")


@contextmanager
def _problems(url: str) -> Iterator[None]:
    """What goes wrong in a file that is not ours is the user's to mend; each reader has errors of its own."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        raise SchemaError(url, f"cannot be read as a table of profiles: {error}") from error


@contextmanager
def _file(url: str) -> Iterator[Any]:
    with store.open_file(url) as file:
        if not url.lower().endswith(".gz"):
            yield file
            return
        with gzip.open(file) as unzipped:
            yield unzipped


def _as_array(batch: pa.RecordBatch, columns: Sequence[str]) -> NDArray[np.float32]:
    values = np.empty((batch.num_rows, len(columns)), np.float32)
    for i, name in enumerate(columns):
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which filters know
            values[:, i] = batch.column(name).to_numpy(zero_copy_only=False)
    return values


# --- CSV -----------------------------------------------------------------------------------------


def _open_csv(url: str) -> Source:
    _, header = _csv_header(url)
    columns = tuple(name for name in header if name)
    _refuse_twins(url, columns)
    finite, strays = _contents(_csv_batches(url, columns), columns)
    numbers = frozenset(name for name in columns if finite[name] > (strays[name].n if name in strays else 0))
    empty = frozenset(name for name in columns if not finite[name] and name not in strays)
    strays = {name: stray for name, stray in strays.items() if name in numbers}
    return Source(url, "csv", columns, numbers, empty=empty, strays=strays)


def _csv_header(url: str) -> tuple[str, list[str]]:
    with _file(url) as file:
        line = io.TextIOWrapper(file, "utf-8-sig", newline="").readline(_BLOCK_BYTES)
    if len(line) == _BLOCK_BYTES:
        raise SchemaError(url, f"has no end of a line in its first {_BLOCK_BYTES:,} letters: it is no table")
    if not line.strip():
        raise SchemaError(url, "is empty: expected a line of column names and a line for each well")
    delimiter = max(",;\t", key=line.count)
    return delimiter, [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]


def _csv_batches(url: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns as text, nothing where it stands for a missing value."""
    from pyarrow import csv as arrow_csv

    delimiter, header = _csv_header(url)
    with _file(url) as file:
        yield from arrow_csv.open_csv(
            file,
            read_options=arrow_csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=header, skip_rows=1),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(columns),
                column_types=dict.fromkeys(columns, pa.string()),
                null_values=_NULLS,
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )


def _contents(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> tuple[dict[str, int], dict[str, Stray]]:
    """How many numbers each column of text holds, and what is neither number nor missing in those that hold such."""
    finite = dict.fromkeys(columns, 0)
    strays: dict[str, Stray] = {}
    start = 0
    for batch in batches:
        for name in columns:
            column = batch.column(name)
            values, rows = _numbers(column)
            finite[name] += int(np.isfinite(values).sum())
            if len(rows):
                first = Stray(start + int(rows[0]) + 1, str(column[int(rows[0])].as_py()), 0)
                before = strays.get(name, first)
                strays[name] = before._replace(n=before.n + len(rows))
        start += batch.num_rows
    return finite, strays


def _numbers(text: pa.Array) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Text as numbers, NaN where they are missing, and the rows of what is neither."""
    try:
        return text.cast(pa.float32()).to_numpy(zero_copy_only=False), np.empty(0, np.int64)
    except pa.ArrowInvalid:
        text = pc.utf8_trim_whitespace(text)
    number = pc.fill_null(pc.match_substring_regex(text, _NUMBER, ignore_case=True), False)
    marks = pa.array(sorted({mark.upper() for mark in _NULLS}))
    missing = pc.or_(pc.is_null(text), pc.is_in(pc.utf8_upper(text), value_set=marks))
    values = pc.if_else(number, text, pa.scalar(None, pa.string())).cast(pa.float32())
    strays = np.flatnonzero(~pc.or_(number, missing).to_numpy(zero_copy_only=False))
    return values.to_numpy(zero_copy_only=False), strays


def _not_a_number(url: str, column: str, stray: Stray) -> SchemaError:
    more = f" (and {stray.n - 1:,} more)" if stray.n > 1 else ""
    return SchemaError(
        url,
        f"column {column!r}, row {stray.row:,} (not counting the header): {stray.value!r} is no number{more}; mend "
        "it, leave the cell empty if nothing was measured, or leave the column out by naming the measurements "
        "(--features)",
    )


# --- Parquet -------------------------------------------------------------------------------------


def _open_parquet(url: str) -> Source:
    with _file(url) as file:
        schema = pq.read_schema(file)
    fields = [f for f in schema if not f.name.startswith("__index_level_")]
    plain = [f for f in fields if not pa.types.is_nested(f.type)]
    numbers = [f.name for f in plain if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    return Source(url, "parquet", tuple(f.name for f in plain), frozenset(numbers))


# --- AnnData -------------------------------------------------------------------------------------


@contextmanager
def _h5ad(url: str) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise SchemaError(url, "AnnData files need the extra: pip install 'screening[anndata]'") from error
    # HDF5 forgets what a store says of a read that fails.
    with store.local_copy(url) as path, h5py.File(path, "r") as stored:
        missing = {"X", "obs", "var"} - set(stored)
        if missing:
            raise SchemaError(url, f"is no AnnData file: it lacks {sorted(missing)}")
        yield stored


def _member(url: str, group: Any, name: str) -> Any:
    """A part of a file by its path, if it lies in that file: HDF5 can make any file of the disk look like a part."""
    import h5py

    for part in name.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise SchemaError(url, f"has no part {name!r} of its own")
        group = group[part]
    if isinstance(group, h5py.Dataset):
        if group.external or group.is_virtual:
            raise SchemaError(url, f"{name!r} lies in other files, which are not read")
        if group.dtype.kind not in "biufSUO":
            raise SchemaError(url, f"{name!r} holds {group.dtype}; expected numbers or text")
        _check_chunks(url, group)
    return group


def _stretch(url: str, stored: Any, rows: slice = slice(None)) -> NDArray[Any]:
    """Rows of a dataset, if that is not more than a read may take."""
    n = len(range(len(stored))[rows])
    width = max(stored.dtype.itemsize, 64 if stored.dtype.hasobject else 0)
    check_size(url, f"{stored.name!r}", n * math.prod(stored.shape[1:]) * width)
    return np.asarray(stored[rows])


def _check_chunks(url: str, stored: Any) -> None:
    """Refuse compressed chunks that become more than they should: HDF5 goes on until they end."""
    if stored.chunks is None or stored.compression is None:
        return
    most = math.prod(stored.chunks) * stored.dtype.itemsize
    check_size(url, f"a chunk of {stored.name!r}", most)
    large: list[tuple[int, ...]] = []
    limit = read_limit() // _DEFLATE
    stored.id.chunk_iter(lambda chunk: large.append(chunk.chunk_offset) if chunk.size > limit else None)
    for offset in large:
        mask, data = stored.id.read_direct_chunk(offset)
        if stored.compression == "gzip" and not mask:
            inflate(url, data, most + 2**16, wbits=15)


def _open_h5ad(url: str) -> Source:
    with _h5ad(url) as stored:
        obs, var = (_member(url, stored, name) for name in ("obs", "var"))
        names_of_obs = [str(name) for name in obs.attrs["column-order"]]
        kinds = [getattr(_member(url, obs, name), "dtype", np.dtype("O")).kind for name in names_of_obs]
        numbers = [name for name, kind in zip(names_of_obs, kinds, strict=True) if kind in "iuf"]
        variables = _decoded(_stretch(url, _member(url, var, str(var.attrs["_index"]))))
        shape = _shape_of_x(url, _member(url, stored, "X"))
    if shape[1] != len(variables):
        raise SchemaError(url, f"X has {shape[1]} columns and var {len(variables)} names")
    names = tuple(str(name) for name in variables)
    return Source(url, "h5ad", (*names_of_obs, *names), frozenset([*numbers, *names]), names)


def _shape_of_x(url: str, x: Any) -> tuple[int, ...]:
    if hasattr(x, "shape"):
        return tuple(x.shape)
    encoding = x.attrs.get("encoding-type")
    if encoding != "csr_matrix":
        raise SchemaError(url, f"X is stored as {encoding!r}: expected a dense matrix or one of sparse rows")
    return tuple(int(n) for n in x.attrs["shape"])


def _variable_blocks(url: str, variables: Sequence[str], columns: Sequence[str]) -> Iterator[NDArray[np.float32]]:
    place = {name: i for i, name in enumerate(variables)}
    wanted = np.array([place[name] for name in columns])
    with _h5ad(url) as stored:
        x = _member(url, stored, "X")
        n, dimension = _shape_of_x(url, x)
        check_size(url, f"{_BLOCK_ROWS} rows", _BLOCK_ROWS * dimension * 4)
        parts = [] if hasattr(x, "shape") else [_member(url, x, name) for name in ("indptr", "data", "indices")]
        for start in range(0, n, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, n)
            if not parts:
                block = np.asarray(_stretch(url, x, slice(start, stop)), np.float32)
            else:
                block = np.zeros((stop - start, dimension), np.float32)
                bounds = _stretch(url, parts[0], slice(start, stop + 1)).astype(np.int64)
                rows = np.repeat(np.arange(stop - start), np.diff(bounds))
                held = slice(int(bounds[0]), int(bounds[-1]))
                data, places = (_stretch(url, part, held) for part in parts[1:])
                block[rows, places] = data
            yield np.ascontiguousarray(block[:, wanted])


def _read_obs(url: str, columns: Sequence[str]) -> pd.DataFrame:
    with _h5ad(url) as stored:
        obs = _member(url, stored, "obs")
        n = _shape_of_x(url, _member(url, stored, "X"))[0]
        check_size(url, "obs", n * len(columns) * 8)
        return pd.DataFrame({name: _obs_column(url, _member(url, obs, name)) for name in columns}, index=range(n))


def _obs_column(url: str, stored: Any) -> NDArray[Any]:
    """A column of ``obs``: an array, categories with their codes, or values with a mask."""
    if hasattr(stored, "shape"):
        return _decoded(_stretch(url, stored))
    if "codes" in stored:
        categories = _decoded(_stretch(url, _member(url, stored, "categories")))
        codes = _stretch(url, _member(url, stored, "codes"))
        values = np.full(len(codes), None, object)
        values[codes >= 0] = categories.astype(object)[codes[codes >= 0]]
        return values
    values = _decoded(_stretch(url, _member(url, stored, "values"))).astype(object)
    values[_stretch(url, _member(url, stored, "mask")).astype(bool)] = None
    return values


def _decoded(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "OS":
        return values
    return np.array([v.decode() if isinstance(v, bytes) else v for v in values.tolist()], object)
