"""Files that were made to do harm: they claim more than any machine has, or become it when they are unpacked."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import torch
from PIL import Image

from storage_schemas.tables import INDEX_IDS, write_table

BOMB = 8 * 2**30  # bytes that a bomb becomes: more than the process that reads it may have
_PIECE = bytes(2**24)

Read = Callable[[], object]


# --- archives and tables -------------------------------------------------------------------------


def gzip_bomb(before: bytes = b"") -> bytes:
    """Some MB that become gigabytes of zeros, behind an honest beginning."""

    def member(data: bytes) -> bytes:
        stream = zlib.compressobj(9, wbits=31)
        return stream.compress(data) + stream.flush()

    return member(before) + member(_PIECE) * (BOMB // len(_PIECE))


def zlib_bomb() -> bytes:
    """One zlib stream, which goes on for gigabytes and never ends."""
    stream = zlib.compressobj(9, wbits=-15)
    piece = stream.compress(_PIECE) + stream.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\x9c" + piece * (BOMB // len(_PIECE))


def zip_of(**parts: bytes) -> bytes:
    """A compressed zip archive."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return sink.getvalue()


def zip_claiming(archive: bytes, size: int) -> bytes:
    """A zip archive whose list says that each part becomes so many bytes; nobody writes gigabytes for a test."""
    data, at = bytearray(archive), archive.index(b"PK\x01\x02")
    while data[at : at + 4] == b"PK\x01\x02":
        data[at + 24 : at + 28] = struct.pack("<I", size)
        at += 46 + sum(struct.unpack_from("<HHH", data, at + 28))
    return bytes(data)


def npy(shape: tuple[int, ...], dtype: str = "<f4", data: bytes = b"") -> bytes:
    """A NumPy file whose header says what is told."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": dtype, "fortran_order": False, "shape": shape})
    return sink.getvalue() + data


def workbook(cells: str, dimension: str = "A1") -> bytes:
    """An XLSX file with one sheet."""
    sink = io.BytesIO()
    pd.DataFrame({"plate": ["p"]}).to_excel(sink, index=False)
    parts = {}
    with zipfile.ZipFile(sink) as archive:
        for name in archive.namelist():
            parts[name] = archive.read(name)
    head = "<worksheet xmlns='http://schemas.openxmlformats.org/spreadsheetml/2006/main'>"
    sheet = f"{head}<dimension ref='{dimension}'/><sheetData>{cells}</sheetData></worksheet>"
    return zip_of(**{**parts, "xl/worksheets/sheet1.xml": sheet.encode()})


def far_cells(rows: int) -> str:
    """A few bytes a row, and 16,384 cells, since what is left of a cell is there too."""
    return "".join(f"<row r='{row}'><c r='XFD{row}'><v>1</v></c></row>" for row in range(1, rows + 1))


def repeated_text(rows: int = 2**20, length: int = 2**16) -> pa.Table:
    """Text that stands in a file once, and in memory in every row: 64 GiB of it."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["x" * length])
    return pa.table({"compound": text, "Cells_a": pa.array(np.zeros(rows, np.float32))})


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, store_schema=False, compression="zstd")
    return sink.getvalue()


def long_ids(path: Path, rows: int = 2**20) -> None:
    """A table of our own form, whose names fill memory."""
    nothing: dict[str, Any] = dict.fromkeys(INDEX_IDS.schema.names)
    write_table(
        str(path), pa.table({name: pa.array([None], INDEX_IDS.schema.field(name).type) for name in nothing}), INDEX_IDS
    )
    metadata = pq.read_schema(path).metadata
    id_ = repeated_text(rows)["compound"]
    columns = {name: pa.nulls(rows, INDEX_IDS.schema.field(name).type) for name in nothing}
    table = pa.table({**columns, "id": id_}).replace_schema_metadata(metadata)
    pq.write_table(table, path, compression="zstd", store_schema=False)


def page_claiming(content: bytes, size: int) -> bytes:
    """A Parquet file whose first page says that it becomes so many bytes."""
    at = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0).column(0)
    start = min(at.data_page_offset, at.dictionary_page_offset or at.data_page_offset)
    # Thrift's compact protocol: field 1 of 32 bits, then field 2, the size of the page without compression.
    assert content[start : start + 1] == b"\x15"
    assert content[start + 2 : start + 3] == b"\x15"
    end = start + 3
    while content[end] > 127:
        end += 1
    return content[: start + 3] + varint(size) + content[end + 1 :]


def varint(number: int) -> bytes:
    """A positive number as Thrift writes it."""
    left, found = 2 * number, []
    while left > 127:
        found.append(left & 127 | 128)
        left >>= 7
    return bytes([*found, left])


def h5ad(path: Path, change: Callable[[h5py.File], None]) -> None:
    """An AnnData file of two rows and one variable, changed."""
    with h5py.File(path, "w") as file:
        file["X"] = np.zeros((2, 1), np.float32)
        for name, index in (("obs", ["a", "b"]), ("var", ["v"])):
            group = file.create_group(name)
            group["index"] = np.array(index, object)
            group.attrs["_index"] = "index"
            group.attrs["column-order"] = np.array(["index"], object)
        change(file)


def huge_names(file: h5py.File) -> None:
    del file["var/index"]
    file["var"].create_dataset("index", (10**10,), "S1", chunks=(1000,))
    del file["X"]
    file.create_dataset("X", (2, 10**10), "f4", chunks=(1, 1000))


def exploding_chunk(file: h5py.File) -> None:
    del file["X"]
    x = file.create_dataset("X", (2, 1), "f4", chunks=(2, 1), compression="gzip")
    x.id.write_direct_chunk((0, 0), zlib_bomb())


# --- arrays and images ---------------------------------------------------------------------------


def zarr_v2(path: Path, chunk: bytes | None, **metadata: Any) -> None:
    """An array of Zarr v2, of which only the first chunk is there."""
    path.mkdir(parents=True)
    form = {"shape": [4, 4], "chunks": [4, 4], "dtype": "<u2", "fill_value": 0, "order": "C", "filters": None}
    document = {"zarr_format": 2, "compressor": None, **form, **metadata}
    (path / ".zarray").write_text(json.dumps(document))
    if chunk is not None:
        (path / "0.0").write_bytes(chunk)


def zarr_v3(
    path: Path,
    chunk: bytes | None,
    codecs: list[dict[str, Any]],
    shape: tuple[int, ...] = (4, 4),
    chunks: tuple[int, ...] | None = None,
) -> None:
    """An array of Zarr v3, of which only the first chunk is there."""
    (path / "c" / "0").mkdir(parents=True)
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks or shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": {},
    }
    (path / "zarr.json").write_text(json.dumps(document))
    if chunk is not None:
        (path / "c" / "0" / "0").write_bytes(chunk)


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
GZIP = {"name": "gzip", "configuration": {"level": 5}}
ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
BLOSC = {
    "name": "blosc",
    "configuration": {"typesize": 2, "cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "blocksize": 0},
}


def sharded(inner: tuple[int, ...], codecs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": "sharding_indexed",
            "configuration": {"chunk_shape": inner, "codecs": codecs, "index_codecs": [BYTES], "index_location": "end"},
        }
    ]


def zstd_bomb() -> bytes:
    return imagecodecs.zstd_encode(_PIECE) * (BOMB // len(_PIECE))


def lying_blosc(becomes: int = 2**31 - 1) -> bytes:
    """The header of a Blosc chunk that says more than there is."""
    return struct.pack("<BBBBIII", 2, 1, 0x20, 2, becomes, 2**18, 64) + bytes(48)


def lying_lz4() -> bytes:
    return struct.pack("<I", 2**31 - 1) + bytes(64)


def shard(chunk: bytes, offset: int | None = None, length: int | None = None) -> bytes:
    """A shard of one chunk, and the index that says where it lies."""
    return chunk + struct.pack("<QQ", offset or 0, len(chunk) if length is None else length)


def tiff(width: int, height: int, *, compressed: bool = False) -> bytes:
    """A TIFF of 8 × 8 pixels that says that it has others."""
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink) as writer:
        writer.write(np.zeros((8, 8), np.uint16), compression="zlib" if compressed else None, metadata=None)
    data = bytearray(sink.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        tags = read.pages.first.tags
        sizes = {"ImageWidth": width, "ImageLength": height, "RowsPerStrip": height}
        for name, value in sizes.items():
            tag = tags[name]
            data[tag.offset + 2 : tag.offset + 4] = struct.pack("<H", 4)
            data[tag.offset + 8 : tag.offset + 12] = struct.pack("<I", value)
    return bytes(data)


def exploding_tiff() -> bytes:
    """A TIFF of 8 × 8 pixels whose only strip goes on for gigabytes."""
    data, bomb = bytearray(tiff(8, 8, compressed=True)), zlib_bomb()
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        for name, value in {"StripOffsets": len(data), "StripByteCounts": len(bomb)}.items():
            tag = read.pages.first.tags[name]
            data[tag.offset + 2 : tag.offset + 4] = struct.pack("<H", 4)
            data[tag.offset + 8 : tag.offset + 12] = struct.pack("<I", value)
    return bytes(data) + bomb


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of 8 × 8 pixels that says that it has others."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "JPEG")
    data = bytearray(sink.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


# --- networks ------------------------------------------------------------------------------------


def torch_file(state: object) -> bytes:
    sink = io.BytesIO()
    torch.save(state, sink)
    return sink.getvalue()


def packed_torch_file() -> bytes:
    """A torch file whose parts are compressed, so that any of them may become anything."""
    with zipfile.ZipFile(io.BytesIO(torch_file({"w": torch.zeros(2)}))) as archive:
        return zip_of(**{name: archive.read(name) for name in archive.namelist()})


def safetensors(shape: tuple[int, ...], end: int) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


# --- text ----------------------------------------------------------------------------------------


def laughs() -> bytes:
    """XML whose entities become 3 GB of text (the billion laughs)."""
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    return f'<!DOCTYPE x [<!ENTITY l0 "lol">{entities}]><x>&l9;</x>'.encode()


def other_file() -> bytes:
    """XML that stands for a file of the machine."""
    return b'<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><x>&f;</x>'
