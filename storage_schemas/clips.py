"""Single-cell clips: one Zarr v3 array a well, (N, C, T, H, W), one chunk a clip, sharded.

A pixel is stored as a share of a range of intensities, from 0 (black) to what :data:`WHITE` says, and the array's
attributes say which range, so that intensities can be had back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray

from storage_schemas import arrays
from storage_schemas.errors import SchemaError

VERSION = 2
SHARD_CLIPS = 64  # some tens of MB a shard: few files, and a writer holds one shard in memory

MAX_CLIPS = 2**22  # of a well: more than any has, and the embeddings of all are still held at once

ClipType = Literal["uint8", "uint16", "float16"]
Clips: TypeAlias = NDArray[np.uint8 | np.uint16 | np.float16]

WHITE: Final[Mapping[str, float]] = {"uint8": 255.0, "uint16": 65535.0, "float16": 1.0}
"""Type of a clip's pixels -> what the high end of its range is stored as; the low end is 0."""

UNIT = "of the image, after correction of its illumination"


def white(dtype: object) -> float:
    """What the high end of the range is stored as in a numpy or torch dtype."""
    return WHITE[str(dtype).removeprefix("torch.")]


def as_bytes(clips: Clips) -> NDArray[np.uint8]:
    """Clips of any type as those of 8 bit, for eyes."""
    return np.asarray(np.rint(clips.astype(np.float32) * np.float32(255 / white(clips.dtype))), np.uint8)


@dataclass(frozen=True)
class Ranges:
    """The intensities that N clips show as black and as white, beyond which they are cut off.

    Attributes:
        low: (N, C) float32, image units.
        high: (N, C) float32, likewise.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def intensities(self, clips: Clips) -> NDArray[np.float32]:
        """The intensities that N clips (N, C, T, H, W) show, (N, C, T, H, W), but for rounding and what was cut off."""
        low, width = (range_[..., None, None, None] for range_ in (self.low, self.high - self.low))
        return np.asarray(low + clips.astype(np.float32) / np.float32(white(clips.dtype)) * width, np.float32)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Those of clips put one after the other."""
        return cls(np.concatenate([part.low for part in parts]), np.concatenate([part.high for part in parts]))


def write_clips(
    url: str, clips: Clips, channels: Sequence[str], frames: Sequence[int] | None, ranges: Ranges | None = None
) -> None:
    """Write a well's clips; whatever was there is replaced.

    The array is whole only when the well's cells table, written after it, stands there. An array of the same form is
    written over and at no time removed: a node that was given up may still be writing the clips of a well that another
    has done again and committed, and both write the same.

    Args:
        url: the array's folder.
        clips: (N, C, T, H, W), of a type in :data:`WHITE`.
        channels: a name a channel.
        frames: the movie's frames that the clips are made of, a number a clip frame; None where they are not the same
            for all clips, which come from movies of different length.
        ranges: of the N clips; None where the intensities they came from are not known.

    Raises:
        StoreError: if the store or disk does not take them; a disk that is full keeps nothing of new ones.
    """
    form: dict[str, Any] = {
        "shape": clips.shape,
        "chunks": (1, *clips.shape[1:]),
        "shards": (min(SHARD_CLIPS, len(clips)), *clips.shape[1:]) if len(clips) else None,
        "dtype": clips.dtype.name,
        "compressors": arrays.COMPRESSORS,
        "dimension_names": ["n", "c", "t", "y", "x"],
        "attributes": {
            "screening": {
                "form": "clips",
                "version": VERSION,
                "channels": list(channels),
                "frames": None if frames is None else [int(frame) for frame in frames],
                "scaling": None if ranges is None else _scaling(clips, ranges),
            }
        },
    }
    array = arrays.existing(url, form)
    with arrays.writing(url, keep=array is not None):
        if array is None:
            array = zarr.create_array(arrays.zarr_store(url), **form, overwrite=True)
        if len(clips):
            array[...] = clips


def _scaling(clips: Clips, ranges: Ranges) -> dict[str, Any]:
    """The ranges as attributes: a row a clip, or one row where all clips share one."""
    assert ranges.low.shape == ranges.high.shape == clips.shape[:2]
    low, high = ranges.low, ranges.high
    if len(low) and (low == low[0]).all() and (high == high[0]).all():
        low, high = low[:1], high[:1]
    return {"black": 0.0, "white": white(clips.dtype), "low": low.tolist(), "high": high.tolist(), "unit": UNIT}


def open_clips(url: str) -> zarr.Array[Any]:
    """Open a well's clips for reading.

    Raises:
        SchemaError: if they are missing or not in the form that :func:`write_clips` gives.
    """
    array = arrays.open_array(url)
    attributes = array.metadata.attributes
    mark = attributes.get("screening", {}) if isinstance(attributes, dict) else {}
    if not isinstance(mark, dict) or (mark.get("form"), mark.get("version")) != ("clips", VERSION):
        raise SchemaError(url, f"expected clips of version {VERSION}, found {mark or 'no mark'}")
    if array.ndim != 5 or str(array.dtype) not in WHITE:
        raise SchemaError(url, f"expected (N, C, T, H, W) {', '.join(WHITE)}, found {array.shape} {array.dtype}")
    if array.shape[0] > MAX_CLIPS:
        raise SchemaError(url, f"says that it holds {array.shape[0]:,} clips; a well has at most {MAX_CLIPS:,}")
    channels, frames = mark.get("channels"), mark.get("frames", False)
    if not _is_list_of(str, channels) or not (frames is None or _is_list_of(int, frames)):
        raise SchemaError(url, f"its attributes do not name its channels and frames: found {channels!r}, {frames!r}")
    return array


def _is_list_of(kind: type, found: object) -> bool:
    return isinstance(found, list) and all(isinstance(entry, kind) for entry in found)


def channel_names(array: zarr.Array[Any]) -> list[str]:
    """The clips' channel names, in order."""
    mark = array.attrs.asdict()["screening"]
    assert isinstance(mark, dict)
    return [str(name) for name in mark["channels"]]


def frame_numbers(array: zarr.Array[Any]) -> list[int] | None:
    """The movie's frames that the clips are made of, in order; None where they are not the same for all clips."""
    mark = array.attrs.asdict()["screening"]
    assert isinstance(mark, dict)
    frames = mark["frames"]
    return None if frames is None else [int(frame) for frame in frames]


def read_ranges(url: str) -> Ranges | None:
    """The ranges of intensities of a well's clips; None where they are not known.

    Raises:
        SchemaError: if the clips are missing, or their attributes are not in the form that :func:`write_clips` gives.
    """
    array = open_clips(url)
    mark = array.attrs.asdict()["screening"]
    assert isinstance(mark, dict)
    scaling = mark.get("scaling")
    if scaling is None:
        return None
    try:
        low, high = (
            np.broadcast_to(np.asarray(scaling[end], np.float32).reshape(-1, array.shape[1]), array.shape[:2])
            for end in ("low", "high")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(
            url, f"its scaling does not give low and high for {array.shape[:2]} clips and channels"
        ) from error
    return Ranges(low, high)


def read_clips(url: str, positions: Sequence[int] | slice) -> Clips:
    """Some of a well's clips, (n, C, T, H, W), in the order asked for (repeats allowed).

    Raises:
        SchemaError: if they are missing, corrupt or fewer than asked for.
    """
    array = open_clips(url)
    if isinstance(positions, slice):
        return arrays.read(url, array, (positions,))
    outside = [position for position in positions if not 0 <= position < array.shape[0]]
    if outside:
        raise SchemaError(url, f"holds {array.shape[0]} clips, asked for number(s) {outside[:5]}")
    # Each clip is read once even if asked for often.
    unique, inverse = np.unique(np.asarray(positions, dtype=np.int64), return_inverse=True)
    clips = np.concatenate([arrays.read(url, array, (part,)) for part in arrays.stretches(unique.tolist())])
    return clips if np.array_equal(unique, positions) else clips[inverse]
