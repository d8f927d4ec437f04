"""A plate's calibration on disk: the flat field and the intensity range of each channel, one ``.npz`` file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage_schemas import store
from storage_schemas.errors import SchemaError

VERSION = 1

Float32s = NDArray[np.float32]


def write_calibration(url: str, flat_field: Float32s | None, offset: Float32s, low: Float32s, high: Float32s) -> None:
    """Write a calibration, atomically; see :class:`screening.illumination.Calibration` for its meaning.

    Args:
        url: where to.
        flat_field: (C, h, w) float32 of mean 1 on a coarse grid, or None where none was estimated.
        offset: (C,) float32, the dark level under the field.
        low: (C,) float32, the intensity shown as black.
        high: (C,) float32, the intensity shown as white.
    """
    fields = {"version": np.array(VERSION), "offset": offset, "low": low, "high": high}
    store.write_npz(url, fields if flat_field is None else {**fields, "flat_field": flat_field})


def read_calibration(url: str) -> tuple[Float32s | None, Float32s, Float32s, Float32s]:
    """What :func:`write_calibration` wrote: (flat field or None, offset, low, high).

    Raises:
        SchemaError: if the file is missing, truncated or of another version.
    """
    stored = store.read_npz(url)
    if not {"version", "offset", "low", "high"} <= stored.keys():
        raise SchemaError(url, f"is not a calibration: it holds {sorted(stored)}")
    if stored["version"] != VERSION:
        raise SchemaError(url, f"expected a calibration of version {VERSION}, found {stored['version']}")
    return stored.get("flat_field"), stored["offset"], stored["low"], stored["high"]
