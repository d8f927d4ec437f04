"""Tables on disk: the columns of each, read and written as Parquet, and users' tables read from what they have.

A :class:`TableForm` names a table's columns and version. Writing checks them and puts the whole file at once; opening
checks them again, so that a file of another form, version or run is an error that names the file.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_schemas import parquet, store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import canonical_well, check_name
from storage_schemas.limits import check_size, inflate

_METADATA_KEY = b"screening"
_GROUP_BYTES = 2**24
# Of tables that users write, such as plate maps: beyond what anyone has, and still a few GB in memory.
_MAX_TEXT = 2**28  # bytes
_MAX_CELLS = 2**25

ROLES = ("treatment", "negative_control", "positive_control")

# Roles in training and tests; see screening.splits.
PARTS = (
    "train",
    "validation",
    "gallery",
    "test_compound",
    "test_replicate",
    "test_well",
    "test_cell",
    "query",
    "unused",
)


@dataclass(frozen=True)
class TableForm:
    """The form of a table on disk.

    Attributes:
        name: written into each file and checked on opening.
        version: raised whenever the meaning of a column changes.
        schema: the columns, in order.
        extra_prefix: columns beyond the schema are allowed if their names begin so.
    """

    name: str
    version: int
    schema: pa.Schema
    extra_prefix: str | None = None


_KEYS = [("plate", pa.string()), ("well", pa.string())]
_CELL_KEYS = [*_KEYS, ("site", pa.string()), ("track", pa.int32())]

PLATE_MAP = TableForm(
    "plate_map",
    1,
    pa.schema(
        [
            *_KEYS,
            ("compound", pa.string()),
            ("concentration", pa.float64()),
            ("unit", pa.string()),
            ("role", pa.string()),
            ("replicate", pa.string()),
        ]
    ),
)

COMPOUNDS = TableForm(
    "compounds",
    1,
    pa.schema([(name, pa.string()) for name in ("compound", "name", "moa", "cas", "inchikey", "smiles", "target")]),
)

FEATURE_PREFIX = "feature_"

CELLS = TableForm(
    "cells",
    1,
    pa.schema(
        [
            *_CELL_KEYS,
            ("parent", pa.int32()),  # track that divided; null without a known parent
            ("first_frame", pa.int32()),
            ("last_frame", pa.int32()),
            ("n_frames", pa.int32()),  # frames the cell was seen in, gaps left out
            ("centroid_y", pa.list_(pa.float32())),  # px, a value a frame, NaN where unseen
            ("centroid_x", pa.list_(pa.float32())),
            ("box", pa.list_(pa.list_(pa.int32(), 4))),  # (y0, x0, y1, x1) px, -1 where unseen
            ("n_missing", pa.int32()),  # frames of the clip in which the cell was not seen
            ("n_repaired", pa.int32()),  # frames of the clip taken from a neighbour: soft or empty
            ("excluded", pa.string()),  # why the track has no clip; empty if it has one
            ("clip", pa.int32()),  # position in the well's clip array; null without a clip
        ]
    ),
    extra_prefix=FEATURE_PREFIX,
)

QUALITY = TableForm(
    "quality",
    2,
    pa.schema(
        [
            *_KEYS,
            ("site", pa.string()),
            ("frame", pa.int32()),
            ("channel", pa.string()),
            ("focus", pa.float32()),  # null for a plane that is constant or all noise
            ("saturated", pa.float32()),  # share of pixels at the camera's ceiling
            ("glare", pa.float32()),  # how far the brightest 0.5 % are above the median, camera units
            ("mean", pa.float32()),  # camera units, like sd
            ("sd", pa.float32()),
            ("not_finite", pa.float32()),  # share of pixels
            ("flags", pa.string()),  # why the channel makes its frame bad, joined by ", "; empty where it does not
            ("bad", pa.bool_()),  # the whole frame, for one channel or another
            ("n_nuclei", pa.int32()),  # objects found in the frame, the same in each of its channels
            ("drift_y", pa.float32()),  # px that the field has moved since the last frame with objects in it
            ("drift_x", pa.float32()),
            ("site_flag", pa.string()),  # why the whole site gives no clips; empty if it is not for its images
        ]
    ),
)

SEQUENCES = TableForm(
    "sequences",
    1,
    pa.schema(
        [
            *_CELL_KEYS,
            ("part", pa.string()),  # what the data's makers used the cell for: train, query, gallery, nc or novel
            ("folder", pa.string()),  # of its images, below the folder that was imported
            ("frames", pa.list_(pa.int32())),  # frames of the clip whose image files are there, counted from 0
        ]
    ),
)

SPLIT = TableForm(
    "split",
    2,
    pa.schema(
        [
            *_KEYS,
            ("site", pa.string()),  # null where a row is a well, like the track
            ("track", pa.int32()),
            ("compound", pa.string()),
            ("moa", pa.string()),
            ("role", pa.string()),
            ("replicate", pa.string()),
            ("split", pa.string()),  # one of PARTS
        ]
    ),
)

TRAINING_METRICS = TableForm(
    "training_metrics",
    2,
    pa.schema(
        [
            ("phase", pa.string()),  # "pretrain" on compounds, "train" on what the configuration says
            ("epoch", pa.int32()),  # of the phase, counted from 1
            ("name", pa.string()),
            ("value", pa.float64()),
        ]
    ),
)

INDEX_IDS = TableForm(
    "index_ids",
    2,
    pa.schema(
        [
            ("id", pa.string()),  # the key's text form; at compound level the compound
            ("compound", pa.string()),
            ("moa", pa.string()),
            ("plate", pa.string()),  # null at compound level, like the well
            ("well", pa.string()),
            ("n_cells", pa.int32()),  # null where it is not known
        ]
    ),
)

SWEEP_RESULTS = TableForm(
    "sweep_results",
    2,
    pa.schema(
        [
            ("ablation", pa.string()),
            ("network", pa.string()),  # as the field calls it: ResNet-18
            ("seed", pa.int32()),
            ("epochs", pa.int32()),  # that were trained
            ("train_seconds", pa.float64()),  # wall-clock time of the command that ended the training
            ("test", pa.string()),  # what was held out: compound, replicate, ...
            ("contrast", pa.string()),  # the MOAs that retrieval was among
            ("n_queries", pa.int32()),  # cells that were looked up
            ("metric", pa.string()),
            ("value", pa.float64()),  # null where there was nothing to score, like the three after it
            ("low", pa.float64()),  # 95 % interval over compounds
            ("high", pa.float64()),
            ("chance", pa.float64()),
        ]
    ),
)

SEARCH_RESULTS = TableForm(
    "search_results",
    1,
    pa.schema(
        [
            ("sample", pa.int32()),  # 0: the configuration as it is
            ("settings", pa.string()),  # JSON: dotted key -> value
            ("seed", pa.int32()),
            ("state", pa.string()),  # of the training: done, or stopped early
            ("epoch", pa.int32()),
            ("validation_map", pa.float64()),
        ]
    ),
)

COMPARISON = TableForm(
    "comparison",
    1,
    pa.schema(
        [
            ("method", pa.string()),
            ("test", pa.string()),  # what was held out: compound or replicate
            ("contrast", pa.string()),  # the MOAs that retrieval was among
            ("metric", pa.string()),
            ("value", pa.float64()),  # null where there was nothing to score, like the three after it
            ("low", pa.float64()),  # 95 % interval over compounds
            ("high", pa.float64()),
            ("chance", pa.float64()),
            ("n_queries", pa.int32()),  # cells that were looked up
            ("n_compounds", pa.int32()),  # that they are of
        ]
    ),
)


RECIPES = TableForm(
    "recipes",
    1,
    pa.schema(
        [
            ("recipe", pa.string()),  # its name, or the settings it was given by
            ("n_features", pa.int32()),  # that it left
            ("test", pa.string()),  # replicate, replicate or control, class
            ("metric", pa.string()),
            ("value", pa.float64()),  # null where there was nothing to score, like the three after it
            ("low", pa.float64()),  # 95 % interval over compounds
            ("high", pa.float64()),
            ("chance", pa.float64()),
            ("n_queries", pa.int32()),  # wells, or treatments, that were looked up
            ("n_compounds", pa.int32()),  # that they are of
            ("n_left_out", pa.int32()),  # that had nothing to find
        ]
    ),
)


def embeddings_form(dimension: int) -> TableForm:
    """A row a cell: its key and its embedding, a fixed-size list of float32."""
    vector = ("embedding", pa.list_(pa.float32(), dimension))
    return TableForm("embeddings", 1, pa.schema([*_CELL_KEYS, vector]))


METADATA_PREFIX = "metadata_"


def raw_profiles_form(dimension: int) -> TableForm:
    """A row a well: its profile before any normalisation, which may hold NaN, and what else is known of the well.

    Columns beyond the form's are metadata that neither the plate map nor the table of compounds has, such as
    ``metadata_time``.
    """
    return TableForm(
        "raw_profiles",
        1,
        pa.schema(
            [
                *_KEYS,
                ("n_cells", pa.int32()),  # null where it is not known
                ("profile", pa.list_(pa.float32(), dimension)),
            ]
        ),
        extra_prefix=METADATA_PREFIX,
    )


def well_profiles_form(dimension: int) -> TableForm:
    """A row a well: its key, how many cells it had and its normalised profile."""
    return TableForm(
        "well_profiles",
        1,
        pa.schema(
            [
                *_KEYS,
                ("compound", pa.string()),
                ("role", pa.string()),
                ("n_cells", pa.int32()),
                ("profile", pa.list_(pa.float32(), dimension)),
            ]
        ),
    )


def treatment_profiles_form(dimension: int) -> TableForm:
    """A row a treatment; what its wells share beside the compound stands in columns such as ``metadata_time``."""
    return TableForm(
        "treatment_profiles",
        1,
        pa.schema(
            [
                ("compound", pa.string()),
                ("n_wells", pa.int32()),
                ("profile", pa.list_(pa.float32(), dimension)),
            ]
        ),
        extra_prefix=METADATA_PREFIX,
    )


def compound_profiles_form(dimension: int) -> TableForm:
    """A row a compound: how many wells and cells it had and the consensus of its wells' profiles."""
    return TableForm(
        "compound_profiles",
        1,
        pa.schema(
            [
                ("compound", pa.string()),
                ("role", pa.string()),
                ("n_wells", pa.int32()),
                ("n_cells", pa.int32()),
                ("profile", pa.list_(pa.float32(), dimension)),
            ]
        ),
    )


FEATURES = TableForm(
    "features",
    1,
    pa.schema(
        [
            ("feature", pa.string()),  # in the order of the raw profiles
            ("excluded", pa.string()),  # why the processed profiles are without it; empty where they are not
        ]
    ),
)

NORMALISATION = TableForm(
    "normalisation",
    2,
    pa.schema(
        [
            ("step", pa.int32()),  # of the recipe, counted from 1
            ("plate", pa.string()),
            ("n_reference", pa.int32()),  # wells that the plate was compared with
            ("center", pa.list_(pa.float32())),  # what was subtracted, a value a feature that was there
            ("scale", pa.list_(pa.float32())),  # what was divided by
        ]
    ),
)


_PRECISION = [
    ("mean_average_precision", pa.float64()),  # null where nothing could be tested, like the numbers after it
    ("expected_precision", pa.float64()),  # in random order
    ("normalised_precision", pa.float64()),  # 0 as chance has it, 1 for perfect
    ("p_value", pa.float64()),
    ("q_value", pa.float64()),  # false discovery rate
]

ACTIVITY = TableForm(
    "activity",
    1,
    pa.schema(
        [
            ("compound", pa.string()),  # what else makes a treatment stands in further columns
            ("role", pa.string()),
            ("moa", pa.string()),
            ("n_wells", pa.int32()),
            ("n_replicates", pa.int32()),  # wells that took part: on plates with negative controls
            ("n_controls", pa.int32()),
            *_PRECISION,
            ("active", pa.bool_()),
            ("n_relabelings", pa.int32()),
            ("excluded", pa.string()),  # why it could not be tested; null where it was
            ("control_distance", pa.float64()),  # median over the wells, in the controls' standard deviations
            ("replicate_correlation", pa.float64()),  # median over pairs of wells
            ("replicate_p_value", pa.float64()),
            ("replicates", pa.bool_()),
        ]
    ),
    extra_prefix=METADATA_PREFIX,
)

CONSISTENCY = TableForm(
    "consistency",
    1,
    pa.schema(
        [
            ("kind", pa.string()),  # moa or target
            ("label", pa.string()),
            ("n_compounds", pa.int32()),
            *_PRECISION,
            ("consistent", pa.bool_()),
            ("n_relabelings", pa.int32()),
            ("excluded", pa.string()),
        ]
    ),
)

PREDICTIONS = TableForm(
    "predictions",
    1,
    pa.schema(
        [
            ("compound", pa.string()),
            ("call", pa.string()),  # what it is called: a mechanism, none of the known, or like the negative control
            ("moa", pa.string()),  # a candidate; the first choice stands first
            ("share", pa.float64()),  # of the votes
            ("mean_distance", pa.float64()),  # cosine distance; null without candidates
            ("p_value", pa.float64()),  # null for what is like the negative control
            ("q_value", pa.float64()),  # false discovery rate over all compounds and candidates
            ("n_votes", pa.int32()),
            ("nearest_similarity", pa.float64()),  # cosine of the compound's profile and that of the nearest known one
            ("true_moa", pa.string()),
            ("split", pa.string()),  # what the network was told of the compound; null without a network
            ("note", pa.string()),
        ]
    ),
)

CONTROLS = TableForm(
    "controls",
    1,
    pa.schema(
        [
            ("plate", pa.string()),
            ("n_wells", pa.int32()),
            ("n_negative", pa.int32()),
            ("n_positive", pa.int32()),
            ("z_prime", pa.float64()),  # null like the next three with too few controls
            ("ssmd", pa.float64()),
            ("z_prime_robust", pa.float64()),
            ("ssmd_robust", pa.float64()),
            ("control_distance", pa.float64()),  # of a negative control from the others, median
            ("treated_distance", pa.float64()),  # of a treated well from them, median
            ("excluded", pa.string()),
        ]
    ),
)

DOSES = TableForm(
    "doses",
    1,
    pa.schema(
        [
            ("compound", pa.string()),
            ("n_wells", pa.int32()),
            ("n_doses", pa.int32()),
            ("spearman", pa.float64()),
            ("p_value", pa.float64()),
            ("q_value", pa.float64()),
            ("dose_dependent", pa.bool_()),
            ("n_relabelings", pa.int32()),
            ("excluded", pa.string()),
        ]
    ),
    extra_prefix=METADATA_PREFIX,
)


def write_table(url: str, table: pa.Table | pd.DataFrame, form: TableForm, fingerprint: str = "") -> None:
    """Write a table of a given form as one Parquet file, atomically.

    Args:
        url: where to.
        table: all the form's columns, in any order.
        form: what it must look like.
        fingerprint: of the stage that made it (see :mod:`storage_schemas.screen`).

    Raises:
        SchemaError: if columns are missing, unknown or of a type that does not fit.
    """
    if isinstance(table, pd.DataFrame):
        try:
            table = pa.Table.from_pandas(table, preserve_index=False)
        except pa.ArrowException as error:
            raise SchemaError(url, f"a column of this {form.name} table has no one type: {error}") from error
    write_tables(url, [table], form, fingerprint)


def write_tables(url: str, tables: Iterable[pa.Table], form: TableForm, fingerprint: str = "") -> int:
    """Write parts of a table one after another, as :func:`write_table` does the whole; one is in memory at a time.

    Returns:
        How many rows.

    Raises:
        SchemaError: as :func:`write_table`; or if there is no part at all.
    """
    mark = {"form": form.name, "version": form.version, "fingerprint": fingerprint}
    metadata = {_METADATA_KEY: json.dumps(mark).encode()}
    rows = 0
    # Left first, so that a writer that has failed is closed while its file is still open.
    with store.open_new(url) as file, ExitStack() as opened:
        writer = None
        for part in tables:
            table = _conform(url, part, form).replace_schema_metadata(metadata)
            if writer is None:
                writer = pq.ParquetWriter(
                    file,
                    table.schema,
                    compression="lz4",
                    # Dictionaries cost more than they save on vectors.
                    use_dictionary=[f.name for f in table.schema if pa.types.is_string(f.type)],
                    write_statistics=False,
                )
                opened.enter_context(writer)
            # A row group of limited size keeps readers' memory flat, whatever the rows are.
            of_a_row = max(table.nbytes // max(len(table), 1), 1)
            writer.write_table(table, row_group_size=min(20_000, max(_GROUP_BYTES // of_a_row, 1)))
            rows += len(table)
        if writer is None:
            raise SchemaError(url, f"a {form.name} table of no parts cannot be written")
    return rows


def open_vectors(url: str, form: TableForm, column: str) -> tuple[pa.Table, NDArray[np.float32]]:
    """Read a table whose vectors are large: they are filled into one array, row group by row group.

    Args:
        url: where it lies.
        form: what it must look like, with ``column`` a fixed-size list of float32.
        column: the vectors.

    Returns:
        The other columns, and (n, D) vectors.

    Raises:
        SchemaError: as :func:`open_table`.
    """
    try:
        with store.open_file(url) as source:
            file = pq.ParquetFile(source)
            _check_mark(url, file.schema_arrow, form)
            dimension = form.schema.field(column).type.list_size
            if store.is_local(url):
                # Elsewhere each look at a page is a request.
                parquet.check_claims(url, source, file, file.schema_arrow.names)
            check_size(url, f"column {column!r}", file.metadata.num_rows * dimension * 4)
            values = np.empty((file.metadata.num_rows, dimension), np.float32)
            others, start = [], 0
            for group in range(file.num_row_groups):
                table = _conform(url, file.read_row_group(group), form)
                for chunk in table[column].chunks:
                    flat = chunk.flatten().to_numpy(zero_copy_only=False)
                    values[start : start + len(chunk)] = flat.reshape(len(chunk), dimension)
                    start += len(chunk)
                others.append(table.drop_columns(column))
            if start != len(values):
                raise SchemaError(url, f"has {start:,} rows and says that it has {len(values):,}: it is damaged")
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # the last of parts that do not fit together
        raise SchemaError(url, f"is not a readable Parquet file of form {form.name!r} ({error})") from error
    return pa.concat_tables(others), values


def open_table(url: str, form: TableForm, columns: list[str] | None = None, fingerprint: str | None = None) -> pa.Table:
    """Read a Parquet table and check that it is of the given form.

    Args:
        url: where it lies.
        form: what it must look like.
        columns: only these columns; all by default.
        fingerprint: if given, the fingerprint that the file must carry.

    Raises:
        SchemaError: if the file is missing, not Parquet, or of another form, version or run.
    """
    data = io.BytesIO(store.read_bytes(url))
    try:
        table = parquet.read_table(url, data, columns)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(url, f"is not a readable Parquet file of form {form.name!r} ({error})") from error
    mark = _check_mark(url, table.schema, form)
    if fingerprint is not None and mark.get("fingerprint") != fingerprint:
        raise SchemaError(url, "was written by another run: run its stage again")
    if columns is None:
        return _conform(url, table, form)
    missing = sorted(set(columns) - set(table.column_names))
    if missing:
        raise SchemaError(url, f"has no columns {missing}")
    return table


def column_names(url: str) -> list[str]:
    """The columns of a Parquet table, read from the file's footer.

    Raises:
        SchemaError: if the file is missing or not Parquet.
    """
    try:
        with store.open_file(url) as file:
            return list(pq.read_schema(file).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(url, f"is not a readable Parquet file ({error})") from error


def row_count(url: str, form: TableForm) -> int:
    """How many rows a table of the given form has, read from the file's footer.

    Raises:
        SchemaError: as :func:`open_table`.
    """
    try:
        with store.open_file(url) as file:
            footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(url, f"is not a readable Parquet file of form {form.name!r} ({error})") from error
    _check_mark(url, footer.schema.to_arrow_schema(), form)
    return int(footer.num_rows)


def vector_dimension(url: str, column: str) -> int:
    """The length of the vectors in a fixed-size-list column, read from the file's footer.

    Raises:
        SchemaError: if the file is not Parquet or the column is not of that type.
    """
    try:
        with store.open_file(url) as file:
            schema = pq.read_schema(file)
        kind = schema.field(column).type
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise SchemaError(url, f"has no readable column {column!r} ({error})") from error
    if not pa.types.is_fixed_size_list(kind):
        raise SchemaError(url, f"column {column!r} is {kind}, expected a fixed-size list of float32")
    return int(kind.list_size)


def table_mark(content: bytes) -> dict[str, object] | None:
    """What a Parquet file says of itself: form, version and fingerprint; None where no screen has written it."""
    try:
        return _mark(pq.read_schema(pa.BufferReader(content)))
    except (pa.ArrowException, OSError):
        return None


def _mark(schema: pa.Schema) -> dict[str, object] | None:
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    try:
        mark = None if raw is None else json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None


def _check_mark(url: str, schema: pa.Schema, form: TableForm) -> dict[str, object]:
    """What a file says of itself, which must be the form that is expected."""
    mark = _mark(schema)
    if mark is None:
        raise SchemaError(url, "was not written by screening (its mark is missing)")
    if (mark.get("form"), mark.get("version")) != (form.name, form.version):
        raise SchemaError(
            url,
            f"expected form {form.name!r} version {form.version}, found {mark.get('form')!r} version "
            f"{mark.get('version')!r}",
        )
    return mark


def _conform(url: str, table: pa.Table, form: TableForm) -> pa.Table:
    expected = form.schema.names
    missing = [name for name in expected if name not in table.column_names]
    prefix = form.extra_prefix
    extra = [name for name in table.column_names if name not in expected]
    unknown = [name for name in extra if prefix is None or not name.startswith(prefix)]
    if missing or unknown:
        raise SchemaError(
            url,
            f"a {form.name} table has the columns {expected}; missing: {missing}, unknown: {unknown}",
        )
    fields = [*form.schema, *(table.schema.field(name) for name in extra)]
    try:
        return table.select([field.name for field in fields]).cast(pa.schema(fields))
    except pa.ArrowException as error:
        raise SchemaError(url, f"a column of this {form.name} table has the wrong type: {error}") from error


def read_user_table(url: str, sheet: str | None = None) -> pd.DataFrame:
    """Read a table a user wrote: CSV or TSV (gzipped too), Parquet or XLSX. All cells come as text or null.

    Rows without any value are left out. The frame's index says where a row stands: line ``index + 1`` of the file,
    whose header is line 1.

    Args:
        url: where it lies.
        sheet: of an XLSX file; the first by default.

    Raises:
        SchemaError: if the file is missing, of another kind, or unreadable, or has no such sheet.
    """
    data = store.read_bytes(url)
    name = url.lower()
    try:
        if name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt")):
            cells = _read_text(url, data)
        elif name.endswith(".parquet"):
            cells = _read_parquet(url, data)
        elif name.endswith(".xlsx"):
            cells = _read_xlsx(url, data, sheet)
        else:
            raise SchemaError(url, "expected a .csv, .tsv, .parquet or .xlsx table")
    except SchemaError:
        raise
    except Exception as error:  # each parser has its own errors; the file is the user's to mend
        raise SchemaError(url, f"cannot be read as a table: {error}") from error
    if cells.empty:
        raise SchemaError(url, "is empty: expected a line of column names and a line for each row")
    cells = cells.map(lambda value: None if pd.isna(value) else str(value).strip() or None)
    cells = cells.astype(object).where(cells.notna(), None)
    named = cells.loc[:, cells.iloc[0].notna()]
    frame: pd.DataFrame = named.iloc[1:].dropna(how="all")
    frame.columns = pd.Index([str(column).lower() for column in named.iloc[0]])
    doubled = sorted(set(frame.columns[frame.columns.duplicated()]))
    if doubled:
        raise SchemaError(url, f"columns {doubled} stand there more than once")
    return frame


def _read_text(url: str, data: bytes) -> pd.DataFrame:
    content = inflate(url, data, _MAX_TEXT) if data.startswith(b"\x1f\x8b") else data
    if len(content) > _MAX_TEXT:
        raise SchemaError(url, f"has {len(content):,} bytes of text; at most {_MAX_TEXT:,} are read as a table")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line} is not UTF-8 text; in a spreadsheet, save it as CSV UTF-8") from error
    header = text.partition("\n")[0]
    # The header is read like any row: pandas would rename doubled columns and take surplus cells for an index.
    return pd.read_csv(
        io.StringIO(text),
        sep=max(",;\t", key=header.count),
        header=None,
        dtype=str,
        keep_default_na=False,
        skip_blank_lines=False,
    )


def _read_xlsx(url: str, data: bytes, sheet: str | None) -> pd.DataFrame:
    _check_workbook(url, data)
    with pd.ExcelFile(io.BytesIO(data), engine="openpyxl") as book:
        if sheet is not None and sheet not in book.sheet_names:
            raise SchemaError(url, f"has no sheet {sheet!r}; its sheets are {book.sheet_names}")
        return pd.read_excel(book, sheet_name=sheet or 0, header=None, dtype=str, keep_default_na=False)


def _check_workbook(url: str, data: bytes) -> None:
    """Refuse a workbook that unpacks to too much, or whose sheets claim more cells than anyone has filled in."""
    import openpyxl  # the readers of all other tables start without it

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > _MAX_TEXT:
        raise SchemaError(url, f"becomes {size:,} bytes when it is unpacked; at most {_MAX_TEXT:,} are read as a table")
    with closing(openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)) as book:
        for sheet in book.worksheets:
            n_cells = 0
            for row in sheet.iter_rows(values_only=True):
                n_cells += len(row)
                if n_cells > _MAX_CELLS:
                    raise SchemaError(url, f"sheet {sheet.title!r} has more than {_MAX_CELLS:,} cells, empty ones too")


def _read_parquet(url: str, data: bytes) -> pd.DataFrame:
    schema = pq.read_schema(io.BytesIO(data))
    nested = [field.name for field in schema if pa.types.is_nested(field.type)]
    if nested:
        raise SchemaError(url, f"columns {nested} hold lists or structures; expected one value a cell")
    table = parquet.read_table(url, io.BytesIO(data))
    if table.num_rows * table.num_columns > _MAX_CELLS:
        raise SchemaError(url, f"has {table.num_rows:,} rows; tables of more than {_MAX_CELLS:,} cells are not read")
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True).astype(object)
    header = pd.DataFrame([table.column_names], columns=frame.columns)
    return pd.concat([header, frame], ignore_index=True)


def read_plate_map(url: str) -> pd.DataFrame:
    """Read and check a user's plate map.

    Columns ``plate``, ``well``, ``compound`` and ``role`` must be there; ``concentration`` (a number), ``unit`` and
    ``replicate`` may be. Without ``replicate`` each plate counts as a replicate of its own.

    Returns:
        A data frame with the columns of :data:`PLATE_MAP`, a row a well.

    Raises:
        SchemaError: naming the lines that are not usable and what they should say.
    """
    frame = read_user_table(url)
    _require_columns(url, frame, ("plate", "well", "compound", "role"), PLATE_MAP)
    for column in PLATE_MAP.schema.names:
        if column not in frame:
            frame[column] = frame["plate"] if column == "replicate" else None
    _require_filled(url, frame, ("plate", "well", "compound", "role", "replicate"))
    _refuse(url, frame["role"], ~frame["role"].isin(ROLES), f"is unknown: expected one of {list(ROLES)}")
    frame["well"] = _canonical_wells(url, frame)
    concentration = pd.to_numeric(frame["concentration"], errors="coerce").astype(float)
    wrong = frame["concentration"].notna() & ~np.isfinite(concentration)
    _refuse(url, frame["concentration"], wrong, "is not a number: expected one, or nothing")
    frame["concentration"] = concentration
    keys = (frame["plate"] + "/" + frame["well"]).rename("well")
    _refuse(url, keys, keys.duplicated(), "stands there more than once")
    if frame.empty:
        raise SchemaError(url, "holds no wells")
    columns: pd.DataFrame = frame[PLATE_MAP.schema.names]
    return columns.sort_values(["plate", "well"], ignore_index=True)


def read_compounds(url: str) -> pd.DataFrame:
    """Read and check a user's table of compounds: ``compound``, and any other column of :data:`COMPOUNDS`.

    Raises:
        SchemaError: if the column is missing, a compound has no id or stands there twice.
    """
    frame = read_user_table(url)
    _require_columns(url, frame, ("compound",), COMPOUNDS)
    for column in COMPOUNDS.schema.names:
        if column not in frame:
            frame[column] = None
    _require_filled(url, frame, ("compound",))
    _refuse(url, frame["compound"], frame["compound"].duplicated(), "stands there more than once")
    columns: pd.DataFrame = frame[COMPOUNDS.schema.names]
    return columns.sort_values("compound", ignore_index=True)


def read_split(url: str) -> pd.DataFrame:
    """Read and check a user's table of the split.

    Columns ``plate``, ``well`` and ``split`` (one of :data:`PARTS`) must be there; ``site`` and ``track`` make it a
    table of cells. Other columns are passed over, so that what `screening split` has written can be edited and given
    back.

    Returns:
        plate, well, site, track (Int32; both null where rows are wells) and split, a row a well or a row a cell.

    Raises:
        SchemaError: naming the lines that are not usable and what they should say.
    """
    frame = read_user_table(url)
    _require_columns(url, frame, ("plate", "well", "split"), SPLIT)
    _require_filled(url, frame, ("plate", "well", "split"))
    _refuse(url, frame["split"], ~frame["split"].isin(PARTS), f"is unknown: expected one of {list(PARTS)}")
    frame["well"] = _canonical_wells(url, frame)
    for column in ("site", "track"):
        frame[column] = frame.get(column)
    keys = ["plate", "well"]
    if frame[["site", "track"]].notna().any(axis=None):
        _require_filled(url, frame, ("site", "track"))
        keys += ["site", "track"]
        number = frame["track"].str.fullmatch(r"[1-9][0-9]{0,8}")
        _refuse(url, frame["track"], ~number.astype(bool), "is not a track's number: they are counted from 1")
    names = frame[keys].agg("/".join, axis=1).rename("cell" if len(keys) > 2 else "well")
    _refuse(url, names, names.duplicated(), "stands there more than once")
    if frame.empty:
        raise SchemaError(url, "holds no wells")
    columns = frame[["plate", "well", "site", "track", "split"]].astype({"track": "Int32"})
    return columns.sort_values(["plate", "well", "site", "track"], ignore_index=True)


def _canonical_wells(url: str, frame: pd.DataFrame) -> pd.Series[str]:
    """The column well in its one spelling, plate names checked too."""
    for line, plate, well in zip(frame.index + 1, frame["plate"], frame["well"], strict=True):
        try:
            check_name(plate, "plate")
            canonical_well(well)
        except InputError as error:
            raise SchemaError(url, f"line {line}: {error}") from error
    return frame["well"].map(canonical_well)


def _require_columns(url: str, frame: pd.DataFrame, columns: tuple[str, ...], form: TableForm) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise SchemaError(
            url,
            f"has no column {missing}; a {form.name} table has {form.schema.names}, found {list(frame.columns)}",
        )


def _require_filled(url: str, frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    for column in columns:
        empty = frame.index[frame[column].isna()]
        if len(empty):
            raise SchemaError(url, f"column {column!r} is empty in line(s) {_lines(empty)}")


def _refuse(url: str, column: pd.Series[str], wrong: pd.Series[bool], problem: str) -> None:
    if wrong.any():
        values = sorted(set(column[wrong]))[:5]
        raise SchemaError(url, f"line(s) {_lines(column.index[wrong])}: {column.name} {values} {problem}")


def _lines(rows: pd.Index[int]) -> list[int]:
    return [int(row) + 1 for row in rows[:5]]
