"""MitoReID's ablation table, and its table of methods, on a simulated screen that is harder than the demo's.

Run: ``python benchmarks/ablations.py FOLDER``; some 40 minutes on two cores. Effects are half as strong as in the demo,
images have half of the light, and a third of the compounds come without an MOA: they are all that pretraining has and
fine-tuning has not. Of the other 48, each mechanism has 3 to train on, 1 to choose the epoch on and 2 to test. The
commands are printed before they are run; given again, they go on where they were cut off.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

SIMULATION = {
    "compounds_per_moa": 9,
    "unknown_per_moa": 3,
    "replicates": 2,
    "controls_per_plate": 8,
    "effect_size": 0.5,
    "exposure": 0.5,
}
RUN = {
    "split.test_share": 0.3,
    "split.hold_out_replicate": "false",
    "model.temporal": "retain",
    "pretrain.epochs": 8,
    "train.epochs": 6,
    "evaluation.contrasts": "[]",
}
ROWS = "full,no-pretraining,standard-time,image"
SEEDS = (0, 1, 2)
DEPTH = 10


def sets(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def screening(*arguments: str) -> None:
    """Run the command as a user would, and show it."""
    print("\nscreening", shlex.join(arguments), flush=True)
    subprocess.run([Path(sys.executable).with_name("screening"), *arguments], check=True)


def main(folder: Path) -> None:
    """Simulate, sweep, and compare the methods on the first trial that has everything."""
    config, sweep = str(folder / "simulated" / "run.yaml"), folder / "sweep"
    screening("simulate", str(folder / "simulated"), *sets(SIMULATION))
    seeds = ",".join(map(str, SEEDS))
    chosen = ("--ablations", ROWS, "--depths", str(DEPTH), "--seeds", seeds, "--concurrency", "1")
    screening("sweep", config, "--out", str(sweep), *chosen, *sets(RUN))
    screening("compare", str(sweep / "trials" / f"full-depth{DEPTH}-seed{SEEDS[0]}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
