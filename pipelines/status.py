"""How far a screen has come."""

from __future__ import annotations

import pandas as pd

from storage_schemas import store
from storage_schemas.screen import STAGES, Screen

_OF_IMAGES = ("segment", "train", "embed", "evaluate")


def stage_table(screen: Screen) -> pd.DataFrame:
    """A row a stage: its state, wells done and left, failures recorded (of wells or single sites), and its counts.

    Screens of imported profiles have no stages of images.

    Raises:
        SchemaError: if there is no screen.
    """
    manifest = screen.read_manifest()
    rows = []
    for stage in STAGES:
        if manifest.has_imported_profiles and stage in _OF_IMAGES:
            continue
        record = manifest.stages.get(stage)
        # `screening report` writes the page at any time, and no record.
        absent = "done" if stage == "report" and store.exists(screen.report) else "not begun"
        done = failed = left = None
        if (stage == "segment" or stage == "embed") and record is not None:
            units = screen.done_units(stage)
            done = len(units)
            failed = len(screen.failures(stage))
            left = max(record.counts["wells"] - len(units | screen.failed_units(stage)), 0)
        counts = {} if record is None else record.counts
        rows.append(
            {
                "stage": stage,
                "state": absent if record is None else "done" if record.done else "begun",
                "done": done,
                "failed": failed,
                "left": left,
                "counts": ", ".join(
                    f"{name} {count:,}" for name, count in counts.items() if name not in ("wells", "done", "failed")
                ),
                "seconds": None if record is None else round(record.seconds, 1),
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({name: "Int64" for name in ("done", "failed", "left")})
