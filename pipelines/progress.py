"""How far a stage has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LOG_EVERY = 10.0  # seconds between lines where there is no terminal

console = Console(stderr=True, highlight=False)


class Advance(Protocol):
    """Called for each thing done, with what to say beside the count."""

    def __call__(self, message: str = "", /) -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show how many of ``total`` units are done while the block lasts."""
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("{task.fields[message]}"),
            console=console,
        ) as bar:
            task = bar.add_task(label, total=total, message="")

            def advance(message: str = "", /) -> None:
                bar.update(task, advance=1, message=message)

            yield advance
        return

    start = last = time.monotonic()
    done = 0

    def log(message: str = "", /) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if done == total or now - last >= _LOG_EVERY:
            last = now
            console.print(f"{label}: {done}/{total} {unit}, {now - start:.0f} s {message}".rstrip(), soft_wrap=True)

    yield log
