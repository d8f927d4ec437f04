"""The served page: who is let in, what is refused, and what is answered."""

from __future__ import annotations

import base64
import functools
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import chromium, faults, watch  # noqa: F401 (a fixture)
from hostile import varint
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed_screens import DIMENSION, write_screen
from made_up_clips import write_clips_of
from PIL import Image
from playwright.sync_api import Browser, expect
from runs import eventually

from pipelines.query import Searcher
from pipelines.serve import MAX_QUESTION, Desk, Gate, Server, open_server
from pipelines.uploads import MAX_ROWS, read_vectors
from pipelines.vectors import vector_column
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.screen import Screen

TOKEN = "a-token-for-this-test"
LIMIT = 100_000


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    screen = write_screen(tmp_path_factory.mktemp("served") / "screen")
    write_clips_of(screen)
    return screen


@pytest.fixture(scope="module")
def desk(screen: Screen) -> Desk:
    return Desk(screen, LIMIT)


@contextmanager
def running(desk: Desk, gate: Gate) -> Iterator[Server]:
    server = Server(desk, gate, ("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def local(desk: Desk) -> Iterator[Server]:
    with running(desk, Gate(frozenset({"localhost", "127.0.0.1"}), any_address=False, token=None)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(desk: Desk) -> Iterator[Server]:
    with running(desk, Gate(frozenset({"screens.example"}), any_address=True, token=TOKEN)) as server:
        yield server


class Answer:
    """What came back."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    server: Server, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def ask(server: Server, **question: Any) -> Answer:
    return send(server, "POST", "/ask", json.dumps(question).encode())


# --- answers -------------------------------------------------------------------------------------


def test_the_page_is_the_report_with_a_form(local: Server) -> None:
    answer = send(local, "GET", "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page = answer.body.decode()
    assert 'id="ask-form"' in page
    assert "uncoupler-1" in page
    assert send(local, "HEAD", "/").body == b""


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ({"by": "compound", "name": "uncoupler-1"}, {"compound": "uncoupler-1"}),
        ({"by": "well", "name": "plate-1/A02", "k": 3}, {"well": "plate-1/A02", "k": 3}),
        (
            {"by": "cell", "name": "plate-1/A02/0/3", "exclude_same_compound": True, "moa": "uncoupler"},
            {"cell": "plate-1/A02/0/3", "exclude_same_compound": True, "moa": ["uncoupler"]},
        ),
    ],
)
def test_answers_are_those_of_the_index(
    local: Server, screen: Screen, question: dict[str, Any], asked: dict[str, Any]
) -> None:
    expected = Searcher(screen).query(**asked)
    found = ask(local, **question).json
    assert [column["name"] for column in found["columns"]] == list(expected.columns)
    ids = [row[list(expected.columns).index("id")][1] for row in found["rows"]]
    assert ids == expected["id"].tolist()


def as_npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def as_parquet(values: np.ndarray, column: str = "embedding") -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({column: vector_column(values.astype(np.float32))}), stream)
    return stream.getvalue()


@pytest.mark.parametrize("write", [as_npy, as_parquet])
def test_a_file_of_vectors_is_a_question_for_each(local: Server, screen: Screen, write: Any) -> None:
    vectors = np.random.default_rng(1).normal(size=(2, DIMENSION)).astype(np.float32)
    expected = Searcher(screen).query(vectors=vectors, k=4)
    answer = send(local, "POST", "/ask-file?question=%7B%22by%22%3A%22file%22%2C%22k%22%3A4%7D", write(vectors))
    assert answer.status == 200, answer.body
    assert [row[2][1] for row in answer.json["rows"]] == expected["id"].tolist()


def test_a_cell_of_the_screen_is_shown(local: Server) -> None:
    clip = send(local, "GET", "/clip/plate-1/A02/0/3").json
    strip = Image.open(io.BytesIO(base64.b64decode(clip["strip"])))
    assert (clip["frames"], clip["width"], strip.size) == (3, 16, (48, 16))


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"by": "compound", "name": "uncopler-1"}, "uncoupler-1"),
        ({"by": "compound"}, "not in the index"),
        ({"by": "screen"}, "by"),
        ({"by": "compound", "name": "x", "k": 0}, "k"),
        ({"by": "compound", "name": "x" * 501}, "name"),
        ({"by": "compound", "name": "x", "path": "/etc"}, "path"),
        ({"by": "file"}, "neither Parquet nor NumPy"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(local: Server, question: dict[str, Any], said: str) -> None:
    answer = ask(local, **question)
    assert answer.status == 400
    assert said in answer.json["error"]


# --- refusals ------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_told(guarded: Server) -> None:
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": "Bearer nonsense"},
        {"Cookie": f"{guarded.cookie}=nonsense"},
        {"Authorization": TOKEN},
    )
    for headers in wrong:
        for method, path in (("GET", "/"), ("POST", "/ask"), ("GET", "/clip/plate-1/A02/0/3"), ("GET", "/nothing")):
            answer = send(guarded, method, path, b"{}" if method == "POST" else None, headers)
            assert answer.status == 401
            assert set(answer.json) == {"error"}
    assert send(guarded, "GET", "/?token=nonsense").status == 401


def test_the_token_is_taken_from_a_header_or_a_cookie_and_kept_out_of_addresses(
    guarded: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    assert send(guarded, "GET", "/", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
    admitted = send(guarded, "GET", f"/?token={TOKEN}")
    assert (admitted.status, admitted.headers["Location"]) == (303, "/")
    cookie = admitted.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
    assert send(guarded, "GET", "/", headers={"Cookie": cookie.split(";")[0]}).status == 200
    logged = capfd.readouterr().err
    assert logged.count(" GET / ") == 3
    assert TOKEN not in logged


def test_a_browser_may_keep_the_tokens_of_two_servers_of_one_host(desk: Desk, guarded: Server) -> None:
    token = "a-token-of-another-one"
    with running(desk, Gate(frozenset(), any_address=True, token=token)) as other:
        kept = [
            send(server, "GET", f"/?token={each}").headers["Set-Cookie"].split(";")[0].partition("=")
            for server, each in ((guarded, TOKEN), (other, token))
        ]
        # As a browser does: of one name, the last one only, and all of them to every port of the host.
        jar = {name: value for name, _, value in kept}
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        for server in (guarded, other):
            assert send(server, "GET", "/", headers={"Cookie": cookies}).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../manifest.json",
        "/manifest.json",
        "/clip/..%2f..%2fetc%2fpasswd",
        "/clip/../../../etc/passwd",
        "/clip/plate-1/A02/..%2f0/3",
        "/clip/plate-1/A02/%2e%2e/3",
        "/clip/plate-9/A02/0/3",
        "/clip/plate-1/A02/0/9999",
        "/clip/plate-1/A02/0/x",
        "/clip/plate-1/A02%00/0/3",
        "//etc/passwd",
    ],
)
def test_a_path_outside_the_screen_leads_nowhere(local: Server, path: str) -> None:
    answer = send(local, "GET", path)
    assert answer.status in (400, 404)
    assert set(answer.json) == {"error"}
    assert b"root:" not in answer.body


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("address", ["http://[/", "http://x]/"])
def test_an_address_that_cannot_be_parsed_is_refused(
    local: Server, capfd: pytest.CaptureFixture[str], method: str, address: str
) -> None:
    with socket.create_connection(("127.0.0.1", local.server_address[1]), timeout=20) as connection:
        request = f"{method} {address}\x1b[1m\\?token=secret HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(request.encode("latin-1"))
        assert connection.makefile("rb").readline().split()[1] == b"400"
    logged = capfd.readouterr().err
    assert "Traceback" not in logged
    assert f"{method} {address}\\x1b[1m\\\\ 400" in logged
    assert "secret" not in logged


def test_an_upload_that_is_too_large_is_refused_unread(local: Server) -> None:
    answer = send(local, "POST", "/ask-file?question=%7B%22by%22%3A%22file%22%7D", b"x" * (LIMIT + 1))
    assert answer.status == 413
    assert f"at most {LIMIT:,}" in answer.json["error"]
    assert send(local, "POST", "/ask", b" " * (MAX_QUESTION + 1)).status == 413


def start_upload(server: Server, sent: bytes, length: int) -> http.client.HTTPConnection:
    """A file of which no more comes than this."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest("POST", "/ask-file?question=%7B%22by%22%3A%22file%22%7D")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    connection.send(sent)
    return connection


def test_one_file_is_taken_at_a_time(desk: Desk, local: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serve.UPLOAD_WAIT", 0.2)
    content = as_npy(np.ones((1, DIMENSION), np.float32))
    path = "/ask-file?question=%7B%22by%22%3A%22file%22%7D"
    first = start_upload(local, content[:-1], len(content))
    eventually(desk.uploads.locked)
    busy = send(local, "POST", path, content)
    assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
    assert "again in some seconds" in busy.json["error"]
    assert ask(local, by="compound", name="uncoupler-1").status == 200
    first.send(content[-1:])
    assert first.getresponse().status == 200
    first.close()
    assert send(local, "POST", path, content).status == 200


def test_connections_are_bounded_in_number(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serve.MAX_CONNECTIONS", 3)
    gate = Gate(frozenset({"127.0.0.1"}), any_address=False, token=None)
    with running(desk, gate) as server, ExitStack() as held:
        silent = [held.enter_context(socket.create_connection(server.server_address[:2])) for _ in range(3)]
        eventually(lambda: len(server._connections) == 3)
        answer = send(server, "HEAD", "/")
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "5"
        silent[0].close()
        eventually(lambda: len(server._connections) == 2)
        assert send(server, "HEAD", "/").status == 200
        eventually(lambda: len(server._connections) == 2)


def test_a_request_that_comes_too_slowly_is_cut_off(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each byte in time, and the whole never: it would keep a connection from others for as long as it likes."""
    monkeypatch.setattr("pipelines.serve.TIMEOUT", 0.5)
    gate = Gate(frozenset({"127.0.0.1"}), any_address=False, token=None)
    with running(desk, gate) as server, socket.create_connection(server.server_address[:2]) as slow:
        started, sent = time.monotonic(), 0
        with suppress(ConnectionError):
            for byte in b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 1000:
                sent += slow.send(bytes([byte]))
                time.sleep(0.02)
        assert sent < 1000
        assert time.monotonic() - started < 15
        eventually(lambda: not server._connections)
        assert send(server, "HEAD", "/").status == 200
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_comes_too_slowly_makes_room(desk: Desk, local: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serve.UPLOAD_TIMEOUT", 0.1)
    slow = start_upload(local, b"x", 100)
    eventually(desk.uploads.locked)
    time.sleep(0.2)
    slow.send(b"x")
    with pytest.raises(http.client.RemoteDisconnected):
        slow.getresponse()
    eventually(lambda: not desk.uploads.locked())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Length": "many"}, 411),
        ({"Content-Length": "-1"}, 400),
        ({"Transfer-Encoding": "chunked", "Content-Length": "2"}, 400),
    ],
)
def test_a_body_of_unknown_length_is_refused(local: Server, headers: dict[str, str], status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", local.server_address[1], timeout=20)
    connection.putrequest("POST", "/ask")
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", ""]
)
def test_another_host_name_is_refused(local: Server, host: str) -> None:
    assert send(local, "GET", "/", headers={"Host": host}).status == 421


def test_names_and_addresses_that_are_allowed_are_let_in(local: Server, guarded: Server) -> None:
    known = {"Authorization": f"Bearer {TOKEN}"}
    for host in ("localhost", "LOCALHOST:9000", "127.0.0.1:1"):
        assert send(local, "GET", "/", headers={"Host": host}).status == 200
    for host in ("screens.example", "10.0.0.1:80", "[::2]:80"):
        assert send(guarded, "GET", "/", headers={"Host": host, **known}).status == 200
    assert send(guarded, "GET", "/", headers={"Host": "evil.example", **known}).status == 421


def test_a_page_of_another_site_may_not_ask(local: Server) -> None:
    question = json.dumps({"by": "compound", "name": "uncoupler-1"}).encode()
    for origin, status in (("http://evil.example", 403), ("null", 403), (local.url.rstrip("/"), 200)):
        assert send(local, "POST", "/ask", question, {"Origin": origin}).status == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(local: Server, method: str) -> None:
    answer = send(local, method, "/")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, POST")


def test_every_answer_is_fenced_in(local: Server, guarded: Server) -> None:
    answers = [send(local, "GET", "/"), send(local, "GET", "/x"), ask(local, by="x"), send(guarded, "GET", "/")]
    answers.append(send(local, "PUT", "/"))
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert "Python" not in answer.headers["Server"]
    allowed = answers[0].headers["Content-Security-Policy"]
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]+';", allowed)


# --- what is sent --------------------------------------------------------------------------------


class Boom:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def header_only(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def lists(*values: list[float | None] | None) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"embedding": pa.array(list(values), pa.list_(pa.float32()))}), stream)
    return stream.getvalue()


def repeated_text() -> bytes:
    """Text that stands once in a small file and would fill memory in a table."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * MAX_ROWS, pa.int32()), ["x" * 2**16])
    stream = io.BytesIO()
    pq.write_table(pa.table({"embedding": text}), stream, store_schema=False)
    return stream.getvalue()


def with_page_claiming(bytes_: int | None = None, numbers: int | None = None, version: str = "1.0") -> bytes:
    """A small file with an honest footer and a page whose header claims something else."""
    stream = io.BytesIO()
    pq.write_table(
        pa.table({"embedding": vector_column(np.ones((2, 3), np.float32))}),
        stream,
        compression="snappy",
        use_dictionary=False,
        data_page_version=version,
        write_statistics=False,
    )
    content = stream.getvalue()
    at = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0).column(0).data_page_offset
    # Thrift's compact protocol: a type, its size unpacked and packed, and a struct that begins with how many numbers.
    header = re.compile(rb"(\x15.\x15)(.)(\x15.)(.)(\x15)(.)", re.S).match(content, at)
    assert header is not None
    assert header[6] == varint(6)
    new = b"".join(
        (
            header[1],
            header[2] if bytes_ is None else varint(bytes_),
            header[3],
            header[4],
            header[5],
            header[6] if numbers is None else varint(numbers),
        )
    )
    return content[:at] + new + content[header.end() :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (with_page_claiming(bytes_=2**31 - 1), "numbers; at most"),
        (with_page_claiming(numbers=2**30), "numbers; at most"),
        (with_page_claiming(numbers=2**30, version="2.0"), "numbers; at most"),
        (b"", "neither"),
        (b"\x80\x04K\x01.", "neither"),
        (as_npy(np.array([Boom()])), "expected a matrix"),
        (header_only((1000, 10**12)), "truncated"),
        (header_only((2**62, 2**62)), "at a time"),
        (header_only((-1, -1)), "truncated"),
        (as_npy(np.zeros((2, 3)))[:-1], "truncated"),
        (as_npy(np.zeros((2, 3))) + b"x", "truncated"),
        (as_npy(np.zeros(3)), "expected a matrix"),
        (as_npy(np.zeros((0, 3))), "shape"),
        (as_npy(np.full((1, 3), np.nan)), "not finite"),
        (as_npy(np.zeros((MAX_ROWS + 1, 1))), "at a time"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': exit()}", "cannot be read"),
        (b"PAR1 and then nothing", "cannot be read"),
        (as_parquet(np.zeros((2, 3)), "something"), "none of the columns"),
        (as_parquet(np.zeros((MAX_ROWS + 1, 1))), "at a time"),
        (as_parquet(np.zeros((900, 20_000))), "numbers; at most"),
        (as_npy(np.zeros((900, 20_000), np.uint8)), "numbers; at most"),
        (lists([1.0], [1.0, 2.0]), "one length"),
        (lists([1.0], [1.0, 2.0, 3.0]), "one length"),
        (lists([1.0, None]), "without gaps"),
        (lists([1.0], None), "without gaps"),
        (repeated_text(), "holds string; expected lists"),
    ],
)
def test_files_are_read_without_trust(content: bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=said):
        read_vectors(content)
    assert "unpickled" not in capsys.readouterr().out


def test_files_are_read_as_they_were_written() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    for content in (
        as_npy(values),
        as_npy(np.asfortranarray(values)),
        as_parquet(values),
        as_parquet(values, "profile"),
    ):
        np.testing.assert_array_equal(read_vectors(content), values)
    np.testing.assert_array_equal(read_vectors(lists([1.0, 2.0], [3.0, 4.0])), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(read_vectors(with_page_claiming()), np.ones((2, 3)))
    np.testing.assert_array_equal(read_vectors(as_npy(np.arange(6).reshape(2, 3))), np.arange(6).reshape(2, 3))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dictionary=st.booleans(),
    compression=st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    version=st.sampled_from(["1.0", "2.0"]),
    page=st.sampled_from([64, 2**20]),
    groups=st.sampled_from([7, 1000]),
    index=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_tables_are_read_however_they_were_written(
    shape: tuple[int, int], dictionary: bool, compression: str, version: str, page: int, groups: int, index: bool
) -> None:
    values = np.random.default_rng(0).integers(0, 9, shape).astype(np.float32)
    stream = io.BytesIO()
    pq.write_table(
        pa.table({"name": ["x"] * len(values), "embedding": vector_column(values)}),
        stream,
        row_group_size=groups,
        use_dictionary=dictionary,
        compression=compression,
        data_page_version=version,
        data_page_size=page,
        write_batch_size=5,
        write_page_index=index,
        write_page_checksum=index,
    )
    np.testing.assert_array_equal(read_vectors(stream.getvalue()), values)


# --- starting and stopping -----------------------------------------------------------------------


def test_a_token_is_made_where_others_can_reach_the_server(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    monkeypatch.setattr("pipelines.serve.Desk", lambda *_: None)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        server = open_server(screen.url, host, 0)
        made[host] = server.gate
        server.server_close()
    assert made["127.0.0.1"].token is None
    assert made["localhost"].token is None
    token = made["0.0.0.0"].token
    assert token is not None
    assert len(token) >= 32
    assert made["0.0.0.0"].any_address
    for poor in ("", "short", "with blanks and; semicolons"):
        with pytest.raises(InputError, match="token"):
            open_server(screen.url, token=poor)


def test_a_port_in_use_and_a_screen_without_index_are_said(local: Server, screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another program listens there"):
        open_server(screen.url, port=local.server_address[1])
    with pytest.raises(InputError, match="cannot be listened at"):
        open_server(screen.url, host="192.0.2.1")
    with pytest.raises(SchemaError, match="not a screen"):
        open_server(str(tmp_path))


@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(screen: Screen, request_to_end: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", screen.url, "--port", str(port)]
    command = [sys.executable, "-c", "from screening.cli import main; main()", *arguments]
    # As a shell starts what is to run in the background.
    deaf = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=deaf) as process, ExitStack() as stack:
        stack.callback(process.kill)
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(request_to_end)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopped" in out
    assert "Traceback" not in err


# --- in a browser --------------------------------------------------------------------------------


def test_the_form_asks_and_shows_answers_and_cells(chromium: Browser, local: Server, tmp_path: Path) -> None:  # noqa: F811
    tab = chromium.new_page()
    wrong = watch(tab)
    tab.goto(local.url)
    tab.locator("#ask-name input").focus()
    tab.keyboard.type("uncoupler-1")
    tab.keyboard.press("Enter")
    rows = tab.locator("#ask-answer tbody tr")
    expect(rows).to_have_count(6)
    expect(rows.first).to_contain_text("uncoupler")
    tab.locator("#ask-answer input").fill("ionophore")
    expect(tab.locator("#ask-answer output")).to_have_text("3 of 6 rows")
    assert faults(tab) == []
    tab.locator("[name=by]").select_option("cell")
    tab.locator("#ask-name input").fill("plate-1/A02/0/3")
    tab.locator("#ask-form button").press("Enter")
    expect(tab.locator("#ask-cells img")).to_have_count(8)
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.random.default_rng(1).normal(size=(2, DIMENSION)).astype(np.float32))
    tab.locator("[name=by]").select_option("file")
    tab.locator("#ask-file input").set_input_files(vectors)
    tab.locator("#ask-form button").press("Enter")
    expect(tab.locator("#ask-answer tbody tr")).to_have_count(20)
    assert wrong == []
    vectors.write_bytes(b"x" * (LIMIT + 1))
    tab.locator("#ask-file input").set_input_files(vectors)
    tab.locator("#ask-form button").press("Enter")
    expect(tab.locator("#ask-error")).to_contain_text("at most")
    tab.close()


def test_what_cannot_be_answered_is_said_in_the_page(chromium: Browser, guarded: Server) -> None:  # noqa: F811
    tab = chromium.new_page()
    tab.goto(f"{guarded.url}?token={TOKEN}")
    assert tab.url == guarded.url
    tab.locator("#ask-name input").fill("uncopler-1")
    tab.keyboard.press("Enter")
    expect(tab.locator("#ask-error")).to_contain_text("did you mean uncoupler-1")
    tab.close()
