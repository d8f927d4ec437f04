"""Single-cell clips: one Zarr v3 array a well, (N, C, T, H, W), one chunk a clip, sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from storage_schemas import arrays
from storage_schemas.errors import SchemaError

VERSION = 1
SHARD_CLIPS = 64  # some tens of MB a shard: few files, and a writer holds one shard in memory


def write_clips(url: str, clips: NDArray[np.uint8], channels: Sequence[str], frames: Sequence[int]) -> None:
    """Write a well's clips; whatever was there is replaced.

    The array is whole only when the well's cells table, written after it, stands there.

    Args:
        url: the array's folder.
        clips: (N, C, T, H, W) uint8.
        channels: a name a channel.
        frames: the movie's frames that the clips are made of, a number a clip frame.
    """
    array = zarr.create_array(
        arrays.zarr_store(url),
        shape=clips.shape,
        chunks=(1, *clips.shape[1:]),
        shards=(min(SHARD_CLIPS, len(clips)), *clips.shape[1:]) if len(clips) else None,
        dtype="uint8",
        compressors=arrays.COMPRESSORS,
        dimension_names=["n", "c", "t", "y", "x"],
        attributes={
            "screening": {
                "form": "clips",
                "version": VERSION,
                "channels": list(channels),
                "frames": [int(frame) for frame in frames],
            }
        },
        overwrite=True,
    )
    if len(clips):
        array[...] = clips


def open_clips(url: str) -> zarr.Array[Any]:
    """Open a well's clips for reading.

    Raises:
        SchemaError: if they are missing or not in the form that :func:`write_clips` gives.
    """
    array = arrays.open_array(url)
    mark = array.attrs.asdict().get("screening", {})
    if not isinstance(mark, dict) or (mark.get("form"), mark.get("version")) != ("clips", VERSION):
        raise SchemaError(url, f"expected clips of version {VERSION}, found {mark or 'no mark'}")
    if array.ndim != 5 or array.dtype != np.uint8:
        raise SchemaError(url, f"expected (N, C, T, H, W) uint8, found {array.shape} {array.dtype}")
    return array


def channel_names(array: zarr.Array[Any]) -> list[str]:
    """The clips' channel names, in order."""
    mark = array.attrs.asdict()["screening"]
    assert isinstance(mark, dict)
    return [str(name) for name in mark["channels"]]


def read_clips(url: str, positions: Sequence[int] | slice) -> NDArray[np.uint8]:
    """Some of a well's clips, (n, C, T, H, W) uint8, in the order asked for (repeats allowed).

    Raises:
        SchemaError: if they are missing, corrupt or fewer than asked for.
    """
    array = open_clips(url)
    if isinstance(positions, slice):
        return arrays.read(url, array, (positions,))
    outside = [position for position in positions if not 0 <= position < array.shape[0]]
    if outside:
        raise SchemaError(url, f"holds {array.shape[0]} clips, asked for number(s) {outside[:5]}")
    # Each clip is read once even if asked for often; zarr wants ascending positions to be fast.
    unique, inverse = np.unique(np.asarray(positions, dtype=np.int64), return_inverse=True)
    clips: NDArray[np.uint8] = arrays.read(url, array, (unique,))[inverse]
    return clips
