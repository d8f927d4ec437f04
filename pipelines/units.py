"""Running a stage's units of work through Ray Data: resumable, with failures recorded and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from pipelines.progress import progress
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen

Counts = dict[str, int]

# Blocks are what Ray schedules; more than this many cost more than the balance they buy.
_MAX_BLOCKS = 4096


class StageError(InputError):
    """A stage cannot go on."""


@dataclass(frozen=True)
class Work:
    """How Ray is to run a stage's units.

    Attributes:
        function: does one unit and returns counts; or a class of such, made once an actor.
        arguments: of the class's constructor; empty for a function.
        num_cpus: that a task or actor asks for.
        num_gpus: likewise.
        actors: how many, for a class.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    actors: int = 1


def run_units(
    screen: Screen,
    stage: Literal["segment", "embed"],
    units: Sequence[WellKey],
    work: Work,
    max_failed_share: float,
) -> Counter[str]:
    """Do all units that are not done yet.

    A unit that raises is recorded in the screen's folder and the others go on; it is tried again by the next run.

    Args:
        screen: whose listing says what is done.
        stage: which stage this is.
        units: all units of the stage.
        work: what to do with each.
        max_failed_share: of ``units``.

    Returns:
        Sums of the counts that the units done now returned.

    Raises:
        StageError: when more units have failed than allowed.
    """
    done = screen.done_units(stage)
    left = [unit for unit in units if unit not in done]
    for failure in screen.failures(stage):
        # A run cut off between a unit's commit and this left a record that is no longer true.
        if WellKey.parse(failure.unit) in done:
            screen.clear_failure(stage, WellKey.parse(failure.unit))
    totals: Counter[str] = Counter()
    failed = 0
    with progress(stage, len(units), "wells") as advance:
        for _ in range(len(units) - len(left)):
            advance()
        for outcome in _outcomes(screen, stage, left, work):
            totals.update(json.loads(outcome["counts"]))
            failed += bool(outcome["error"])
            advance(f"{failed} failed" if failed else "")
            if failed > max_failed_share * len(units):
                raise StageError(
                    f"{stage}: {failed} of {len(units)} wells failed, more than max_failed_share={max_failed_share} "
                    f"allows; the last: {outcome['unit']}: {outcome['error']}"
                )
    return totals


def _outcomes(
    screen: Screen, stage: Literal["segment", "embed"], units: Sequence[WellKey], work: Work
) -> Iterator[dict[str, Any]]:
    if not units:
        return
    rows = [{"unit": str(unit)} for unit in units]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
    resources = {"num_cpus": work.num_cpus, "num_gpus": work.num_gpus}
    if isinstance(work.function, type):
        dataset = dataset.map(
            _Actor,
            fn_constructor_args=(screen, stage, work.function, work.arguments),
            concurrency=work.actors,
            **resources,
        )
    else:
        dataset = dataset.map(_Attempt(screen, stage, work.function), **resources)
    yield from dataset.iter_rows()


@dataclass(frozen=True)
class _Attempt:
    """Does a unit; what it raises becomes a record, so that one bad well costs one well."""

    screen: Screen
    stage: Literal["segment", "embed"]
    function: Callable[[WellKey], Counts]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = WellKey.parse(row["unit"])
        counts: Counts = {}
        message = ""
        try:
            counts = self.function(unit)
            self.screen.clear_failure(self.stage, unit)
        except Exception as error:  # whatever it is, it is recorded with its unit
            self.screen.write_failure(self.stage, unit, error)
            message = f"{type(error).__name__}: {error}"
        return {"unit": row["unit"], "counts": json.dumps(counts), "error": message}


class _Actor:
    """An actor that makes its worker once and then attempts units with it."""

    def __init__(
        self,
        screen: Screen,
        stage: Literal["segment", "embed"],
        factory: Callable[..., Callable[[WellKey], Counts]],
        arguments: tuple[Any, ...],
    ) -> None:
        self._attempt = _Attempt(screen, stage, factory(*arguments))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._attempt(row)
