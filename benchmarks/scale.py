"""How the engine bears many units: ``python benchmarks/scale.py [UNITS]``, up to 100,000 by default.

Each unit writes a small table of embeddings through :mod:`storage_schemas`, with the real commit, and is run by the
real :func:`pipelines.units.run_units`; so what is timed is the engine, the commit and the driver. A row is a run in a
process of its own: more and more units on two cores; then nodes (raylets of one CPU on this machine), cores, and cells
a unit.

Columns: units a second from start to end; seconds to the first commit; seconds that counting takes, as the stage does
at its end; seconds of a second run that finds everything done; the driver's memory at its peak and by how much it has
grown since Ray was started; processor time a unit, of the driver and of all processes. The last two change little with
other work on the machine. Three raylets on two cores share these: what more nodes cost is seen there, not what they
bring.

What 1,000 plates would take is computed by ``benchmarks/costs.py``.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from processes import processor_time
from ray.cluster_utils import Cluster

from pipelines.cluster import quiet_ray_data
from pipelines.spread import spread
from pipelines.units import Work, run_units
from pipelines.vectors import vector_column
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import embeddings_form, row_count, write_table

DIMENSION = 64
FORM = embeddings_form(DIMENSION)
WELLS = [f"{'ABCDEFGHIJKLMNOP'[i // 24]}{i % 24 + 1:02d}" for i in range(384)]
# Units, nodes, cores a node, cells a unit.
RUNS = [
    (100, 1, 2, 10),
    (1_000, 1, 2, 10),
    (10_000, 1, 2, 10),
    (100_000, 1, 2, 10),
    (1_000, 1, 1, 10),
    (1_000, 2, 1, 10),
    (1_000, 3, 1, 10),
    (1_000, 1, 2, 1_000),
]


def embed(screen: Screen, cells: int, unit: WellKey) -> float:
    """A unit: it computes nothing, and commits a table."""
    keys = pd.DataFrame(
        {"plate": unit.plate, "well": unit.well, "site": "0", "track": np.arange(1, cells + 1, dtype="i4")}
    )
    table = pa.Table.from_pandas(keys, preserve_index=False)
    vectors = np.zeros((cells, DIMENSION), np.float32)
    write_table(screen.embeddings(unit), table.append_column("embedding", vector_column(vectors)), FORM)
    return 0.0


@contextmanager
def raylets(nodes: int, cores: int) -> Iterator[None]:
    """A cluster of nodes on this machine."""
    node = {"num_cpus": cores, "object_store_memory": 2**27}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        quiet_ray_data()
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(units: int, nodes: int, cores: int, cells: int) -> dict[str, float]:
    """One run, in this process."""
    keys = [WellKey(f"plate-{i // len(WELLS)}", WELLS[i % len(WELLS)]) for i in range(units)]
    with tempfile.TemporaryDirectory() as folder, raylets(nodes, cores):
        screen = Screen(folder)
        work = Work(partial(embed, screen, cells))
        before, spent, of_all = peak(), time.process_time(), processor_time()
        began, start = time.time(), time.perf_counter()
        run_units(screen, "embed", keys, work, 0)
        took = time.perf_counter() - start
        spent, of_all = time.process_time() - spent, processor_time() - of_all
        first = min(os.stat(screen.embeddings(key)).st_mtime for key in keys) - began
        start = time.perf_counter()
        found = sum(spread(partial(row_count, form=FORM), [screen.embeddings(key) for key in keys]))
        counted = time.perf_counter() - start
        assert found == units * cells, "nothing is lost"
        start = time.perf_counter()
        run_units(screen, "embed", keys, work, 0)
        again = time.perf_counter() - start
        return {
            "units/s": units / took,
            "first s": first,
            "count s": counted,
            "resume s": again,
            "peak MiB": peak(),
            "grown MiB": peak() - before,
            "driver ms": 1000 * spent / units,
            "all ms": 1000 * of_all / units,
        }


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(most: int) -> None:
    """Print a row a run."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    names: list[str] = []
    for run in RUNS:
        if run[0] > most:
            continue
        command = [sys.executable, __file__, "--one", *map(str, run)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_worker_niceness": "0"})
        if done.returncode:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        if not names:
            names = list(row)
            print(f"{'units':>8}{'nodes':>6}{'cores':>6}{'cells':>6}" + "".join(f"{name:>11}" for name in names))
        units, nodes, cores, cells = run
        print(f"{units:>8}{nodes:>6}{cores:>6}{cells:>6}" + "".join(f"{row[n]:>11.1f}" for n in names), flush=True)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        units, nodes, cores, cells = map(int, sys.argv[2:])
        print(json.dumps(measure(units, nodes, cores, cells)))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10**5)
