from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.units import Counts, StageError, Work, run_units
from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Failure, Screen

WELLS = [WellKey("p1", f"{row}{column:02d}") for row in "AB" for column in (1, 2, 3)]
BAD = WELLS[1]

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return Screen(str(tmp_path / "screen"))


def make_stage(screen: Screen, log: Path, broken: set[WellKey]) -> Callable[[WellKey], Counts]:
    """A stage that commits a unit by a file, logs that it did, and raises for some units.

    Made inside a function, so that Ray's workers need not find this file.
    """

    def stage(well: WellKey) -> Counts:
        with log.open("a") as file:
            file.write(f"{well}\n")
        if well in broken:
            raise SchemaError(f"{well}.zarr", "is broken")
        store.write_bytes(screen.cells(well), b"cells")
        return {"wells": 1, "cells": int(well.well[1:])}

    return stage


def attempts(log: Path) -> list[str]:
    return sorted(log.read_text().split()) if log.exists() else []


def test_every_unit_is_done_once_and_counted(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"
    totals = run_units(screen, "segment", WELLS, Work(make_stage(screen, log, set())), 0)
    assert totals == {"wells": 6, "cells": 2 * (1 + 2 + 3)}
    assert attempts(log) == [str(well) for well in WELLS]
    assert screen.done_units("segment") == set(WELLS)
    assert screen.failures("segment") == []


def test_what_is_done_is_not_done_again(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stage = make_stage(screen, log, set())
    run_units(screen, "segment", WELLS[:4], Work(stage), 0)
    log.unlink()
    totals = run_units(screen, "segment", WELLS, Work(stage), 0)
    assert attempts(log) == [str(well) for well in WELLS[4:]]
    assert totals["wells"] == 2
    log.unlink()
    assert not run_units(screen, "segment", WELLS, Work(stage), 0)
    assert attempts(log) == []


def test_a_failure_is_recorded_and_costs_one_unit(screen: Screen, tmp_path: Path) -> None:
    stage = make_stage(screen, tmp_path / "log", {BAD})
    totals = run_units(screen, "segment", WELLS, Work(stage), 0.5)
    assert totals["wells"] == 5
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


@pytest.mark.parametrize(("allowed", "stops"), [(0.0, True), (0.3, True), (0.34, False), (1.0, False)])
def test_more_failures_than_allowed_stop_the_stage(screen: Screen, tmp_path: Path, allowed: float, stops: bool) -> None:
    stage = make_stage(screen, tmp_path / "log", set(WELLS[:2]))
    if not stops:
        assert run_units(screen, "segment", WELLS, Work(stage), allowed)["wells"] == 4
        return
    with pytest.raises(StageError) as caught:
        run_units(screen, "segment", WELLS, Work(stage), allowed)
    assert f"of 6 wells failed, more than max_failed_share={allowed} allows" in str(caught.value)
    assert "is broken" in str(caught.value)
    assert screen.failures("segment")


def test_any_exception_is_a_recorded_failure(screen: Screen) -> None:
    def divide(well: WellKey) -> Counts:
        return {"never": 1 // 0}

    run_units(screen, "segment", WELLS[:1], Work(divide), 1)
    (failure,) = screen.failures("segment")
    assert (failure.kind, failure.message) == ("ZeroDivisionError", "integer division or modulo by zero")


def test_no_units(screen: Screen, tmp_path: Path) -> None:
    assert not run_units(screen, "segment", [], Work(make_stage(screen, tmp_path / "log", set())), 0)


def test_an_actor_is_made_once_and_does_all_its_units(screen: Screen, tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Worker:
        def __init__(self, owner: Screen, made: Path, step: int) -> None:
            with made.open("a") as file:
                file.write("made\n")
            self.owner, self.step, self.done = owner, step, 0

        def __call__(self, well: WellKey) -> Counts:
            if well == BAD:
                raise ValueError("broken")
            self.done += self.step
            store.write_bytes(self.owner.embeddings(well), b"embeddings")
            return {"wells": 1, "last": self.done}

    work = Work(Worker, (screen, log, 10), num_cpus=1, actors=1)
    totals = run_units(screen, "embed", WELLS, work, 0.5)
    assert attempts(log) == ["made"]
    # The actor keeps what it has between units: 10 + 20 + ... + 50.
    assert totals == {"wells": 5, "last": 150}
    assert screen.done_units("embed") == set(WELLS) - {BAD}
    assert [failure.unit for failure in screen.failures("embed")] == [str(BAD)]
    assert screen.failures("segment") == []
