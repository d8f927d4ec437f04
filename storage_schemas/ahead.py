"""Waiting for a store side by side: what many small reads cost over a network is how long each is waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_THREADS = 16


def ahead(function: Callable[[Argument], Result], arguments: Iterable[Argument], most: int = 32) -> Iterator[Result]:
    """``map`` with a few results computed ahead by threads.

    Args:
        function: of an argument; it may not call this one, whose threads all its callers share.
        arguments: in order.
        most: results that are held at once.

    Returns:
        Results in the order of the arguments; what ``function`` raises is raised in its place.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for argument in arguments:
            waiting.append(_threads().submit(function, argument))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@cache
def _threads() -> ThreadPoolExecutor:
    """One pool a process, so that many short calls do not start threads each."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead")
