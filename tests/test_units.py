from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.units import StageError, Work, run_units
from storage_schemas import store
from storage_schemas.errors import SchemaError, StoreError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Failure, Screen

WELLS = [WellKey("p1", f"{row}{column:02d}") for row in "AB" for column in (1, 2, 3)]
BAD = WELLS[1]

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return Screen(str(tmp_path / "screen"))


def make_stage(
    screen: Screen, log: Path, broken: set[WellKey], parts: dict[WellKey, float] | None = None
) -> Callable[[WellKey], float]:
    """A stage that commits a unit by a file, logs that it did, raises for some units and fails in part for others.

    Made inside a function, so that Ray's workers need not find this file.
    """
    shares = parts or {}

    def stage(well: WellKey) -> float:
        with log.open("a") as file:
            file.write(f"{well}\n")
        if well in broken:
            raise SchemaError(f"{well}.zarr", "is broken")
        share = shares.get(well, 0.0)
        screen.write_failures("segment", well, [Failure(f"{well}/2", "blank", "site 2 is")] if share else [])
        store.write_bytes(screen.cells(well), b"cells")
        return share

    return stage


def attempts(log: Path) -> list[str]:
    return sorted(log.read_text().split()) if log.exists() else []


def test_every_unit_is_done_once(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_units(screen, "segment", WELLS, Work(make_stage(screen, log, set())), 0)
    assert attempts(log) == [str(well) for well in WELLS]
    assert screen.done_units("segment") == set(WELLS)
    assert screen.failures("segment") == []


def test_what_is_done_is_not_done_again(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stage = make_stage(screen, log, set())
    run_units(screen, "segment", WELLS[:4], Work(stage), 0)
    log.unlink()
    run_units(screen, "segment", WELLS, Work(stage), 0)
    assert attempts(log) == [str(well) for well in WELLS[4:]]
    log.unlink()
    run_units(screen, "segment", WELLS, Work(stage), 0)
    assert attempts(log) == []


def test_a_failure_is_recorded_and_costs_one_unit(screen: Screen, tmp_path: Path) -> None:
    stage = make_stage(screen, tmp_path / "log", {BAD})
    run_units(screen, "segment", WELLS, Work(stage), 0.5)
    assert screen.done_units("segment") == set(WELLS) - {BAD}
    assert screen.failures("segment") == [Failure(str(BAD), "SchemaError", f"{BAD}.zarr: is broken")]


def test_a_failed_unit_is_tried_again_and_then_forgotten(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_units(screen, "segment", WELLS, Work(make_stage(screen, log, {BAD})), 0.5)
    log.unlink()
    run_units(screen, "segment", WELLS, Work(make_stage(screen, log, {BAD})), 0.5)
    assert attempts(log) == [str(BAD)]
    assert len(screen.failures("segment")) == 1
    run_units(screen, "segment", WELLS, Work(make_stage(screen, log, set())), 0.5)
    assert screen.failures("segment") == []
    assert screen.done_units("segment") == set(WELLS)


def test_a_unit_of_which_a_part_failed_is_done_and_tried_again(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_units(screen, "segment", WELLS, Work(make_stage(screen, log, set(), {BAD: 0.5})), 0.1)
    assert screen.done_units("segment") == set(WELLS)
    assert screen.failures("segment") == [Failure(f"{BAD}/2", "blank", "site 2 is")]
    log.unlink()
    run_units(screen, "segment", WELLS, Work(make_stage(screen, log, set())), 0.1)
    assert attempts(log) == [str(BAD)]
    assert screen.failures("segment") == []


# Of six wells one raises and one fails by half: a quarter of all.
@pytest.mark.parametrize(("allowed", "stops"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)])
def test_more_failures_than_allowed_stop_the_stage(screen: Screen, tmp_path: Path, allowed: float, stops: bool) -> None:
    stage = make_stage(screen, tmp_path / "log", {WELLS[0]}, {BAD: 0.5})
    if not stops:
        run_units(screen, "segment", WELLS, Work(stage), allowed)
        assert len(screen.done_units("segment")) == 5
        return
    with pytest.raises(StageError) as caught:
        run_units(screen, "segment", WELLS, Work(stage), allowed)
    assert f"of 6 wells failed, wholly or in part, more than max_failed_share={allowed} allows" in str(caught.value)
    assert re.search(r"the last: (p1/A01: p1/A01\.zarr: is broken|p1/A02/2: site 2 is)", str(caught.value))
    assert screen.failures("segment")


def test_any_exception_is_a_recorded_failure(screen: Screen) -> None:
    def divide(well: WellKey) -> float:
        return 1 / 0

    run_units(screen, "segment", WELLS[:1], Work(divide), 1)
    (failure,) = screen.failures("segment")
    assert (failure.kind, failure.message) == ("ZeroDivisionError", "division by zero")


def test_no_units(screen: Screen, tmp_path: Path) -> None:
    run_units(screen, "segment", [], Work(make_stage(screen, tmp_path / "log", set())), 0)
    assert screen.done_units("segment") == set()


def test_an_actor_is_made_once_and_does_all_its_units(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Worker:
        def __init__(self, owner: Screen, made: Path, step: int) -> None:
            with made.open("a") as file:
                file.write("made\n")
            self.owner, self.step, self.done = owner, step, 0

        def __call__(self, well: WellKey) -> float:
            if well == BAD:
                raise ValueError("broken")
            self.done += self.step
            store.write_bytes(self.owner.embeddings(well), str(self.done).encode())
            return 0.0

    work = Work(Worker, (screen, log, 10), num_cpus=1, actors=1)
    run_units(screen, "embed", WELLS, work, 0.5)
    assert attempts(log) == ["made"]
    # The actor keeps what it has between units.
    done = [int(store.read_bytes(screen.embeddings(well))) for well in WELLS if well != BAD]
    assert sorted(done) == [10, 20, 30, 40, 50]
    assert screen.done_units("embed") == set(WELLS) - {BAD}
    assert [failure.unit for failure in screen.failures("embed")] == [str(BAD)]
    assert screen.failures("segment") == []


def test_open_pool_grows_while_there_is_room(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Worker:
        def __init__(self, owner: Screen, made: Path) -> None:
            with made.open("a") as file:
                file.write("made\n")
            self.owner, self.made = owner, made

        def __call__(self, well: WellKey) -> float:
            end = time.monotonic() + 60
            while len(self.made.read_text().split()) < 2:
                if time.monotonic() > end:
                    raise ValueError("no other worker was made")
                time.sleep(0.05)
            store.write_bytes(self.owner.embeddings(well), b"embedded")
            return 0.0

    run_units(screen, "embed", WELLS, Work(Worker, (screen, log), num_cpus=1, actors=None), 0.0)
    assert attempts(log) == ["made"] * 2  # there are two CPUs


# --- what is no fault of the unit -------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts."""
    monkeypatch.setattr("pipelines.units._PAUSE", 0.0)


def make_trouble(screen: Screen, log: Path, trouble: str, times: int) -> Callable[[WellKey], float]:
    """A stage in which BAD loses its worker or its store so many times before it is done."""

    def stage(well: WellKey) -> float:
        with log.open("a") as file:
            file.write(f"{well}\n")
        if well == BAD and log.read_text().split().count(str(BAD)) <= times:
            if trouble == "store":
                raise StoreError(f"{well}.zarr", "does not answer")
            with store.open_new(screen.cells(well)) as file:
                file.write(b"ce")
                os.kill(os.getpid(), signal.SIGKILL)
        screen.write_failures("segment", well, [])
        store.write_bytes(screen.cells(well), b"cells")
        return 0.0

    return stage


TROUBLES = pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("worker", "lost worker", "tried 3 times: its worker was lost (WorkerCrashedError: "),
        ("store", "StoreError", f"tried 3 times: {BAD}.zarr: does not answer"),
    ],
)


@TROUBLES
def test_passing_trouble_costs_an_attempt(
    screen: Screen, tmp_path: Path, quick: None, trouble: str, kind: str, message: str
) -> None:
    log = tmp_path / "log"
    run_units(screen, "segment", WELLS, Work(make_trouble(screen, log, trouble, 2), attempts=3), 0)
    assert not list(tmp_path.rglob("*.partial"))
    assert attempts(log) == sorted([*map(str, WELLS), str(BAD), str(BAD)])
    assert screen.done_units("segment") == set(WELLS)
    assert screen.failures("segment") == []


@TROUBLES
def test_lasting_trouble_is_recorded_and_costs_one_unit(
    screen: Screen, tmp_path: Path, quick: None, trouble: str, kind: str, message: str
) -> None:
    log = tmp_path / "log"
    run_units(screen, "segment", WELLS, Work(make_trouble(screen, log, trouble, 99), attempts=3), 0.5)
    assert attempts(log) == sorted([*map(str, WELLS), str(BAD), str(BAD)])
    assert screen.done_units("segment") == set(WELLS) - {BAD}
    (failure,) = screen.failures("segment")
    assert (failure.unit, failure.kind) == (str(BAD), kind)
    assert failure.message.startswith(message)
    with pytest.raises(StageError, match="1 of 6 wells failed"):
        run_units(screen, "segment", WELLS, Work(make_trouble(screen, log, trouble, 99), attempts=1), 0)


@pytest.mark.parametrize(("at_once", "expected"), [(0.01, 4), (1, 1)])
def test_units_that_share_a_task_with_a_bad_one_are_done(
    screen: Screen, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, at_once: float, expected: int
) -> None:
    monkeypatch.setattr("pipelines.units._TASKS_A_CORE", at_once)
    log = tmp_path / "log"
    run_units(screen, "segment", WELLS, Work(make_trouble(screen, log, "worker", 99), attempts=2), 0.5)
    assert screen.done_units("segment") == set(WELLS) - {BAD}
    tried = attempts(log)
    assert tried.count(str(BAD)) == 2
    assert len(tried) <= len(WELLS) + expected
    with pytest.raises(StageError, match="1 of 6 wells failed"):
        run_units(screen, "segment", WELLS, Work(make_trouble(screen, log, "worker", 99), attempts=1), 0)


def test_each_pause_is_twice_as_long(screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("pipelines.units.time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    run_units(screen, "segment", WELLS, Work(make_trouble(screen, tmp_path / "log", "store", 99), attempts=4), 1)
    assert pauses == [2.0, 4.0, 8.0]


def test_worker_lost_after_the_commit_has_done_its_unit(screen: Screen, tmp_path: Path, quick: None) -> None:
    log = tmp_path / "log"
    commit = make_stage(screen, log, set())

    def stage(well: WellKey) -> float:
        share = commit(well)
        if well == BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return share

    run_units(screen, "segment", WELLS, Work(stage), 0)
    assert attempts(log) == [str(well) for well in WELLS]
    assert screen.done_units("segment") == set(WELLS)


MEMORY_RUNS_OUT = """
import sys, time
from pipelines import units
from pipelines.cluster import cluster
from pipelines.config import ResourcesConfig
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen

units._PAUSE = 0.0
screen = Screen(sys.argv[1])
with cluster(ResourcesConfig(cpus=2, object_store_mb=100)):
    units.run_units(screen, "segment", [WellKey("p1", "A01")], units.Work(lambda well: time.sleep(60), attempts=2), 1)
(failure,) = screen.failures("segment")
print(failure.kind, failure.message)
"""


@pytest.mark.slow
def test_well_that_takes_all_memory_is_given_up(screen: Screen) -> None:
    """Ray kills a worker as soon as more than a hundredth of the memory is used, and by itself would never stop."""
    environment = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    told = subprocess.run(
        [sys.executable, "-c", MEMORY_RUNS_OUT, screen.url],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert told.startswith("lost worker tried 2 times: its worker was lost (OutOfMemoryError: ")
    assert "if memory has run out, say by resources.segment_memory_mb" in told


@pytest.mark.parametrize("actors", [1, None])
def test_lost_actor_is_made_anew(screen: Screen, tmp_path: Path, quick: None, actors: int | None) -> None:
    trouble = make_trouble(screen, tmp_path / "log", "worker", 2)

    class Worker:
        def __call__(self, well: WellKey) -> float:
            return trouble(well)

    run_units(screen, "segment", WELLS, Work(Worker, actors=actors), 0)
    assert screen.done_units("segment") == set(WELLS)
    assert screen.failures("segment") == []


@pytest.mark.parametrize("what", ["full", "full plates", "denied"])
def test_where_nothing_can_be_written_the_stage_stops_at_once(screen: Screen, what: str) -> None:
    def stage(well: WellKey) -> float:
        if what == "denied":
            raise StoreError(screen.cells(well), "access denied", lasting=True)
        full = OSError(errno.ENOSPC, "No space left", screen.cells(well))
        if what == "full":
            raise full
        raise StoreError(f"plates/cells/p1/{well.well}", "the disk is full", lasting=True) from full  # its labels

    with pytest.raises(StageError, match=r"nothing can be written any more: .*cells/p1/"):
        run_units(screen, "segment", WELLS, Work(stage), 1)
    assert screen.failures("segment") == []


@pytest.mark.parametrize("elsewhere", ["elsewhere/p1.zarr", "{screen}_plates/p1.zarr"])
def test_source_that_stays_away_is_a_failure_of_its_units(screen: Screen, elsewhere: str) -> None:
    """Access to one plate may be denied, and others go on."""
    url = elsewhere.format(screen=screen.url)

    def stage(well: WellKey) -> float:
        raise StoreError(url, "access denied", lasting=True)

    run_units(screen, "segment", WELLS[:1], Work(stage), 1)
    assert [failure.message for failure in screen.failures("segment")] == [f"{url}: access denied"]
