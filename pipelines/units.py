"""Running a stage's units of work through Ray Data: resumable, with failures tried again, recorded and counted."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from pipelines import events
from pipelines.cluster import cluster_address, cpus_up
from pipelines.metrics import StageMetrics
from pipelines.progress import Advance, progress
from storage_schemas.errors import InputError, StoreError, is_disk_full
from storage_schemas.keys import WellKey
from storage_schemas.remote import describe
from storage_schemas.screen import Failure, Screen, UnitStage

Counts = dict[str, int]

# Blocks are what Ray schedules; more than this many cost more than the balance they buy.
_MAX_BLOCKS = 4096
# Between two tasks a core waits for the driver (benchmarks/engine.py): a task is given some units, one after
# the other, where there are so many that cores still have some tasks each and end at about the same time.
_TOGETHER = 4
_TASKS_A_CORE = 8
_MAY_GROW = 256  # CPUs that a cluster is taken to have at least: more nodes may join
_PAUSE = 2.0  # seconds before a unit is tried the second time; each time after that twice as long
_LONGEST_PAUSE = 60.0
_EXECUTOR = "ray.data._internal.execution.streaming_executor_state"  # where Ray Data logs the tasks that it has lost

LOST = "lost worker"
"""The kind of failure of a unit whose worker died each time that it was tried."""

_SAVES_MEMORY: dict[UnitStage, str] = {
    "segment": "say by resources.segment_memory_mb what a well takes, so that fewer are done at once",
    "embed": "lower embed.batch_size and embed.read_clips",
}


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
        memory_mb: MiB of memory, likewise; 0: any.
        actors: how many, for a class; None: as many as there is work and room for, while a cluster grows for it.
        attempts: how often a unit is tried whose worker dies or whose store does not answer.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_mb: int = 0
    actors: int | None = 1
    attempts: int = 4


def run_units(screen: Screen, stage: UnitStage, units: Sequence[WellKey], work: Work, max_failed_share: float) -> None:
    """Do all units that are not done yet, and again those of which a part has failed.

    A unit that raises is recorded in the screen's folder and the others go on; it is tried again by the next run. One
    that is not to blame, since its worker died, its node went or its store did not answer, is tried again
    by this run, once the others have been tried and after a pause; after so many attempts it is recorded as well.

    Args:
        screen: whose listing says what is done.
        stage: which stage this is.
        units: all units of the stage.
        work: what to do with each.
        max_failed_share: of ``units``; one of which only a part fails counts by its share.

    Raises:
        StageError: when more has failed than allowed, or nothing can be written any more.
    """
    done = screen.done_units(stage) - screen.failed_units(stage)
    left = [unit for unit in units if unit not in done]
    with progress(stage, len(units), "wells") as advance, StageMetrics(screen.url, stage, len(left)) as metrics:
        tally = _Tally(screen, stage, len(units), max_failed_share, advance, metrics)
        for _ in range(len(units) - len(left)):
            advance()
        for attempt in range(1, work.attempts + 1):
            # What is lost takes what it was given with it: of those each gets a task of its own.
            tasks = len(left) if attempt > 1 or work.attempts == 1 else _tasks(len(left), work)
            again = _try(screen, stage, left, tasks, work, tally)
            left = list(again)
            if not left:
                return
            if attempt < work.attempts:
                pause = min(_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
                why = next(iter(again.values())).message
                words = f"{stage}: {len(left)} well(s) to be tried again in {pause:.0f} s: {why}"
                events.warning("units_tried_again", words, stage=stage, units=len(left), attempt=attempt, error=why)
                tally.metrics.tried_again(len(left))
                time.sleep(pause)
        for unit, failure in again.items():
            message = f"tried {work.attempts} times: {failure.message}"
            screen.write_failures(stage, unit, [Failure(str(unit), failure.kind, message)])
            tally.add(unit, 1.0)


def _tasks(n_units: int, work: Work) -> int:
    """How many tasks to make of the units."""
    if isinstance(work.function, type) and work.actors:
        cores: float = work.actors
    else:
        cores = (max(cpus_up(), _MAY_GROW) if cluster_address() else cpus_up()) / work.num_cpus
    together = min(_TOGETHER, max(1, int(n_units / (_TASKS_A_CORE * cores))))
    return -(-n_units // together)


@dataclass
class _Tally:
    """How many units have failed, and whether that is too many."""

    screen: Screen
    stage: UnitStage
    units: int
    max_failed_share: float
    advance: Advance
    metrics: StageMetrics
    failed: float = 0.0
    n_failed: int = 0

    def add(self, unit: WellKey, failed_share: float, seconds: float | None = None) -> None:
        """Count one unit, and how long it took where that is known.

        Raises:
            StageError: if it is one too many.
        """
        self.failed += failed_share
        self.n_failed += failed_share > 0
        self.metrics.ended("failed" if failed_share == 1 else "part" if failed_share else "done", seconds)
        self.advance(failed=self.n_failed)
        if self.failed > self.max_failed_share * self.units:
            last = self.screen.failures(self.stage, unit)[-1]
            raise StageError(
                f"{self.stage}: {self.n_failed} of {self.units} wells failed, wholly or in part, more than "
                f"max_failed_share={self.max_failed_share} allows; the last: {last.unit}: {last.message}"
            )


def _try(
    screen: Screen, stage: UnitStage, units: Sequence[WellKey], tasks: int, work: Work, tally: _Tally
) -> dict[WellKey, Failure]:
    """Try each unit once, in so many tasks; those that are to be tried again, and why."""
    again: dict[WellKey, Failure] = {}
    open_ = dict.fromkeys(units)
    with _lost_tasks() as lost:
        for outcome in _outcomes(screen, stage, units, tasks, work):
            unit = WellKey.parse(outcome["unit"])
            del open_[unit]
            if outcome["state"] == "stop":
                raise StageError(
                    f"{stage}: nothing can be written any more: {outcome['message']}; make room or mend the access, "
                    "and say the same again: what is done is kept"
                )
            if outcome["state"] == "again":
                again[unit] = Failure(str(unit), outcome["kind"], outcome["message"])
            else:
                tally.add(unit, outcome["failed_share"], outcome["seconds"])
    # Of these nothing was heard. The worker may have died after its commit, which the listing tells.
    done = screen.done_units(stage) - screen.failed_units(stage) if open_ else set()
    screen.remove_partial({unit.plate for unit in open_})
    # Which of them it was that a reason is of, Ray Data does not say.
    reasons = " or ".join(dict.fromkeys(lost)) or "no reason is known"
    for unit in open_:
        if unit in done:
            tally.add(unit, 0.0)
        else:
            message = f"its worker was lost ({reasons}); if memory has run out, {_SAVES_MEMORY[stage]}"
            again[unit] = Failure(str(unit), LOST, message)
    return again


def _outcomes(
    screen: Screen, stage: UnitStage, units: Sequence[WellKey], tasks: int, work: Work
) -> Iterator[Mapping[str, Any]]:
    if not units:
        return
    rows = [{"unit": str(unit)} for unit in units]
    dataset = ray.data.from_items(rows, override_num_blocks=min(tasks, _MAX_BLOCKS))
    resources: dict[str, Any] = {
        "num_cpus": work.num_cpus,
        "num_gpus": work.num_gpus,
        "memory": work.memory_mb * 2**20 or None,
    }
    # Trying again is up to `run_units`, which counts: Ray by itself would try without end what uses up all memory.
    # It has no other way to be told until these are to go, in 2.64.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        if isinstance(work.function, type):
            dataset = dataset.map(
                _Actor,
                fn_constructor_args=(screen, stage, work.function, work.arguments),
                concurrency=work.actors or (1, len(units)),
                max_task_retries=0,
                **resources,
            )
        else:
            dataset = dataset.map(_Attempt(screen, stage, work.function), max_retries=0, **resources)
    dataset.context.max_errored_blocks = -1
    yield from dataset.iter_rows()


@contextmanager
def _lost_tasks() -> Iterator[list[str]]:
    """Why tasks were lost while the block lasts; Ray Data goes on without them and says so in its log alone."""
    reasons: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if error is None:
            return True
        cause = error.cause if isinstance(error, RayTaskError) else error
        reasons.append(describe(cause))
        return False

    log = logging.getLogger(_EXECUTOR)
    log.addFilter(note)
    try:
        yield reasons
    finally:
        log.removeFilter(note)


@dataclass(frozen=True)
class _Attempt:
    """Does a unit; what it raises becomes a record, so that one bad well costs one well."""

    screen: Screen
    stage: UnitStage
    function: Callable[[WellKey], float]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        outcome = {"unit": row["unit"], "state": "done", "failed_share": 0.0, "kind": "", "message": "", "seconds": 0.0}
        start = time.monotonic()
        try:
            share = self._share(WellKey.parse(row["unit"]))
        except Exception as error:
            if not self._is_told(error):
                raise
            state = "again" if is_passing(error) else "stop"
            return outcome | {"state": state, "kind": type(error).__name__, "message": str(error)}
        return outcome | {"failed_share": share, "seconds": time.monotonic() - start}

    def _share(self, unit: WellKey) -> float:
        try:
            with events.attempt(self.stage, str(unit)):
                return self.function(unit)
        except Exception as error:  # whatever else it is, it is recorded with its unit
            if self._is_told(error):
                raise
            self.screen.write_failures(self.stage, unit, [Failure(str(unit), type(error).__name__, str(error))])
            return 1.0

    def _is_told(self, error: Exception) -> bool:
        """Whether it is for the driver to say what follows, and no record is to be written."""
        return is_passing(error) or self._ends_all(error)

    def _ends_all(self, error: Exception) -> bool:
        """Whether no other unit could be written either."""
        ours = isinstance(error, StoreError) and error.lasting and error.path.startswith(f"{self.screen.url}/")
        return ours or is_disk_full(error)


def is_passing(error: Exception) -> bool:
    """Whether an error says nothing of the unit that met it: it may be gone when the unit is tried again."""
    return (isinstance(error, StoreError) and not error.lasting) or isinstance(error, RayError)


class _Actor:
    """An actor that makes its worker once and then attempts units with it."""

    def __init__(
        self,
        screen: Screen,
        stage: UnitStage,
        factory: Callable[..., Callable[[WellKey], float]],
        arguments: tuple[Any, ...],
    ) -> None:
        self._attempt = _Attempt(screen, stage, factory(*arguments))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._attempt(row)
