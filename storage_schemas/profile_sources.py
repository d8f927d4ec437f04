"""Tables of profiles that other software wrote, opened without being read and read block by block.

CSV (gzipped too), Parquet and AnnData (``.h5ad``, through h5py). Nothing here knows what a column means.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError

_SAMPLE_ROWS = 1000
_BLOCK_BYTES = 2**24
_BLOCK_ROWS = 2048
_NULLS = ["", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "none", "#N/A"]


@dataclass(frozen=True)
class Source:
    """A table of profiles.

    Attributes:
        url: where it lies.
        kind: of file.
        columns: names of its columns, in order; of AnnData those of ``obs``, then the names of the variables.
        numbers: those that hold numbers, as their type or the first thousand rows say.
        variables: those that are measurements because the file says so; none where it does not say.
    """

    url: str
    kind: Literal["csv", "parquet", "h5ad"]
    columns: tuple[str, ...]
    numbers: frozenset[str]
    variables: tuple[str, ...] = ()

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
            text = dict.fromkeys(columns, pa.string())
            batches = [batch.to_pandas() for batch in _csv_batches(self.url, columns, text)]
            return pd.concat(batches, ignore_index=True) if batches else pd.DataFrame(columns=list(columns))

    def blocks(self, columns: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Measurements, (rows, columns) at a time, NaN where there is none.

        Raises:
            SchemaError: if the file cannot be read, or a value is not a number: naming its column.
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
            for batch in _csv_batches(self.url, columns, dict.fromkeys(columns, pa.float32())):
                yield _as_array(batch, columns)


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
    seen = pd.Index(source.columns)
    if seen.has_duplicates:
        raise SchemaError(url, f"columns {sorted(set(seen[seen.duplicated()]))[:5]} stand there more than once")
    return source


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
    fs, path = store.filesystem(url)
    with fs.open(path, "rb", compression="gzip" if url.lower().endswith(".gz") else None) as file:
        yield file


def _as_array(batch: pa.RecordBatch, columns: Sequence[str]) -> NDArray[np.float32]:
    values = np.empty((batch.num_rows, len(columns)), np.float32)
    for i, name in enumerate(columns):
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which filters know
            values[:, i] = batch.column(name).to_numpy(zero_copy_only=False)
    return values


# --- CSV -----------------------------------------------------------------------------------------


def _open_csv(url: str) -> Source:
    delimiter, header = _csv_header(url)
    with _file(url) as file:
        sample = pd.read_csv(file, sep=delimiter, nrows=_SAMPLE_ROWS, na_values=_NULLS, encoding="utf-8-sig")
    if len(sample.columns) != len(header):
        raise SchemaError(url, f"has {len(header)} names of columns and rows of {len(sample.columns)} values")
    kinds = [dtype.kind for dtype in sample.dtypes]
    # pandas renames what stands there twice, so the header itself is asked.
    numbers = frozenset(name for name, kind in zip(header, kinds, strict=True) if kind in "if")
    return Source(url, "csv", tuple(name for name in header if name), numbers - {""})


def _csv_header(url: str) -> tuple[str, list[str]]:
    with _file(url) as file:
        line = io.TextIOWrapper(file, "utf-8-sig", newline="").readline()
    if not line.strip():
        raise SchemaError(url, "is empty: expected a line of column names and a line for each well")
    delimiter = max(",;\t", key=line.count)
    return delimiter, [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]


def _csv_batches(url: str, columns: Sequence[str], types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    from pyarrow import csv as arrow_csv

    delimiter, header = _csv_header(url)
    try:
        with _file(url) as file:
            yield from arrow_csv.open_csv(
                file,
                read_options=arrow_csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=header, skip_rows=1),
                parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=arrow_csv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=types,
                    null_values=_NULLS,
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=True,
                ),
            )
    except pa.ArrowInvalid as error:
        place = re.search(r"In CSV column #(\d+): (?:CSV conversion error to \w+: )?(.*)", str(error))
        if place is None:
            raise
        raise SchemaError(
            url,
            f"column {header[int(place[1])]!r} is no measurement in every row: {place[2]}; mend it, or leave the "
            "column out by naming the measurements (--features)",
        ) from error


# --- Parquet -------------------------------------------------------------------------------------


def _open_parquet(url: str) -> Source:
    with _file(url) as file:
        schema = pq.read_schema(file)
    fields = [field for field in schema if not field.name.startswith("__index_level_")]
    plain = [field for field in fields if not pa.types.is_nested(field.type)]
    numbers = [f.name for f in plain if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    return Source(url, "parquet", tuple(field.name for field in plain), frozenset(numbers))


# --- AnnData -------------------------------------------------------------------------------------


@contextmanager
def _h5ad(url: str) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise SchemaError(url, "AnnData files need the extra: pip install 'screening[anndata]'") from error
    fs, path = store.filesystem(url)
    with fs.open(path, "rb") as file, h5py.File(file, "r") as stored:
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
