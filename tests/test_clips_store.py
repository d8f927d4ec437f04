from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage_schemas import arrays
from storage_schemas.clips import SHARD_CLIPS, channel_names, open_clips, read_clips, write_clips
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
        ((2, 2, 3, 4, 4), "uint8", None, "expected clips of version 1, found no mark"),
        ((2, 2, 3, 4, 4), "uint8", "clips", "expected clips of version 1"),
        ((2, 2, 3, 4, 4), "uint8", {"form": "clips", "version": 2}, "expected clips of version 1"),
        ((2, 2, 3, 4, 4), "uint8", {"form": "labels", "version": 1}, "expected clips of version 1"),
        ((2, 3, 4, 4), "uint8", {"form": "clips", "version": 1}, "expected .*uint8, found"),
        ((2, 2, 3, 4, 4), "uint16", {"form": "clips", "version": 1}, "found .*uint16"),
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
        with pytest.raises(SchemaError, match="truncated, corrupt or unreachable") as caught:
            read_clips(url, [0, SHARD_CLIPS])
        assert caught.value.path == url
        np.testing.assert_array_equal(read_clips(url, [5, 0]), clips[[5, 0]])
