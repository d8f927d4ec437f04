"""What is read is not trusted: names that lead elsewhere, pickles, and files that claim or become more than there is.

What `screening serve` lets in is in test_serve.py, what recipes of clusters say in test_cluster_configs.py, what text
becomes of in a page in test_report.py and test_report_browser.py.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from bombs import CASES, Case
from conftest import Command
from hostile import h5ad, torch_file, zarr_v2, zip_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexed_screens import write_screen

from pipelines.config import load
from pipelines.evaluate_recipes import parse_recipe
from pipelines.inputs import well_keys
from pipelines.tiff import read_image
from pipelines.uploads import read_vectors
from screening.layouts import Cv8000Layout, ImageXpressLayout, PatternLayout, PhenixLayout, read
from screening.layouts.xml import parse_xml
from screening.mitoreid import clip_of
from screening.spreadsheet import as_csv
from screening.torch_files import read_state_dict
from storage_schemas import arrays, checkpoint, clips, index, plate, store, tables
from storage_schemas.calibration import read_calibration
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.ingest import IngestRecord, read_record
from storage_schemas.keys import SiteKey, WellKey
from storage_schemas.limits import VARIABLE, check_size, read_limit
from storage_schemas.missing import read_missing
from storage_schemas.profile_sources import open_source
from storage_schemas.screen import Failure, Manifest, Screen, StageRecord
from storage_schemas.truth import Truth
from tune.space import load_search

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("screening", "pipelines", "tune", "storage_schemas")
ELSEWHERE = ("../../secret", "..", "/etc/passwd", "a/../../b", "a\\..\\b", "", ".", "x\0y", "s3://bucket/x", "zip::/x")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen with an index, to be copied."""
    return Path(write_screen(tmp_path_factory.mktemp("written") / "screen", plates=("p",)).url)


@pytest.fixture
def screen(written: Path, tmp_path: Path) -> Screen:
    return Screen(str(shutil.copytree(written, tmp_path / "screen")))


# --- names that lead elsewhere -------------------------------------------------------------------


@pytest.fixture
def small_plate(tmp_path: Path) -> Path:
    url = tmp_path / "p.zarr"
    plate.create_well(str(url), "B02", {"0": np.full((1, 1, 8, 8), 7, np.uint16)}, ["a"])
    plate.list_wells(str(url), "p", ["B02"])
    # What a name that leads out of the plate would find.
    secret = tmp_path / "secret"
    plate.create_well(str(secret), "B02", {"0": np.full((1, 1, 8, 8), 9, np.uint16)}, ["a"])
    (secret / "B/02/0/0").rename(tmp_path / "level")
    return url


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(file.read_text())
    change(document["attributes"]["ome"])
    file.write_text(json.dumps(document))


def refuse(read_it: Callable[[], object], where: object, name: str) -> None:
    """It is an error that names the file and what stands there."""
    with pytest.raises(InputError) as caught:
        read_it()
    assert str(where) in str(caught.value)
    if name:
        assert repr(name)[1:-1].split("/")[0] in str(caught.value)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_in_a_plate_lead_nowhere_else(small_plate: Path, name: str) -> None:
    url, image = str(small_plate), small_plate / "B/02/0"

    edit(image / "zarr.json", lambda ome: ome["multiscales"][0]["datasets"][0].update(path=name))
    refuse(lambda: plate.open_site(str(image)), image, name)

    edit(small_plate / "B/02/zarr.json", lambda ome: ome["well"]["images"][0].update(path=name))
    refuse(lambda: plate.open_plate(url).sites("B02"), small_plate / "B/02", name)

    if name:  # without one, the folder's counts
        edit(small_plate / "zarr.json", lambda ome: ome["plate"].update(name=name))
        refuse(lambda: plate.open_plate(url), small_plate, name)
        edit(small_plate / "zarr.json", lambda ome: ome["plate"].update(name="p"))

    edit(small_plate / "zarr.json", lambda ome: ome["plate"]["wells"][0].update(path=name))
    refuse(lambda: plate.open_plate(url), small_plate, name)


def test_a_level_beside_the_plate_is_not_read(small_plate: Path) -> None:
    """Zarr itself would follow the path: it is the name that is refused."""
    image = small_plate / "B/02/0"
    assert arrays.read("", arrays.open_array(f"{image}/../../../../level"), slice(None)).max() == 9
    edit(image / "zarr.json", lambda ome: ome["multiscales"][0]["datasets"][0].update(path="../../../../level"))
    with pytest.raises(SchemaError, match=r"0: dataset name '\.\.' is not usable"):
        plate.open_site(str(image))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_become_no_path_of_a_screen(tmp_path: Path, name: str) -> None:
    screen = Screen(str(tmp_path / "screen"))
    for make in (lambda: WellKey(name, "B02"), lambda: WellKey("p", name), lambda: SiteKey("p", "B02", name)):
        with pytest.raises(InputError):
            make()
    for path in (screen.calibration, screen.remove_cells, *([screen.added] if name else [])):
        with pytest.raises(InputError, match="name"):
            path(name)
    with pytest.raises(InputError):
        plate.create_well(str(tmp_path / "p.zarr"), "B02", {name: np.zeros((1, 1, 8, 8))}, ["a"])
    with pytest.raises(InputError):
        plate.list_wells(str(tmp_path / "p.zarr"), name, ["B02"])
    assert not (tmp_path / "p.zarr").exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "a\\b"])
def test_names_in_tables_are_refused_where_they_stand(screen: Screen, tmp_path: Path, name: str) -> None:
    url = str(tmp_path / "map.csv")
    pd.DataFrame({"plate": ["p", name], "well": ["B02", "B03"], "compound": "x", "role": "treatment"}).to_csv(
        url, index=False
    )
    with pytest.raises(SchemaError, match=r"map\.csv: line 3: plate name"):
        tables.read_plate_map(url)
    # One that was written past the check, as by others.
    maps = tables.open_table(screen.plate_map, tables.PLATE_MAP).to_pandas().assign(plate=name)
    tables.write_table(screen.plate_map, maps, tables.PLATE_MAP)
    with pytest.raises(InputError, match="plate name"):
        well_keys(tables.open_table(screen.plate_map, tables.PLATE_MAP).to_pandas())


@pytest.mark.parametrize(
    "place",
    [
        "../other",
        "other",
        "http://host/x",
        "reference::/x.json",
        "/x::http://host/y",
        "simplecache::s3://b/x",
        "github://a",
    ],
)
def test_a_screen_takes_its_cells_from_a_plain_place_alone(tmp_path: Path, place: str) -> None:
    """Other protocols of fsspec fetch pages, or run what a file says."""
    screen = Screen(str(tmp_path))
    screen.write_manifest(Manifest(software={}, config={}, inputs="x", cells=place))
    with pytest.raises(SchemaError, match=r"manifest\.json: takes its cells from"):
        Screen.open(screen.url)


@pytest.mark.parametrize("place", ["/data/screen", "s3://bucket/screen", "memory://screen"])
def test_plain_places_are_taken(tmp_path: Path, place: str) -> None:
    screen = Screen(str(tmp_path))
    screen.write_manifest(Manifest(software={}, config={}, inputs="x", cells=place))
    assert Screen.open(screen.url).segmented == Screen(place)


@pytest.mark.parametrize("build", ["../../../x", "/etc", "..", "0123456789ab/..", "A123456789ab"])
def test_a_build_of_an_index_is_a_folder_of_its_own(screen: Screen, build: str) -> None:
    where = Path(screen.index) / "manifest.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), "build": build}))
    with pytest.raises(SchemaError, match=r"manifest\.json: is not whole \(see build\)"):
        index.read_manifest(screen.index)


def test_what_metadata_of_instruments_name_is_not_opened() -> None:
    """Files are those of the listing; what metadata name is only promised, and its folders are dropped."""
    names = ["Images/r02c02f01p01-ch1sk1fk1fl1.tiff"]
    for url in ("../../../etc/r02c02f01p01-ch1sk1fk1fl1.tiff", "C:\\x\\r02c02f01p01-ch1sk1fk1fl1.tiff"):
        entry = f"<Image><URL>{url}</URL></Image>"
        found = read(PhenixLayout(), names, {"Images/Index.idx.xml": f"<a><Images>{entry}</Images></a>".encode()})
        assert found.table["path"].tolist() == names
        assert found.promised[["well", "site"]].to_numpy().tolist() == [["B02", "1"]]
    with pytest.raises(InputError, match=r"'/etc/passwd' is not named as Harmony names files"):
        read(
            PhenixLayout(),
            names,
            {"Images/Index.idx.xml": b"<a><Images><Image><URL>/etc/passwd</URL></Image></Images></a>"},
        )
    record = (
        '<a><MeasurementRecord Type="IMG" Row="../.." Column="2" FieldIndex="1" TimePoint="1" Ch="1" ZIndex="1"/></a>'
    )
    with pytest.raises(InputError, match=r"a\.mlf: a MeasurementRecord is not usable"):
        read(Cv8000Layout(), ["P_B02_T0001F001L01A01Z01C01.tif"], {"a.mlf": record.encode()})
    for pattern, name in ((r"(?P<well>B02)(?P<site>.*)\.tif", "B02../../x.tif"), (r"(?P<well>.*)\.tif", "../B02.tif")):
        with pytest.raises(InputError, match="is not"):
            read(PatternLayout(pattern=pattern), [name], {})


def test_an_h5ad_file_is_one_file(tmp_path: Path) -> None:
    """HDF5 makes any file of the disk, or a part of another, look like a part of its own."""
    secret = tmp_path / "secret"
    secret.write_bytes(np.full(2, 9, "<f4").tobytes())
    h5ad(tmp_path / "other.h5ad", lambda file: None)
    layout = h5py.VirtualLayout((2, 1), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5ad"), "X", (2, 1))

    def without_x(how: Callable[[h5py.File], None]) -> Callable[[h5py.File], None]:
        def change(file: h5py.File) -> None:
            del file["X"]
            how(file)

        return change

    changes: list[Callable[[h5py.File], None]] = [
        lambda file: file.create_dataset("X", (2, 1), "<f4", external=[(str(secret), 0, 8)]),
        lambda file: file.__setitem__("X", h5py.ExternalLink(str(tmp_path / "other.h5ad"), "X")),
        lambda file: file.__setitem__("X", h5py.SoftLink("/var/index")),
        lambda file: file.create_virtual_dataset("X", layout),
    ]
    for change in changes:
        h5ad(tmp_path / "x.h5ad", without_x(change))
        with pytest.raises(SchemaError, match=r"x\.h5ad: .*'X'"):
            list(open_source(str(tmp_path / "x.h5ad")).blocks(["v"]))
        (tmp_path / "x.h5ad").unlink()


# --- metadata of any form ------------------------------------------------------------------------

JUNK = (None, True, -1, 0, 10**30, 1e308, "", "..", "\0", "x" * 3000, [], [None], ["a"], [[]], {}, {"a": 1})


def spots(document: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a JSON document."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(document, dict | list):
        inner = list(document.items() if isinstance(document, dict) else enumerate(document))
    return [path, *(spot for key, value in inner for spot in spots(value, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def look_at_plate(url: str) -> None:
    opened = plate.open_plate(url)
    for well in opened.well_paths:
        for site in opened.sites(well).values():
            plate.open_site(site).read(frames=[0])
    read_record(url)


def look_at_labels(url: str) -> None:
    plate.write_labels(url, {"nuclei": np.zeros((1, 8, 8), np.int32)})
    plate.open_labels(url, "nuclei")


def look_at_clips(url: str) -> None:
    array = clips.open_clips(url)
    clips.channel_names(array), clips.frame_numbers(array), clips.read_ranges(url), clips.read_clips(url, [0])


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[], object]]]:
    """JSON documents that are read, and who reads them."""
    folder = tmp_path_factory.mktemp("described")
    url, array, screen = str(folder / "p.zarr"), str(folder / "c.zarr"), Screen(str(folder / "screen"))
    plate.create_well(url, "B02", {"0": np.zeros((1, 2, 8, 8), np.uint16)}, ["a", "b"], pixel_size=0.5)
    plate.list_wells(url, "p", ["B02"], IngestRecord().model_dump())
    plate.write_labels(f"{url}/B/02/0", {"nuclei": np.zeros((1, 8, 8), np.int32)})
    ranges = clips.Ranges(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))
    clips.write_clips(array, np.zeros((1, 2, 1, 8, 8), np.uint8), ["a", "b"], [0], ranges)
    screen.write_manifest(Manifest(software={"a": "1"}, config={"x": 1}, inputs="x", cells="/x"))
    screen.write_record("segment", StageRecord(fingerprint="x", counts={"a": 1}, notes=["x"]))
    screen.write_failures("segment", WellKey("p", "B02"), [Failure("p/B02", "x", "y")])
    kept = checkpoint.CheckpointManifest({"a": 1}, ("a",), ("c",), 4, (0.1,), (1.0,), 8, 1, ({"epoch": 1},), "f")
    checkpoint.write_checkpoint(screen.checkpoint, kept, {"w": np.zeros(2, np.float32)})
    return {
        "plate": (folder / "p.zarr/zarr.json", lambda: look_at_plate(url)),
        "well": (folder / "p.zarr/B/02/zarr.json", lambda: look_at_plate(url)),
        "image": (folder / "p.zarr/B/02/0/zarr.json", lambda: look_at_plate(url)),
        "array": (folder / "p.zarr/B/02/0/0/zarr.json", lambda: look_at_plate(url)),
        "labels": (folder / "p.zarr/B/02/0/labels/zarr.json", lambda: look_at_labels(f"{url}/B/02/0")),
        "clips": (folder / "c.zarr/zarr.json", lambda: look_at_clips(array)),
        "manifest": (Path(screen.manifest_url), lambda: Screen.open(screen.url)),
        "failures": (folder / "screen/failures/segment/p/B02.json", lambda: screen.failures("segment")),
        "checkpoint": (Path(screen.checkpoint) / "manifest.json", lambda: checkpoint.read_manifest(screen.checkpoint)),
    }


@pytest.mark.parametrize(
    "name", ["plate", "well", "image", "array", "labels", "clips", "manifest", "failures", "checkpoint"]
)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metadata_of_any_form_are_read_or_an_error_that_can_be_mended(
    name: str, described: dict[str, tuple[Path, Callable[[], object]]], data: st.DataObject
) -> None:
    file, look = described[name]
    whole = file.read_bytes()
    document = json.loads(whole)
    path = data.draw(st.sampled_from(spots(document)))
    file.write_text(json.dumps(replaced(document, path, data.draw(st.sampled_from(JUNK)))))
    try:
        with suppress(InputError):
            look()
    finally:
        file.write_bytes(whole)


# --- pickles -------------------------------------------------------------------------------------


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def pickled_npy(mark: Path) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([Payload(mark)], object), allow_pickle=True)
    return sink.getvalue()


def pickled_npz(mark: Path) -> bytes:
    return zip_of(**{"offset.npy": pickled_npy(mark), "0/nuclei.npy": pickled_npy(mark)})


def pickled_extension(mark: Path) -> bytes:
    """A Parquet file with a type of Python's, as older pyarrow unpickled, and pandas' metadata of the same kind."""
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled(mark)}
    field = pa.field("embedding", pa.binary(), metadata=kind)
    schema = pa.schema([field], metadata={b"pandas": pickled(mark), b"screening": pickled(mark)})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([pickled(mark)])], schema=schema), sink)
    return sink.getvalue()


def pickled_torch(mark: Path) -> bytes:
    return torch_file({"state_dict": {"w": torch.zeros(1)}, "x": Payload(mark)})


def tagged_yaml(mark: Path) -> bytes:
    return f"!!python/object/apply:os.mkdir ['{mark}']".encode()


def pickled_h5ad(mark: Path) -> bytes:
    where = mark.with_name("payload.h5ad")
    kind = h5py.opaque_dtype(np.dtype("V10"))

    def change(file: h5py.File) -> None:
        del file["obs/index"]
        file["obs"].create_dataset("index", (2,), kind)
        file["obs"].attrs["pickle"] = np.void(pickled(mark))

    h5ad(where, change)
    return where.read_bytes()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": pickled,
    "npy": pickled_npy,
    "npz": pickled_npz,
    "parquet": pickled_extension,
    "pth": pickled_torch,
    "yaml": tagged_yaml,
    "h5ad": pickled_h5ad,
    "json": lambda mark: json.dumps({"py/object": "os.mkdir", "py/reduce": [str(mark)]}).encode(),
}


def at(name: str, read_it: Callable[[str], object]) -> tuple[str, Callable[[str], object]]:
    return name, read_it


def whole(url: str) -> object:
    source = open_source(url)
    return source.read([name for name in source.columns if name not in source.numbers]), list(
        source.blocks(source.variables)
    )


def of_index(url: str) -> object:
    held = index.ArrayForm.model_validate({"shape": (1,), "dtype": "float32", "sha256": ""})
    return index._open_array(url, held)


def frozen(url: str) -> object:
    return load(url)


# Every function that reads a file, under the name that the file has for it.
READERS: list[tuple[str, Callable[[str], object]]] = [
    at("x.npz", store.read_npz),
    at("calibration.npz", read_calibration),
    at("truth/p/B02.npz", lambda url: Truth(url.removesuffix("/truth/p/B02.npz")).read(WellKey("p", "B02"), "0")),
    at("cell.vectors.npy", of_index),
    at("asked.npy", lambda url: read_vectors(Path(url).read_bytes())),
    at("cells.parquet", lambda url: tables.open_table(url, tables.CELLS)),
    at("cells.parquet", lambda url: tables.open_table(url, tables.CELLS, ["site"])),
    at("embeddings.parquet", lambda url: tables.open_vectors(url, tables.embeddings_form(2), "embedding")),
    at("embeddings.parquet", lambda url: tables.vector_dimension(url, "embedding")),
    *(at(f"map.{kind}", tables.read_plate_map) for kind in ("csv", "csv.gz", "tsv", "txt", "parquet", "xlsx")),
    *(at(f"compounds.{kind}", tables.read_compounds) for kind in ("csv", "parquet", "xlsx")),
    *(at(f"split.{kind}", tables.read_split) for kind in ("csv", "parquet", "xlsx")),
    *(at(f"profiles.{kind}", whole) for kind in ("csv", "csv.gz", "tsv", "parquet", "h5ad")),
    at("checkpoint/manifest.json", lambda url: checkpoint.read_manifest(store.parent(url))),
    at("checkpoint/model.safetensors", lambda url: checkpoint.read_weights(store.parent(url))),
    at("network.pth", read_state_dict),
    at("manifest.json", lambda url: Screen.open(store.parent(url))),
    at("manifest.json", lambda url: index.read_manifest(store.parent(url))),
    at("failures/segment/p/B02.json", lambda url: Screen(url.split("/failures")[0]).failures("segment")),
    at("missing_planes.csv", lambda url: read_missing(store.parent(url))),
    at("run.yaml", frozen),
    at("search.yaml", load_search),
    at("recipe.yaml", lambda url: parse_recipe(Path(url).read_bytes().decode("latin-1"))),
    at("zarr.json", lambda url: plate.open_plate(store.parent(url))),
    at("zarr.json", lambda url: plate.open_site(store.parent(url))),
    at("zarr.json", lambda url: clips.open_clips(store.parent(url))),
    at("0/.zarray", lambda url: arrays.open_array(store.parent(url))),
    at("plane.tif", lambda url: read_image(url, "YX")),
    at("1.jpg", lambda url: clip_of([Path(url).read_bytes()], 8)),
    at("Index.idx.xml", lambda url: parse_xml(url, Path(url).read_bytes())),
    at("a.mlf", lambda url: Cv8000Layout().read([], {"a.mlf": Path(url).read_bytes()})),
    at("P.HTD", lambda url: ImageXpressLayout().read([], {"P.HTD": Path(url).read_bytes()})),
]


@pytest.mark.filterwarnings("ignore:pyarrow.PyExtensionType:FutureWarning")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_reader_runs_what_a_file_holds(payload: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for i, (name, read_it) in enumerate(READERS):
        file = tmp_path / str(i) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(PAYLOADS[payload](mark))
        with pytest.raises(InputError) as caught:
            read_it(str(file))
        assert not mark.exists(), f"{name} ran the payload"
        assert str(caught.value)


def test_the_payloads_work(tmp_path: Path) -> None:
    """What the readers are given does run where it is read with trust."""
    for i, (name, trusting) in enumerate(
        {
            "pickle": lambda data: pickle.loads(data),
            "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
            "npz": lambda data: dict(np.load(io.BytesIO(data), allow_pickle=True)),
            "pth": lambda data: torch.load(io.BytesIO(data), weights_only=False),
            "yaml": lambda data: yaml.unsafe_load(data),
        }.items()
    ):
        mark = tmp_path / str(i)
        try:
            trusting(PAYLOADS[name](mark))
        except FileExistsError:  # an archive holds it twice
            assert name == "npz"
        assert mark.exists(), name


@pytest.mark.parametrize(
    "metadata",
    [
        {"filters": [{"id": "pickle"}]},
        {"compressor": {"id": "pickle", "protocol": 5}},
        {"dtype": "|O", "filters": [{"id": "pickle"}], "fill_value": None},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "fill_value": None},
        {"dtype": "|O", "filters": [{"id": "json2"}], "fill_value": None},
        {"filters": [{"id": "zlib", "level": 1}]},
        {"compressor": {"id": "lzma"}},
    ],
)
def test_codecs_of_numbers_alone_are_let_in(metadata: dict[str, Any], tmp_path: Path) -> None:
    zarr_v2(tmp_path / "a.zarr", pickled(tmp_path / "ran"), **metadata)
    with pytest.raises(SchemaError, match=r"a\.zarr"):
        arrays.read("a.zarr", arrays.open_array(str(tmp_path / "a.zarr")), slice(None))
    assert not (tmp_path / "ran").exists()


def test_chunks_of_every_codec_that_is_let_in_read_back(tmp_path: Path) -> None:
    import numcodecs

    values = np.arange(16, dtype="<u2").reshape(4, 4)
    for i, name in enumerate(("blosc", "gzip", "lz4", "zlib", "zstd")):
        for filters in ([], [{"id": "delta", "dtype": "<u2"}], [{"id": "shuffle", "elementsize": 2}]):
            encoded: Any = values
            for each in filters:
                encoded = numcodecs.get_codec(each).encode(encoded)
            chunk = bytes(numcodecs.get_codec({"id": name}).encode(encoded))
            where = tmp_path / f"{i}{len(filters)}{filters[0]['id'] if filters else ''}.zarr"
            zarr_v2(where, chunk, compressor={"id": name}, filters=filters or None)
            array = arrays.open_array(str(where))
            np.testing.assert_array_equal(arrays.read(str(where), array, slice(None)), values)


def test_nothing_of_ours_can_unpickle_or_run_text() -> None:
    """Torch reads weights alone, YAML its plain tags, NumPy numbers; no shell, no eval."""
    found = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if what := _unsafe(node):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {what}")  # type: ignore[attr-defined]
    assert not found


_MODULES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "pty"}
_LOADERS = {
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "os.system",
    "os.popen",
    "pd.read_pickle",
}


def _unsafe(node: ast.AST) -> str:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names]
        modules = {
            name.partition(".")[0] for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else names)
        }
        return ", ".join(sorted(modules & _MODULES))
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in {"eval", "exec", "compile", "__import__"} | _LOADERS:
        return called
    if called.endswith("torch.load") and given.get("weights_only") != "True":
        return "torch.load with code"
    if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
        return f"{called} with {given}"
    return "np.load" if called in ("np.load", "numpy.load") else ""


@pytest.mark.parametrize(
    "code",
    [
        "import dill",
        "from joblib import load",
        "import a, pickle",
        "eval('1')",
        "torch.load(f)",
        "yaml.load(f, Loader=x)",
        "np.load(f)",
        "np.lib.format.read_array(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_what_is_looked_for_is_found(code: str) -> None:
    assert any(_unsafe(node) for node in ast.walk(ast.parse(code)))


# --- more than there is --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each file in a process that may have 4 GiB more than it begins with."""
    folder = tmp_path_factory.mktemp("bombs")
    for case in CASES:
        case.write(folder / case.name)
    script = Path(__file__).with_name("bombs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, folder], env=environment, capture_output=True, text=True, timeout=600
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{found[-1:]} {done.stderr[-2000:]}"
    return {row["name"]: row for row in found if "said" in row}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_too_large_is_an_error_before_it_is_read(case: Case, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[case.name]
    assert "InputError" in outcome["said"]
    assert "MemoryError" not in outcome["said"], "it was tried"
    assert re.search(case.said, outcome["said"])
    assert outcome["seconds"] < 20
    first = outcomes[CASES[0].name]["peak"]
    assert outcome["peak"] - first < 1.5 * 2**30


def test_more_may_be_read_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    size = read_limit() + 1
    with pytest.raises(SchemaError, match=rf"x\.zarr: a chunk would take .* GiB of memory.*{VARIABLE}"):
        check_size("x.zarr", "a chunk", size)
    monkeypatch.setenv(VARIABLE, str(2 * size / 2**30))
    check_size("x.zarr", "a chunk", size)
    for wrong in ("much", "0", "-1", "inf"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(InputError, match=f"{VARIABLE}={wrong}: expected a number of GiB"):
            read_limit()


# --- text ----------------------------------------------------------------------------------------


def test_no_text_is_a_formula_in_a_spreadsheet() -> None:
    names = ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "\tx", "aspirin", "(-)-menthol", "a=b"]
    table = pd.DataFrame({"=compound": names, "value": [-1.5] * len(names), "n": -1})
    back = pd.read_csv(io.StringIO(as_csv(table)), keep_default_na=False)
    assert back["'=compound"].tolist() == [f"'{name}" for name in names[:5]] + names[5:]
    assert back["value"].tolist() == [-1.5] * len(names)
    assert back["n"].tolist() == [-1] * len(names)


def test_names_do_not_reach_the_terminal_as_commands(command: Command, screen: Screen) -> None:
    compounds = tables.open_table(screen.compounds, tables.COMPOUNDS).to_pandas()
    moved = compounds.assign(moa=compounds["moa"].replace("uncoupler", "\x1b[2J\x1b]0;owned\x07=uncoupler"))
    tables.write_table(screen.compounds, moved, tables.COMPOUNDS)
    shown = command("query", screen.url, "--compound", "uncoupler-1").out
    assert "\x1b" not in shown
    assert "\x07" not in shown


# --- clusters ------------------------------------------------------------------------------------


def test_wherever_ray_is_started_it_asks_for_a_token_and_its_dashboard_listens_to_this_machine_alone() -> None:
    started = 0
    files = [ROOT / "README.md", ROOT / "cluster.yaml", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    files += [file for file in (ROOT / "examples" / "clusters").iterdir() if file.is_file()]
    for file in files:
        # Commands may go on in the next line of a YAML file.
        text = re.sub(r"\n +(?=--)", " ", file.read_text(encoding="utf-8"))
        for line in text.splitlines():
            if re.search(r"\bray start --", line) and "`ray start" not in line:
                started += 1
                assert "RAY_AUTH_MODE=token ray start" in line, f"{file.name}: {line}"
                assert ("--head" in line) == ("--dashboard-host=127.0.0.1" in line), f"{file.name}: {line}"
        assert not re.search(r"RAY_AUTH_MODE[=: ]+\"?disabled", text), file.name
    assert started >= 6
    # On Kubernetes the operator and the namespace, and by a network policy nobody else, must reach the dashboard.
    for file in files:
        text = file.read_text(encoding="utf-8")
        if "dashboard-host: " in text:
            assert "authOptions: {mode: token}" in text, file.name
            assert "kind: NetworkPolicy" in text, file.name


# --- the audit of dependencies -------------------------------------------------------------------


def audited(*packages: dict[str, Any], errors: str = "") -> tuple[int, str]:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    code, lines = audit.verdict({"dependencies": list(packages)} if packages else None, errors)
    return code, "\n".join(lines)


def test_an_audit_that_was_not_done_is_not_taken_for_a_clean_one() -> None:
    clean = {"name": "a", "version": "1", "vulns": []}
    known = clean | {"vulns": [{"id": "X-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]}
    skipped = {"name": "b", "skip_reason": "not found"}
    assert audited(clean) == (0, "audit: 0 known vulnerabilities in 1 packages")
    code, said = audited(clean, known, skipped)
    assert code == 1
    assert "a 1: X-1 (CVE-1), mended in 2" in said
    assert "1 known vulnerabilities in 2 packages; 1 could not be looked up: b" in said
    for code, said in (audited(skipped), audited(errors="requests.exceptions.ConnectionError: no such host")):
        assert code == 0
        assert "NOT DONE" in said
    assert audited(errors="ValueError: x") == (1, "audit: pip-audit failed: ValueError: x")
    assert audited()[0] == 1
