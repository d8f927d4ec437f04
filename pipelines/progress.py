"""How far a stage has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipelines import events

_LOG_EVERY = 10.0  # seconds between lines where there is no terminal


class Advance(Protocol):
    """Called for each thing done, with what to say beside the count and how many have failed so far."""

    def __call__(self, message: str = "", /, *, failed: int = 0) -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show how many of ``total`` units are done while the block lasts."""
    if events.console.is_terminal and not events.is_json():
        with Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("{task.fields[message]}", markup=False),
            console=events.console,
        ) as bar:
            task = bar.add_task(label, total=total, message="")

            def advance(message: str = "", /, *, failed: int = 0) -> None:
                bar.update(task, advance=1, message=_beside(message, failed))

            yield advance
        return

    start = last = time.monotonic()
    done = 0

    def log(message: str = "", /, *, failed: int = 0) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if done == total or now - last >= _LOG_EVERY:
            last = now
            text = f"{label}: {done}/{total} {unit}, {now - start:.0f} s {_beside(message, failed)}".rstrip()
            counts = {"done": done, "total": total, "failed": failed, "unit": unit, "seconds": round(now - start, 1)}
            events.info("progress", text, stage=label, **counts)

    yield log


def _beside(message: str, failed: int) -> str:
    return f"{failed} failed" if failed else message
