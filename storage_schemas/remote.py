"""Object stores and other remote file systems, asked again where they fail for now: the one place that retries.

Whatever the store's driver, everything that reads or writes goes through :class:`RemoteFileSystem`. It tells what
passes (time-outs, throttling, errors of the server, cut connections), which it tries again for about a minute, from
what lasts (no access, no bucket), which it reports at once; both end as a
:class:`storage_schemas.errors.StoreError`. What is missing stays a ``FileNotFoundError``.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import http.client
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.spec import AbstractBufferedFile

from storage_schemas.errors import StoreError

PATIENCE = 60.0  # seconds from the first try after which no other is begun

_SHORTEST, _LONGEST = 0.25, 5.0  # seconds of the pauses between tries, which double
_STUCK, _SLOWEST = 60.0, 100_000  # an upload that takes more seconds than this and its size at so many bytes a second
_ROUNDS = 5  # of removing, until nothing is left

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Listings are not kept, since others write too; and one stream an object, since more would ask for its size first.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "max_concurrency": 1,
        "config_kwargs": {
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "connect_timeout": 5,
            "read_timeout": 20,
        },
    }
}

_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",  # as after an upload was completed and the answer got lost
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_PASSING_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_PASSING_CLASSES = {  # of botocore and aiohttp, which are not always installed
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "CredentialRetrievalError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "MetadataRetrievalError",
    "ResponseParserError",
}
_WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}
_OURS = (TypeError, ValueError, LookupError, AttributeError, AssertionError)

_HOW_TO_GET_IN = (
    "credentials are looked for as AWS's tools do (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a role of "
    "the machine) and must allow to list, get, put and delete there; the clock must be right; for other stores than "
    "AWS, AWS_ENDPOINT_URL says where they are"
)


class ChangedError(StoreError):
    """What was to be replaced, or was being read, is no longer what it was: somebody else has written it."""


class UnknownRequestError(StoreError):
    """The store does not know what it was asked for."""


class RemoteFileSystem(AsyncFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """An fsspec file system whose requests are tried again; for reading, and for writing of whole objects.

    Args:
        protocol: of the file system behind, as in its URLs.
        asynchronous: whether its coroutines are awaited by the caller (Zarr); else it has methods that block.
        options: for the file system behind, as (name, value).
    """

    cachable = False

    def __init__(self, protocol: str, asynchronous: bool = False, options: tuple[tuple[str, Any], ...] = ()) -> None:
        super().__init__(asynchronous=asynchronous)
        kind = fsspec.get_filesystem_class(protocol)
        given = {**_OPTIONS.get(_family(kind), {}), **dict(options)}
        if kind.async_impl:
            behind = kind(asynchronous=True, skip_instance_cache=True, **given)
            behind.retries = 1  # of s3fs, in whose place ours are
        else:
            behind = AsyncFileSystemWrapper(kind(**given), asynchronous=True)
        self.behind = behind
        self.protocol = (protocol,)
        self.root_marker = behind.root_marker
        self._strip_protocol = behind._strip_protocol
        self._parent = behind._parent
        self._is_s3 = _family(kind) == "s3"
        self._running: asyncio.AbstractEventLoop | None = None  # which its connections belong to
        # Zarr, which asks by a loop of its own, ends that at the end of the process; this comes before.
        atexit.register(self._close)

    # --- reading -----------------------------------------------------------------------------

    async def _info(self, path: str, **kwargs: Any) -> Any:
        return await self._patiently(path, lambda: self.behind._info(path, **kwargs))

    async def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            await self._info(path, **kwargs)
        except FileNotFoundError:
            return False
        return True

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return await self._patiently(path, lambda: self.behind._ls(path, detail=detail, **kwargs))

    async def _find(self, path: str, **kwargs: Any) -> Any:
        return await self._patiently(path, lambda: self.behind._find(path, **kwargs))

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, version: str | None = None, **kwargs: Any
    ) -> bytes:
        """Bytes of an object; with a ``version``, of no other (a store that knows none is taken at its word)."""
        if version is None or not self._is_s3:
            return await self._patiently(path, lambda: self.behind._cat_file(path, start=start, end=end, **kwargs))
        bucket, key, _ = self.behind.split_path(path)
        part = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}

        async def get() -> bytes:
            answer = await self.behind._call_s3("get_object", Bucket=bucket, Key=key, IfMatch=version, **part)
            async with answer["Body"] as body:
                return bytes(await body.read())

        return await self._patiently(path, get)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _Reader:
        if mode != "rb":
            raise NotImplementedError("objects are written whole: see storage_schemas.store.open_new")
        return _Reader(self, path, mode, **kwargs)

    def version(self, path: str) -> str | None:
        """What tells an object's content from that of others in its place; None if there is none or none can tell.

        It may be of an older content than that which is read next, never of a newer one.
        """
        try:
            return self.info(path).get("ETag") if self._is_s3 else None
        except FileNotFoundError:
            return None

    # --- writing -----------------------------------------------------------------------------

    async def _pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put an object; on S3 ``IfMatch`` allows for no other version of it in its place.

        Raises:
            ChangedError: if another is there, and the store is one that looks.
        """
        try:
            await self._patiently(path, lambda: self.behind._pipe_file(path, data, **kwargs), len(data))
        except UnknownRequestError:
            if "IfMatch" not in kwargs:
                raise
            await self._patiently(path, lambda: self.behind._pipe_file(path, data), len(data))

    async def _put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **kwargs: Any) -> None:
        size = os.path.getsize(lpath)
        await self._patiently(rpath, lambda: self.behind._put_file(lpath, rpath, **kwargs), size)

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        await self._patiently(path, lambda: self.behind._rm_file(path, **kwargs))

    async def _rm(self, path: str, recursive: bool = False, **kwargs: Any) -> None:
        if not recursive:
            await self._rm_file(path)
            return
        if not self._is_s3:
            await self._patiently(path, lambda: self.behind._rm(path, recursive=True))
            return
        # Asked to remove many, S3 answers with a list of those that it did not remove, of which the driver says
        # nothing: what is there afterwards tells.
        for _ in range(_ROUNDS):
            left = await self._at_or_below(path)
            if not left:
                return
            if left == [path]:
                await self._rm_file(path)
                return
            await self._patiently(path, partial(self.behind._rm, left))
        raise StoreError(
            self._url(path), f"{len(left)} objects below it are there still, though removed {_ROUNDS} times"
        )

    async def _at_or_below(self, path: str) -> list[str]:
        """The object of a name and all below it as a folder, by one listing."""
        above, _, name = path.rpartition("/")
        found = await self._find(above, prefix=name) if above else await self._find(path)
        return [each for each in found if each == path or each.startswith(path + "/")]

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        await self._patiently(path, lambda: self.behind._makedirs(path, exist_ok=exist_ok))

    # --- trying again ------------------------------------------------------------------------

    async def _patiently(self, path: str, ask: Callable[[], Awaitable[T]], size: int = 0) -> T:
        """What the store answers, asked again while it fails for now.

        Args:
            path: that it is asked of.
            ask: asks once.
            size: bytes that are put: the driver knows when an answer is overdue, not when nobody takes what it sends.

        Raises:
            StoreError: if it goes on failing, or refuses.
            FileNotFoundError: if there is nothing.
        """
        self._running = asyncio.get_running_loop()
        start = time.monotonic()
        tries = 0
        while True:
            try:
                async with asyncio.timeout(_STUCK + size / _SLOWEST if size else None):
                    return await ask()
            except Exception as error:
                refusal = _refusal(error)
                if refusal is not None:
                    raise refusal(self._url(path)) from None
                if not _passes(error):
                    raise
                problem = without_secrets(describe(error))
            tries += 1
            pause = min(_SHORTEST * 2 ** (tries - 1), _LONGEST) * random.uniform(0.5, 1.0)
            waited = time.monotonic() - start
            if waited + pause > PATIENCE:
                raise StoreError(
                    self._url(path), f"the store does not answer as it should, asked for {waited:.0f} s: {problem}"
                )
            if tries == 4:
                _log.warning("%s: the store fails (%s); it is asked again", self._url(path), problem)
            await asyncio.sleep(pause)

    def _close(self) -> None:
        """Close connections, of which their owner would complain otherwise."""
        client = getattr(self.behind, "_s3creator", None)
        if client is not None and self._running is not None and self._running.is_running():
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(client.__aexit__(None, None, None), self._running).result(1)

    def _url(self, path: str) -> str:
        return f"{self.protocol[0]}://{self._strip_protocol(path)}"


class _Reader(AbstractBufferedFile):  # type: ignore[misc]
    """A remote file to read parts of, all of one version."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path, start=start, end=end, version=self.details.get("ETag"))
        if len(data) != end - start:
            raise StoreError(self.fs._url(self.path), f"the store gave {len(data)} bytes of {end - start} that it has")
        return data


@lru_cache(maxsize=64)
def _remote(protocol: str, asynchronous: bool, options: tuple[tuple[str, Any], ...], _process: int) -> RemoteFileSystem:
    return RemoteFileSystem(protocol, asynchronous, options)


def remote(url: str, *, asynchronous: bool = False) -> tuple[RemoteFileSystem, str]:
    """The file system of a remote URL, one a process, and the path on it.

    Raises:
        ImportError: if its driver is not installed.
        ValueError: if there is none.
    """
    protocol = url.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    options = tuple(sorted(kind._get_kwargs_from_urls(url).items()))
    # A forked process must not share its parent's connections.
    return _remote(protocol, asynchronous, options, os.getpid()), str(kind._strip_protocol(url))


# --- what an error means -------------------------------------------------------------------------


def _refusal(error: Exception) -> Callable[[str], StoreError] | None:
    """The error to raise, of a URL, where asking again does not help."""
    code, status = _code(error), _status(error)
    said = without_secrets(describe(error))

    def lasting(problem: str) -> Callable[[str], StoreError]:
        return lambda url: StoreError(url, problem, lasting=True)

    if code == "NoSuchBucket":
        return lasting(
            "there is no such bucket; make it, or mend the URL (or AWS_ENDPOINT_URL, which says at which store)"
        )
    if code == "PreconditionFailed" or status == 412 or isinstance(error, FileExistsError):
        return lambda url: ChangedError(url, "was changed by somebody else meanwhile")
    if code == "NotImplemented" or status == 501:
        return lambda url: UnknownRequestError(url, f"the store does not know how to do it: {said}", lasting=True)
    if code == "RequestTimeTooSkewed":
        return lasting("the store refuses, since the clock of this machine is wrong; set it")
    names = {kind.__name__ for each in _causes(error) for kind in type(each).__mro__}
    if names & _WITHOUT_CREDENTIALS:
        return lasting(f"no credentials for the store are found: {_HOW_TO_GET_IN}")
    if status in (401, 403) or isinstance(error, PermissionError):
        return lasting(f"the store refuses access ({said}): {_HOW_TO_GET_IN}")
    if code == "InvalidRange" or _passes(error) or isinstance(error, (FileNotFoundError, IsADirectoryError)):
        return None
    if isinstance(error, (*_OURS, NotADirectoryError, NotImplementedError, StoreError)):
        return None
    return lasting(f"the store refuses: {said}")


def _passes(error: BaseException) -> bool:
    """Whether it may go well the next time."""
    for each in _causes(error):
        if isinstance(each, (TimeoutError, ConnectionError, asyncio.IncompleteReadError, http.client.IncompleteRead)):
            return True
        if _PASSING_CLASSES & {kind.__name__ for kind in type(each).__mro__}:
            return True
    code, status = _code(error), _status(error)
    if code in _PASSING or status in (408, 429):
        return True
    if status is not None:
        return status >= 500 and status != 501
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def passes_on_disk(error: OSError) -> bool:
    """Whether an error of a local or mounted disk may not come again."""
    return error.errno in _PASSING_ERRNOS


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _code(error: BaseException) -> str:
    """What S3 calls an error; empty of others."""
    for each in _causes(error):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
    return ""


def _status(error: BaseException) -> int | None:
    """The status of HTTP's answer, where the driver tells; each has its own name for it."""
    for each in _causes(error):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
        for name in ("status", "status_code", "code"):
            status = getattr(each, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return None


def describe(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")
_TOKEN = re.compile(
    r"(?i)([?&;](?:[\w-]*(?:token|signature|secret|password|credential|accesskey\w*)|(?:[\w-]*[_-])?(?:key|sig))=)"
    r"[^&\s\"'\\]+"
)


def has_secrets(url: str) -> bool:
    """Whether a URL holds a password or a token."""
    return without_secrets(url) != url


def without_secrets(text: str) -> str:
    """A text without what URLs in it hold of passwords and tokens."""
    return _TOKEN.sub(r"\1***", _PASSWORD.sub("***@", text))


def _family(kind: type[Any]) -> str:
    protocol = kind.protocol
    names = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    return "s3" if "s3" in names else str(names[0])
