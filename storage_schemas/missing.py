"""The planes that a plate's source lacks, a CSV file in the plate: ``PLATE.zarr/missing_planes.csv``."""

from __future__ import annotations

import io

import pandas as pd

from storage_schemas import store
from storage_schemas.errors import SchemaError

MISSING = "missing_planes.csv"

PLANE = ["well", "site", "time", "channel", "z"]
COLUMNS = [*PLANE, "promised", "written"]

# What stands in the plate instead of a missing plane.
ZEROS = "zeros"
WITHOUT = "without"  # z was projected without it
ABSENT = "no"  # its site, time or channel is not in the plate

_TYPES = {"well": "str", "site": "str", "time": "int64", "channel": "str", "z": "int64", "promised": "bool"}


def write_missing(plate_url: str, planes: pd.DataFrame) -> None:
    """Write the list of missing planes, atomically, or remove it where nothing is missing.

    Args:
        plate_url: the plate's folder.
        planes: well, site, time, channel and z as the source calls them; ``promised`` (bool) by the instrument's
            metadata; ``written``: one of ``zeros``, ``without``, ``no``.
    """
    url = store.join(plate_url, MISSING)
    if planes.empty:
        store.remove(url)
    else:
        store.write_bytes(url, planes[COLUMNS].to_csv(index=False).encode())


def read_missing(plate_url: str) -> pd.DataFrame:
    """What :func:`write_missing` wrote; no rows where nothing is missing.

    Raises:
        SchemaError: if the file has other columns.
    """
    url = store.join(plate_url, MISSING)
    if not store.exists(url):
        return pd.DataFrame({column: pd.Series(dtype=_TYPES.get(column, "str")) for column in COLUMNS})
    try:
        planes = pd.read_csv(io.BytesIO(store.read_bytes(url)), dtype=_TYPES, keep_default_na=False)
    except ValueError as error:  # pandas' and the decoder's errors are such
        raise SchemaError(url, f"is not a list of missing planes ({error})") from error
    if list(planes.columns) != COLUMNS:
        raise SchemaError(url, f"expected the columns {COLUMNS}, found {list(planes.columns)}")
    return planes
