"""A plate's calibration on disk: flat field, intensity range and usual quality of each channel, one ``.npz`` file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from storage_schemas import store
from storage_schemas.errors import SchemaError

VERSION = 2

# What is kept, each (C,) but the flat field; see screening.illumination.Calibration for the first four, and
# screening.quality.PlateQuality for the others.
FIELDS = ("offset", "low", "high", "focus", "saturated", "glare", "sd")
FLAT_FIELD = "flat_field"  # (C, h, w) of mean 1 on a coarse grid; not there where none was estimated

Float32s = NDArray[np.float32]


def write_calibration(url: str, calibration: Mapping[str, Float32s]) -> None:
    """Write a calibration, all of ``FIELDS`` and perhaps a flat field, atomically."""
    assert {*FIELDS} <= calibration.keys() <= {*FIELDS, FLAT_FIELD}
    store.write_npz(url, {"version": np.array(VERSION), **calibration})


def read_calibration(url: str) -> dict[str, Float32s]:
    """What :func:`write_calibration` wrote.

    Raises:
        SchemaError: if the file is missing, truncated or of another version.
    """
    stored = store.read_npz(url)
    if "version" in stored and stored["version"] != VERSION:
        raise SchemaError(url, f"expected a calibration of version {VERSION}, found {stored['version']}")
    if not {"version", *FIELDS} <= stored.keys() <= {"version", *FIELDS, FLAT_FIELD}:
        raise SchemaError(url, f"is not a calibration: it holds {sorted(stored)}")
    del stored["version"]
    return stored
