"""The stage `segment` on two cores against a plain loop over the same wells on one: wall seconds and their ratio.

Run on a machine with nothing else to do: ``python benchmarks/ray_stage.py [WELLS] [ROUNDS] [SIDE]``. Wells of one
simulated site of 16 × 3 × SIDE² pixels. The loop does each well as the stage's tasks do, its process pinned to one
core, with one thread. A round that is not counted starts Ray, compiles and calibrates. Ray's workers of the round
before are gone by the next, so beside the seconds of a round stands its pace, the seconds a well from the first ones
done to the last, which leaves their start and imports out. Rounds alternate; medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# One thread a task is what Ray gives its workers; it must be said before numpy is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import ray

from pipelines import config as configs
from pipelines.cluster import cluster
from pipelines.inputs import Inputs, open_inputs
from pipelines.segment import _Context, _plate_forms, segment, segment_well
from pipelines.simulate import simulate
from screening.simulation import SimulationConfig
from storage_schemas.screen import Screen

CORES = 2
CELLS_IN_2048 = 480


def seconds(function: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pinned(function: Callable[[], object]) -> None:
    """Call on one core; the thread is new so that Ray's own threads in this process keep theirs."""

    def call() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def clear(screen: Screen, inputs: Inputs) -> None:
    for well in inputs.wells:
        screen.remove_unit(well)


def pace(screen: Screen, inputs: Inputs, at_once: int) -> float:
    """Wall seconds a well of the round just done, once ``at_once`` of them were done."""
    done = sorted(os.stat(screen.cells(well)).st_mtime for well in inputs.wells)
    return (done[-1] - done[at_once - 1]) / (len(done) - at_once)


def main(wells: int, rounds: int, side: int) -> None:
    """Print the seconds of each round and the ratio of the medians."""
    cv2.setNumThreads(1)
    simulation = SimulationConfig(
        replicates=1,
        moas=("uncoupler",),
        compounds_per_moa=1,
        controls_per_plate=wells - 1,
        frames=16,
        height=side,
        width=side,
        cells_per_site=round(CELLS_IN_2048 * (side / 2048) ** 2),
    )
    with tempfile.TemporaryDirectory() as folder:
        resources = configs.ResourcesConfig(cpus=CORES)
        with cluster(resources):
            assert ray.cluster_resources()["CPU"] == CORES
            simulate(simulation, f"{folder}/simulated")
            config = configs.load(f"{folder}/simulated/run.yaml")
            inputs, screen = open_inputs(config.inputs), Screen(f"{folder}/screen")
            assert config.segment is not None
            context = _Context(config.segment, inputs.plates, _plate_forms(inputs), screen, "benchmark")

            def stage() -> None:
                segment(config, inputs, screen, "benchmark")

            def loop() -> None:
                for well in inputs.wells:
                    segment_well(context, well)

            times: dict[str, list[float]] = {"stage": [], "loop": []}
            paces: dict[str, list[float]] = {"stage": [], "loop": []}
            for _ in range(rounds + 1):
                clear(screen, inputs)
                times["stage"].append(seconds(stage))
                paces["stage"].append(pace(screen, inputs, CORES))
                clear(screen, inputs)
                times["loop"].append(seconds(lambda: pinned(loop)))
                paces["loop"].append(pace(screen, inputs, 1))
    print(f"{len(inputs.wells)} wells of 16 × 3 × {side}², {os.cpu_count()} cores there, the first round not counted")
    for what, taken in (("a round", times), ("a well, start-up left out", paces)):
        medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
        print(f"seconds {what}:")
        for name, values in taken.items():
            print(f"  {name:<6}{' '.join(f'{value:8.2f}' for value in values[1:])}, median {medians[name]:.2f}")
        print(f"  ratio {medians['loop'] / medians['stage']:.2f}")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*arguments, *(12, 5, 1024)[len(arguments) :])
