"""Everything that is read and written, on a real S3 server: whole, in spite of faults, and with nobody's secrets."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from conftest import Command, Outcome
from s3_server import KEY, REGION, SECRET, S3Server
from test_clips_store import clips_of
from test_index_store import VECTORS, write

from storage_schemas import arrays, remote, store
from storage_schemas.clips import open_clips, read_clips, write_clips
from storage_schemas.errors import InputError, SchemaError, StoreError
from storage_schemas.index import index_exists, new_build, read_array, read_manifest
from storage_schemas.keys import WellKey
from storage_schemas.screen import Manifest, Screen, StageRecord
from storage_schemas.tables import TableForm, open_table, open_vectors, write_table

FORM = TableForm("toy", 1, pa.schema([("name", pa.string()), ("vector", pa.list_(pa.float32(), 2))]))
MANIFEST = Manifest(software={}, config={}, inputs="")
CUTS = ("slow_down", "error", "reset", "lost", "truncated")
B02 = WellKey("plate 1", "B02")


def toy(value: float, rows: int = 5) -> pd.DataFrame:
    return pd.DataFrame({"name": [f"n{i}" for i in range(rows)], "vector": [[value, i] for i in range(rows)]})


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def server(running_server: S3Server) -> Iterator[S3Server]:
    """A server without faults that this process and what it starts would use."""
    with running_server.used_here():
        running_server.forget()
        yield running_server
        running_server.fail(0)
        running_server.cut(0)


@pytest.fixture
def root(server: S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of the test's own; which requests fail goes by their names."""
    return server.url(re.sub(r"\W", "-", request.node.name))


def client_of(server: S3Server) -> Any:
    """What others use; it asks once."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name=REGION,
        config=botocore.config.Config(retries={"total_max_attempts": 1}),
    )


# --- the server itself -----------------------------------------------------------------------


def test_the_server_fails_as_it_is_told(server: S3Server) -> None:
    client = client_of(server)

    def outcome() -> str:
        try:
            client.get_object(Bucket=server.bucket, Key="x")["Body"].read()
        except ClientError as error:
            return str(error.response["Error"]["Code"])
        except BotoCoreError as error:
            return type(error).__name__
        return "ok"

    client.put_object(Bucket=server.bucket, Key="x", Body=b"data")
    assert outcome() == "ok"
    kinds = {"slow_down": "SlowDown", "error": "InternalError", "reset": "ConnectionClosedError"}
    for fault, seen in kinds.items():
        server.fail(1, (fault,))
        assert outcome() == seen
    server.fail(1, only="put .*")
    assert outcome() == "ok"
    seen_twice = []
    for _ in range(2):
        server.forget()
        server.fail(0.5, ("slow_down", "error"))
        seen_twice.append([outcome() for _ in range(30)])
    assert seen_twice[0] == seen_twice[1]
    assert set(seen_twice[0]) == {"ok", "SlowDown", "InternalError"}
    counts = server.counts()
    assert (counts["get 200"], counts["get 503"]) == (seen_twice[1].count("ok"), seen_twice[1].count("SlowDown"))
    server.fail(0)
    server.cut(60)
    assert outcome() == "ConnectionClosedError"
    server.cut(0)
    assert outcome() == "ok"


# --- whole or not at all ---------------------------------------------------------------------


def test_files_and_folders(server: S3Server, root: str) -> None:
    assert store.list_names(root) == []
    assert not store.exists(root)
    for name in ("z.txt", "a/x.txt", "a/y/deep.txt", "ab.txt"):
        store.write_bytes(store.join(root, name), name.encode())
    assert store.list_names(root) == ["a", "ab.txt", "z.txt"]
    assert store.list_names(store.join(root, "a")) == ["x.txt", "y"]
    assert store.exists(store.join(root, "a"))
    store.write_bytes(store.join(root, "z.txt"), b"new")
    assert store.read_bytes(store.join(root, "z.txt")) == b"new"
    store.remove(store.join(root, "a"))
    store.remove(store.join(root, "nowhere"))
    assert store.list_names(root) == ["ab.txt", "z.txt"]
    with pytest.raises(SchemaError, match="no such file"):
        store.read_bytes(store.join(root, "a"))


def test_what_others_write_and_remove_is_seen_at_once(server: S3Server, root: str) -> None:
    url = store.join(root, "d", "x.txt")
    others, place = client_of(server), {"Bucket": server.bucket, "Key": url.removeprefix(server.url() + "/")}
    assert (store.list_names(store.join(root, "d")), store.exists(url)) == ([], False)
    others.put_object(**place, Body=b"1")
    assert (store.list_names(store.join(root, "d")), store.exists(url)) == (["x.txt"], True)
    others.delete_object(**place)
    assert (store.list_names(store.join(root, "d")), store.exists(url)) == ([], False)


@pytest.mark.slow
def test_more_than_one_request_can_remove_goes(server: S3Server, root: str) -> None:
    fs, path = store.filesystem(root)
    fs.pipe({f"{path}/many/{i:04d}": b"" for i in range(1003)})
    assert len(store.list_names(store.join(root, "many"))) == 1003
    store.remove(store.join(root, "many"))
    assert store.list_names(root) == []
    assert server.counts()["delete many 200"] == 2


@pytest.mark.parametrize("fault", CUTS)
def test_a_put_that_is_cut_is_whole_or_not_there(
    server: S3Server, root: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    old, new, unheard = (store.join(root, name) for name in ("old.parquet", "new.parquet", "unheard"))
    write_table(old, toy(1), FORM)
    server.fail(1, (fault,), only="^put ")
    for url in (old, new):
        with pytest.raises(StoreError, match="does not answer") as caught:
            write_table(url, toy(2), FORM)
        assert not caught.value.lasting
    with pytest.raises(StoreError):
        store.write_json(unheard, {})
    server.fail(0)
    # What the store heard and did, though nobody was told, is the whole new file.
    heard = fault in ("lost", "truncated")
    assert open_table(old, FORM)["vector"].to_pylist()[0][0] == (2 if heard else 1)
    assert store.list_names(root) == (["new.parquet", "old.parquet", "unheard"] if heard else ["old.parquet"])


KILLED = """
import sys, threading
import numpy as np
from storage_schemas import store
from storage_schemas.clips import write_clips
from storage_schemas.screen import Screen
sys.path.insert(0, sys.argv[2])
from test_object_store import FORM, MANIFEST, toy, write, write_table
from test_clips_store import clips_of

root = sys.argv[1]
def upload():
    with store.open_new(root + "/large") as file:
        file.write(bytes(101 * 2**20))
jobs = [
    lambda: write_table(root + "/table.parquet", toy(2), FORM),
    lambda: Screen(root).write_manifest(MANIFEST.model_copy(update={"inputs": "new"})),
    lambda: write(root + "/index", 5),
    lambda: write_clips(root + "/clips.zarr", clips_of(100), ["a", "b"], [0, 1, 2]),
    upload,
]
writers = [threading.Thread(target=job) for job in jobs]
for writer in writers:
    writer.start()
for writer in writers:
    writer.join()
"""
LAST_OBJECTS = r"table.parquet|/manifest\.json|clips.zarr/c/1|complete upload"


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_whole(server: S3Server, root: str) -> None:
    """Killed while the last object of each artefact is on its way."""
    screen = Screen(root)
    screen.write_manifest(MANIFEST)
    write(store.join(root, "index"))
    server.fail(1, ("delay",), only=LAST_OBJECTS, delay=600)
    writer = subprocess.Popen([sys.executable, "-c", KILLED, root, str(Path(__file__).parent)])
    try:
        end = time.monotonic() + 120
        # The clips are two shards, which are put side by side.
        while not (server.waiting()["put"] >= 4 and server.waiting()["complete upload"] == 1):
            assert time.monotonic() < end
            assert writer.poll() is None
            time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    server.fail(0)
    assert {"large", "table.parquet"}.isdisjoint(store.list_names(root))
    assert screen.read_manifest() == MANIFEST
    index = store.join(root, "index")
    np.testing.assert_array_equal(read_array(index, read_manifest(index), "well", "vectors"), VECTORS)
    # Of the clips a part is there; what commits them, the table of cells, is written after them.
    assert store.exists(store.join(root, "clips.zarr"))
    assert screen.done_units("segment") == set()
    write_clips(store.join(root, "clips.zarr"), clips_of(100), ["a", "b"], [0, 1, 2])
    np.testing.assert_array_equal(read_clips(store.join(root, "clips.zarr"), slice(None)), clips_of(100))


def test_a_failed_index_leaves_the_old_one(server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    url = store.join(root, "index")
    server.fail(1, ("reset",), only="put .*/manifest.json")
    with pytest.raises(StoreError):
        write(url)
    assert not index_exists(url)
    server.fail(0)
    write(url)
    before = read_manifest(url)
    server.fail(1, ("reset",), only="put .*vectors.npy")
    with pytest.raises(StoreError):
        write(url, 5)
    server.fail(0)
    assert read_manifest(url) == before
    assert set(store.list_names(url)) == {"manifest.json", before.build}


def test_a_writer_that_fails_itself_puts_nothing(server: S3Server, root: str) -> None:
    def fail_half_way() -> None:
        with store.open_new(store.join(root, "x")) as file:
            file.write(b"half")
            raise KeyError

    def build_nothing() -> None:
        with new_build(store.join(root, "index")):
            raise KeyError

    for fails in (fail_half_way, build_nothing):
        with pytest.raises(KeyError):
            fails()
    assert store.list_names(root) == []


def test_two_writers_of_one_manifest_lose_nothing(server: S3Server, root: str) -> None:
    screen = Screen(root)
    screen.write_manifest(MANIFEST)
    stages = ("segment", "train", "embed", "index")

    def write_records(stage: str) -> None:
        for number in range(4):
            screen.write_record(stage, StageRecord(fingerprint=f"{stage} {number}"))  # type: ignore[arg-type]

    writers = [threading.Thread(target=write_records, args=(stage,)) for stage in stages]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = {stage: record.fingerprint for stage, record in screen.read_manifest().stages.items()}
    assert found == {stage: f"{stage} 3" for stage in stages}
    assert server.counts()["put 412"] > 0


def test_a_change_whose_answer_is_lost_is_made(server: S3Server, root: str) -> None:
    url = store.join(root, "x.json")
    store.write_json(url, {"a": 1})
    server.fail(0.5, ("lost",), only="^put ")
    for number in range(6):
        store.update_json(url, lambda document, number=number: {**document, f"b{number}": number})
    assert store.read_json(url) == {"a": 1, **{f"b{number}": number for number in range(6)}}


def test_a_store_without_conditions_is_written_to_without(server: S3Server, root: str) -> None:
    url = store.join(root, "x.json")
    store.write_json(url, {"a": 1})
    server.fail(1, ("unknown",), only="^put .* if$")
    store.update_json(url, lambda document: {**document, "b": 2})
    assert store.read_json(url) == {"a": 1, "b": 2}
    assert server.counts()["put 501"] == 1


def test_a_file_that_is_replaced_while_it_is_read_is_told(server: S3Server, root: str) -> None:
    url = store.join(root, "x")
    store.write_bytes(url, bytes(12 * 2**20))
    with store.open_file(url) as file:
        assert file.read(10) == bytes(10)
        store.write_bytes(url, b"\1" * (12 * 2**20))
        file.seek(11 * 2**20)
        with pytest.raises(StoreError, match="changed by somebody else"):
            file.read(10)


# --- faults that pass ------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_is_read_right_in_spite_of_faults(server: S3Server, root: str) -> None:
    clips = clips_of(100) | 1  # no zeros, which is what a chunk reads as that is not there
    server.fail(0.2, CUTS)
    url = store.join(root, "clips.zarr")
    write_clips(url, clips, ["a", "b"], [0, 1, 2])
    for start in range(0, 100, 20):
        np.testing.assert_array_equal(read_clips(url, slice(start, start + 20)), clips[start : start + 20])
    table = store.join(root, "x.parquet")
    write_table(table, toy(3, rows=50), FORM)
    _, vectors = open_vectors(table, FORM, "vector")
    np.testing.assert_array_equal(vectors, [[3, i] for i in range(50)])
    write(store.join(root, "index"))
    manifest = read_manifest(store.join(root, "index"))
    np.testing.assert_array_equal(read_array(store.join(root, "index"), manifest, "well", "vectors"), VECTORS)
    assert sum(count for what, count in server.counts().items() if what.split()[-1] in (*CUTS, "500", "503")) > 20


@pytest.mark.slow
def test_thousands_of_chunks_are_read_right_in_spite_of_faults(server: S3Server, root: str) -> None:
    clips = clips_of(640) | 1
    url = store.join(root, "clips.zarr")
    write_clips(url, clips, ["a", "b"], [0, 1, 2])
    server.forget()
    server.fail(0.05, CUTS)
    for _ in range(5):
        for start in range(0, 640, 64):
            np.testing.assert_array_equal(read_clips(url, slice(start, start + 63)), clips[start : start + 63])
    counts = server.counts()
    assert counts["get 206"] > 3000
    assert sum(count for what, count in counts.items() if what.split()[-1] in (*CUTS, "500", "503")) > 100


def test_a_store_that_is_cut_off_for_a_while_is_waited_for(server: S3Server, root: str) -> None:
    url = store.join(root, "x")
    store.write_bytes(url, b"1")
    server.cut(2)
    assert store.read_bytes(url) == b"1"
    server.cut(2)
    assert store.list_names(root) == ["x"]
    assert server.counts()["get cut"] > 1


def test_a_store_that_goes_on_failing_is_no_fault_of_the_data(
    server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    clips, table = store.join(root, "clips.zarr"), store.join(root, "x.parquet")
    write_clips(clips, clips_of(70), ["a", "b"], [0, 1, 2])
    write_table(table, toy(1), FORM)
    readers: list[Callable[[], object]] = [
        lambda: store.read_bytes(table),
        lambda: store.list_names(root),
        lambda: store.exists(table),
        lambda: open_vectors(table, FORM, "vector"),
        lambda: read_clips(clips, [3]),
        lambda: write_clips(clips, clips_of(70), ["a", "b"], [0, 1, 2]),
    ]
    server.fail(1, ("error", "reset"))
    for reader in readers:
        with pytest.raises(StoreError, match="does not answer as it should") as caught:
            reader()
        assert not caught.value.lasting
    # The metadata are there, the chunks are not to be had.
    server.fail(1, ("slow_down",), only=r"clips.zarr/c/")
    with pytest.raises(StoreError, match="does not answer as it should"):
        read_clips(clips, slice(0, 20))


@pytest.mark.parametrize("fault", ["delay", "timeout", "many"])
def test_a_store_that_never_answers_or_is_asked_too_often_is_given_up_for_now(
    server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    monkeypatch.setitem(remote._OPTIONS["s3"]["config_kwargs"], "read_timeout", 0.2)
    server.fail(1, (fault,), delay=5)
    for ask in (lambda: store.read_bytes(root + "/x"), lambda: store.write_bytes(root + "/x", b"")):
        with pytest.raises(StoreError, match="does not answer as it should") as caught:
            ask()
        assert not caught.value.lasting


def test_no_room_to_put_an_object_together_is_said(
    server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        name = "/tmp/part"

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda *_, **__: Full())
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *_, **__: Full())
    with pytest.raises(StoreError, match="the disk is full") as caught, store.open_new(root + "/x") as file:
        file.write(b"data")
    assert caught.value.lasting
    assert not store.exists(root + "/x")


# --- faults that last ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("denied", "refuses access.*AWS_ACCESS_KEY_ID"),
        ("skewed", "clock of this machine is wrong|the clock must be right"),  # of HEAD S3 tells no more
        ("bucket", "no such bucket"),
        ("credentials", "no credentials"),
    ],
)
def test_what_lasts_is_said_at_once(
    server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch, said: str, problem: str
) -> None:
    if said in ("denied", "skewed"):
        server.fail(1, (said,))
    if said == "bucket":
        root = "s3://no-such-bucket/x"
    if said == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    url = store.join(root, "x")
    asked: list[Callable[[], object]] = [
        lambda: store.read_bytes(url),
        lambda: store.list_names(root),
        lambda: store.exists(url),
        lambda: store.write_bytes(url, b""),
        lambda: store.remove(url),
        lambda: read_clips(url, [0]),
        lambda: write_clips(url, clips_of(3), ["a", "b"], [0, 1, 2]),
    ]
    for ask in asked:
        with pytest.raises(StoreError, match=problem) as caught:
            ask()
        assert caught.value.lasting
    assert sum(server.counts().values()) <= 2 * len(asked)


def test_zarr_takes_no_bucket_for_no_chunk(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(server)
    client.create_bucket(Bucket="going")
    write_clips("s3://going/clips.zarr", clips_of(70), ["a", "b"], [0, 1, 2])
    array = open_clips("s3://going/clips.zarr")
    store.remove("s3://going/clips.zarr")
    client.delete_bucket(Bucket="going")
    with pytest.raises(StoreError, match="no such bucket"):
        arrays.read("s3://going/clips.zarr", array, (slice(0, 3),))


def test_a_full_disk_keeps_nothing_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zarr.storage._local as local

    honest = local._put
    puts = []

    def full(path: Path, *arguments: object, **more: object) -> object:
        puts.append(path)
        if len(puts) > 1:
            raise OSError(28, "No space left on device")
        return honest(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "_put", full)
    with pytest.raises(StoreError, match=r"B02\.zarr: the disk is full") as caught:
        write_clips(str(tmp_path / "B02.zarr"), clips_of(70), ["a", "b"], [0, 1, 2])
    assert caught.value.lasting
    assert os.listdir(tmp_path) == []


# --- secrets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hush-hush@bucket/x",
        "https://store.example/x?X-Amz-Signature=hush-hush&y=1",
        "abfs://x@y/z?sig=hush-hush",
        "https://store.example/x?y=1&token=hush-hush",
    ],
)
def test_secrets_in_a_url_are_refused_and_not_repeated(url: str, command: Command, tmp_path: Path) -> None:
    for use in (store.read_bytes, store.absolute, store.is_local, store.list_names):
        with pytest.raises(InputError, match="holds a password or token") as caught:
            use(url)
        assert "hush" not in str(caught.value)
    settings = "inputs: {plates: [p.zarr], plate_map: map.csv}\nsegment: {channels: {nucleus: nucleus}}\n"
    (tmp_path / "run.yaml").write_text(settings)
    for arguments in (("status", url), ("run", tmp_path / "run.yaml", "--out", url), ("query", url, "--compound", "x")):
        outcome: Outcome = command(*arguments)
        assert outcome.code == 1
        assert "hush" not in outcome.out + outcome.err


def test_ordinary_urls_are_let_in() -> None:
    for url in ("s3://b/a:b@c", "s3://b/key=1?x", "memory://b/x?monkey=2", "sftp://user@host/x"):
        assert not remote.has_secrets(url), url


# --- a whole screen --------------------------------------------------------------------------

HIDDEN = "hush-hush-5f0c"  # a secret key that must turn up nowhere


@pytest.fixture(scope="module")
def screen_at_store(
    small_screen: Path, small_settings: list[str], subprocess_command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[S3Server, str, str]]:
    """A server of which 5 % of the requests fail, the screen that was run from plates to report on it, what was said.

    Plates and tables lie there too.
    """
    environment = {"AWS_SECRET_ACCESS_KEY": HIDDEN, "RAY_worker_niceness": "0"}
    with S3Server(seed=6) as server, server.used_here(**environment):
        fs, place = store.filesystem(server.url("simulated"))
        for path in small_screen.rglob("*"):
            if path.is_file():
                fs.put_file(str(path), f"{place}/{path.relative_to(small_screen)}")
        server.forget()
        server.fail(0.05)
        out = server.url("screen")
        outcome = subprocess_command("run", server.url("simulated", "run.yaml"), "--out", out, *small_settings)
        assert outcome.code == 0, outcome.err
        asked = server.counts()
        print("requests of the run:", sum(asked.values()), dict(sorted(asked.items())))
        said = outcome.out + outcome.err
        for arguments in (
            ("query", out, "--compound", "uncoupler-1"),
            ("predict", out, "--compound", "uncoupler-1"),
            ("statistics", out),
            ("status", out),
            ("report", out, "--out", tmp_path_factory.mktemp("report") / "report.html"),
            ("run", server.url("simulated", "run.yaml"), "--out", out, *small_settings),
        ):
            outcome = subprocess_command(*arguments)
            assert outcome.code == 0, outcome.err
            said += outcome.out + outcome.err
        server.fail(0)
        yield server, out, said


@pytest.mark.slow
def test_a_screen_on_a_failing_store_is_the_same(
    screen_at_store: tuple[S3Server, str, str], finished_screen: Path
) -> None:
    server, out, said = screen_at_store
    counts = server.counts()
    assert sum(count for what, count in counts.items() if what.split()[-1] in (*CUTS, "500", "503")) > 50
    fs, place = store.filesystem(out)
    there = {path.removeprefix(f"{place}/") for path in fs.find(place)}
    here = {str(path.relative_to(finished_screen)) for path in finished_screen.rglob("*") if path.is_file()}
    # What Ray Train keeps while it trains, and an index's folder, are named anew each time.
    tables = {name for name in here if name.endswith(".parquet") and not name.startswith("index/")}
    assert len(tables) > 40
    assert tables == {name for name in there if name.endswith(".parquet") and not name.startswith("index/")}
    for name in tables:
        content = store.read_bytes(store.join(out, name))
        written, expected = (pq.read_table(source) for source in (io.BytesIO(content), finished_screen / name))
        assert written.schema.equals(expected.schema), name
        # Missing numbers, which Arrow takes for unlike each other, are here alike.
        pd.testing.assert_frame_equal(written.to_pandas(), expected.to_pandas(), check_exact=True, obj=name)
    exact = [name for name in here if name.startswith(("clips/", "calibration/")) or name == "evaluation.json"]
    assert len(exact) > 16
    for name in exact:
        assert store.read_bytes(store.join(out, name)) == (finished_screen / name).read_bytes(), name
    counted = [Screen(url).read_manifest().stages["segment"].counts for url in (out, str(finished_screen))]
    assert counted[0] == counted[1]
    assert said.count("done before") == 7


@pytest.mark.slow
def test_no_secret_is_written_or_said(screen_at_store: tuple[S3Server, str, str]) -> None:
    server, _, said = screen_at_store
    fs, place = store.filesystem(server.url())
    names = fs.find(place)
    assert any(name.endswith("report.html") for name in names)
    found = [name for name in names if HIDDEN.encode() in fs.cat_file(name)]
    assert found == []
    assert HIDDEN not in said
