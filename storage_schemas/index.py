"""A similarity index on disk: for each level a FAISS file, a table of ids and a file of vectors' meaning.

Layout: ``index/<level>.faiss``, ``index/<level>.parquet`` (a row a vector, in the index's order) and
``index/manifest.json``, written last. FAISS bytes are opaque here; :mod:`screening.similarity` makes and checks them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import pandas as pd

from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.tables import INDEX_IDS, open_table, write_table

VERSION = 1

Level = Literal["compound", "well", "cell"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class IndexManifest:
    """What an index holds.

    Attributes:
        metric: how vectors are compared.
        embedder: fingerprint of the network and clips that the vectors come from.
        dimension: of the vectors.
        counts: vectors a level.
    """

    metric: Literal["cosine"]
    embedder: str
    dimension: int
    counts: dict[str, int]


def write_level(url: str, level: Level, index: bytes, ids: pd.DataFrame) -> None:
    """Write one level: the serialised FAISS index and its ids, in the same order."""
    store.write_bytes(store.join(url, f"{level}.faiss"), index)
    write_table(store.join(url, f"{level}.parquet"), ids, INDEX_IDS)


def write_manifest(url: str, manifest: IndexManifest) -> None:
    """Write the manifest, which makes the index whole."""
    document = {"form": "index", "version": VERSION, **asdict(manifest)}
    store.write_json(_manifest(url), document)


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
    if not isinstance(document, dict) or document.pop("form", None) != "index":
        raise SchemaError(where, "is not the manifest of an index")
    if document.pop("version", None) != VERSION:
        raise SchemaError(where, f"expected an index of version {VERSION}")
    try:
        return IndexManifest(**document)
    except TypeError as error:
        raise SchemaError(where, f"is incomplete: {error}") from error


def read_level(url: str, level: Level) -> tuple[bytes, pd.DataFrame]:
    """One level's serialised FAISS index and its ids.

    Raises:
        SchemaError: if a file is missing or not in form.
    """
    index = store.read_bytes(store.join(url, f"{level}.faiss"))
    ids = open_table(store.join(url, f"{level}.parquet"), INDEX_IDS)
    return index, ids.to_pandas()


def _manifest(url: str) -> str:
    return store.join(url, "manifest.json")
