"""How many CPUs a run has changes nothing but its speed."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run, digests


@pytest.mark.slow
def test_one_cpu_finds_the_same_cells_and_ends(
    small_screen: Path, small_settings: list[str], finished_screen: Path, tmp_path: Path
) -> None:
    screen = tmp_path / "screen"
    one = Run(
        tmp_path / "log",
        *("run", small_screen / "run.yaml", "--out", screen, *small_settings, "--set", "resources.cpus=1"),
    )
    assert one.wait() == 0, one.said()
    assert (screen / "report.html").exists()
    for part in ("calibration", "cells", "quality", "clips", "split.parquet"):
        assert digests(screen, part) == digests(finished_screen, part)
