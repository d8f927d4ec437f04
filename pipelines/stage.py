"""Doing a stage once: what the manifest says before, while and after, so that a kill at any moment costs no more."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipelines import events
from pipelines.metrics import set_counts
from pipelines.spread import spread
from pipelines.units import Counts
from storage_schemas.screen import Screen, Stage, StageRecord, fingerprint


def do_stage(
    screen: Screen,
    stage: Stage,
    mark: str,
    function: Callable[[], tuple[Counts, list[str]]],
    counts: Counts,
    *,
    whole: bool,
) -> None:
    """Do a stage, or go on with it, unless it is done; what was made from anything else is removed first.

    Args:
        screen: with a manifest.
        stage: which.
        mark: fingerprint of everything that its output depends on.
        function: does it; counts over the whole stage, and notes for the reader.
        counts: what is known before: wells, of a stage that goes well by well.
        whole: whether no well is left to do; wells may have joined since the stage was done.
    """
    record = screen.read_manifest().stages.get(stage)
    if record is not None and record.fingerprint != mark:
        # Said before it is done, or a kill in between would leave a stage that is done and has no files.
        screen.write_record(stage, StageRecord(fingerprint="", counts=counts))
        screen.remove_stage(stage)
        record = None
    if record is not None and record.done and not screen.failures(stage) and whole:
        events.info("stage_done_before", f"{stage}: done before", stage=stage)
        return
    screen.write_record(stage, StageRecord(fingerprint=mark, counts=counts))

    events.info("stage_begun", stage=stage)
    start = time.monotonic()
    counts, notes = function()
    seconds = time.monotonic() - start
    output = fingerprint(mark, screen.outputs(stage, spread))
    record = StageRecord(fingerprint=mark, done=True, output=output, counts=counts, notes=notes, seconds=seconds)
    screen.write_record(stage, record)
    set_counts(screen.url, stage, counts)
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    events.info(
        "stage_done", f"{stage}: {shown} ({seconds:.0f} s)", stage=stage, counts=counts, seconds=round(seconds, 1)
    )
    for note in notes:
        events.info("note", f"  note: {note}", stage=stage)
    for failure in screen.failures(stage)[:5]:
        words = f"  failed: {failure.unit}: {failure.message}"
        events.warning("unit_failed", words, stage=stage, unit=failure.unit, kind=failure.kind, error=failure.message)
