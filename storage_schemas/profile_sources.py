"""Tables of profiles that other software wrote, opened without being read and read block by block.

CSV (gzipped too), Parquet and AnnData (``.h5ad``, through h5py). Nothing here knows what a column means.
"""

from __future__ import annotations

import csv
import gzip
import io
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

from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError

_BLOCK_BYTES = 2**24
_BLOCK_ROWS = 2048
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
                    frame = pq.read_table(file, columns=list(columns)).to_pandas(ignore_metadata=True)
                return pd.DataFrame(frame[list(columns)])
            batches = [batch.to_pandas() for batch in _csv_batches(self.url, columns)]
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
                    for batch in pq.ParquetFile(file).iter_batches(_BLOCK_ROWS, columns=list(columns)):
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
        line = io.TextIOWrapper(file, "utf-8-sig", newline="").readline()
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


def _open_h5ad(url: str) -> Source:
    with _h5ad(url) as stored:
        obs = [str(name) for name in stored["obs"].attrs["column-order"]]
        numbers = [name for name in obs if getattr(stored["obs"][name], "dtype", np.dtype("O")).kind in "iuf"]
        variables = _decoded(stored["var"][stored["var"].attrs["_index"]][:])
        shape = _shape_of_x(url, stored["X"])
    if shape[1] != len(variables):
        raise SchemaError(url, f"X has {shape[1]} columns and var {len(variables)} names")
    names = tuple(str(name) for name in variables)
    return Source(url, "h5ad", (*obs, *names), frozenset([*numbers, *names]), names)


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
        x = stored["X"]
        n, dimension = _shape_of_x(url, x)
        for start in range(0, n, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, n)
            if hasattr(x, "shape"):
                block = np.asarray(x[start:stop], np.float32)
            else:
                block = np.zeros((stop - start, dimension), np.float32)
                bounds = x["indptr"][start : stop + 1]
                rows = np.repeat(np.arange(stop - start), np.diff(bounds))
                held = slice(int(bounds[0]), int(bounds[-1]))
                block[rows, x["indices"][held]] = x["data"][held]
            yield np.ascontiguousarray(block[:, wanted])


def _read_obs(url: str, columns: Sequence[str]) -> pd.DataFrame:
    with _h5ad(url) as stored:
        obs = stored["obs"]
        n = _shape_of_x(url, stored["X"])[0]
        return pd.DataFrame({name: _obs_column(obs[name]) for name in columns}, index=range(n))


def _obs_column(stored: Any) -> NDArray[Any]:
    """A column of ``obs``: an array, categories with their codes, or values with a mask."""
    if hasattr(stored, "shape"):
        return _decoded(stored[:])
    if "codes" in stored:
        categories, codes = _decoded(stored["categories"][:]), stored["codes"][:]
        values = np.full(len(codes), None, object)
        values[codes >= 0] = categories.astype(object)[codes[codes >= 0]]
        return values
    values = _decoded(stored["values"][:]).astype(object)
    values[stored["mask"][:].astype(bool)] = None
    return values


def _decoded(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "OS":
        return values
    return np.array([v.decode() if isinstance(v, bytes) else v for v in values.tolist()], object)
