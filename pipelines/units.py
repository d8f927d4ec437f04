"""Running a stage's units of work through Ray Data: resumable, with failures recorded and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from pipelines.progress import progress
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Failure, Screen

Counts = dict[str, int]

# Blocks are what Ray schedules; more than this many cost more than the balance they buy.
_MAX_BLOCKS = 4096


class StageError(InputError):
    """A stage cannot go on."""


@dataclass(frozen=True)
class Work:
    """How Ray is to run a stage's units.

    Attributes:
        function: does one unit; or a class of such, made once an actor. It commits the unit, having recorded what of
            it failed, and returns the share that did; or it raises.
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
) -> None:
    """Do all units that are not done yet, and again those of which a part has failed.

    A unit that raises is recorded in the screen's folder and the others go on; it is tried again by the next run.

    Args:
        screen: whose listing says what is done.
        stage: which stage this is.
        units: all units of the stage.
        work: what to do with each.
        max_failed_share: of ``units``; one of which only a part fails counts by its share.

    Raises:
        StageError: when more has failed than allowed.
    """
    done = screen.done_units(stage) - screen.failed_units(stage)
    left = [unit for unit in units if unit not in done]
    failed = 0.0
    n_failed = 0
    with progress(stage, len(units), "wells") as advance:
        for _ in range(len(units) - len(left)):
            advance()
        for outcome in _outcomes(screen, stage, left, work):
            failed += outcome["failed_share"]
            n_failed += outcome["failed_share"] > 0
            advance(f"{n_failed} failed" if n_failed else "")
            if failed > max_failed_share * len(units):
                last = screen.failures(stage, WellKey.parse(outcome["unit"]))[-1]
                raise StageError(
                    f"{stage}: {n_failed} of {len(units)} wells failed, wholly or in part, more than "
                    f"max_failed_share={max_failed_share} allows; the last: {last.unit}: {last.message}"
                )


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
    function: Callable[[WellKey], float]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = WellKey.parse(row["unit"])
        try:
            failed_share = self.function(unit)
        except Exception as error:  # whatever it is, it is recorded with its unit
            failed_share = 1.0
            self.screen.write_failures(self.stage, unit, [Failure(str(unit), type(error).__name__, str(error))])
        return {"unit": row["unit"], "failed_share": failed_share}


class _Actor:
    """An actor that makes its worker once and then attempts units with it."""

    def __init__(
        self,
        screen: Screen,
        stage: Literal["segment", "embed"],
        factory: Callable[..., Callable[[WellKey], float]],
        arguments: tuple[Any, ...],
    ) -> None:
        self._attempt = _Attempt(screen, stage, factory(*arguments))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._attempt(row)
