from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pipelines.spread import spread
from storage_schemas.ahead import ahead
from storage_schemas.errors import SchemaError, StoreError


@pytest.mark.parametrize("n", [0, 1, 128, 129, 1000])
@pytest.mark.usefixtures("local_ray")
def test_it_is_map_in_order(n: int) -> None:
    offset = 7
    assert list(spread(lambda x: x * x + offset, range(n))) == [x * x + offset for x in range(n)]


@pytest.mark.usefixtures("local_ray")
def test_much_is_done_by_workers_and_little_here() -> None:
    assert os.getpid() not in set(spread(lambda _: os.getpid(), range(300)))
    assert set(spread(lambda _: os.getpid(), range(100))) == {os.getpid()}


@pytest.mark.parametrize("n", [10, 300])
@pytest.mark.usefixtures("local_ray")
def test_what_cannot_be_mended_is_raised(n: int) -> None:
    def broken(x: int) -> int:
        if x == 5:
            raise SchemaError("x.parquet", "is broken")
        return x

    with pytest.raises(SchemaError, match=r"x\.parquet: is broken"):
        list(spread(broken, range(n)))


@pytest.mark.usefixtures("local_ray")
def test_a_store_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    def once_away(x: int) -> int:
        seen = tmp_path / str(x)
        if x % 100 == 0 and not seen.exists():
            seen.touch()
            raise StoreError("s3://bucket/x", "does not answer")
        return x

    assert list(spread(once_away, range(300))) == list(range(300))


def test_ahead_is_map_and_keeps_no_more_than_it_may() -> None:
    done: list[int] = []

    def note(x: int) -> int:
        done.append(x)
        return x

    results = ahead(note, range(100), most=5)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(done) <= 5
    assert list(results) == list(range(1, 100))


def test_ahead_waits_for_many_at_once() -> None:
    # Each waits until as many others do: one after another they would never.
    together = threading.Barrier(8, timeout=10)
    assert list(ahead(lambda _: together.wait(), range(16), most=8)) != []


def test_ahead_raises_in_its_place() -> None:
    results = ahead(lambda x: 6 // x, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
