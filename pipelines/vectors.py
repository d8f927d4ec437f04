"""Reading embeddings and profiles back as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from storage_schemas.errors import SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import embeddings_form, open_table, vector_dimension

CELL_KEYS = ["plate", "well", "site", "track"]


def read_embeddings(screen: Screen, wells: Sequence[WellKey]) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
    """Keys (plate, well, site, track) and (n, D) embeddings of the wells that have been embedded, in order.

    Raises:
        SchemaError: if none has been.
    """
    done = screen.done_units("embed")
    urls = [screen.embeddings(well) for well in wells if well in done]
    if not urls:
        raise SchemaError(screen.url, "has no embeddings: run the stage `embed` first")
    form = embeddings_form(vector_dimension(urls[0], "embedding"))
    table = pa.concat_tables([open_table(url, form) for url in urls])
    return table.select(CELL_KEYS).to_pandas(), vectors(table["embedding"])


def vectors(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """A fixed-size-list column as an (n, D) array."""
    array = column.combine_chunks()
    flat: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(array), array.type.list_size)


def vector_column(values: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    """An (n, D) array as a fixed-size-list column."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values, np.float32).ravel()), values.shape[1]
    )
