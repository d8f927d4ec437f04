"""Zarr arrays that others wrote: which codecs are let in, and how much a chunk may become.

A chunk is decoded by what its array's metadata name. Of the codecs that zarr and numcodecs know, one runs code
(``pickle``), and nearly all decompress what they are given to whatever size it has. Here only codecs of numbers are let
in, and a chunk that would become more than its array says is an error.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import imagecodecs
import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.chunk_grids import RegularChunkGrid
from zarr.core.metadata import ArrayV2Metadata

from storage_schemas.errors import SchemaError
from storage_schemas.limits import check_size, inflate

_COMPRESSORS = ("blosc", "gzip", "lz4", "zlib", "zstd")
_FILTERS = ("astype", "bitround", "delta", "fixedscaleoffset", "packbits", "quantize", "shuffle")
_OTHERS = (BytesCodec, Crc32cCodec, TransposeCodec)
_NAMES: dict[type[Codec], str] = {BloscCodec: "blosc", GzipCodec: "gzip", ZstdCodec: "zstd"}
_MOST_CHUNKS = 2**20
"""Chunks of one shard or one read: each costs some hundred bytes and microseconds, however small it is."""


def guarded(url: str, array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The same array, which decodes nothing but numbers, and no chunk to more than it should have.

    Raises:
        SchemaError: if it holds something else than numbers, names a codec that is not let in, or claims chunks that
            no memory holds.
    """
    metadata = array.metadata
    if array.dtype.kind not in "biuf":
        raise SchemaError(url, f"holds {array.dtype}; expected whole or real numbers")
    chunk = array.shards or array.chunks
    check_size(url, "a chunk", math.prod(chunk) * array.dtype.itemsize)
    _check_chunks(url, math.prod(chunk) // max(math.prod(array.chunks), 1))
    if isinstance(metadata, ArrayV2Metadata):
        most = _room(chunk, array.dtype)
        compressor = metadata.compressor
        if compressor is not None:
            compressor = _BoundedV2(_let_in(url, compressor, _COMPRESSORS), most)
        filters = tuple(_let_in(url, each, _FILTERS) for each in metadata.filters or ()) or None
        return _with(array, replace(metadata, compressor=compressor, filters=filters))
    if not isinstance(metadata.chunk_grid, RegularChunkGrid):
        raise SchemaError(url, "has chunks of different sizes; expected a regular grid")
    return _with(array, replace(metadata, codecs=_bounded(url, metadata.codecs)))


def check_selection(url: str, array: zarr.Array[Any], selection: Any) -> None:
    """Refuse to read what would take more memory than a read may.

    Args:
        url: of the array.
        array: of it.
        selection: slices and positions, one an axis or for the first axes; or one slice, of the first.

    Raises:
        SchemaError: if it would.
    """
    picks = selection if isinstance(selection, tuple) else (selection,)
    shape, touched = list(array.shape), []
    check_size(url, "an axis", max(array.shape, default=0))
    for axis, (n, chunk) in enumerate(zip(array.shape, array.shards or array.chunks, strict=True)):
        pick = picks[axis] if axis < len(picks) else slice(None)
        shape[axis] = len(range(n)[pick]) if isinstance(pick, slice) else len(pick)
        touched.append(min(shape[axis], -(-n // max(chunk, 1))))
    check_size(url, f"{' × '.join(map(str, shape))} {array.dtype}", math.prod(shape) * array.dtype.itemsize)
    _check_chunks(url, math.prod(touched))


def _check_chunks(url: str, n: int) -> None:
    if n > _MOST_CHUNKS:
        raise SchemaError(url, f"is cut into {n:,} chunks; at most {_MOST_CHUNKS:,} are read at once")


def _room(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Bytes that a chunk may have on its way to numbers: its own, and what checksums and filters add."""
    return math.prod(shape) * max(dtype.itemsize, 8) + 2**16


def _with(array: zarr.Array[Any], metadata: Any) -> zarr.Array[Any]:
    own = array.async_array
    return zarr.Array(type(own)(metadata=metadata, store_path=own.store_path, config=own.config))


def _let_in(url: str, codec: Any, known: Sequence[str]) -> Any:
    if codec.codec_id not in known:
        raise _refused(url, str(codec.codec_id))
    return codec


def _bounded(url: str, codecs: Sequence[Codec]) -> tuple[Codec, ...]:
    """The codecs of Zarr v3, those that decompress with a bound."""
    found: list[Codec] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            index = _bounded(url, codec.index_codecs)
            found.append(replace(codec, codecs=_bounded(url, codec.codecs), index_codecs=index))
        elif type(codec) in _NAMES:
            assert isinstance(codec, BytesBytesCodec)
            found.append(_BoundedV3(_NAMES[type(codec)], codec))
        elif type(codec) in _OTHERS:
            found.append(codec)
        else:
            raise _refused(url, str(codec.to_dict().get("name", type(codec).__name__)))
    return tuple(found)


def _refused(url: str, name: str) -> SchemaError:
    return SchemaError(
        url,
        f"is written with the codec {name!r}, which is not let in: expected one of {', '.join(_COMPRESSORS)}; write it "
        "again with one of these",
    )


class _BoundedV2:
    """A compressor of Zarr v2, for reading; it has all that numcodecs asks of a codec."""

    codec_id = "bounded"

    def __init__(self, codec: Any, most: int) -> None:
        self._codec, self._most = codec, most

    def decode(self, buf: Any, out: Any = None) -> Any:
        data = memoryview(buf).cast("B")
        _check_claim(self._codec.codec_id, data, self._most)
        found = _decompressed(self._codec.codec_id, data, self._most)
        return self._codec.decode(data) if found is None else found

    def encode(self, buf: Any) -> Any:
        return self._codec.encode(buf)

    def get_config(self) -> Any:
        return self._codec.get_config()

    @classmethod
    def from_config(cls, config: Any) -> _BoundedV2:
        raise NotImplementedError


@dataclass(frozen=True)
class _BoundedV3(BytesBytesCodec):
    """A compressor of Zarr v3, for reading."""

    name: str
    codec: BytesBytesCodec
    is_fixed_size = False

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        data = chunk_bytes.as_numpy_array().data.cast("B")
        most = _room(chunk_spec.shape, chunk_spec.dtype.to_native_dtype())
        _check_claim(self.name, data, most)
        found = await asyncio.to_thread(_decompressed, self.name, data, most)
        if found is not None:
            return chunk_spec.prototype.buffer.from_bytes(found)
        return await self.codec._decode_single(chunk_bytes, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError


def _check_claim(name: str, data: memoryview, most: int) -> None:
    """Compare what a chunk says of its own size with what it may have."""
    if name == "blosc":
        if len(data) < 16:
            raise ValueError("a chunk is cut short")
        becomes, packed = struct.unpack_from("<I4xI", data, 4)
        if packed > len(data):
            raise ValueError("a chunk is cut short")
    elif name == "lz4":
        (becomes,) = struct.unpack_from("<I", data)
    else:
        return
    if becomes > most:
        raise ValueError(f"a chunk becomes {becomes:,} bytes; at most {most:,} are expected")


def _decompressed(name: str, data: memoryview, most: int) -> bytes | None:
    """What a chunk becomes, of the codecs whose chunks do not say so first; None of the others."""
    if name == "zstd":
        return bytes(imagecodecs.zstd_decode(bytes(data), out=most))
    if name in ("gzip", "zlib"):
        return inflate("a chunk", data, most, 31 if name == "gzip" else 15)
    return None
