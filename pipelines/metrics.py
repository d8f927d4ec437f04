"""What Prometheus can be told of a run: counted in the driver, offered by Ray beside its own metrics.

The driver counts, since it sees every unit end, whichever worker or node it was on and whether that is still there. A
process that runs no Ray, or a Ray without the agent that offers metrics (extra ``cluster``), counts for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple, Self

from ray.util.metrics import Counter, Gauge, Histogram

from pipelines import events

_TAGS = ("screen", "stage")
_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]  # upper bounds of the histogram's buckets

Outcome = Literal["done", "part", "failed"]


class _Metrics(NamedTuple):
    units: Counter
    retries: Counter
    seconds: Histogram
    busy: Counter
    left: Gauge
    counts: Gauge


@cache
def _metrics() -> _Metrics:
    """All metrics of the project. Ray puts ``ray_`` before their names, and ``_total`` behind those of counters."""
    return _Metrics(
        units=Counter("screening_units", "Units that have ended: done, part or failed", (*_TAGS, "outcome")),
        retries=Counter("screening_unit_retries", "Attempts at units that are made again", _TAGS),
        seconds=Histogram("screening_unit_seconds", "Seconds a unit; Ray knows the buckets only", _SECONDS, _TAGS),
        busy=Counter("screening_unit_busy_seconds", "Seconds of all units that have ended, together", _TAGS),
        left=Gauge("screening_units_left", "Units that have not ended yet", _TAGS),
        counts=Gauge("screening_stage_count", "What a stage that is done counted, such as cells", (*_TAGS, "what")),
    )


def names() -> set[str]:
    """The names that Prometheus sees, of every metric."""
    metrics = _metrics()
    found = set()
    for metric in metrics:
        name = f"ray_{metric.info['name']}"
        if isinstance(metric, Counter):
            found.add(f"{name}_total")
        elif isinstance(metric, Histogram):
            found |= {f"{name}_bucket", f"{name}_count", f"{name}_sum"}
        else:
            found.add(name)
    return found


class StageMetrics:
    """What is counted of one stage of one screen, for as long as a ``with`` block lasts: then nothing is left to do.

    Args:
        screen: folder or URL of the screen.
        stage: which.
        units: how many are to be done.
    """

    def __init__(self, screen: str, stage: str, units: int) -> None:
        self._tags = _tags(screen, stage)
        self._left = units
        self._set_left()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What a stage that was stopped has not done would look like a screen that stands still.
        self._left = 0
        self._set_left()

    def ended(self, outcome: Outcome, seconds: float | None) -> None:
        """Count a unit that will not be tried again.

        Args:
            outcome: ``part`` where some sites of a well have failed.
            seconds: that its last attempt took, where that is known.
        """
        metrics = _metrics()
        metrics.units.inc(1, {**self._tags, "outcome": outcome})
        if seconds:
            metrics.seconds.observe(seconds, self._tags)
            metrics.busy.inc(seconds, self._tags)
        self._left -= 1
        self._set_left()

    def tried_again(self, units: int) -> None:
        """Count attempts that failed and are made again."""
        _metrics().retries.inc(units, self._tags)

    def _set_left(self) -> None:
        _metrics().left.set(self._left, self._tags)


def set_counts(screen: str, stage: str, counts: Mapping[str, int]) -> None:
    """Tell what a stage that is done has counted: wells, cells, clips and what else there is of it."""
    for what, count in counts.items():
        _metrics().counts.set(count, {**_tags(screen, stage), "what": _ascii(what)})


def _tags(screen: str, stage: str) -> dict[str, str]:
    """Metrics name a screen by the last part of its URL: a whole one may hold secrets."""
    name = events.masked(screen).rstrip("/").rpartition("/")[2]
    return {"screen": _ascii(name), "stage": stage}


def _ascii(text: str) -> str:
    """All that Ray takes."""
    return text.encode("ascii", "backslashreplace").decode()
