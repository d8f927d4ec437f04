"""`screening serve`: the report of a screen with a form to ask it, over HTTP.

The standard library's server is enough: a few people of one laboratory ask it, and a question takes milliseconds.
It changes nothing in the screen. Whoever can reach it can ask: on this machine alone that is everyone who is
logged in; where it can be reached from others, a token is asked for. What each guard is for:

- the name in ``Host`` must be one of this machine's, or a page on another site could point its own name here (DNS
  rebinding) and read what it likes through the reader's browser;
- a question that another site's page sends (``Origin``) is refused;
- no path of a request ever becomes a path on disk: a clip is looked up by a well that the plate map names;
- what is sent is bounded in size and time, one file after another, and read without trusting it
  (:mod:`pipelines.uploads`);
- connections are bounded in number, and each has a bounded time to say what it wants.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import json
import math
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import pandas as pd
from pydantic import Field, ValidationError

from pipelines.query import Searcher
from pipelines.report import collect, read_example
from pipelines.uploads import read_vectors
from screening.report import Live, content_policy, render
from screening.report.clips import brightness, film_strip
from screening.report.tables import table
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError
from storage_schemas.index import Level
from storage_schemas.keys import TrackKey, WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import PLATE_MAP, open_table

MAX_QUESTION = 64 * 1024
"""Bytes of a question without a file."""
TIMEOUT = 30.0
"""Seconds that a client may keep the server waiting: for the next bytes, and for a whole request but its body."""
MAX_CONNECTIONS = 64
"""Connections that are open at a time; a browser takes some six."""
UPLOAD_TIMEOUT = 300.0
"""Seconds that a whole body may take: a file that comes byte by byte would keep all others waiting."""
UPLOAD_WAIT = 5.0
"""Seconds that a file waits for the one before it."""

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Question(Config):
    """What is asked of a screen; see :meth:`pipelines.query.Searcher.query`."""

    by: Literal["compound", "well", "cell", "file"] = Field(description="what is asked about")
    name: str = Field("", max_length=500, description="its name; of a file it is not needed")
    level: Level | None = Field(None, description="what to compare it with")
    k: int = Field(10, ge=1, le=1000, description="how many answers")
    moa: str | None = Field(None, max_length=500, description="only what has this mechanism")
    exclude_same_compound: bool = Field(False, description="leave out the compound of the well or cell")


class Refusal(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of the answer.
        retry_after: seconds after which the same request may be let in; None where it will not.
    """

    def __init__(self, status: HTTPStatus, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class Gate:
    """Who is let in.

    Attributes:
        hosts: names that a request may call this server by.
        any_address: whether it may also call it by any IP address: no one can make a name of their own of these.
        token: what must come with every request; None where only this machine can reach the server.
    """

    hosts: frozenset[str]
    any_address: bool
    token: str | None

    def check_host(self, header: str | None) -> None:
        """Refuse a request that calls the server by a name that is not its own."""
        name = _host_name(header or "")
        if name not in self.hosts and not (self.any_address and _is_address(name)):
            raise Refusal(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this server is not called {name!r}; start it with --allow-host {name} if it is",
            )

    def check_origin(self, header: str | None) -> None:
        """Refuse a request that a page of another site has sent."""
        if header is not None:
            try:
                self.check_host(urlsplit(header).netloc)
            except (Refusal, ValueError) as error:
                raise Refusal(HTTPStatus.FORBIDDEN, "a page of another site may not ask this server") from error

    def knows(self, token: str | None) -> bool:
        """Whether a token is the right one, found out in the same time for any wrong one."""
        if self.token is None:
            return True
        return hmac.compare_digest((token or "").encode(), self.token.encode())


class Desk:
    """A screen that is open for questions.

    Args:
        screen: with a report to show; questions need an index, too.
        max_upload: bytes of the largest file that is taken.

    Attributes:
        uploads: held by whoever sends a file, from before its first byte is read: one file is in memory at a time, and
            each may take some hundred MB while it is read.
    """

    def __init__(self, screen: Screen, max_upload: int) -> None:
        self.screen = screen
        self.max_upload = max_upload
        self.searcher = Searcher(screen)
        data = collect(screen)
        moas = sorted(data.plate_maps["moa"].dropna().unique()) if "moa" in data.plate_maps else []
        self._live = Live(max_upload, self.searcher.levels, tuple(map(str, moas)))
        self.page = render(data, live=self._live).encode()
        self.policy = content_policy(self._live)
        self._brightness = brightness(data.examples)
        self.uploads = threading.Lock()

    @cached_property
    def wells(self) -> frozenset[WellKey]:
        """The wells that the plate map names."""
        maps = open_table(self.screen.plate_map, PLATE_MAP, ["plate", "well"]).to_pandas()
        return frozenset(WellKey(plate, well) for plate, well in maps.itertuples(index=False, name=None))

    def answer(self, question: Question, content: bytes | None = None) -> dict[str, Any]:
        """The table of answers as the page shows it: columns and rows of (text, value).

        Args:
            question: what is asked.
            content: of the file, where the question is by one.

        Raises:
            InputError: if it cannot be answered.
        """
        if question.by == "file":
            return self._look_up(question, vectors=read_vectors(content or b""))
        return self._look_up(question, **{question.by: question.name})

    def clip(self, key: TrackKey) -> dict[str, Any]:
        """The film strip of a cell.

        Raises:
            InputError: if the screen has no such cell, or no clip of it.
        """
        well = WellKey(key.plate, key.well)
        if well not in self.wells or well not in self.screen.done_units("segment"):
            raise InputError(f"{key}: the screen has no cells of this well")
        example = read_example(self.screen, key)
        strip = film_strip(example, self._brightness or brightness([example]))
        return {"strip": strip.strip, "frames": strip.frames, "width": strip.width, "height": strip.height}

    def _look_up(self, question: Question, **asked: Any) -> dict[str, Any]:
        found = self.searcher.query(
            **asked,
            level=question.level,
            k=question.k,
            moa=() if question.moa is None else (question.moa,),
            exclude_same_compound=question.exclude_same_compound,
        )
        return _as_json(found)


class Server(ThreadingHTTPServer):
    """A server of one screen, bound and ready; :meth:`serve_forever` starts it.

    Args:
        desk: answers.
        gate: lets in.
        address: host and port; port 0 is any free one.

    Raises:
        InputError: if the address cannot be taken.
    """

    daemon_threads = True

    def __init__(self, desk: Desk, gate: Gate, address: tuple[str, int]) -> None:
        self.desk, self.gate = desk, gate
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._deadlines: dict[socket.socket, float] = {}
        host, port = address
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self.address_family = found[0]
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise InputError(f"{host}:{port}: {_why_not(error)}") from error

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host, port = self.server_address[:2]
        name = str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"

    @property
    def cookie(self) -> str:
        """Name of the cookie with the token: browsers send the cookies of a host to all its ports."""
        return f"screening_token_{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread of its own, or turn it away where there are too many."""
        with self._lock:
            full = len(self._connections) >= MAX_CONNECTIONS
            if not full:
                self._connections.add(request)
        if full:
            with contextlib.suppress(OSError):
                request.setblocking(False)  # whoever does not listen is not waited for
                request.send(_FULL)
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        with self._lock:
            self._connections.discard(request)
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def expect_request(self, connection: socket.socket) -> None:
        """Give a connection its time for the next request, from now on."""
        with self._lock:
            self._deadlines[connection] = time.monotonic() + TIMEOUT

    def has_request(self, connection: socket.socket) -> None:
        """Wait no longer for the request of a connection: it is there."""
        with self._lock:
            self._deadlines.pop(connection, None)

    def service_actions(self) -> None:
        """Cut off, some times a second, whoever sends a request byte by byte."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection, deadline in self._deadlines.items() if now > deadline]
            for connection in late:
                del self._deadlines[connection]
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever has left is no failure of the server."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def open_server(
    url: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_upload: int = 64 * 2**20,
    allow_hosts: Iterable[str] = (),
) -> Server:
    """Make a screen ready to be asked.

    Args:
        url: the screen.
        host: the address to listen at; any but a loopback address makes a token be asked for.
        port: 0 for any that is free.
        token: what must come with every request; one is made where it is needed and none is given.
        max_upload: bytes of the largest file that is taken.
        allow_hosts: further names that requests may call this server by, as behind a proxy.

    Raises:
        InputError: if the address cannot be taken.
        SchemaError: if there is no screen, or no index of it.
    """
    local = host in _LOCAL_NAMES or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    if token is not None and not _TOKEN.fullmatch(token):
        raise InputError("the token must have 16 to 128 letters, digits, - and _; give none to have one made")
    if token is None and not local:
        token = secrets.token_urlsafe(24)
    own = {socket.gethostname(), socket.getfqdn()} if not local else set()
    hosts = frozenset(name.lower().strip("[]") for name in (*_LOCAL_NAMES, host, *own, *allow_hosts))
    gate = Gate(hosts, any_address=not local, token=token)
    return Server(Desk(Screen.open(store.absolute(url)), max_upload), gate, (host, port))


def serve(server: Server, say: Callable[[str], None]) -> None:
    """Answer until the user presses Ctrl-C, or the process is asked to end. To be called in the main thread.

    Args:
        server: of :func:`open_server`.
        say: is told where the page is, and when it is over.
    """
    token = server.gate.token
    say(f"The screen is at {server.url}{f'?token={token}' if token else ''} (Ctrl-C to stop)")
    if token:
        say("Whoever has this address can ask the screen; what is sent is not encrypted.")
    # Also where a shell has started the command in the background, deaf to Ctrl-C.
    for request in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    server_version = "screening"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def handle_one_request(self) -> None:
        self.server.expect_request(self.connection)
        super().handle_one_request()

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_HEAD(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def _get(self, parts: SplitResult) -> None:
        token = parse_qs(parts.query).get("token", [None])[0]
        # Without a token to compare it with, nothing of the address may go into an answer.
        if parts.path == "/" and token is not None and self.server.gate.token is not None:
            self._admit(token)
            return
        self._check_token()
        if parts.path == "/":
            self._send(HTTPStatus.OK, self.server.desk.page, "text/html; charset=utf-8", self.server.desk.policy)
        elif parts.path.startswith("/clip/"):
            names = parts.path.removeprefix("/clip/").split("/")
            self._send_json(self.server.desk.clip(TrackKey.parse("/".join(map(unquote, names)))))
        else:
            raise Refusal(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self, parts: SplitResult) -> None:
        self._check_token()
        if parts.path == "/ask":
            self._send_json(self.server.desk.answer(_question(self._read(self._length(MAX_QUESTION)))))
        elif parts.path == "/ask-file":
            self._send_json(self._ask_file(parse_qs(parts.query).get("question", [""])[0]))
        else:
            raise Refusal(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _ask_file(self, question: str) -> dict[str, Any]:
        """The answer to a question with a file, which waits its turn before any of the file is kept."""
        desk = self.server.desk
        length = self._length(desk.max_upload)
        if not desk.uploads.acquire(timeout=UPLOAD_WAIT):
            self._discard(length)
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "files of others are being read; send yours again in some seconds",
                retry_after=math.ceil(UPLOAD_WAIT),
            )
        try:
            content = self._read(length)
            return desk.answer(_question(question.encode()), content)
        finally:
            desk.uploads.release()

    def _respond(self, work: Callable[[SplitResult], None]) -> None:
        """Do the work of a request that is let in, given its address; what goes wrong is the answer."""
        self.server.has_request(self.connection)
        try:
            self.server.gate.check_host(self.headers.get("Host"))
            self.server.gate.check_origin(self.headers.get("Origin"))
            work(_address(self.path))
        except Refusal as refusal:
            self.close_connection = True
            extra = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
            self._send_json({"error": str(refusal)}, refusal.status, extra)
        except InputError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self.close_connection = True
            self._send_json({"error": "the server has failed; its log says how"}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _admit(self, token: str) -> None:
        """Keep the token of an address in a cookie, so that it stands in no address from then on."""
        if not self.server.gate.knows(token):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "the token is wrong")
        cookie = f"{self.server.cookie}={token}; HttpOnly; SameSite=Lax; Path=/"
        self._send(HTTPStatus.SEE_OTHER, b"", "text/plain", extra={"Location": "/", "Set-Cookie": cookie})

    def _check_token(self) -> None:
        gate = self.server.gate
        scheme, _, given = (self.headers.get("Authorization") or "").partition(" ")
        if not gate.knows(given.strip() if scheme.lower() == "bearer" else self._cookie()):
            raise Refusal(
                HTTPStatus.UNAUTHORIZED, "a token is needed: open the address that `screening serve` has printed"
            )

    def _cookie(self) -> str | None:
        with contextlib.suppress(CookieError):
            found = SimpleCookie(self.headers.get("Cookie") or "").get(self.server.cookie)
            return None if found is None else found.value
        return None

    def _length(self, limit: int) -> int:
        """Bytes of what is sent.

        Raises:
            Refusal: if it is larger than allowed, or does not say how large it is.
        """
        try:
            length = int(self.headers.get("Content-Length") or "")
        except ValueError as error:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is") from error
        if length < 0 or "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request's length is not usable")
        if length > limit:
            self._discard(min(length, 4 * limit))
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length:,} bytes were sent; at most {limit:,} are taken"
            )
        return length

    def _read(self, length: int) -> bytes:
        content = b"".join(self._pieces(length))
        if len(content) < length:
            raise ConnectionError("the client has left")
        return content

    def _discard(self, n: int) -> None:
        """Take some of what is too much, so that the client has done sending and reads the answer."""
        for _ in self._pieces(n):
            pass

    def _pieces(self, n: int) -> Iterator[bytes]:
        """The next bytes that are sent, up to some number or the last."""
        until = time.monotonic() + UPLOAD_TIMEOUT
        while n > 0 and (piece := self.rfile.read1(min(n, 2**16))):
            if time.monotonic() > until:
                raise TimeoutError("the client sends too slowly")
            n -= len(piece)
            yield piece

    def _send_json(
        self, value: object, status: HTTPStatus = HTTPStatus.OK, extra: Mapping[str, str] | None = None
    ) -> None:
        self._send(status, json.dumps(value, allow_nan=False).encode(), "application/json", extra=extra)

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        kind: str,
        policy: str = "default-src 'none'",
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
            **({"Connection": "close"} if self.close_connection else {}),
            **(extra or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, such as a method that there is not."""
        self.close_connection = True
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            allowed = {"Allow": "GET, HEAD, POST"}
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"", "text/plain", extra=allowed)
        else:
            self._send_json({"error": status.phrase}, status)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing but what :meth:`log_request` says."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A line a request, without what stands behind the question mark: a token may."""
        # Not parsed: an address that cannot be is refused, and that is logged, too.
        shown = getattr(self, "path", "").partition("?")[0][:200].encode("unicode_escape").decode()
        sys.stderr.write(f"{self.log_date_time_string()} {self.client_address[0]} {self.command} {shown} {int(code)}\n")


def _address(target: str) -> SplitResult:
    try:
        return urlsplit(target)
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the address of the request cannot be read") from error


def _question(content: bytes) -> Question:
    try:
        return Question.model_validate_json(content)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, entry['loc'])) or 'question'}: {entry['msg']}" for entry in error.errors()
        )
        raise InputError(f"the question cannot be understood: {wrong}") from error


def _as_json(found: pd.DataFrame) -> dict[str, Any]:
    shown = table(found, "answers", "What resembles it most")
    if shown is None:
        return {"columns": [], "rows": []}
    columns = [{"name": c.name, "heading": c.heading, "numeric": c.numeric} for c in shown.columns]
    return {"columns": columns, "rows": [[[cell.text, cell.value] for cell in row] for row in shown.rows]}


def _host_name(header: str) -> str:
    """The host of a ``Host`` header, without its port and brackets."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _why_not(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program listens there; choose another --port, or --port 0 for any that is free"
    if error.errno == errno.EACCES:
        return "this user may not listen there; choose a --port above 1023"
    return f"cannot be listened at ({error.strerror or error}); choose another --host"
