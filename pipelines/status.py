"""How far a screen has come, at one moment or for as long as somebody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from pipelines import events
from storage_schemas import store
from storage_schemas.errors import StoreError
from storage_schemas.screen import STAGES, Manifest, Screen, Stage, StageRecord, UnitStage

_OF_IMAGES = ("segment", "train", "embed", "evaluate")
_OF_UNITS: tuple[UnitStage, ...] = ("segment", "embed")
_NO_COUNTS = ("wells", "done", "failed")  # which have columns of their own
_RECENT = 300.0  # seconds whose commits tell the rate
_RESTS = 4  # times as long as it took to look, before the next look: a store of many wells is not kept busy by it


def stage_table(screen: Screen) -> pd.DataFrame:
    """A row a stage: its state, wells done and left, failures recorded (of wells or single sites), and its counts.

    Screens of imported profiles have no stages of images.

    Raises:
        SchemaError: if there is no screen.
    """
    rows = []
    for stage, state, record in _stages(screen, screen.read_manifest()):
        done = failed = left = None
        if stage in _OF_UNITS and record is not None:
            units = screen.done_units(stage)
            done = len(units)
            failed = len(screen.failures(stage))
            left = max(record.counts["wells"] - len(units | screen.failed_units(stage)), 0)
        rows.append(
            {
                "stage": stage,
                "state": state,
                "done": done,
                "failed": failed,
                "left": left,
                "counts": _shown(record),
                "seconds": None if record is None else round(record.seconds, 1),
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({name: "Int64" for name in ("done", "failed", "left")})


def glance(screen: Screen, now: float) -> pd.DataFrame:
    """As :func:`stage_table`, at the cost of reading the manifest and of listing what the stage at work has written.

    Args:
        screen: which.
        now: seconds since the epoch.

    Returns:
        A row a stage: stage, state, done, failed (wells, wholly or in part; wholly, once it is done), left, per_minute
        (wells, of late), minutes_left at that rate, idle_minutes since the last commit, counts.

    Raises:
        SchemaError: if there is no screen.
    """
    rows = []
    for stage, state, record in _stages(screen, screen.read_manifest()):
        row: dict[str, Any] = dict.fromkeys(_GLANCE)
        row |= {"stage": stage, "state": state, "counts": _shown(record)}
        if stage in _OF_UNITS and record is not None:
            if state == "begun":
                row |= _pace(screen, stage, record.counts["wells"], now)
            else:
                row |= {"done": record.counts.get("done"), "failed": record.counts.get("failed"), "left": 0}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(_GLANCE)).astype(_GLANCE)


_GLANCE = {
    "stage": "object",
    "state": "object",
    "done": "Int64",
    "failed": "Int64",
    "left": "Int64",
    "per_minute": "Float64",
    "minutes_left": "Float64",
    "idle_minutes": "Float64",
    "counts": "object",
}


def _pace(screen: Screen, stage: UnitStage, wells: int, now: float) -> dict[str, Any]:
    """What the times of a stage's commits say."""
    commits = screen.commit_times(stage)
    failed = screen.failed_units(stage)
    left = max(wells - len(commits.keys() | failed), 0)
    rate = rate_of(list(commits.values()), now)
    return {
        "done": len(commits),
        "failed": len(failed),
        "left": left,
        "per_minute": rate,
        "minutes_left": left / rate if rate else None,
        "idle_minutes": max(0.0, now - max(commits.values())) / 60 if commits else None,
    }


def rate_of(times: Sequence[float], now: float) -> float | None:
    """Commits a minute, of late; None where too few of them are of late to tell.

    Args:
        times: of all commits, in seconds since the epoch by the store's clock.
        now: likewise, by this machine's.
    """
    recent = [moment for moment in times if moment >= now - _RECENT]
    if len(recent) < 2:
        return None
    # From the first commit on: what was done before it was none of the others' time.
    span = max(now, *recent) - min(recent)
    return 60 * (len(recent) - 1) / span if span else None


def watch(
    screen: Screen,
    until: Stage,
    every: float,
    show: Callable[[pd.DataFrame], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Look at a screen again and again until a stage of it is done.

    A store that does not answer is asked again at the next look.

    Args:
        screen: which; another process runs it.
        until: the stage.
        every: seconds between looks; more where a look takes long.
        show: is given each :func:`glance`.
        sleep: waits.

    Raises:
        SchemaError: if there is no screen.
    """
    while True:
        start = time.monotonic()
        try:
            seen = glance(screen, time.time())
        except StoreError as error:
            if error.lasting:
                raise
            events.warning("store_does_not_answer", f"note: asked again, since it does not answer now: {error}")
        else:
            show(seen)
            if _is_done(seen, until):
                return
        sleep(max(every, _RESTS * (time.monotonic() - start)))


def _is_done(seen: pd.DataFrame, until: Stage) -> bool:
    """Whether a stage is done and none before it is at work, as when a screen that was done is run again."""
    before = seen["stage"].map(STAGES.index) <= STAGES.index(until)
    state = seen.loc[before, "state"]
    return bool((state[seen["stage"] == until] == "done").all() and not (state == "begun").any())


def changed_rows(before: pd.DataFrame | None, seen: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The rows of a glance whose state or numbers of wells are others than in the glance before."""
    keys = ["stage", "state", "done", "failed", "left"]
    known = [] if before is None else before[keys].astype(str).to_numpy().tolist()
    for row, key in zip(seen.to_dict("records"), seen[keys].astype(str).to_numpy().tolist(), strict=True):
        if key not in known and (before is not None or row["state"] != "not begun"):
            yield {str(name): None if pd.isna(value) else value for name, value in row.items()}


def sentence(row: dict[str, Any]) -> str:
    """A changed row in words."""
    words = [f"{row['stage']}: {row['state']}"]
    if row["done"] is not None:
        words.append(f"{row['done']} wells done, {row['left']} left")
    if row["failed"]:
        words.append(f"{row['failed']} failed")
    if row["per_minute"] is not None:
        words.append(f"{row['per_minute']:.1f} wells a minute")
    if row["minutes_left"] is not None:
        words.append(f"about {row['minutes_left']:.0f} min left")
    return ", ".join([*words, *([row["counts"]] if row["counts"] else [])])


def _stages(screen: Screen, manifest: Manifest) -> Iterator[tuple[Stage, str, StageRecord | None]]:
    """Each stage that such a screen has, its state, and what the manifest says of it."""
    for stage in STAGES:
        if manifest.has_imported_profiles and stage in _OF_IMAGES:
            continue
        record = manifest.stages.get(stage)
        if record is not None:
            yield stage, "done" if record.done else "begun", record
        else:
            # `screening report` writes the page at any time, and no record.
            written = stage == "report" and store.exists(screen.report)
            yield stage, "done" if written else "not begun", None


def _shown(record: StageRecord | None) -> str:
    counts = {} if record is None else record.counts
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if name not in _NO_COUNTS)
