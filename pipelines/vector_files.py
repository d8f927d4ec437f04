"""Questions from a file: vectors that a user brings, checked to be such as the index holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.query import Searcher
from pipelines.uploads import read_vectors
from screening.similarity import to_unit
from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.index import Level
from storage_schemas.limits import read_limit
from storage_schemas.tables import table_mark

_ANY = 2**62  # vectors: a user's own file may be as large as memory allows


def vectors_of(
    searcher: Searcher, url: str, level: Level | None, *, each: bool = False
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """The vectors of a user's own file, to look up in a screen.

    A table that a screen has written must be of this one: vectors of another network mean something else. Nobody can
    tell by a file without such a mark.

    Args:
        searcher: of the screen.
        url: as of :func:`read_vectors`.
        level: what they are to be compared with; by default cells where there are cells, else wells.
        each: every vector by itself; by default the mean of their directions.

    Returns:
        Vectors, and what to call them: their numbers from 0, or the file's name.

    Raises:
        InputError: if the file cannot be read, or is of another screen or another level.
    """
    content = store.read_bytes(url)
    try:
        vectors = read_vectors(content, max_rows=_ANY, max_numbers=read_limit() // 8)
    except InputError as error:
        raise SchemaError(url, str(error)) from error
    level = level or ("cell" if "cell" in searcher.levels else "well")
    if content.startswith(b"PAR1"):
        _check_origin(searcher, url, content, level)
    if each:
        return vectors, [str(i) for i in range(len(vectors))]
    mean = to_unit(vectors).mean(axis=0, dtype=np.float64)[None].astype(np.float32)
    return mean, [url.rstrip("/").rpartition("/")[2]]


def _check_origin(searcher: Searcher, url: str, content: bytes, level: Level) -> None:
    mark = table_mark(content)
    if mark is None:
        return
    form = str(mark.get("form"))
    fits = {"embeddings": ("cell",), "well_profiles": ("well", "compound"), "compound_profiles": ("well", "compound")}
    if level not in fits.get(form, ()):
        raise SchemaError(url, f"holds {form}, which cannot be compared with vectors of the level {level!r}")
    stage = "embed" if form == "embeddings" else "index"
    record = searcher.screen.read_manifest().stages.get(stage)
    known = {searcher.manifest.embedder, *([] if record is None else [record.fingerprint])}
    if mark.get("fingerprint") not in known:
        raise SchemaError(
            url,
            f"was written by another screen or another run than {searcher.screen.url}: its vectors cannot be compared "
            "with those of the index; ask by the clips that they come from (--clips)",
        )
