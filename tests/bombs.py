"""Reads files that claim or become more than memory holds, in a process of limited memory: `python bombs.py FOLDER`.

A line of JSON is printed for each as it is read: its name, what came of it, seconds of CPU and the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hostile as h
import numpy as np
import pyarrow as pa
import torch
from hostile import BLOSC, BYTES, GZIP, ZSTD

SPACE = 4 * 2**30  # bytes beyond what the process has when it begins to read


class Case(NamedTuple):
    """A file and how it is read; ``said`` stands in the error."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[str], object]
    said: str


def _bytes(data: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data())


def _array(url: str) -> object:
    from storage_schemas import arrays

    return arrays.read(url, arrays.open_array(url), slice(None))


def _site(url: str) -> object:
    from storage_schemas.plate import open_site

    return open_site(url).read(frames=[0])


def _huge_site(path: Path) -> None:
    from storage_schemas import plate

    plate.create_well(str(path), "B02", {"0": np.zeros((1, 1, 8, 8), np.uint16)}, ["a"])
    where = path / "B/02/0/0/zarr.json"
    where.write_text(where.read_text().replace("8", "1000000"))


def _user_table(url: str) -> object:
    from storage_schemas.tables import read_plate_map

    return read_plate_map(url)


def _ids(url: str) -> object:
    from storage_schemas.tables import INDEX_IDS, open_table

    return open_table(url, INDEX_IDS)


def _npz(url: str) -> object:
    from storage_schemas.store import read_npz

    return read_npz(url)


def _json(url: str) -> object:
    from storage_schemas.store import read_json

    return read_json(url)


def _profiles(url: str) -> object:
    from storage_schemas.profile_sources import open_source

    source = open_source(url)
    texts = [name for name in source.columns if name not in source.numbers]
    return source.read(texts), list(source.blocks([name for name in source.columns if name in source.numbers]))


def _xml(url: str) -> object:
    from screening.layouts.xml import parse_xml

    return parse_xml(url, Path(url).read_bytes())


def _imagexpress(url: str) -> object:
    from screening.layouts import ImageXpressLayout

    return ImageXpressLayout().read(["P_B02_s1_w1.TIF"], {"P.HTD": Path(url).read_bytes()})


def _cv8000(url: str) -> object:
    from screening.layouts import Cv8000Layout

    record = (
        '<a><MeasurementRecord Type="IMG" Row="2" Column="2" FieldIndex="1" TimePoint="1" Ch="1" ZIndex="1" '
        'TimelineIndex="1" ActionIndex="1" Time="2020-01-01T00:00:00" Z="0"/></a>'
    )
    documents = {"a.mlf": record.encode(), "a.mrf": Path(url).read_bytes()}
    return Cv8000Layout().read(["P_B02_T0001F001L01A01Z01C01.tif"], documents)


def _tiff(url: str) -> object:
    from pipelines.tiff import read_header, read_image

    return read_header(url, "YX"), read_image(url, "YX")


def _clip(url: str) -> object:
    from screening.mitoreid import clip_of

    return clip_of([Path(url).read_bytes()], 8)


def _torch(url: str) -> object:
    from screening.torch_files import read_state_dict

    return {name: tensor.clone() for name, tensor in read_state_dict(url).items()}


def _weights(url: str) -> object:
    from storage_schemas.checkpoint import read_weights

    return read_weights(str(Path(url).parent))


def _v2(chunk: Callable[[], bytes], codec: str) -> Callable[[Path], object]:
    return lambda path: h.zarr_v2(path, chunk(), compressor={"id": codec})


def _v3(chunk: Callable[[], bytes], *codecs: dict) -> Callable[[Path], object]:  # type: ignore[type-arg]
    return lambda path: h.zarr_v3(path, chunk(), [BYTES, *codecs])


_HTD = (
    '"TimePoints", 2000000000\n"ZSeries", FALSE\n"XWells", 12\n"YWells", 1\n"WellsSelection1", TRUE\n"Sites", FALSE\n'
    '"NWavelengths", 1\n"WaveName1", "a"\n'
)
_INFLATED = "expected|decompress|too small|short|output"

CASES = [
    # What is declared.
    Case("site.zarr", _huge_site, lambda url: _site(f"{url}/B/02/0"), "memory"),
    Case("shape.zarr", lambda path: h.zarr_v3(path, None, [BYTES], (10**6, 10**6), (8, 8)), _array, "memory"),
    Case("axis.zarr", lambda path: h.zarr_v3(path, None, [BYTES], (10**30, 1), (8, 8)), _array, "memory"),
    Case("chunk.zarr", lambda path: h.zarr_v3(path, None, [BYTES], (8, 8), (10**7, 10**7)), _array, "memory"),
    Case("chunks.zarr", lambda path: h.zarr_v3(path, None, [BYTES], (2**14, 2**14), (1, 1)), _array, "chunks"),
    Case(
        "shards.zarr",
        lambda path: h.zarr_v3(path, None, h.sharded((1, 1), [BYTES]), (2**14, 2**14), (2**14, 2**14)),
        _array,
        "chunks",
    ),
    Case("v2.zarr", lambda path: h.zarr_v2(path, None, shape=[10**9, 10**9], chunks=[8, 8]), _array, "memory"),
    Case("header.npz", _bytes(lambda: h.zip_of(**{"a.npy": h.npy((10**6, 10**6))})), _npz, "holds"),
    Case("sparse.json", lambda path: path.open("wb").truncate(2**40), _json, "memory"),
    Case("claims.h5ad", lambda path: h.h5ad(path, h.huge_names), _profiles, "memory"),
    Case(
        "page.parquet",
        _bytes(lambda: h.page_claiming(h.parquet(pa.table({"plate": ["p"]})), 2**31 - 1)),
        _user_table,
        "memory|read",
    ),
    Case("square.tif", _bytes(lambda: h.tiff(10**6, 10**6)), _tiff, "memory"),
    Case("packed.tif", _bytes(lambda: h.tiff(10**6, 10**6, compressed=True)), _tiff, "memory"),
    Case("square.jpg", _bytes(lambda: h.jpeg(65_000, 65_000)), _clip, "readable"),
    Case("steps.HTD", _bytes(_HTD.encode), _imagexpress, "planes"),
    Case("steps.mrf", _bytes(lambda: b'<a TimePointCount="2000000000"/>'), _cv8000, "planes"),
    Case("stride.pth", _bytes(lambda: h.torch_file({"w": torch.zeros(1).expand(10**6, 10**6)})), _torch, "shape"),
    Case(
        "model.safetensors",
        _bytes(lambda: h.safetensors((10**6, 10**6), 4 * 10**12)),
        _weights,
        "not a safetensors file",
    ),
    # What becomes large.
    Case("longer.npz", _bytes(lambda: h.zip_of(**{"a.npy": h.npy((8,), data=bytes(2**20))})), _npz, "holds"),
    Case(
        "deflated.npz",
        _bytes(lambda: h.zip_claiming(h.zip_of(**{"a.npy": h.npy((8,)), "b.npy": h.npy((8,))}), 2**32 - 2)),
        _npz,
        "memory",
    ),
    Case("map.csv.gz", _bytes(lambda: h.gzip_bomb(b"plate,well,compound,role\n")), _user_table, "decompress"),
    Case("profiles.csv.gz", _bytes(h.gzip_bomb), _profiles, "end of a line"),
    Case("zeros.xlsx", _bytes(lambda: h.zip_claiming(h.workbook(""), 2**30)), _user_table, "unpacked"),
    Case("far.xlsx", _bytes(lambda: h.workbook(h.far_cells(10_000), "A1:XFD10000")), _user_table, "cells"),
    Case("text.parquet", _bytes(lambda: h.parquet(h.repeated_text())), _user_table, "memory"),
    Case("texts.parquet", _bytes(lambda: h.parquet(h.repeated_text())), _profiles, "memory"),
    Case("ids.parquet", h.long_ids, _ids, "memory"),
    Case("strip.tif", _bytes(h.exploding_tiff), _tiff, "not a readable TIFF"),
    Case("chunk.h5ad", lambda path: h.h5ad(path, h.exploding_chunk), _profiles, "decompress"),
    Case("gzip2.zarr", _v2(h.gzip_bomb, "gzip"), _array, _INFLATED),
    Case("zlib2.zarr", _v2(h.zlib_bomb, "zlib"), _array, _INFLATED),
    Case("zstd2.zarr", _v2(h.zstd_bomb, "zstd"), _array, _INFLATED),
    Case("blosc2.zarr", _v2(h.lying_blosc, "blosc"), _array, "expected"),
    Case("lz42.zarr", _v2(h.lying_lz4, "lz4"), _array, "expected"),
    Case("gzip3.zarr", _v3(h.gzip_bomb, GZIP), _array, _INFLATED),
    Case("zstd3.zarr", _v3(h.zstd_bomb, ZSTD), _array, _INFLATED),
    Case("blosc3.zarr", _v3(h.lying_blosc, BLOSC), _array, "expected"),
    Case(
        "shard.zarr",
        lambda path: h.zarr_v3(path, h.shard(h.gzip_bomb()), h.sharded((4, 4), [BYTES, GZIP])),
        _array,
        _INFLATED,
    ),
    Case(
        "index.zarr",
        lambda path: h.zarr_v3(path, h.shard(bytes(32), 2**62, 2**62), h.sharded((4, 4), [BYTES])),
        _array,
        "cannot be read",
    ),
    Case("bomb.pth", _bytes(h.packed_torch_file), _torch, "torch file"),
    Case("laughs.xml", _bytes(h.laughs), _xml, "DTD"),
    Case("deep.json", _bytes(lambda: b"[" * 10**5), _json, "JSON"),
    Case("deep.xml", _bytes(lambda: b"<a>" * 10**5), _xml, "XML"),
]


def main(folder: Path) -> None:
    """Read them all."""
    # Whatever a reader imports is no memory of a file's.
    for name in (
        "pipelines.tiff",
        "pipelines.uploads",
        "screening.layouts",
        "screening.mitoreid",
        "screening.torch_files",
    ):
        __import__(name)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE,) * 2)
    for case in CASES:
        print(json.dumps({"name": case.name}), flush=True)
        started = time.process_time()
        try:
            case.read(str(folder / case.name))
            said = "read"
        except BaseException as error:
            said = f"{'/'.join(kind.__name__ for kind in type(error).__mro__)}: {error}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"name": case.name, "said": said, "seconds": time.process_time() - started, "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
