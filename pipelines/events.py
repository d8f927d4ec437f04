"""What a command says while it works, on standard error: a line for people or, on demand, a JSON line an event.

Every event has a name and fields, and most have words for people. Ray's own log files of its workers get the same JSON
lines whatever a command's form is: they are read by programs, and by people only when something is wrong.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console

from storage_schemas.remote import without_secrets

LogFormat = Literal["text", "json"]
VARIABLE = "SCREENING_LOG_FORMAT"  # names the form where no option does, as for jobs and in notebooks

console = Console(stderr=True, highlight=False)

_shared: dict[str, Any] = {}  # fields of every event; of the process, since stages have threads of their own

# User and password of a URL. More is hidden than stores refuse, as passwords with a slash: a log that hides a part of
# a path does no harm.
_USER = re.compile(r"""(\w://)(?:[^\s/@:"']*:[^\s@"']*|[^\s/@"']+)@""")


def info(event: str, message: str = "", /, **fields: Any) -> None:
    """Say what has happened; without words it is said in JSON only.

    Args:
        event: its name, by which programs know it.
        message: words for people.
        fields: values that JSON has.
    """
    _say(logging.INFO, event, message, fields)


def warning(event: str, message: str = "", /, **fields: Any) -> None:
    """As :func:`info`, of what somebody may have to look at."""
    _say(logging.WARNING, event, message, fields)


def error(event: str, message: str = "", /, **fields: Any) -> None:
    """As :func:`info`, of what has failed."""
    _say(logging.ERROR, event, message, fields)


def note(message: str, /, **fields: Any) -> None:
    """What a reader of the result should know."""
    _say(logging.INFO, "note", f"note: {message}", fields)


def line(level: int, event: str, message: str = "", /, **fields: Any) -> None:
    """Write a JSON line to standard error whatever the form is: in a worker that is a log file of Ray's."""
    record = _record(level, event, message, fields)
    sys.stderr.write(_JSON.format(record) + "\n")
    sys.stderr.flush()


@contextmanager
def attempt(stage: str, unit: str) -> Iterator[None]:
    """Write to the worker's log how the block has ended: that the unit is done, or all of what it raised."""
    start = time.monotonic()
    try:
        yield
    except Exception as error:
        seconds = round(time.monotonic() - start, 3)
        what = {"kind": type(error).__name__, "error": str(error), "traceback": traceback.format_exc()}
        line(logging.ERROR, "unit_failed", stage=stage, unit=unit, seconds=seconds, **what)
        raise
    line(logging.INFO, "unit_done", stage=stage, unit=unit, seconds=round(time.monotonic() - start, 3))


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Give these fields, such as which screen it is, to all events of this process while the block lasts."""
    before = dict(_shared)
    _shared.update(fields)
    try:
        yield
    finally:
        _shared.clear()
        _shared.update(before)


def use(form: LogFormat) -> None:
    """Choose the form of this process's log. In JSON, what libraries warn of and log is put into lines as well."""
    as_json = form == "json"
    _handler.setFormatter(_JSON if as_json else _TEXT)
    logging.captureWarnings(as_json)
    root = logging.getLogger()
    root.removeHandler(_handler)
    if as_json:
        root.addHandler(_handler)


def is_json() -> bool:
    """Whether events are JSON lines."""
    return _handler.formatter is _JSON


def masked(text: str) -> str:
    """A text without the secrets of the URLs in it."""
    return without_secrets(_USER.sub(r"\1***@", text)) if "://" in text else text


def visible(text: str) -> str:
    """A text in which what would move a terminal's cursor or change its settings is written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _say(level: int, event: str, message: str, fields: dict[str, Any]) -> None:
    if message or is_json():
        _handler.handle(_record(level, event, message, fields))


def _record(level: int, event: str, message: str, fields: dict[str, Any]) -> logging.LogRecord:
    more = {"event": event, "fields": {**_shared, **fields}}
    return logging.makeLogRecord({"levelno": level, "levelname": logging.getLevelName(level), "msg": message, **more})


class _JsonFormatter(logging.Formatter):
    """An object a line: time, level, event, message, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record, of ours or of a library's."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
        }
        if message := record.getMessage().strip():
            document["message"] = message
        if not hasattr(record, "event"):
            document["logger"] = record.name
        document.update(getattr(record, "fields", {}))
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return masked(json.dumps(document, ensure_ascii=False, default=str))


class _TextFormatter(logging.Formatter):
    """The words alone, and that they tell of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """The words of one record."""
        prefix = "error: " if record.levelno >= logging.ERROR else ""
        said = masked(f"{prefix}{record.getMessage()}")
        return "\n".join(map(visible, said.split("\n")))


class _Handler(logging.Handler):
    """Standard error, as it is at the moment; where a bar is being drawn on a terminal, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            text = self.format(record)
            if is_json():
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
            else:
                style = "red" if record.levelno >= logging.ERROR else None
                console.print(text, style=style, markup=False, soft_wrap=True)
        except Exception:  # what a full disk or a closed pipe does to a log must not end a run
            self.handleError(record)


_JSON, _TEXT = _JsonFormatter(), _TextFormatter()
_handler = _Handler(logging.INFO)
use("json" if os.environ.get(VARIABLE) == "json" else "text")
