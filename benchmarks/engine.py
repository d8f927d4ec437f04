"""What the engine costs: a stage's units through Ray beside a plain loop over the same pure functions on one core.

Run on a machine with nothing else to do: ``python benchmarks/engine.py [ROUNDS] [CASE ...]``, where cases are ``1``,
``0.1`` and ``0.01`` (units that compute for so many seconds and commit a small file) and ``segment`` (wells of one
simulated site of 16 × 3 × 1024² pixels through the real stage). All by default, five rounds. Both ways in turn, the
order of the two changing; medians of wall seconds.

With one core everything, Ray's own processes too, is held to one core; with two, to two; the loop always to one, in one
thread. Efficiency is the loop's time by cores times the pipeline's. Ray's workers of the round before are gone by the
next, so a round has their start and imports in it; beside it stands the pace, the seconds a unit from the first ones
done to the last, which leaves these out. Starting Ray itself is in neither: it is printed by itself. ``CPU`` is the
processor time a unit of all processes of the pipeline above that of the loop, and ``busy`` the share of the time, from
the first unit's start to the last one's end, that cores of the pipeline were in a unit: other work on the machine
changes these two little.
"""

from __future__ import annotations

import os

# One thread a task is what Ray gives its workers; it must be said before numpy is loaded.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray would give its workers a lower priority than the loop has.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (its name is Ray's)

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import cv2
from processes import processor_time

from pipelines import config as configs
from pipelines.cluster import cluster
from pipelines.inputs import open_inputs
from pipelines.segment import _Context, _plate_forms, segment, segment_well
from pipelines.simulate import simulate
from pipelines.units import Work, run_units
from screening.simulation import SimulationConfig
from storage_schemas import store
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen

UNITS = {"1": 60, "0.1": 300, "0.01": 1000, "segment": 12}
SIDE, CELLS = 1024, 120
_BLOCK = bytes(2**20)


@dataclass(frozen=True)
class Case:
    """The same units in two ways.

    Attributes:
        screen: that they are committed to.
        units: what is to be done.
        one: does one of them.
        stage: does all, through Ray.
        says_when: whether a unit's file says when it began.
    """

    screen: Screen
    units: Sequence[WellKey]
    one: Callable[[WellKey], object]
    stage: Callable[[], object]
    says_when: bool = True

    def loop(self) -> None:
        """Do all, one after the other."""
        for unit in self.units:
            self.one(unit)


@dataclass(frozen=True)
class Taken:
    """A round.

    Attributes:
        wall: seconds.
        pace: seconds a unit, once the first ones were done.
        cpu: seconds of all processes.
        busy: share of the time that cores were in a unit; NaN where units do not say when they began.
    """

    wall: float
    pace: float
    cpu: float
    busy: float


def compute(screen: Screen, blocks: int, unit: WellKey) -> float:
    """A unit that computes and is committed by a small file, which says when it began."""
    start = time.time()
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(_BLOCK)
    store.write_bytes(screen.cells(unit), f"{start} {digest.hexdigest()}".encode())
    return 0.0


def blocks_in(seconds: float) -> int:
    """How many blocks are digested in so many seconds of one core."""
    some = 500
    start = time.process_time()
    digest = hashlib.sha256()
    for _ in range(some):
        digest.update(_BLOCK)
    return max(1, round(some * seconds / (time.process_time() - start)))


def computing(folder: str, seconds: str, blocks: int) -> Case:
    """Units of so many seconds."""
    screen = Screen(f"{folder}/{seconds}")
    units = [WellKey(f"p{i // 96}", f"{'ABCDEFGH'[i % 96 // 12]}{i % 12 + 1:02d}") for i in range(UNITS[seconds])]
    one = partial(compute, screen, blocks)
    return Case(screen, units, one, lambda: run_units(screen, "segment", units, Work(one), 0))


def segmenting(folder: str) -> Case:
    """Wells of a simulated plate, made before by :func:`simulated`."""
    config = configs.load(f"{folder}/simulated/run.yaml")
    inputs, screen = open_inputs(config.inputs), Screen(f"{folder}/screen")
    assert config.segment is not None
    context = _Context(config.segment, inputs.plates, _plate_forms(inputs), screen, "benchmark")
    return Case(
        screen,
        inputs.wells,
        partial(segment_well, context),
        lambda: segment(config, inputs, screen, "benchmark"),
        says_when=False,
    )


def simulated(folder: str) -> None:
    """A plate of single sites."""
    simulation = SimulationConfig(
        replicates=1,
        moas=("uncoupler",),
        compounds_per_moa=1,
        controls_per_plate=UNITS["segment"] - 1,
        frames=16,
        height=SIDE,
        width=SIDE,
        cells_per_site=CELLS,
    )
    simulate(simulation, f"{folder}/simulated")


def held_to(cores: int) -> None:
    """Hold every thread of this process, and what it starts from now on, to so many cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), range(cores))


def taken(case: Case, function: Callable[[], object], at_once: int) -> Taken:
    """Do the case anew."""
    for unit in case.units:
        case.screen.remove_unit(unit)
    cpu, start = processor_time(), time.perf_counter()
    function()
    wall, cpu = time.perf_counter() - start, processor_time() - cpu
    files = [case.screen.cells(unit) for unit in case.units]
    done = sorted(os.stat(file).st_mtime for file in files)
    busy = float("nan")
    if case.says_when:
        began = [float(store.read_bytes(file).split()[0]) for file in files]
        busy = (sum(done) - sum(began)) / at_once / (done[-1] - min(began))
    return Taken(wall, (done[-1] - done[at_once - 1]) / (len(done) - at_once), cpu, busy)


def looped(case: Case) -> Taken:
    """One after the other, on one core."""
    there = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(there)})  # this thread alone: Ray's in this process keep theirs
    try:
        return taken(case, case.loop, 1)
    finally:
        os.sched_setaffinity(0, there)


def compare(name: str, case: Case, cores: int, rounds: int) -> None:
    """Print the medians of a case."""
    ways: dict[str, list[Taken]] = {"loop": [], "stage": []}
    run = {"loop": lambda: looped(case), "stage": lambda: taken(case, case.stage, cores)}
    if name == "segment":
        case.stage()  # compiles and calibrates
    for number in range(rounds):
        for way in sorted(run, reverse=bool(number % 2)):
            ways[way].append(run[way]())
    loop, stage = (
        Taken(*(statistics.median(column) for column in zip(*map(astuple, ways[way]), strict=True)))
        for way in ("loop", "stage")
    )
    n = len(case.units)
    overhead = 1000 * (cores * stage.pace - loop.pace)
    print(
        f"{name:>8}{cores:>6}{n:>6}{loop.wall:>9.2f}{stage.wall:>9.2f}{loop.wall / cores / stage.wall:>9.3f}"
        f"{1000 * loop.pace:>11.1f}{1000 * stage.pace:>9.1f}{loop.pace / cores / stage.pace:>9.3f}{overhead:>11.1f}"
        f"{1000 * (stage.cpu - loop.cpu) / n:>9.1f}{stage.busy:>9.3f}",
        flush=True,
    )


def main(rounds: int, names: Sequence[str]) -> None:
    """Print a row a case and number of cores."""
    cv2.setNumThreads(1)
    everywhere = os.cpu_count() or 1
    print(
        f"{rounds} rounds, {everywhere} cores, load {os.getloadavg()[0]:.1f} at the start; ms but for a round's seconds"
    )
    print(
        f"{'unit':>8}{'cores':>6}{'units':>6}{'loop s':>9}{'stage s':>9}{'effic.':>9}"
        f"{'loop/unit':>11}{'pace':>9}{'effic.':>9}{'over/unit':>11}{'CPU':>9}{'busy':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if "segment" in names:
            with cluster(configs.ResourcesConfig(cpus=everywhere)):
                simulated(folder)
        blocks = {name: blocks_in(float(name)) for name in names if name != "segment"}
        for cores in range(1, min(everywhere, 2) + 1):
            held_to(cores)
            start = time.perf_counter()
            with cluster(configs.ResourcesConfig(cpus=cores)):
                print(f"starting Ray on {cores} core(s): {time.perf_counter() - start:.1f} s", flush=True)
                for name in names:
                    case = segmenting(folder) if name == "segment" else computing(folder, name, blocks[name])
                    compare(name, case, cores, rounds)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:] or list(UNITS))
