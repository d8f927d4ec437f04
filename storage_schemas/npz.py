"""NumPy's ``.npz`` archives, read without trust: no pickles, and no more memory than the file has claimed and may."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.limits import check_size

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_arrays(url: str, data: bytes) -> dict[str, NDArray[Any]]:
    """All arrays of an archive, by name.

    Args:
        url: of the archive, for errors.
        data: its bytes.

    Raises:
        SchemaError: if they would take more memory than a read may.
        ValueError: if an array holds objects, or claims another size than its part of the archive.
        Exception: whatever else is wrong; zip, zlib and NumPy have errors of their own.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
        check_size(url, "the file", sum(part.file_size for part in parts))
        return {part.filename.removesuffix(".npy"): _read_array(archive, part) for part in parts}


def _read_array(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(part) as file:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
        if dtype.hasobject:
            raise ValueError(f"{part.filename} holds pickled objects")
        # NumPy takes memory for what the header says; zipfile reads no more than the archive's own list says.
        values = file.read()
        if math.prod(shape) * dtype.itemsize != len(values):
            raise ValueError(f"{part.filename} says that it holds {shape} {dtype}, and has {len(values):,} bytes")
    array: NDArray[Any] = np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")
    return array.copy()
