"""A run that is killed goes on with the same command, to the same screen as a run that was left alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from runs import Run, Victim, digests, indexed, times

from storage_schemas.checkpoint import read_manifest

SEGMENTED = ("calibration", "cells", "quality", "clips")
RESULTS = (
    *SEGMENTED,
    "split.parquet",
    "train/metrics.parquet",
    "checkpoint",
    "embeddings",
    "profiles",
    "statistics",
    "evaluation.json",
)
EPOCHS = 6


@dataclass(frozen=True)
class Kill:
    """Kill the victim once there are so many files of a pattern."""

    stage: str
    pattern: str
    count: int
    victim: Victim


KILLS = (
    Kill("segment", "cells/*/*.parquet", 2, "driver"),
    Kill("segment", "cells/*/*.parquet", 8, "tree"),
    Kill("train", "train/runs/*/epoch_0002/manifest.json", 1, "group"),
    Kill("train", "train/runs/*/epoch_0004/manifest.json", 1, "driver"),
    Kill("embed", "embeddings/*/*.parquet", 2, "tree"),
    Kill("index", "embeddings/*/*.parquet", 16, "driver"),
    Kill("evaluate", "index/manifest.json", 1, "group"),
)


def count(screen: Path, pattern: str) -> int:
    return sum(1 for _ in screen.glob(pattern))


def finished(screen: Path) -> dict[str, int]:
    """When the files of finished units were written: of wells that have been segmented or embedded, and epochs."""
    wells = [path.relative_to(screen / "cells").with_suffix("") for path in screen.glob("cells/*/*.parquet")]
    parts = [
        f"{folder}/{well}{suffix}"
        for well in wells
        for folder, suffix in (
            ("cells", ".parquet"),
            ("quality", ".parquet"),
            ("clips", ".zarr"),
            ("embeddings", ".parquet"),
        )
    ]
    return times(screen, "calibration", *parts)


def epochs(screen: Path) -> list[int]:
    """Whole checkpoints of epochs that are kept."""
    found = screen.glob("train/runs/*/epoch_*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("epoch_")) for path in found)


class Watch:
    """Says when it is time to kill, and sees which epochs are trained until then."""

    def __init__(self, screen: Path, kill: Kill) -> None:
        self._screen = screen
        self._kill = kill
        self._before = set(epochs(screen))
        self._seen: set[int] = set()

    def __call__(self) -> bool:
        self._seen.update(set(epochs(self._screen)) - self._before)
        return count(self._screen, self._kill.pattern) >= self._kill.count

    def repeated(self) -> set[int]:
        """Epochs seen that come before one that was there at the start."""
        return {epoch for epoch in self._seen if self._before and epoch <= max(self._before)}


@pytest.mark.slow
def test_a_killed_segmentation_goes_on(
    small_screen: Path, small_settings: list[str], finished_screen: Path, tmp_path: Path
) -> None:
    screen = tmp_path / "screen"
    command = ("run", small_screen / "run.yaml", "--out", screen, "--stages", "segment", *small_settings)
    first = Run(tmp_path / "log", *command)
    first.wait_until(lambda: count(screen, "cells/*/*.parquet") >= 3)
    first.kill("tree")
    done = finished(screen)
    assert count(screen, "cells/*/*.parquet") < 16
    again = Run(tmp_path / "log", *command)
    assert again.wait() == 0, again.said()
    assert finished(screen).items() >= done.items()
    assert digests(screen, *SEGMENTED) == digests(finished_screen, *SEGMENTED)


@pytest.mark.slow
def test_kills_at_every_stage_leave_no_trace(small_screen: Path, small_settings: list[str], tmp_path: Path) -> None:
    settings = (*small_settings, "--set", f"train.epochs={EPOCHS}")
    calm, screen = tmp_path / "calm", tmp_path / "screen"
    undisturbed = Run(tmp_path / "calm.log", "run", small_screen / "run.yaml", "--out", calm, *settings)
    assert undisturbed.wait() == 0, undisturbed.said()

    command = ("run", small_screen / "run.yaml", "--out", screen, *settings)
    log = tmp_path / "log"
    done: dict[str, int] = {}
    for kill in KILLS:
        run = Run(log, *command)
        watch = Watch(screen, kill)
        run.wait_until(watch)
        run.kill(kill.victim)
        assert watch.repeated() == set(), "trained on from the start, not from the last checkpoint"
        now = finished(screen)
        assert now.items() >= done.items(), f"done before, and again before the kill in {kill.stage}"
        done = now
        record = json.loads((screen / "manifest.json").read_text())["stages"].get(kill.stage)
        # The last stages are over in a blink: the kill may come after them, but not after all.
        assert record is None or not record["done"] or kill.stage in ("index", "evaluate")
        assert not (screen / "report.html").exists()

    last = Run(log, *command)
    assert last.wait() == 0, last.said()
    assert finished(screen).items() >= done.items()
    history = read_manifest(str(screen / "checkpoint")).history
    assert [metrics["epoch"] for metrics in history] == list(range(1, EPOCHS + 1))
    assert_same_screen(screen, calm)


def assert_same_screen(screen: Path, calm: Path) -> None:
    """The same files, byte for byte; where not, it should be said whether it is the content that differs."""
    found, expected = (digests(folder, *RESULTS) | indexed(folder) for folder in (screen, calm))
    assert found.keys() == expected.keys()
    for name in [name for name in found if found[name] != expected[name] and name.endswith(".parquet")]:
        pd.testing.assert_frame_equal(pd.read_parquet(screen / name), pd.read_parquet(calm / name), check_exact=True)
    for clips in calm.glob("clips/*/*.zarr"):
        same = screen / clips.relative_to(calm)
        np.testing.assert_array_equal(zarr.open_array(same, mode="r")[...], zarr.open_array(clips, mode="r")[...])
    assert found == expected
