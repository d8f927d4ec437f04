"""Memory of a run with a small object store: a screen of many GiB of pixels beside one twice as large.

``python benchmarks/memory.py [GIB] [SIDE]``, 8 and 1024 by default. Wells of one site of 16 × 3 × SIDE² 16-bit pixels,
the same three simulated movies again and again; chunks are hard links, so that the disk holds each movie once. Stages
are run by the command, one after the other, with ``resources.object_store_mb=512``, and all processes of a run are
watched while it goes on. Memory is the proportional set size: pages that processes share count once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import yaml

from screening.simulation import CHANNELS, SimulationConfig, design, simulate_site
from storage_schemas.plate import create_well, list_wells

FRAMES = 16
MOVIES = 3
OBJECT_STORE_MB = 512
STAGES = ("segment", "train", "embed")
WELLS = [f"{row}{column:02d}" for row in "ABCD" for column in range(1, 7)]
EVERY = 0.5  # seconds between looks
COLUMNS = ("driver", "workers", "largest worker", "Ray itself", "object store", "all", "spilled")


def write_plates(folder: Path, n_wells: int, side: int) -> None:
    """Plates of 24 wells and a ``run.yaml`` for them; the first wells' movies are written, those of others linked."""
    config = SimulationConfig(
        replicates=1,
        controls_per_plate=MOVIES,
        frames=FRAMES,
        height=side,
        width=side,
        cells_per_site=side * side // 10**4,
        out_of_focus_rate=0,
    )
    names = design(config)[0]["well"]
    originals = []
    rows = []
    for number in range(n_wells):
        plate, well = f"p{number // len(WELLS)}", WELLS[number % len(WELLS)]
        url = folder / f"plates/{plate}.zarr"
        there = url / well[0] / well[1:]
        if number < MOVIES:
            create_well(str(url), well, {"0": simulate_site(config, "plate-1", names[number], 0).stack}, CHANNELS)
            originals.append(there)
        else:
            link(originals[number % MOVIES], there)
        compound = number % 6
        rows.append((plate, well, f"compound-{compound}", "treatment", f"r{number // len(WELLS) % 2}"))
    layout = pd.DataFrame(rows, columns=["plate", "well", "compound", "role", "replicate"])
    for plate, wells in layout.groupby("plate")["well"]:
        list_wells(f"{folder}/plates/{plate}.zarr", str(plate), wells.tolist())
    layout.to_csv(folder / "plate_map.csv", index=False)
    moas = pd.DataFrame({"compound": [f"compound-{i}" for i in range(6)], "moa": ["one", "other"] * 3})
    moas.to_csv(folder / "compounds.csv", index=False)
    settings = {
        "inputs": {"plates": ["plates/*.zarr"], "plate_map": "plate_map.csv", "compounds": "compounds.csv"},
        "segment": {
            "channels": {"nucleus": "nucleus", "cytoplasm": "mitochondria"},
            "clips": {"frames": FRAMES, "size": 64, "window": {"method": "fixed", "size": 64}},
        },
        # The network is small: what it holds does not depend on the screen, and neither does how long it takes.
        "model": {"depth": 10, "width": 4, "stem_frames": 3},
        "train": {"epochs": 1, "p": 2, "k": 8, "validation_clips": 64},
        "profiles": {"recipe": {"method": "standardised", "reference": "plate"}},
        "resources": {"cpus": 2, "object_store_mb": OBJECT_STORE_MB},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))


def link(original: Path, copy: Path) -> None:
    """A well as another: its chunks linked, its metadata, which a run may write to, copied."""
    shutil.copytree(
        original, copy, copy_function=lambda a, b: shutil.copy(a, b) if a.endswith("zarr.json") else os.link(a, b)
    )


def pixels(folder: Path, side: int) -> float:
    """GiB of the plates' pixels, uncompressed."""
    return len(pd.read_csv(folder / "plate_map.csv")) * FRAMES * len(CHANNELS) * side**2 * 2 / 2**30


def peaks(folder: Path, stage: str) -> dict[str, float]:
    """Run a stage; the MiB at the peak of each kind of process, the object store and its files on disk; and seconds."""
    start = time.monotonic()
    command = [sys.executable, "-c", "from screening.cli import main; main()", "run", f"{folder}/run.yaml"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--out", f"{folder}/screen", "--stages", stage], stdout=log, stderr=subprocess.STDOUT
        )
    found: Counter[str] = Counter()
    while process.poll() is None:
        for name, size in look(psutil.Process(process.pid)).items():
            found[name] = max(found[name], size)
        time.sleep(EVERY)
    if process.returncode:
        raise SystemExit((folder / "log").read_text())
    return {name: found[name] / 2**20 for name in COLUMNS} | {"seconds": time.monotonic() - start}


def look(driver: psutil.Process) -> Counter[str]:
    """Bytes that are held now, by kind."""
    now: Counter[str] = Counter()
    for process in [driver, *driver.children(recursive=True)]:
        try:
            size, shared = held(process.pid)
            words = process.cmdline()
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile
        name = words[0] if words else ""
        kind = "driver" if process.pid == driver.pid else "workers" if name.startswith("ray::") else "Ray itself"
        now[kind] += size
        now["object store"] += shared
        now["all"] += size + shared
        if kind == "workers":
            now["largest worker"] = max(now["largest worker"], size)
        if name.endswith("raylet"):
            now["spilled"] += sum(spilled_files(words))
    return now


def held(pid: int) -> tuple[int, int]:
    """Bytes of a process's own and of memory that it shares with others, which is Ray's object store."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kib["Pss"] - kib["Pss_Shmem"]) * 1024, kib["Pss_Shmem"] * 1024


def spilled_files(raylet: list[str]) -> Iterator[int]:
    """Sizes of the files that a raylet has moved objects to."""
    (session,) = (word.partition("=")[2] for word in raylet if word.startswith("--session_dir="))
    for path in Path(session).glob("ray_spilled_objects*/**/*"):
        try:
            yield path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            yield 0


def main(gib: float, side: int) -> None:
    """Print the peaks of each stage of both screens."""
    n_wells = -(-round(gib * 2**30) // (FRAMES * len(CHANNELS) * side**2 * 2))
    print(f"wells of 16 × 3 × {side}², object store of {OBJECT_STORE_MB} MiB, two CPUs; MiB at the peak")
    print(f"{'stage':<9}{'pixels':>10}" + "".join(f"{name:>16}" for name in (*COLUMNS, "seconds")))
    found: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
    for wells in (n_wells, 2 * n_wells):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_plates(folder, wells, side)
            for stage in STAGES:
                found[stage].append(peaks(folder, stage))
                row = found[stage][-1]
                shown = "".join(f"{row[column]:>16.0f}" for column in (*COLUMNS, "seconds"))
                print(f"{stage:<9}{pixels(folder, side):>6.1f} GiB{shown}", flush=True)
    for stage in ("segment", "embed"):
        small, large = found[stage]
        ratios = ", ".join(f"{name} {large[name] / small[name]:.2f}" for name in COLUMNS if small[name] >= 1)
        print(f"{stage}, twice the screen: {ratios}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(float(arguments[0]) if arguments else 8, int(arguments[1]) if len(arguments) > 1 else 1024)
