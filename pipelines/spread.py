"""Small work over very many things, such as counting what tables hold: on the whole cluster, in order, and bounded.

What a unit of work costs beside its science must not end up in the driver, one unit after the other: a request to an
object store takes tens of milliseconds, and a screen may have hundreds of thousands of wells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray

from storage_schemas.ahead import ahead
from storage_schemas.errors import StoreError

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# A task costs some milliseconds and a worker's start some seconds: fewer things than this are done here and now.
_CHUNK = 128
_RETRIES = 5  # of a chunk whose node is lost, or whose store does not answer


def spread(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[Result]:
    """``map`` over the cluster: tasks of a chunk each, threads within one, since most of the time is spent waiting.

    No more chunks are under way than keep the cluster busy, so that memory does not grow with the arguments.

    Args:
        function: of an argument; a pure function of what is stored, which may be called again.
        arguments: in order.

    Returns:
        Results in the order of the arguments; what ``function`` raises is raised in its place.
    """
    if len(arguments) <= _CHUNK:
        yield from ahead(function, arguments)
        return
    task = ray.remote(max_retries=_RETRIES, retry_exceptions=[StoreError])(_chunk)
    shared = ray.put(function)
    most = 2 + 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting: deque[ray.ObjectRef] = deque()
    for start in range(0, len(arguments), _CHUNK):
        waiting.append(task.remote(shared, arguments[start : start + _CHUNK]))
        if len(waiting) >= most:
            yield from ray.get(waiting.popleft())
    while waiting:
        yield from ray.get(waiting.popleft())


def _chunk(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    return list(ahead(function, arguments))
