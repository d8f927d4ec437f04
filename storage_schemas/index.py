"""A similarity index on disk: of each level the vectors, what they are of, and arrays that a search goes through.

Layout: ``index/<build>/<level>.parquet`` (a row a vector, in the index's order), ``index/<build>/<level>.<name>.npy``
(``vectors`` always; what :class:`screening.similarity.Quantiser` makes of them where the level is compressed) and
``index/manifest.json``, written last, which names the build: a reader sees the old index or the whole new one.

Nothing in these files is believed. An array must have the shape and type that the manifest says and exactly as many
bytes; its checksum is compared where all of it is read anyway. The vectors themselves are mapped into memory and not
read on opening: :mod:`screening.similarity` checks the rows that it uses.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import SchemaError
from storage_schemas.tables import INDEX_IDS, open_table, write_table

VERSION = 2

Level = Literal["compound", "well", "cell"]
LEVELS: tuple[Level, ...] = get_args(Level)

VECTORS = "vectors"


class ArrayForm(Config):
    """What an array's file must hold.

    Attributes:
        shape: of the array.
        dtype: of its values, little-endian.
        sha256: of the values' bytes.
    """

    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=3)
    dtype: Literal["float32", "uint8", "int32"]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Recall(Config):
    """How many of the ten nearest an index has been seen to find.

    Attributes:
        value: mean share of the ten nearest vectors, found exactly, that the index finds too.
        low: two standard errors below it.
        queries: vectors of the index that were looked up, cells among those of other wells.
        target: what was asked for; ``low`` is below it where the index could not be made to reach it.
    """

    value: float = Field(ge=0, le=1)
    low: float = Field(le=1)
    queries: int = Field(ge=1)
    target: float = Field(gt=0, le=1)


class LevelManifest(Config):
    """What an index holds of one level.

    Attributes:
        method: how it is searched.
        reason: why so.
        depth: candidates that are compared exactly to find ten neighbours; 0 where all vectors are.
        probes: lists of vectors that a search goes through; 0 where there are none.
        recall: measured when it was built; null where the search is exact.
        arrays: the form of each array by its name.
        ids: SHA-256 of the table of ids.
    """

    method: Literal["exact", "compressed", "ivf"]
    reason: str
    depth: int = Field(0, ge=0)
    probes: int = Field(0, ge=0)
    recall: Recall | None = None
    arrays: dict[str, ArrayForm]
    ids: str

    @property
    def count(self) -> int:
        """How many vectors."""
        return self.arrays[VECTORS].shape[0]

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return self.arrays[VECTORS].shape[1]


class Added(Config):
    """Plates that were added to an index.

    Attributes:
        screen: the folder that their embeddings lie in.
        plates: their names.
    """

    screen: str
    plates: tuple[str, ...]


class IndexManifest(Config):
    """What an index holds.

    Attributes:
        metric: how vectors are compared.
        embedder: what made the vectors (see :func:`pipelines.index.embedder`).
        build: the folder that the files lie in.
        levels: what there is of each level; profiles that were imported come without cells.
        added: plates of other screens, in the order they were added in.
    """

    form: Literal["index"] = "index"
    version: Literal[2] = 2
    metric: Literal["cosine"] = "cosine"
    embedder: str
    build: str = Field(pattern=r"^[0-9a-f]{12}$")
    levels: dict[Level, LevelManifest]
    added: tuple[Added, ...] = ()


class Build:
    """The files of a new index, in a folder on this machine; nothing reads them before :func:`new_build` ends.

    Attributes:
        name: of the build.
        folder: where its files are written.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.manifest: IndexManifest | None = None

    def write_array(
        self, level: Level, name: str, tail: tuple[int, ...], dtype: str, blocks: Iterable[NDArray[Any]]
    ) -> ArrayForm:
        """Write an array block by block, so that no more than one of them need be in memory.

        Args:
            level: that it is of.
            name: of the array.
            tail: its shape but for the first axis.
            dtype: of the values.
            blocks: parts of it along the first axis, in order.
        """
        digest = hashlib.sha256()
        rows = 0
        with (self.folder / _array_name(level, name)).open("wb") as file:
            file.write(_header((0, *tail), dtype))
            for block in blocks:
                data = np.ascontiguousarray(block, np.dtype(dtype).newbyteorder("<"))
                assert data.shape[1:] == tail, "blocks are parts of the array"
                rows += len(data)
                digest.update(data.data)
                file.write(data.data)
            # As long as the first one: NumPy leaves room for the first axis to grow.
            file.seek(0)
            file.write(_header((rows, *tail), dtype))
        return ArrayForm.model_validate({"shape": (rows, *tail), "dtype": dtype, "sha256": digest.hexdigest()})

    def open_array(self, level: Level, name: str, form: ArrayForm) -> NDArray[Any]:
        """An array that has been written, mapped."""
        return _open_array(str(self.folder / _array_name(level, name)), form)

    def write_ids(self, level: Level, ids: pa.Table | pd.DataFrame) -> str:
        """Write what the vectors of a level are of; returns the table's SHA-256."""
        where = str(self.folder / f"{level}.parquet")
        write_table(where, ids, INDEX_IDS)
        return hashlib.sha256(store.read_bytes(where)).hexdigest()


@contextmanager
def new_build(url: str) -> Iterator[Build]:
    """Write an index: within, its files and ``build.manifest``; at the end it takes the place of the one before.

    Args:
        url: the index's folder. Where it is not on this machine, the files are written here first.
    """
    name = uuid.uuid4().hex[:12]
    target = store.join(url, name)
    local = store.is_local(url)
    folder = Path(store.filesystem(target)[1]) if local else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        build = Build(name, folder)
        yield build
        assert build.manifest is not None, "a build ends with its manifest"
        if not local:
            store.put_folder(folder, target)
        store.write_json(_manifest(url), build.manifest.model_dump(mode="json"))
    except BaseException:
        store.remove(target)
        raise
    finally:
        if not local:
            shutil.rmtree(folder)
    for other in store.list_names(url):
        if other not in (name, "manifest.json"):
            store.remove(store.join(url, other))


def index_exists(url: str) -> bool:
    """Whether a whole index is there: its manifest is written last."""
    return store.exists(_manifest(url))


def read_manifest(url: str) -> IndexManifest:
    """What an index holds.

    Raises:
        SchemaError: if there is no whole index, or one of another version.
    """
    where = _manifest(url)
    document = store.read_json(where)
    if not isinstance(document, dict) or document.get("form") != "index":
        raise SchemaError(where, "is not the manifest of an index")
    if document.get("version") != VERSION:
        raise SchemaError(where, f"expected an index of version {VERSION}: run the stage `index` again")
    try:
        manifest = IndexManifest.model_validate(document)
    except ValidationError as error:
        wrong = sorted({".".join(map(str, entry["loc"])) for entry in error.errors()})
        raise SchemaError(where, f"is not whole (see {', '.join(wrong)}): run the stage `index` again") from error
    for level, held in manifest.levels.items():
        form = held.arrays.get(VECTORS)
        if form is None or form.dtype != "float32" or len(form.shape) != 2 or form.shape[1] < 1:
            raise SchemaError(where, f"level {level!r} has no vectors: run the stage `index` again")
    return manifest


def read_array(url: str, manifest: IndexManifest, level: Level, name: str) -> NDArray[Any]:
    """An array of a level: the vectors mapped and unread where they lie on this machine, others read and checked.

    Raises:
        SchemaError: if the file is missing, or another than the manifest says.
    """
    where = store.join(url, manifest.build, _array_name(level, name))
    form = manifest.levels[level].arrays.get(name)
    if form is None:
        raise SchemaError(_manifest(url), f"level {level!r} has no array {name!r}: run the stage `index` again")
    array = _open_array(where, form)
    if name != VECTORS and hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != form.sha256:
        raise SchemaError(where, "is not what the manifest says: it is damaged; run the stage `index` again")
    return array


def read_ids(url: str, manifest: IndexManifest, level: Level) -> pd.DataFrame:
    """What the vectors of a level are of, in the index's order; names that recur are categories.

    Raises:
        SchemaError: if the table is missing, or another than the manifest says.
    """
    where = store.join(url, manifest.build, f"{level}.parquet")
    held = manifest.levels[level]
    if hashlib.sha256(store.read_bytes(where)).hexdigest() != held.ids:
        raise SchemaError(where, "is not what the manifest says: it is damaged; run the stage `index` again")
    ids = open_table(where, INDEX_IDS)
    if len(ids) != held.count:
        raise SchemaError(where, f"has {len(ids)} rows for {held.count} vectors: run the stage `index` again")
    for i, name in enumerate(ids.column_names):
        if name in ("compound", "moa", "plate", "well"):
            ids = ids.set_column(i, name, ids[name].dictionary_encode())
    frame: pd.DataFrame = ids.to_pandas()
    return frame


def _manifest(url: str) -> str:
    return store.join(url, "manifest.json")


def _array_name(level: Level, name: str) -> str:
    return f"{level}.{name}.npy"


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    sink = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(sink, {"descr": descr, "fortran_order": False, "shape": shape})
    return sink.getvalue()


def _open_array(url: str, form: ArrayForm) -> NDArray[Any]:
    """Map a file; one that is not on this machine is copied here first, and the copy goes with the array."""
    dtype = np.dtype(form.dtype).newbyteorder("<")
    with store.local_copy(url) as path:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                found = _read_header(file)
                offset = file.tell()
        except FileNotFoundError as error:
            raise SchemaError(url, "no such file") from error
        except Exception as error:  # NumPy's reader of headers lets those of Python's tokenizer through, and others
            raise SchemaError(url, f"is not an array file ({error}): run the stage `index` again") from error
        expected = (form.shape, False, dtype)
        if found != expected or size != offset + form.nbytes:
            raise SchemaError(
                url,
                f"holds {found[0]} {found[2]} in {size} bytes, expected {form.shape} {dtype} in "
                f"{offset + form.nbytes}: it is truncated or of another screen; run the stage `index` again",
            )
        if not form.nbytes:
            return np.empty(form.shape, dtype)
        return np.memmap(path, dtype, "r", offset, form.shape)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy")
    return np.lib.format.read_array_header_1_0(file)
