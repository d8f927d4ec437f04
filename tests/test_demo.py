"""The demo learns what it claims to: mechanisms of compounds it has never seen, and time courses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Run, digests

from screening.simulation import KINETIC_PAIR


def evaluation(screen: Path) -> dict[str, Any]:
    return json.loads((screen / "evaluation.json").read_text(encoding="utf-8"))["compound"]


def kinetic_pair(scores: dict[str, Any]) -> dict[str, float]:
    (contrast,) = (part for name, part in scores["contrasts"].items() if set(name.split(" vs ")) == set(KINETIC_PAIR))
    return contrast["rank1"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo_knows_unseen_compounds_and_needs_time_to_tell_the_kinetic_pair(tmp_path: Path) -> None:
    demo = Run(tmp_path / "log", "demo", tmp_path / "demo")
    assert demo.wait(900) == 0, demo.said()
    full = evaluation(tmp_path / "demo" / "screen")

    # The same cells, seen by a network that has but the last frame of each.
    image_screen = tmp_path / "image"
    shutil.copytree(tmp_path / "demo" / "screen", image_screen)
    segmented = digests(image_screen, "cells", "clips")
    image_run = Run(
        tmp_path / "log",
        *("run", tmp_path / "demo" / "plates" / "run.yaml", "--out", image_screen, "--update"),
        *("--set", "model.temporal=image", "--stages", "segment,train,embed,evaluate"),
    )
    assert image_run.wait(500) == 0, image_run.said()
    assert digests(image_screen, "cells", "clips") == segmented
    image = evaluation(image_screen)

    rank1 = full["rank1"]
    assert rank1["value"] >= 3 * rank1["chance"]
    assert rank1["low"] > rank1["chance"]
    with_time, without = kinetic_pair(full), kinetic_pair(image)
    assert with_time["low"] > without["high"]
    # Two held-out compounds, each with ways of its own: near a coin's flip is as much as can be said.
    assert abs(without["value"] - without["chance"]) < 0.25
