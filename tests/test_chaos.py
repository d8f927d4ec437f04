"""The chaos of `make chaos`: two of its runs, and whether it would see what must not happen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import get_args

import pandas as pd
import pyarrow.parquet as pq
import pytest
from chaos import FIRST, KINDS, MOMENTS, Chaos, Fault, Plan, Way, differences, draw, site


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, finished_screen: Path) -> Iterator[Chaos]:
    folder = tmp_path_factory.mktemp("chaos")
    with site(folder) as (network, server, _):
        yield Chaos(folder, network, server, finished_screen / "checkpoint")


def test_seeds_say_what_happens() -> None:
    plans = [draw(seed) for seed in range(20)]
    assert plans == [draw(seed) for seed in range(20)]
    assert [plan.where for plan in plans] == ["disk", "S3"] * 10
    for plan in plans:
        assert FIRST[plan.seed % 3] in {fault.kind for fault in plan.faults}
        moments = [(MOMENTS.index(fault.moment), fault.count) for fault in plan.faults]
        assert moments == sorted(moments)
    faults = [fault for plan in plans for fault in plan.faults]
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.moment for fault in faults} == set(MOMENTS)
    assert {(plan.where, plan.way) for plan in plans} == set(product(("disk", "S3"), get_args(Way)))


# --- what it would see ---------------------------------------------------------------------------


def lose_a_unit(screen: Path) -> str:
    (screen / "cells/plate-1/B02.parquet").unlink()
    return "unit lost: plate-1/B02.parquet"


def double_a_unit(screen: Path) -> str:
    table = screen / "embeddings/plate-1/B02.parquet"
    whole = pq.read_table(table)
    pq.write_table(whole.take([*range(len(whole)), 0]), table)
    return "cells doubled or strange: embeddings/plate-1/B02.parquet"


def take_another_for_it(screen: Path) -> str:
    shutil.copy(screen / "cells/plate-1/B02.parquet", screen / "cells/plate-1/B03.parquet")
    return "cells doubled or strange: cells/plate-1/B03.parquet"


def change_a_clip(screen: Path) -> str:
    chunk = next(path for path in sorted(screen.glob("clips/plate-1/B02.zarr/c/**/*")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    return f"differs: {chunk.relative_to(screen)}"


def change_a_profile(screen: Path) -> str:
    table = screen / "profiles/well.parquet"
    frame = pd.read_parquet(table)
    frame.iloc[::-1].to_parquet(table)
    return "differs: profiles/well.parquet"


def leave_a_part(screen: Path) -> str:
    (screen / "quality/.table.partial").touch()
    return "left over: quality/.table.partial"


def record_a_failure(screen: Path) -> str:
    (screen / "failures/segment/plate-1").mkdir(parents=True)
    (screen / "failures/segment/plate-1/B02.json").write_text("[]")
    return "failure recorded: failures/segment/plate-1/B02.json"


def change_a_count(screen: Path) -> str:
    manifest = json.loads((screen / "manifest.json").read_text())
    counts = manifest["stages"]["embed"]["counts"]
    manifest["stages"]["embed"]["counts"] = counts | {"cells": counts["cells"] + 1}
    (screen / "manifest.json").write_text(json.dumps(manifest))
    changed = manifest["stages"]["embed"]["counts"]
    return f"manifest: counts of embed: {changed}, not {counts}"


def add_a_calibration(screen: Path) -> str:
    shutil.copy(screen / "calibration/plate-1.npz", screen / "calibration/plate-9.npz")
    return "too much: calibration/plate-9.npz"


def change_the_index(screen: Path) -> str:
    vectors = max(
        (path for path in screen.glob("index/*/**/*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = vectors.read_bytes()
    vectors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return "differs: index"


HARM = (
    lose_a_unit,
    double_a_unit,
    take_another_for_it,
    change_a_clip,
    change_a_profile,
    leave_a_part,
    record_a_failure,
    change_a_count,
    add_a_calibration,
    change_the_index,
)


@pytest.mark.parametrize("harm", HARM)
def test_what_must_not_happen_is_seen(harm: Callable[[Path], str], finished_screen: Path, tmp_path: Path) -> None:
    screen = tmp_path / "screen"
    shutil.copytree(finished_screen, screen)
    assert differences(screen, finished_screen) == []
    assert harm(screen) in differences(screen, finished_screen)


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_of_worker_and_driver_leave_the_undisturbed_screen(chaos: Chaos) -> None:
    faults = (Fault("worker", "segment", 4, 0.0, 0.5), Fault("driver", "segment", 12, 0.0, 0.0))
    outcome = chaos.run(Plan(0, "disk", "network", faults))
    assert outcome.wrong == [], chaos.said()
    assert outcome.starts == 2
    assert [fault for fault, _ in outcome.happened] == list(faults)


@pytest.mark.slow
def test_a_lost_raylet_and_a_failing_store_leave_it_too(chaos: Chaos) -> None:
    outcome = chaos.run(Plan(1, "S3", "network", (Fault("raylet", "segment", 6, 0.0, 0.5),)))
    assert outcome.wrong == [], chaos.said()
    assert outcome.starts == 1
    assert not outcome.store.startswith("0 of")
