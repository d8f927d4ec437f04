"""A local S3 server that fails as real ones do: moto's server behind a proxy that injects faults from a seed.

The two run in a process of their own (:class:`S3Server`), which whatever a test starts reaches by the environment that
AWS's own tools look at. Which requests fail is a function of the seed, the request and how often it came: not of the
order in which many clients come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self
from urllib.parse import parse_qs

import aiohttp
from aiohttp import web

KEY, SECRET, REGION = "test-key", "test-secret", "us-east-1"

# Statuses of faults that are answers. The others cut the connection: before the store hears of the request; after it
# has done what was asked; and in the middle of the answer.
ANSWERED = {
    "slow_down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "timeout": (408, "RequestTimeout"),
    "many": (429, "TooManyRequests"),
    "denied": (403, "AccessDenied"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "unknown": (501, "NotImplemented"),
}
FAULTS = ("slow_down", "error", "reset", "lost", "truncated", "delay")

_CONTROL = "/-/"  # no bucket can be called so
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "expect", "date", "server"}


class S3Server:
    """A server in a process of its own, with a bucket; gone at the end of a ``with``.

    Args:
        host: address to listen at.
        port: likewise; 0 takes a free one.
        bucket: that is made at the start.
        seed: of the faults.
        share: of requests that fail, 0 to 1 (see :meth:`fail`).
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, bucket: str = "screens", seed: int = 0, share: float = 0.0
    ) -> None:
        self.bucket = bucket
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"host": host, "port": port, "bucket": bucket, "seed": seed})],
            stdin=subprocess.PIPE,  # it ends when this end closes, however this process ends
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said, "the S3 server did not start"
        self.endpoint = f"http://{host}:{json.loads(said)}"
        if share:
            self.fail(share)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have in its environment to use this server and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    @contextlib.contextmanager
    def used_here(self, **environment: str) -> Iterator[None]:
        """Let this process, and what it starts, use this server and no connection that it has to another.

        Args:
            environment: in place of, or besides, the server's own.
        """
        import pytest  # what the server itself runs without

        from storage_schemas import remote

        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.environment, **environment}.items():
                patch.setenv(name, value)
            remote._remote.cache_clear()
            try:
                yield
            finally:
                remote._remote.cache_clear()

    def url(self, *parts: str) -> str:
        """A place in the bucket."""
        return "/".join([f"s3://{self.bucket}", *parts])

    def fail(self, share: float, faults: tuple[str, ...] = FAULTS, *, only: str = "", delay: float = 2.0) -> None:
        """Let a share of requests fail from now on.

        Args:
            share: of requests, 0 to 1.
            faults: of which kinds, drawn evenly.
            only: a regular expression that "KIND /path" must contain (see :func:`kind_of`), "KIND /path if" where the
                request is conditional.
            delay: seconds that a delayed request waits.
        """
        self._tell(share=share, faults=list(faults), only=only, delay=delay)

    def cut(self, seconds: float) -> None:
        """Reset every connection for some seconds, as where a network is cut."""
        self._tell(cut=seconds)

    def slow(self, seconds: float) -> None:
        """Answer every request so much later from now on; 0 ends it."""
        self._tell(slow=seconds)

    def counts(self) -> Counter[str]:
        """How many requests of each kind have ended how, as "put 200", since the start or :meth:`forget`."""
        return Counter(self._call("GET")["counts"])

    def waiting(self) -> Counter[str]:
        """How many requests of each kind have come and are not answered yet."""
        return Counter(self._call("GET")["waiting"])

    def forget(self) -> None:
        """Count from 0, and let no request have come before."""
        self._tell(forget=True)

    def stop(self) -> None:
        """End the server, with all that it holds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _tell(self, **settings: Any) -> None:
        self._call("POST", json.dumps(settings).encode())

    def _call(self, method: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(self.endpoint + _CONTROL, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


def kind_of(method: str, path: str, query: str) -> str:
    """What a request asks for, in a word or two."""
    asked = parse_qs(query, keep_blank_values=True)
    has_key = len(path.strip("/").split("/", 1)) == 2
    if "uploadId" in asked:
        return {"PUT": "put part", "POST": "complete upload", "DELETE": "abort upload"}.get(method, "list parts")
    if "uploads" in asked:
        return "begin upload" if method == "POST" else "list uploads"
    if "delete" in asked:
        return "delete many"
    return method.lower() if has_key else {"GET": "list"}.get(method, f"{method.lower()} bucket")


# --- in the server's process -----------------------------------------------------------------------


class _Proxy:
    """Passes requests on to the store behind it, unless they are to fail."""

    def __init__(self, behind: str, seed: int) -> None:
        self._behind = behind
        self._seed = seed
        self._share, self._faults, self._only, self._delay = 0.0, list(FAULTS), "", 2.0
        self._slow = 0.0
        self._cut_until = 0.0
        self._counts: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._times: Counter[str] = Counter()
        self._session: aiohttp.ClientSession | None = None
        # The store behind looks whether a condition is met and then writes: two steps, which S3 does in one.
        self._one_at_a_time = asyncio.Lock()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == _CONTROL:
            return await self._control(request)
        kind = kind_of(request.method, request.path, request.query_string)
        fault = self._fault(request, kind)
        self._waiting[kind] += 1
        try:
            answer = await self._answer(request, fault)
        except _Cut:
            self._counts[f"{kind} {fault or 'cut'}"] += 1
            _reset(request)
            raise asyncio.CancelledError from None  # nothing more is to be written
        finally:
            self._waiting[kind] -= 1
        self._counts[f"{kind} {answer.status}"] += 1
        return answer

    async def _answer(self, request: web.Request, fault: str | None) -> web.StreamResponse:
        if time.monotonic() < self._cut_until or fault == "reset":
            raise _Cut
        body = await request.read()
        if self._slow:
            await asyncio.sleep(self._slow)
        if fault == "delay":
            await asyncio.sleep(self._delay)
        if fault in ANSWERED:
            status, code = ANSWERED[fault]
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
            return web.Response(status=status, text=text, content_type="application/xml")
        status, headers, content = await self._pass_on(request, body)
        # A cut may have begun while the store worked.
        if fault == "lost" or time.monotonic() < self._cut_until:
            raise _Cut
        answer = web.StreamResponse(status=status, headers=headers)
        whole = int(headers.get("Content-Length", len(content)))
        if fault == "truncated":
            if len(content) < 2:
                raise _Cut
            answer.content_length = whole
            await answer.prepare(request)
            await answer.write(content[: len(content) // 2])
            raise _Cut
        answer.content_length = whole
        await answer.prepare(request)
        if content:
            await answer.write(content)
        await answer.write_eof()
        return answer

    async def _pass_on(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(60))
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        conditional = "If-Match" in headers or "If-None-Match" in headers
        async with (
            self._one_at_a_time if conditional else contextlib.nullcontext(),
            self._session.request(
                request.method, self._behind + request.raw_path, headers=headers, data=body, allow_redirects=False
            ) as answer,
        ):
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            return answer.status, kept, await answer.read()

    def _fault(self, request: web.Request, kind: str) -> str | None:
        path = re.sub("uploadId=[^&]*", "", request.path_qs)  # made up anew by the store each time
        what = f"{request.method} {path} {request.headers.get('Range', '')}"
        self._times[what] += 1
        condition = " if" if "If-Match" in request.headers or "If-None-Match" in request.headers else ""
        if not re.search(self._only, f"{kind} {request.path}{condition}"):
            return None
        rng = random.Random(f"{self._seed} {what} {self._times[what]}")
        return rng.choice(self._faults) if rng.random() < self._share else None

    async def _control(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            told = await request.json()
            if "share" in told:
                self._share, self._faults = told["share"], told["faults"]
                self._only, self._delay = told["only"], told["delay"]
            if "cut" in told:
                self._cut_until = time.monotonic() + told["cut"]
            if "slow" in told:
                self._slow = told["slow"]
            if "forget" in told:
                self._counts.clear()
                self._times.clear()
        return web.json_response({"counts": dict(self._counts), "waiting": dict(self._waiting)})


class _Cut(Exception):
    """The connection is to be reset."""


def _reset(request: web.Request) -> None:
    transport = request.transport
    if transport is None:
        return
    # Without lingering, what is left unsent is dropped and the other side is told of a reset, not of an end.
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _serve(host: str, port: int, bucket: str, seed: int) -> None:
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    WSGIRequestHandler.disable_nagle_algorithm = True  # answers of two packets would wait 40 ms for the second
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    behind = "http://{}:{}".format(*store.get_host_and_port())
    with urllib.request.urlopen(urllib.request.Request(f"{behind}/{bucket}", method="PUT"), timeout=30) as made:
        assert made.status == 200
    proxy = _Proxy(behind, seed)
    application = web.Application(client_max_size=2**40)
    application.router.add_route("*", "/{any:.*}", proxy.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    assert site._server is not None
    print(json.dumps(site._server.sockets[0].getsockname()[1]), flush=True)  # type: ignore[attr-defined]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    os._exit(0)  # whatever is still asked for


if __name__ == "__main__":
    # A Ctrl-C at the terminal is for the tests; this ends with them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(**json.loads(sys.argv[1])))
