from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from storage_schemas import arrays, store
from storage_schemas.clips import (
    SHARD_CLIPS,
    WHITE,
    Ranges,
    as_bytes,
    channel_names,
    open_clips,
    read_clips,
    read_ranges,
    write_clips,
)
from storage_schemas.errors import SchemaError


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "B02.zarr") if request.param == "local" else f"memory://{uuid.uuid4().hex}/B02.zarr"


def clips_of(n: int, size: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, 2, 3, size, size), dtype=np.uint8)


@pytest.mark.parametrize("n", [0, 1, 2, SHARD_CLIPS, SHARD_CLIPS + 1, 2 * SHARD_CLIPS + 7])
def test_clips_read_back(url: str, n: int) -> None:
    clips = clips_of(n)
    write_clips(url, clips, ["nucleus", "cell"], [0, 2, 5])
    array = open_clips(url)
    assert array.shape == clips.shape
    assert array.dtype == np.uint8
    assert channel_names(array) == ["nucleus", "cell"]
    for back in (read_clips(url, slice(None)), read_clips(url, range(n)), np.asarray(array[...])):
        assert back.shape == clips.shape
        np.testing.assert_array_equal(back, clips)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, NDArray[np.uint8]]:
    url, clips = str(tmp_path_factory.mktemp("clips") / "c.zarr"), clips_of(SHARD_CLIPS + 9)
    write_clips(url, clips, ["a", "b"], [0, 1, 2])
    return url, clips


@given(positions=st.lists(st.integers(0, SHARD_CLIPS + 8), max_size=12))
@settings(max_examples=40, deadline=None)
def test_positions_are_numpy_indexing(stored: tuple[str, NDArray[np.uint8]], positions: list[int]) -> None:
    """Unordered and repeated positions too: training draws clips so."""
    url, clips = stored
    back = read_clips(url, positions)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, clips[np.array(positions, dtype=int)])


@given(start=st.integers(0, 80), length=st.integers(0, 80))
@settings(max_examples=15, deadline=None)
def test_slices_are_numpy_indexing(stored: tuple[str, NDArray[np.uint8]], start: int, length: int) -> None:
    url, clips = stored
    np.testing.assert_array_equal(read_clips(url, slice(start, start + length)), clips[start : start + length])


@pytest.mark.parametrize("positions", [[SHARD_CLIPS + 9], [0, 10_000, 1], [-1], [3, -2]])
def test_positions_outside_are_refused(stored: tuple[str, NDArray[np.uint8]], positions: list[int]) -> None:
    with pytest.raises(SchemaError, match="holds 73 clips, asked for number"):
        read_clips(stored[0], positions)


def test_no_clips_to_read_from(url: str) -> None:
    write_clips(url, clips_of(0), ["a", "b"], [0, 1, 2])
    assert read_clips(url, []).shape == (0, 2, 3, 4, 4)
    with pytest.raises(SchemaError, match="holds 0 clips"):
        read_clips(url, [0])


def test_writing_again_replaces_everything(url: str) -> None:
    write_clips(url, clips_of(SHARD_CLIPS + 5), ["a", "b"], [0, 1, 2])
    few = clips_of(2, size=6)
    write_clips(url, few, ["x", "y"], [3, 4, 5])
    np.testing.assert_array_equal(read_clips(url, slice(None)), few)
    assert channel_names(open_clips(url)) == ["x", "y"]


def test_a_reader_never_misses_clips_that_are_written_again(tmp_path: Path) -> None:
    """As by a node that was given up, and has not noticed, once another has committed the well."""
    folder = tmp_path / "B02.zarr"
    clips = clips_of(SHARD_CLIPS + 7)
    write_clips(str(folder), clips, ["a", "b"], [0, 1, 2])
    files = {path for path in folder.rglob("*") if path.is_file()}
    held = threading.Event()
    missing: set[Path] = set()

    def look() -> None:
        while not held.is_set():
            missing.update(path for path in files if not path.exists())

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for _ in range(10):
            write_clips(str(folder), clips, ["a", "b"], [0, 1, 2])
        held.set()
        looking.result()
    assert missing == set()
    assert {path for path in folder.rglob("*") if path.is_file()} == files
    np.testing.assert_array_equal(read_clips(str(folder), slice(None)), clips)
    write_clips(str(folder), clips[:3], ["a", "c"], [0, 1, 2])
    np.testing.assert_array_equal(read_clips(str(folder), slice(None)), clips[:3])


@pytest.mark.parametrize("dtype", WHITE)
def test_every_type_reads_back(url: str, dtype: str) -> None:
    clips = (clips_of(5) / np.float32(255) * np.float32(WHITE[dtype])).astype(dtype)
    write_clips(url, clips, ["a", "b"], [0, 1, 2])
    for back in (read_clips(url, slice(1, 3)), read_clips(url, [2, 1])[::-1]):
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, clips[1:3])
    assert read_ranges(url) is None


@given(
    ranges=hnp.arrays(np.float32, st.tuples(st.just(2), st.integers(0, 5), st.just(2)), elements=st.floats(width=32)),
    shared=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_ranges_read_back(ranges: NDArray[np.float32], shared: bool) -> None:
    low, high = np.nan_to_num(ranges)
    if shared and len(low):
        low, high = np.broadcast_to(low[:1], low.shape), np.broadcast_to(high[:1], high.shape)
    url = f"memory://{uuid.uuid4().hex}/B02.zarr"
    write_clips(url, clips_of(len(low)), ["a", "b"], [0, 1, 2], Ranges(low, high))
    back = read_ranges(url)
    assert back is not None
    np.testing.assert_array_equal(back.low, low)
    np.testing.assert_array_equal(back.high, high)
    scaling = open_clips(url).attrs["screening"]["scaling"]
    if shared:
        assert len(scaling["low"]) == len(scaling["high"]) == min(len(low), 1)
    store.remove(url)


@pytest.mark.parametrize("scaling", [{}, {"low": [[0, 0]]}, {"low": [[0, 0]], "high": [[1]]}, {"low": 1, "high": 2}, 7])
def test_a_scaling_that_does_not_fit_is_refused(url: str, scaling: Any) -> None:
    mark = {"form": "clips", "version": 2, "channels": ["a", "b"], "frames": [0, 1, 2], "scaling": scaling}
    zarr.create_array(arrays.zarr_store(url), shape=(3, 2, 3, 4, 4), dtype="uint8", attributes={"screening": mark})
    with pytest.raises(SchemaError, match="does not give low and high for"):
        read_ranges(url)


@pytest.mark.parametrize("dtype", WHITE)
def test_clips_of_every_type_look_alike(dtype: str) -> None:
    clips = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 16, 16)
    same = (clips / np.float32(255) * np.float32(WHITE[dtype])).round(12 if dtype == "float16" else 0).astype(dtype)
    assert as_bytes(same).dtype == np.uint8
    np.testing.assert_array_equal(as_bytes(same), clips)


def test_intensities_are_shares_of_the_range() -> None:
    low, high = np.array([[100.0, 0.0]], np.float32), np.array([[300.0, 1.0]], np.float32)
    for dtype, white in WHITE.items():
        clips = np.zeros((1, 2, 1, 1, 2), dtype)
        clips[..., 1] = white
        assert Ranges(low, high).intensities(clips).ravel().tolist() == [100, 300, 0, 1]


def test_one_clip_a_chunk_and_few_files(tmp_path: Path) -> None:
    write_clips(str(tmp_path), clips_of(2 * SHARD_CLIPS + 7), ["a", "b"], [0, 1, 2])
    array = zarr.open_array(tmp_path, mode="r")
    assert array.chunks == (1, 2, 3, 4, 4)
    assert array.shards is not None
    assert array.shards[0] == SHARD_CLIPS
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 4
    document = json.loads((tmp_path / "zarr.json").read_text())
    assert document["attributes"]["screening"]["frames"] == [0, 1, 2]
    assert document["dimension_names"] == ["n", "c", "t", "y", "x"]


@pytest.mark.parametrize(
    ("shape", "dtype", "mark", "problem"),
    [
        ((2, 2, 3, 4, 4), "uint8", None, "expected clips of version 2, found no mark"),
        ((2, 2, 3, 4, 4), "uint8", "clips", "expected clips of version 2"),
        ((2, 2, 3, 4, 4), "uint8", {"form": "clips", "version": 1}, "expected clips of version 2"),
        ((2, 2, 3, 4, 4), "uint8", {"form": "labels", "version": 2}, "expected clips of version 2"),
        ((2, 3, 4, 4), "uint8", {"form": "clips", "version": 2}, "expected .*uint8, .*found"),
        ((2, 2, 3, 4, 4), "float32", {"form": "clips", "version": 2}, "found .*float32"),
    ],
)
def test_what_is_not_clips_is_refused(url: str, shape: tuple[int, ...], dtype: str, mark: Any, problem: str) -> None:
    attributes = {} if mark is None else {"screening": mark}
    zarr.create_array(arrays.zarr_store(url), shape=shape, dtype=dtype, attributes=attributes)
    with pytest.raises(SchemaError, match=problem):
        open_clips(url)


def test_missing_clips_are_named(url: str) -> None:
    with pytest.raises(SchemaError, match=r"B02\.zarr: is not a readable Zarr array"):
        read_clips(url, [0])
    zarr.create_group(arrays.zarr_store(url))
    with pytest.raises(SchemaError, match=r"B02\.zarr: is not a readable Zarr array"):
        read_clips(url, [0])


def test_a_damaged_shard_is_an_error_that_names_the_array(tmp_path: Path) -> None:
    url, clips = str(tmp_path / "c.zarr"), clips_of(SHARD_CLIPS + 9)
    write_clips(url, clips, ["a", "b"], [0, 1, 2])
    shard = next(path for path in (tmp_path / "c.zarr/c/1").rglob("*") if path.is_file())
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[20] ^= 1
    for data in (whole[:1], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        shard.write_bytes(data)
        with pytest.raises(SchemaError, match="truncated or corrupt") as caught:
            read_clips(url, [0, SHARD_CLIPS])
        assert caught.value.path == url
        np.testing.assert_array_equal(read_clips(url, [5, 0]), clips[[5, 0]])
