from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError, StoreError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}-{id(tmp_path)}"


def test_bytes_read_back(root: str) -> None:
    url = store.join(root, "a", "b", "c.bin")
    for data in (b"", b"\0\xff", os.urandom(100_000)):
        store.write_bytes(url, data)
        assert store.read_bytes(url) == data


def test_names_in_a_folder(root: str) -> None:
    assert store.list_names(root) == []
    for name in ("z.txt", "a/x.txt", "a/y/deep.txt"):
        store.write_bytes(store.join(root, name), b"1")
    assert store.list_names(root) == ["a", "z.txt"]
    assert store.list_names(root + "/") == ["a", "z.txt"]
    assert store.list_names(store.join(root, "a")) == ["x.txt", "y"]
    assert store.list_names(store.join(root, "z.txt")) == []
    assert store.list_names(store.join(root, "nowhere")) == []


def test_removing(root: str) -> None:
    for name in ("f.txt", "d/a.txt", "d/e/b.txt"):
        store.write_bytes(store.join(root, name), b"1")
    store.remove(store.join(root, "d"))
    store.remove(store.join(root, "nowhere"))
    assert store.list_names(root) == ["f.txt"]
    assert not store.exists(store.join(root, "d", "e", "b.txt"))
    store.remove(store.join(root, "f.txt"))
    assert not store.exists(store.join(root, "f.txt"))


def test_what_cannot_be_read_is_named(root: str) -> None:
    url = store.join(root, "gone.txt")
    with pytest.raises(SchemaError, match=r"gone\.txt: no such file"):
        store.read_bytes(url)
    store.write_bytes(store.join(root, "d", "x"), b"")
    with pytest.raises(SchemaError, match="/d"):
        store.read_bytes(store.join(root, "d"))


def test_unknown_protocol_says_what_would_do() -> None:
    with pytest.raises(InputError, match=r"nope://x.*fsspec.*screening\[s3\]"):
        store.read_bytes("nope://x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(json_values)
@settings(max_examples=40, deadline=None)
def test_json_reads_back(document: object) -> None:
    store.write_json("memory://json/x.json", document)
    assert store.read_json("memory://json/x.json") == document


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    url = str(tmp_path / "x.json")
    store.write_json(url, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(url, {"value": value})
    assert store.read_json(url) == {"old": 1}


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"nonsense"])
def test_broken_json_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(SchemaError, match=r"x\.json: is not JSON"):
        store.read_json(str(tmp_path / "x.json"))


# --- arrays in one file ----------------------------------------------------------------------


def test_npz_reads_back(root: str) -> None:
    fields = {"a/b": np.arange(6, dtype="i4").reshape(2, 3), "version": np.array(1), "empty": np.zeros(0, "f4")}
    url = store.join(root, "x.npz")
    store.write_npz(url, fields)
    back = store.read_npz(url)
    assert back.keys() == fields.keys()
    for name, array in fields.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


def _npz(**fields: object) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, allow_pickle=True, **fields)  # type: ignore[arg-type]
    return sink.getvalue()


def test_npz_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = _npz(a=np.arange(50.0), b=np.arange(3))
    path = tmp_path / "x.npz"
    for length in [*range(0, len(whole) - 1, 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(SchemaError, match=r"x\.npz"):
            store.read_npz(str(path))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_npz_with_wrong_bytes_is_refused_or_read(data: st.DataObject) -> None:
    broken = bytearray(_npz(a=np.arange(20.0), b=np.arange(3)))
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=4)):
        broken[place] = data.draw(st.integers(0, 255))
    store.write_bytes("memory://npz/x.npz", bytes(broken))
    try:
        back = store.read_npz("memory://npz/x.npz")
    except SchemaError:
        return
    assert all(isinstance(array, np.ndarray) for array in back.values())


class _Payload:
    """Unpickling it would run code; here it would only leave a trace."""

    ran = False

    def __reduce__(self) -> tuple[Callable[..., None], tuple[type, str, bool]]:
        return setattr, (_Payload, "ran", True)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(_npz(a=np.array([_Payload()], dtype=object)))
    with pytest.raises(SchemaError, match=r"x\.npz"):
        store.read_npz(str(tmp_path / "x.npz"))
    assert not _Payload.ran


# --- whole or not at all ---------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["replace", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_a_failed_write_leaves_the_old_bytes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, number: int
) -> None:
    url = str(tmp_path / "x.bin")
    store.write_bytes(url, b"old")

    def raising(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, fails, raising)
    with pytest.raises(StoreError, match=r"x\.bin: (the disk is full|the quota|cannot be written)") as caught:
        store.write_bytes(url, b"new and longer")
    assert caught.value.lasting == (number != errno.EIO)
    monkeypatch.undo()
    assert store.read_bytes(url) == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_write_that_stops_half_way_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "x.bin")
    store.write_bytes(url, b"old")
    honest = Path.open

    class HalfWriter(io.BytesIO):
        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

        def write(self, data: bytes) -> int:  # type: ignore[override]
            with honest(self.path, "wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError("pulled the plug")

    monkeypatch.setattr(Path, "open", lambda self, mode: HalfWriter(self))
    with pytest.raises(StoreError, match="plug"):
        store.write_bytes(url, b"new" * 1000)
    monkeypatch.undo()
    assert store.read_bytes(url) == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_killed_writer_leaves_the_old_bytes_and_nothing_in_the_listing(tmp_path: Path) -> None:
    url = str(tmp_path / "x.bin")
    store.write_bytes(url, b"old")
    # The process ends just before the rename, as under SIGKILL: no `finally` runs.
    script = (
        "import os, sys; from storage_schemas import store; os.replace = lambda *_: os._exit(9); "
        "store.write_bytes(sys.argv[1], b'new')"
    )
    ended = subprocess.run([sys.executable, "-c", script, url], cwd=Path(store.__file__).parents[1], check=False)
    assert ended.returncode == 9
    assert len(os.listdir(tmp_path)) == 2
    assert store.list_names(str(tmp_path)) == ["x.bin"]
    assert store.read_bytes(url) == b"old"
    store.write_bytes(url, b"newer")
    assert store.read_bytes(url) == b"newer"
    store.remove_partial(str(tmp_path.parent))
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_concurrent_reader_sees_one_write_whole(tmp_path: Path) -> None:
    url = str(tmp_path / "x.bin")
    size = 300_000
    store.write_bytes(url, bytes(size))
    ended = threading.Event()

    def write() -> None:
        for value in range(1, 60):
            store.write_bytes(url, bytes([value]) * size)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not ended.is_set():
        data = store.read_bytes(url)
        assert len(data) == size
        assert data == data[:1] * size
        assert set(store.list_names(str(tmp_path))) == {"x.bin"}
        seen.add(data[0])
    writer.join()
    assert len(seen) > 1


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    url = str(tmp_path / "x.bin")
    writers = [
        threading.Thread(target=lambda v=value: [store.write_bytes(url, bytes([v]) * 100_000) for _ in range(10)])
        for value in (1, 2, 3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    data = store.read_bytes(url)
    assert data == data[:1] * 100_000
    assert os.listdir(tmp_path) == ["x.bin"]


# --- names of places -------------------------------------------------------------------------


def test_joining_and_parents() -> None:
    assert store.join("s3://b/k/", "x", "y.z") == "s3://b/k/x/y.z"
    assert store.join("/data", "x") == "/data/x"
    assert store.parent("/data/x/") == "/data"
    assert store.parent("s3://b/k") == "s3://b"


def test_absolute_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    assert store.absolute("x/../y") == str(tmp_path / "y")
    assert store.absolute("y", "/base") == "/base/y"
    assert store.absolute("../y", "/base/sub") == "/base/y"
    assert store.absolute("/y", "/base") == "/y"
    assert store.absolute("~/y") == "/home/user/y"
    assert store.absolute("~/y", "/base") == "/home/user/y"
    assert store.absolute("file:///base/y") == "/base/y"
    assert store.absolute("memory://b/y", "/base") == "memory://b/y"
    assert store.absolute("y", "memory://b") == "memory://b/y"


def test_what_is_local() -> None:
    assert store.is_local("x")
    assert store.is_local("file:///x")
    assert not store.is_local("memory://x")


# --- errors ----------------------------------------------------------------------------------


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(SchemaError("a/b.parquet", "is broken")))
    assert type(error) is SchemaError
    assert isinstance(error, InputError)
    assert (error.path, error.problem) == ("a/b.parquet", "is broken")
    assert str(error) == "a/b.parquet: is broken"
    assert str(pickle.loads(pickle.dumps(InputError("wrong")))) == "wrong"
