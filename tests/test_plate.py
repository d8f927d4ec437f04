from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import ome_zarr_models.v04.hcs
import ome_zarr_models.v05.hcs
import ome_zarr_models.v05.image
import ome_zarr_models.v05.image_label
import ome_zarr_models.v05.labels
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.config import InputsConfig
from pipelines.inputs import open_inputs
from storage_schemas import arrays, store
from storage_schemas import plate as plates
from storage_schemas.errors import InputError, SchemaError, StoreError
from storage_schemas.plate import create_well, list_wells, open_labels, open_plate, open_site, read_notes, write_labels


@pytest.fixture(params=["local", "memory"], scope="session")
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Gives an empty place at each call, so that properties can be tried on many plates."""
    if request.param == "local":
        return lambda: str(tmp_path_factory.mktemp("plate") / "p.zarr")
    return lambda: f"memory://{uuid.uuid4().hex}/p.zarr"


def stack_of(shape: tuple[int, ...], dtype: str = "uint16", seed: int = 0) -> NDArray[Any]:
    values = np.random.default_rng(seed).integers(0, 256, shape)
    return (values - 100 if dtype[0] in "if" else values).astype(dtype)


def small_plate(url: str, sites: int = 1) -> dict[str, NDArray[Any]]:
    stacks = {str(i): stack_of((3, 2, 20, 24), seed=i) for i in range(sites)}
    create_well(url, "B02", stacks, ["nucleus", "cell"], pixel_size=0.5, time_step=60.0)
    list_wells(url, "p", ["B02"])
    return stacks


# --- what is written is read -----------------------------------------------------------------

channel_names = st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True)
well_names = st.builds("{}{:02d}".format, st.sampled_from(["A", "H", "AF"]), st.sampled_from([1, 2, 12, 48]))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[str], dict[str, dict[str, NDArray[Any]]]]:
    """Channel names, and stacks by well and site: sites differ in time points, z planes, size and dtype."""
    channels = draw(channel_names)
    zs = st.just(()) | st.tuples(st.integers(1, 4))
    plane = st.tuples(*(st.integers(1, 40) for _ in range(2)))
    shapes = st.tuples(st.integers(1, 3), zs, plane).map(lambda s: (s[0], len(channels), *s[1], *s[2]))
    dtypes = st.sampled_from(["uint8", "uint16", "int16", "uint32", "float32", "float64"])
    stacks = st.builds(stack_of, shapes, dtypes, st.integers(0, 99))
    sites = st.dictionaries(st.sampled_from(["0", "1", "s3"]), stacks, min_size=1, max_size=2)
    return channels, draw(st.dictionaries(well_names, sites, min_size=1, max_size=2))


@given(layout=layouts())
@settings(max_examples=10, deadline=None)
def test_a_plate_reads_back(
    fresh: Callable[[], str], layout: tuple[list[str], dict[str, dict[str, NDArray[Any]]]]
) -> None:
    channels, wells = layout
    url = fresh()
    for well, sites in wells.items():
        create_well(url, well, sites, channels, pixel_size=0.65, time_step=120.0, z_step=2.0)
    list_wells(url, "plate 1", list(wells))
    plate = open_plate(url)
    assert plate.name == "plate 1"
    assert set(plate.well_paths) == set(wells)
    for well, sites in wells.items():
        urls = plate.sites(well)
        assert list(urls) == list(sites)
        for site, stack in sites.items():
            image = open_site(urls[site])
            projected = stack.max(axis=2) if stack.ndim == 5 else stack
            axes = "tczyx" if stack.ndim == 5 else "tcyx"
            assert (image.axes, image.shape, image.channels) == (axes, projected.shape, tuple(channels))
            assert image.pixel_size == pytest.approx(0.65)
            assert image.time_step == pytest.approx(120)
            back = image.read()
            assert back.dtype == stack.dtype
            np.testing.assert_array_equal(back, projected)
            np.testing.assert_array_equal(arrays.open_array(store.join(urls[site], "0"))[...], stack)


@given(
    frames=st.none() | st.lists(st.integers(0, 4), max_size=6),
    channels=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_selection_is_numpy_indexing(
    selectable: tuple[str, NDArray[Any]], frames: list[int] | None, channels: list[int] | None
) -> None:
    url, stack = selectable
    names = ["a", "b", "c"]
    expected = stack if frames is None else stack[np.array(frames, dtype=int)]
    expected = expected if channels is None else expected[:, channels]
    picked = None if channels is None else [names[c] for c in channels]
    np.testing.assert_array_equal(open_site(url).read(channels=picked, frames=frames), expected)


@pytest.fixture(scope="session")
def selectable(fresh: Callable[[], str]) -> tuple[str, NDArray[Any]]:
    url, stack = fresh(), stack_of((5, 3, 6, 7))
    create_well(url, "A01", {"0": stack}, ["a", "b", "c"])
    return store.join(url, "A", "01", "0"), stack


def test_what_is_not_there_is_said(selectable: tuple[str, NDArray[Any]]) -> None:
    image = open_site(selectable[0])
    with pytest.raises(SchemaError, match=r"no channel 'd'; its channels are \['a', 'b', 'c'\]"):
        image.read(channels=["a", "d"])
    for frames in ([5], [0, -1]):
        with pytest.raises(SchemaError, match="has 5 frames"):
            image.read(frames=frames)


def halved_by_loop(plane: NDArray[Any]) -> NDArray[Any]:
    height, width = plane.shape[0] // 2, plane.shape[1] // 2
    result = np.zeros((height, width), plane.dtype)
    for y in range(height):
        for x in range(width):
            block = [float(plane[2 * y + dy, 2 * x + dx]) for dy in (0, 1) for dx in (0, 1)]
            result[y, x] = int(sum(block) / 4)
    return result


def test_the_pyramid_halves_until_it_is_small(tmp_path: Path) -> None:
    url = str(tmp_path / "p.zarr")
    stack = stack_of((1, 1, 41, 601))
    create_well(url, "A01", {"0": stack}, ["a"], pixel_size=0.5)
    image = open_site(url + "/A/01/0")
    assert image.n_levels == 3
    level = stack[0, 0]
    for number in range(1, 3):
        level = halved_by_loop(level)
        np.testing.assert_array_equal(zarr.open_array(f"{url}/A/01/0/{number}")[0, 0], level)
    document = json.loads((tmp_path / "p.zarr/A/01/0/zarr.json").read_text())["attributes"]["ome"]
    scales = [d["coordinateTransformations"][0]["scale"] for d in document["multiscales"][0]["datasets"]]
    assert scales == [[1, 1, 0.5, 0.5], [1, 1, 1, 1], [1, 1, 2, 2]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_a_level_is_the_mean_of_four_pixels(tmp_path: Path, dtype: str) -> None:
    stack = np.random.default_rng(0).integers(0, 100, (1, 2, 3, 2, 258)).astype(dtype)
    stack[0, 0, 0, 0, :2] = 100 if dtype == "uint8" else 30_000
    create_well(str(tmp_path), "A01", {"0": stack}, ["a", "b"])
    level = zarr.open_array(tmp_path / "A/01/0/1")
    assert level.shape == (1, 2, 3, 1, 129)
    for c, z, x in itertools.product(range(2), range(3), range(129)):
        four = [float(v) for v in stack[0, c, z, :, 2 * x : 2 * x + 2].ravel()]
        mean = sum(four) / 4
        assert level[0, c, z, 0, x] == (mean if dtype.startswith("float") else int(mean))


def test_z_steps_and_colours_stand_in_the_metadata(tmp_path: Path) -> None:
    create_well(
        str(tmp_path),
        "A01",
        {"0": stack_of((2, 2, 3, 8, 9))},
        ["a", "b"],
        colors=["123456", None],
        pixel_size=0.5,
        z_step=3,
    )
    document = json.loads((tmp_path / "A/01/0/zarr.json").read_text())["attributes"]["ome"]
    assert [channel["color"] for channel in document["omero"]["channels"]] == ["123456", "00FF00"]
    (scales,) = document["multiscales"]
    assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == [1, 1, 3, 0.5, 0.5]
    assert [axis.get("unit") for axis in scales["axes"]] == [None, None, *["micrometer"] * 3]
    array = zarr.open_array(tmp_path / "A/01/0/0")
    assert (array.chunks, array.shards) == ((1, 1, 1, 8, 9), (1, 2, 3, 8, 9))
    assert open_site(str(tmp_path / "A/01/0")).pixel_size == 0.5


def test_only_finite_pixels_make_the_display_range(tmp_path: Path) -> None:
    stack = np.full((2, 2, 8, 8), np.nan, np.float32)
    stack[:, 0, :4] = 5
    create_well(str(tmp_path), "A01", {"0": stack}, ["a", "b"])
    document = json.loads((tmp_path / "A/01/0/zarr.json").read_text())["attributes"]["ome"]
    windows = [channel["window"] for channel in document["omero"]["channels"]]
    assert windows == [{"min": 5, "start": 5, "end": 6, "max": 6}, {"min": 0, "start": 0, "end": 1, "max": 1}]


class Watched:
    """Frames that note how much memory is held each time that one is asked for."""

    shape = (16, 1, 1024, 1024)
    dtype = np.dtype("u2")

    def __init__(self) -> None:
        self.held: list[int] = []

    def __getitem__(self, frame: int) -> NDArray[Any]:
        self.held.append(tracemalloc.get_traced_memory()[0])
        return np.zeros(self.shape[1:], self.dtype)


def test_a_movie_is_not_held_while_it_is_written(tmp_path: Path) -> None:
    movie = Watched()
    tracemalloc.start()
    try:
        create_well(str(tmp_path), "A01", {"0": movie}, ["a"])
    finally:
        tracemalloc.stop()
    # From frame to frame no more is kept than a fiftieth of one.
    assert movie.held[-1] - movie.held[1] < 14 * 1024 * 1024 * 2 / 50


class Failing:
    """Frames of which the second cannot be read."""

    shape = (3, 1, 8, 8)
    dtype = np.dtype("u2")

    def __getitem__(self, frame: int) -> NDArray[Any]:
        if frame:
            raise SchemaError("t1.tif", "is truncated")
        return stack_of((1, 8, 8))


def test_a_well_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    small_plate(str(tmp_path))
    with pytest.raises(SchemaError, match="truncated"):
        create_well(str(tmp_path), "B03", {"0": stack_of((1, 1, 8, 8)), "1": Failing()}, ["a"])
    assert not (tmp_path / "B/03").exists()
    assert list(open_plate(str(tmp_path)).well_paths) == ["B02"]


def test_notes_stand_beside_the_list_of_wells(fresh: Callable[[], str]) -> None:
    url = fresh()
    small_plate(url)
    assert read_notes(url) == {}
    list_wells(url, "p", ["B02"], {"made": ["of", 3, "files"]})
    assert read_notes(url) == {"made": ["of", 3, "files"]}
    assert list(open_plate(url).well_paths) == ["B02"]
    list_wells(url, "p", ["B02"])
    assert read_notes(url) == {}


def test_one_shard_a_time_point(tmp_path: Path) -> None:
    small_plate(str(tmp_path))
    array = zarr.open_array(str(tmp_path / "B/02/0/0"))
    assert array.chunks == (1, 1, 20, 24)
    assert array.shards == (1, 2, 20, 24)


def test_a_well_is_replaced_whole(fresh: Callable[[], str]) -> None:
    url = fresh()
    small_plate(url, sites=2)
    create_well(url, "B02", {"5": stack_of((1, 1, 4, 4))}, ["x"])
    assert list(open_plate(url).sites("B02")) == ["5"]
    assert store.list_names(store.join(url, "B", "02")) == ["5", "zarr.json"]


@pytest.mark.parametrize(
    ("well", "site", "shape", "channels"),
    [
        ("b2", "0", (1, 1, 4, 4), ["a"]),
        ("../B", "0", (1, 1, 4, 4), ["a"]),
        ("B02", "../0", (1, 1, 4, 4), ["a"]),
        ("B02", "0/1", (1, 1, 4, 4), ["a"]),
        ("B02", "0", (1, 4, 4), ["a"]),
        ("B02", "0", (1, 2, 4, 4), ["a"]),
        ("B02", "0", (1, 2, 4, 4), ["a", "a"]),
    ],
)
def test_what_makes_no_well_is_refused(
    tmp_path: Path, well: str, site: str, shape: tuple[int, ...], channels: list[str]
) -> None:
    with pytest.raises(InputError):
        create_well(str(tmp_path), well, {site: stack_of(shape)}, channels)
    assert not list(tmp_path.rglob("zarr.json"))


def test_a_plates_name_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plate name"):
        list_wells(str(tmp_path), "../p", ["B02"])


# --- labels ----------------------------------------------------------------------------------


def test_labels_read_back_and_are_replaced(fresh: Callable[[], str]) -> None:
    url = fresh()
    small_plate(url)
    image_url = store.join(url, "B", "02", "0")
    nuclei, cells = (stack_of((3, 20, 24), "int32", seed) for seed in (1, 2))
    write_labels(image_url, {"nuclei": nuclei})
    write_labels(image_url, {"cells": cells, "nuclei": nuclei + 1})
    write_labels(image_url, {"cells": cells})
    np.testing.assert_array_equal(open_labels(image_url, "nuclei"), nuclei + 1)
    np.testing.assert_array_equal(open_labels(image_url, "cells"), cells)
    assert open_labels(image_url, "cells").dtype == np.int32
    attributes = arrays.open_group(store.join(image_url, "labels")).attrs.asdict()
    assert attributes["ome"]["labels"] == ["cells", "nuclei"]
    with pytest.raises(SchemaError, match="labels/spots/0"):
        open_labels(image_url, "spots")
    with pytest.raises(SchemaError, match="nowhere"):
        write_labels(store.join(url, "nowhere"), {"nuclei": nuclei})


def test_a_repeated_write_leaves_the_list_of_labels_alone(tmp_path: Path) -> None:
    small_plate(str(tmp_path))
    listing = tmp_path / "B/02/0/labels/zarr.json"
    write_labels(str(tmp_path / "B/02/0"), {"nuclei": stack_of((3, 20, 24), "int32")})
    before = (listing.read_bytes(), listing.stat().st_mtime_ns)
    write_labels(str(tmp_path / "B/02/0"), {"nuclei": stack_of((3, 20, 24), "int32", 1)})
    assert (listing.read_bytes(), listing.stat().st_mtime_ns) == before


def test_label_levels_keep_labels(tmp_path: Path) -> None:
    create_well(str(tmp_path), "A01", {"0": stack_of((1, 1, 300, 520))}, ["a"])
    movie = np.arange(300 * 520, dtype=np.int32).reshape(1, 300, 520)
    write_labels(str(tmp_path / "A/01/0"), {"cells": movie})
    for level in range(3):
        coarse = zarr.open_array(str(tmp_path / f"A/01/0/labels/cells/{level}"))
        np.testing.assert_array_equal(coarse, movie[:, :: 2**level, :: 2**level])


@pytest.mark.parametrize("stops_at", [1, 2])
def test_interrupted_labels_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    small_plate(str(tmp_path))
    labels = {name: stack_of((3, 20, 24), "int32") for name in ("cells", "nuclei")}
    honest, calls = zarr.create_array, itertools.count(1)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == stops_at:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    monkeypatch.setattr(zarr, "create_array", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_labels(str(tmp_path / "B/02/0"), labels)
    monkeypatch.undo()
    listed = arrays.open_group(str(tmp_path / "B/02/0/labels")).attrs.asdict()
    assert listed == {}
    write_labels(str(tmp_path / "B/02/0"), labels)
    for name, movie in labels.items():
        np.testing.assert_array_equal(open_labels(str(tmp_path / "B/02/0"), name), movie)
    ome_zarr_models.v05.labels.Labels.from_zarr(zarr.open_group(tmp_path / "B/02/0/labels", mode="r"))


# --- plates that others wrote ----------------------------------------------------------------


def write_image(url: str, axes: str, block: NDArray[Any], zarr_format: int = 3, **metadata: Any) -> None:
    """An image as another program writes it, from the specification and not with the code under test."""
    kinds = {"t": "time", "c": "channel"}
    multiscales = {
        "axes": [{"name": a, "type": kinds.get(a, "space")} for a in axes],
        "datasets": [
            {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * len(axes)}]},
        ],
    }
    if zarr_format == 2:
        multiscales["version"] = "0.4"
    document = {"multiscales": [multiscales], **metadata}
    attributes = {"ome": {"version": "0.5", **document}} if zarr_format == 3 else document
    root = arrays.zarr_store(url)
    zarr.create_group(root, zarr_format=zarr_format, attributes=attributes, overwrite=True)
    separator: dict[str, Any] = {} if zarr_format == 3 else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    names: dict[str, Any] = {"dimension_names": list(axes)} if zarr_format == 3 else {}
    array = zarr.create_array(
        root, name="0", shape=block.shape, chunks=block.shape, dtype=block.dtype, zarr_format=zarr_format,
        **separator, **names,
    )  # fmt: skip
    array[...] = block


def edit_image(url: str, **changes: Any) -> None:
    """Change entries of an image's multiscales."""
    path = Path(url, "zarr.json")
    document = json.loads(path.read_text())
    document["attributes"]["ome"]["multiscales"][0].update(changes)
    path.write_text(json.dumps(document))


SIZES = {"t": 3, "c": 2, "z": 4, "y": 5, "x": 6}
SUBSETS = ["".join(axes) + "yx" for n in range(4) for axes in itertools.combinations("tcz", n)]


@pytest.mark.parametrize("axes", SUBSETS)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_subset_of_axes_is_read_as_tchw(fresh: Callable[[], str], axes: str, zarr_format: int) -> None:
    url = fresh()
    block = stack_of(tuple(SIZES[axis] for axis in axes))
    write_image(url, axes, block, zarr_format)
    full = block.reshape([SIZES[a] if a in axes else 1 for a in "tczyx"])
    image = open_site(url)
    assert image.axes == axes
    assert image.shape == (full.shape[0], full.shape[1], 5, 6)
    assert image.channels == tuple(str(c) for c in range(full.shape[1]))
    assert image.pixel_size is None
    assert image.time_step is None
    assert image.read().dtype == block.dtype
    np.testing.assert_array_equal(image.read(), full.max(axis=2))
    mean = image.read(projection="mean")
    assert mean.dtype == (np.float32 if "z" in axes else block.dtype)
    np.testing.assert_allclose(mean, full.mean(axis=2), rtol=1e-6)
    frames, channels = [full.shape[0] - 1, 0], list(image.channels[::-1])
    picked = full[frames][:, ::-1].max(axis=2)
    np.testing.assert_array_equal(image.read(channels=channels, frames=frames), picked)


def test_units_become_micrometres_and_seconds(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_image(url, "tyx", stack_of((2, 4, 4)))
    axes = [
        {"name": "t", "type": "time", "unit": "minute"},
        {"name": "y", "type": "space", "unit": "nanometer"},
        {"name": "x", "type": "space", "unit": "nanometer"},
    ]
    scale = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2.5, 325.0, 325.0]}]}
    edit_image(url, axes=axes, datasets=[scale])
    image = open_site(url)
    assert image.time_step == pytest.approx(150)
    assert image.pixel_size == pytest.approx(0.325)
    edit_image(url, axes=[{"name": a} for a in "tyx"])
    assert (open_site(url).time_step, open_site(url).pixel_size) == (None, None)


def test_channel_labels_are_taken_from_omero(tmp_path: Path) -> None:
    write_image(str(tmp_path), "cyx", stack_of((2, 4, 4)), omero={"channels": [{"label": "DAPI"}, {}]})
    assert open_site(str(tmp_path)).channels == ("DAPI", "1")
    for labels, problem in ([["a"], "2 channels but 1"], [["a", "a"], "same name"]):
        channels = [{"label": label} for label in labels]
        write_image(str(tmp_path), "cyx", stack_of((2, 4, 4)), omero={"channels": channels})
        with pytest.raises(SchemaError, match=problem):
            open_site(str(tmp_path))


def scaled(*scale: object) -> dict[str, Any]:
    """A level whose axes have a scale."""
    return {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(scale)}]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"axes": [{"name": a} for a in "xy"]}, "axes 'xy'; expected t, c, z, y, x"),
        ({"axes": [{"name": a} for a in "tyx"]}, "2 dimensions for the axes 'tyx'"),
        ({"axes": [{"type": "space"}, {"type": "space"}]}, "incomplete"),
        ({"datasets": []}, "incomplete"),
        ({"datasets": [{}]}, "incomplete"),
        ({"datasets": [scaled(1.0)]}, "a scale of 1 numbers for the axes 'yx'"),
        ({"datasets": [scaled("wide", 1.0)]}, "incomplete"),
        ({"datasets": [{"path": "7"}]}, "/7: is not a readable Zarr array"),
    ],
)
def test_images_in_no_usable_form_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_image(str(tmp_path), "yx", stack_of((4, 5)))
    edit_image(str(tmp_path), **changes)
    with pytest.raises(SchemaError, match=problem) as caught:
        open_site(str(tmp_path))
    assert caught.value.path.startswith(str(tmp_path))


def ngff_04_plate(url: str) -> dict[str, NDArray[Any]]:
    """A 0.4 plate on Zarr v2 of two wells, written from the specification."""
    wells = {"A/1": stack_of((2, 2, 1, 8, 9), seed=1), "B/12": stack_of((2, 2, 1, 7, 8), seed=2)}
    plate = {
        "version": "0.4",
        "name": "old",
        "rows": [{"name": "A"}, {"name": "B"}],
        "columns": [{"name": "1"}, {"name": "12"}],
        "wells": [
            {"path": "A/1", "rowIndex": 0, "columnIndex": 0},
            {"path": "B/12", "rowIndex": 1, "columnIndex": 1},
        ],
    }
    root = arrays.zarr_store(url)
    zarr.create_group(root, zarr_format=2, attributes={"plate": plate})
    for path, block in wells.items():
        zarr.create_group(root, path=path.split("/")[0], zarr_format=2)
        well = {"version": "0.4", "images": [{"path": "0"}]}
        zarr.create_group(root, path=path, zarr_format=2, attributes={"well": well})
        omero = {"channels": [{"label": n, "color": "0000FF", "window": {}} for n in ("DAPI", "GFP")]}
        for channel in omero["channels"]:
            channel["window"] = {"min": 0, "start": 0, "end": 255, "max": 255}
        write_image(f"{url}/{path}/0", "tczyx", block, zarr_format=2, omero=omero)
    return wells


def test_a_04_plate_on_zarr_v2_is_read_and_labelled(fresh: Callable[[], str]) -> None:
    url = fresh()
    wells = ngff_04_plate(url)
    plate = open_plate(url)
    assert plate.name == "old"
    assert plate.well_paths == {"A01": "A/1", "B12": "B/12"}
    for well, block in zip(("A01", "B12"), wells.values(), strict=True):
        [(site, site_url)] = plate.sites(well).items()
        assert site == "0"
        image = open_site(site_url)
        assert image.channels == ("DAPI", "GFP")
        np.testing.assert_array_equal(image.read(), block[:, :, 0])
        labels = stack_of((2, *block.shape[3:]), "int32")
        for movie in (labels + 5, labels):
            write_labels(site_url, {"nuclei": movie, "cells": movie + 1})
        np.testing.assert_array_equal(open_labels(site_url, "nuclei"), labels)
        np.testing.assert_array_equal(open_labels(site_url, "cells"), labels + 1)
        group = arrays.open_group(store.join(site_url, "labels"))
        assert group.metadata.zarr_format == 2
        assert group.attrs["labels"] == ["cells", "nuclei"]
        np.testing.assert_array_equal(open_site(site_url).read(), block[:, :, 0])


def test_a_labelled_04_plate_stays_valid(tmp_path: Path) -> None:
    url = str(tmp_path / "old.zarr")
    ngff_04_plate(url)
    write_labels(url + "/A/1/0", {"nuclei": stack_of((2, 8, 9), "int32")})
    hcs = ome_zarr_models.v04.hcs.HCS.from_zarr(zarr.open_group(url, mode="r"))
    assert len(list(hcs.well_groups)) == 2
    image = ome_zarr_models.v04.Image.from_zarr(zarr.open_group(url + "/A/1/0", mode="r"))
    assert image.labels is not None
    assert image.labels.attributes.labels == ["nuclei"]
    ome_zarr_models.v04.ImageLabel.from_zarr(zarr.open_group(url + "/A/1/0/labels/nuclei", mode="r"))


@pytest.mark.parametrize(("sites", "z"), [(1, ()), (3, ()), (1, (3,))])
def test_a_written_plate_is_valid_ome_zarr(tmp_path: Path, sites: int, z: tuple[int, ...]) -> None:
    url = str(tmp_path / "p.zarr")
    for well in ("B02", "C11"):
        stacks = {str(i): stack_of((2, 2, *z, 20, 600), seed=i) for i in range(sites)}
        create_well(url, well, stacks, ["nucleus", "cell"], pixel_size=0.5, time_step=60.0)
        for site in stacks:
            write_labels(f"{url}/{well[0]}/{well[1:]}/{site}", {"nuclei": stack_of((2, 20, 600), "int32")})
    list_wells(url, "p", ["C11", "B02"], {"wells": {"B02": {}}})
    hcs = ome_zarr_models.v05.hcs.HCS.from_zarr(zarr.open_group(url, mode="r"))
    assert [well.path for well in hcs.ome_attributes.plate.wells] == ["B/02", "C/11"]
    # The number of fields need not be said; a wrong one would misplace viewers' tiles.
    assert hcs.ome_attributes.plate.field_count in (None, sites)
    wells = list(hcs.well_groups)
    assert [len(well.ome_attributes.well.images) for well in wells] == [sites, sites]
    image = ome_zarr_models.v05.image.Image.from_zarr(zarr.open_group(url + "/B/02/0", mode="r"))
    assert len(image.ome_attributes.multiscales[0].datasets) == 3
    labels = zarr.open_group(url + "/B/02/0/labels", mode="r")
    assert ome_zarr_models.v05.labels.Labels.from_zarr(labels).ome_attributes.labels == ["nuclei"]
    ome_zarr_models.v05.image_label.ImageLabel.from_zarr(labels["nuclei"])


# --- requests --------------------------------------------------------------------------------


class Counted(MemoryFileSystem):
    """Memory, counting the requests that an object store would be sent."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests: ClassVar[int] = 0

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        Counted.requests += 1
        return super().cat_file(*args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        Counted.requests += 1
        return super().info(*args, **kwargs)

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        Counted.requests += 1
        return super().ls(*args, **kwargs)


fsspec.register_implementation("counted", Counted, clobber=True)


def requests_to_open(zarr_format: int, n_wells: int) -> int:
    """How many requests a run's driver makes until it knows a plate's wells and compounds."""
    folder = f"counted://{uuid.uuid4().hex}"
    url = f"{folder}/p.zarr"
    wells = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)][:n_wells]
    document = {
        "name": "p",
        "version": "0.4",
        "rows": [],
        "columns": [],
        "wells": [{"path": f"{well[0]}/{well[1:]}"} for well in wells],
    }
    if zarr_format == 3:
        list_wells(url, "p", wells, {"wells": dict.fromkeys(wells, "a record of it")})
    else:
        zarr.create_group(arrays.zarr_store(url), zarr_format=2, attributes={"plate": document})
    plate_map = "plate,well,compound,role\n" + "".join(f"p,{well},DMSO,negative_control\n" for well in wells)
    store.write_bytes(f"{folder}/map.csv", plate_map.encode())
    Counted.requests = 0
    inputs = open_inputs(InputsConfig(plates=(f"{folder}/*.zarr",), plate_map=f"{folder}/map.csv"))
    assert list(inputs.plates["p"].well_paths) == wells
    return Counted.requests


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_opening_a_plate_takes_no_request_a_well(zarr_format: int) -> None:
    few, many = (requests_to_open(zarr_format, n_wells) for n_wells in (2, 384))
    assert 0 < few == many < 12


# --- what is no plate ------------------------------------------------------------------------


def edit_plate(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "zarr.json").read_text())
    document["attributes"]["ome"]["plate"].update(changes)
    (folder / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "../x"}, "plate name"),
        ({"wells": []}, "lists no wells"),
        ({"wells": [{"path": "../.."}]}, r"well path '\.\./\.\.' is not of the form row/column"),
        ({"wells": [{"path": "/etc"}]}, "not of the form"),
        ({"wells": [{"path": "B"}]}, "not of the form"),
        ({"wells": [{"path": "B/02/0"}]}, "not of the form"),
        ({"wells": [{}]}, "not of the form"),
        ({"wells": [{"path": "2/B"}]}, "'2B' is not a well name"),
        ({"wells": [{"path": "B/²"}]}, "not a well name"),
        ({"wells": [{"path": "B/2"}, {"path": "B/02"}]}, "B02 is listed twice"),
    ],
)
def test_plates_in_no_usable_form_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    small_plate(str(tmp_path))
    edit_plate(tmp_path, **changes)
    with pytest.raises(SchemaError, match=problem) as caught:
        open_plate(str(tmp_path))
    assert caught.value.path == str(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {"ome": 1}}'])
def test_broken_metadata_is_named(tmp_path: Path, text: str) -> None:
    small_plate(str(tmp_path))
    for folder, read in (
        (tmp_path / "B/02/0", lambda: open_site(str(tmp_path / "B/02/0"))),
        (tmp_path / "B/02", lambda: open_plate(str(tmp_path)).sites("B02")),
        (tmp_path, lambda: open_plate(str(tmp_path))),
    ):
        (folder / "zarr.json").write_text(text)
        with pytest.raises(SchemaError) as caught:
            read()
        assert caught.value.path == str(folder)


def test_a_place_without_a_plate_is_named(fresh: Callable[[], str]) -> None:
    url = fresh()
    with pytest.raises(SchemaError, match="not a readable Zarr group"):
        open_plate(url)
    create_well(url, "B02", {"0": stack_of((1, 1, 4, 4))}, ["a"])
    with pytest.raises(SchemaError):
        open_plate(url)
    with pytest.raises(SchemaError, match="not an OME-Zarr plate"):
        open_plate(store.join(url, "B", "02"))
    with pytest.raises(SchemaError, match="no 'multiscales'"):
        open_site(store.join(url, "B", "02"))
    list_wells(url, "p", ["B02"])
    with pytest.raises(SchemaError, match=r"no well 'C03'; its wells are \['B02'\]"):
        open_plate(url).sites("C03")


@pytest.mark.parametrize(("images", "problem"), [([], "without images"), ([{"path": "../../x"}], "site name")])
def test_wells_in_no_usable_form_are_named(tmp_path: Path, images: list[Any], problem: str) -> None:
    small_plate(str(tmp_path))
    path = tmp_path / "B/02/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["ome"]["well"]["images"] = images
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match=problem) as caught:
        open_plate(str(tmp_path)).sites("B02")
    assert caught.value.path == str(tmp_path / "B/02")


def test_a_plate_without_a_name_is_called_like_its_folder(tmp_path: Path) -> None:
    url = str(tmp_path / "exp 7.ome.zarr")
    small_plate(url)
    edit_plate(Path(url), name=None)
    assert open_plate(url).name == "exp 7"
    assert open_plate(url + "/").name == "exp 7"


# --- faults ----------------------------------------------------------------------------------


def test_a_truncated_or_altered_chunk_is_an_error_that_names_the_array(tmp_path: Path) -> None:
    small_plate(str(tmp_path))
    chunk = next(p for p in (tmp_path / "B/02/0/0/c/1").rglob("*") if p.is_file())
    whole = chunk.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for data in (whole[:1], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        chunk.write_bytes(data)
        image = open_site(str(tmp_path / "B/02/0"))
        with pytest.raises(SchemaError, match="truncated or corrupt") as caught:
            image.read()
        assert caught.value.path == str(tmp_path / "B/02/0/0")
        assert image.read(frames=[0, 2]).shape[0] == 2


def test_a_truncated_chunk_of_labels_is_an_error(tmp_path: Path) -> None:
    small_plate(str(tmp_path))
    write_labels(str(tmp_path / "B/02/0"), {"nuclei": stack_of((3, 20, 24), "int32")})
    chunk = next(p for p in (tmp_path / "B/02/0/labels/nuclei/0/c").rglob("*") if p.is_file())
    whole = chunk.read_bytes()
    for cut in (1, 2, 3, 5, len(whole) // 2, len(whole)):
        chunk.write_bytes(whole[:-cut])
        with pytest.raises(SchemaError, match="labels/nuclei/0"):
            open_labels(str(tmp_path / "B/02/0"), "nuclei")


def test_a_deleted_or_empty_shard_reads_as_zeros(tmp_path: Path) -> None:
    """Zarr leaves chunks of fill value out, so a lost or empty file cannot be told from black pixels: frames of zeros
    are for the quality measures to flag."""
    stacks = small_plate(str(tmp_path))
    shutil.rmtree(tmp_path / "B/02/0/0/c/1")
    next(p for p in (tmp_path / "B/02/0/0/c/2").rglob("*") if p.is_file()).write_bytes(b"")
    back = open_site(str(tmp_path / "B/02/0")).read()
    assert not back[1:].any()
    np.testing.assert_array_equal(back[0], stacks["0"][0])


def test_an_interrupted_well_is_not_in_the_plate_and_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path)
    small_plate(url)
    stacks = {"0": stack_of((2, 1, 8, 8)), "1": stack_of((2, 1, 8, 8))}
    honest = plates._write_image

    def stopping(place: str, *rest: Any) -> None:
        if place.endswith("/1"):
            raise KeyboardInterrupt
        honest(place, *rest)

    monkeypatch.setattr(plates, "_write_image", stopping)
    with pytest.raises(KeyboardInterrupt):
        create_well(url, "C03", stacks, ["a"])
    monkeypatch.undo()
    assert list(open_plate(url).well_paths) == ["B02"]
    assert (tmp_path / "C/03/0").exists()
    create_well(url, "C03", stacks, ["a"])
    list_wells(url, "p", ["B02", "C03"])
    assert list(open_plate(url).sites("C03")) == ["0", "1"]


def test_a_failed_listing_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_plate(str(tmp_path))
    create_well(str(tmp_path), "C03", {"0": stack_of((1, 1, 4, 4))}, ["a"])

    def raising(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", raising)
    with pytest.raises(StoreError, match="full"):
        list_wells(str(tmp_path), "p", ["B02", "C03"])
    assert list(open_plate(str(tmp_path)).well_paths) == ["B02"]


def test_a_reader_sees_the_old_or_the_new_listing_of_a_growing_plate(tmp_path: Path) -> None:
    url = str(tmp_path)
    wells = [f"B{column:02d}" for column in range(1, 25)]
    list_wells(url, "p", wells[:1])
    ended = threading.Event()

    def grow() -> None:
        for n in range(2, len(wells) + 1):
            list_wells(url, "p", wells[:n])
        ended.set()

    writer = threading.Thread(target=grow)
    writer.start()
    sizes = []
    while not ended.is_set():
        seen = list(open_plate(url).well_paths)
        assert seen == wells[: len(seen)]
        sizes.append(len(seen))
    writer.join()
    assert sizes == sorted(sizes)
    assert list(open_plate(url).well_paths) == wells
