"""What a query costs and finds: the compressed index beside exact search, ScaNN, and other indexes of FAISS.

Run: ``OMP_NUM_THREADS=1 python benchmarks/index.py [VECTORS]``. A screen of a million cells is written as Parquet to a
temporary folder (4 GB) and indexed as the stage does. Each row is a process of its own with one thread. Two kinds of
vectors of 512 dimensions: like embeddings (cells about wells, about compounds, about mechanisms, with variances that
fall off along the directions), and uniform noise, the worst there is. The queries are drawn as the vectors are and are
not among them. Times are medians over the queries, one after the other, of wall clock and of CPU time. Memory is what
the process holds beyond pages of files (RssAnon), less what it held before it had the index; pages of the vectors' file
that a search has touched can be dropped by the system at any time and are told apart. ScaNN (``pip install scann``) is
given as many candidates to compare exactly as the compressed index needs, which are its own setting otherwise.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipelines.indexing import build_level, cell_entries, describe, open_level
from pipelines.query import Searcher
from pipelines.vectors import vector_column
from screening.similarity import (
    AutoIndex,
    CompressedIndex,
    Effort,
    Index,
    IvfIndex,
    to_unit,
    train,
    training_size,
    tune,
)
from storage_schemas.index import IndexManifest, new_build, read_array, read_manifest
from storage_schemas.keys import WellKey
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, embeddings_form, write_table

DIMENSION, QUERIES, NEIGHBOURS, CELLS = 512, 200, 10, 1000
MOAS, COMPOUNDS_OF_MOA = 38, 28
MIB = 2**20
Array = npt.NDArray[Any]


# --- vectors -------------------------------------------------------------------------------------


def blocks(kind: str, n: int, seed: int) -> Iterator[Array]:
    """Vectors of one well of cells after another."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(0)
    n_compounds = MOAS * COMPOUNDS_OF_MOA
    spread = ((1 + np.arange(DIMENSION)) ** -0.5).astype(np.float32)
    turn = np.linalg.qr(fixed.standard_normal((DIMENSION, DIMENSION)))[0].astype(np.float32)
    moa = fixed.standard_normal((MOAS, DIMENSION), dtype=np.float32)
    compound = 0.6 * np.repeat(moa, COMPOUNDS_OF_MOA, axis=0)
    compound += np.float32(0.8) * fixed.standard_normal((n_compounds, DIMENSION), dtype=np.float32)
    for start in range(0, n, CELLS):
        cells = rng.standard_normal((min(CELLS, n - start), DIMENSION), dtype=np.float32)
        if kind == "embeddings":
            well = 0.5 * compound[rng.integers(n_compounds)] + 0.4 * rng.standard_normal(DIMENSION, dtype=np.float32)
            cells = ((cells + well) * spread) @ turn
        yield cells


def write_screen(folder: Path, kind: str, n: int) -> None:
    """A screen that has embeddings."""
    screen = Screen(str(folder))
    screen.write_manifest(Manifest(software={}, config={}, inputs=""))
    form = embeddings_form(DIMENSION)
    for key, cells in zip(wells(n), blocks(kind, n, 1), strict=True):
        keys = {"plate": [key.plate] * len(cells), "well": [key.well] * len(cells), "site": ["0"] * len(cells)}
        table = pa.table({**keys, "track": pa.array(range(1, len(cells) + 1), pa.int32())})
        write_table(screen.embeddings(key), table.append_column("embedding", vector_column(cells)), form)
    named = [f"compound {i % (MOAS * COMPOUNDS_OF_MOA)}" for i in range(len(wells(n)))]
    plate_map = pd.DataFrame(
        [(k.plate, k.well, name, 1.0, "uM", "treatment", "1") for k, name in zip(wells(n), named, strict=True)],
        columns=PLATE_MAP.schema.names,
    )
    write_table(screen.plate_map, plate_map, PLATE_MAP)
    compounds = pd.DataFrame({name: None for name in COMPOUNDS.schema.names}, index=range(len(set(named))))
    write_table(screen.compounds, compounds.assign(compound=sorted(set(named)), moa="unknown"), COMPOUNDS)


def wells(n: int) -> list[WellKey]:
    """As many as hold n cells."""
    names = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)]
    return [WellKey(f"plate_{i // 384 + 1}", names[i % 384]) for i in range(-(-n // CELLS))]


# --- measuring -----------------------------------------------------------------------------------


def memory(field: str = "RssAnon") -> float:
    """MiB that the process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


class Peak:
    """The most memory held within, beyond pages of files."""

    def __enter__(self) -> Peak:
        self.start = self.most = memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, memory())


def ask(search: Callable[[Array], Array], queries: Array, truth: Array | None) -> dict[str, float]:
    """Medians over queries, and recall@10."""
    search(queries[:1])
    wall, cpu, found = [], [], []
    for query in queries:
        a, b = time.perf_counter(), time.process_time()
        found.append(search(query[None])[0])
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - b)
    told = {"ms": 1e3 * statistics.median(wall), "cpu": 1e3 * statistics.median(cpu)}
    if truth is not None:
        told["recall"] = float(np.mean([np.isin(f, t).mean() for f, t in zip(found, truth, strict=True)]))
    return told


# --- what is compared, each in a process of its own ----------------------------------------------


def build(folder: Path, n: int) -> dict[str, Any]:
    """Index the screen's cells as the stage does."""
    screen = Screen(str(folder))
    a, b = time.perf_counter(), time.process_time()
    with Peak() as peak, new_build(screen.index) as made:
        level = build_level(made, "cell", cell_entries([(screen, wells(n))]), AutoIndex())
        made.manifest = IndexManifest(embedder="benchmark", build=made.name, levels={"cell": level})
    wall, cpu = time.perf_counter() - a, time.process_time() - b
    told = {"wall": wall, "cpu": cpu, "peak": peak.most - peak.start, "described": describe("cell", level)}
    return told | {"depth": level.depth}


def vectors_of(folder: Path) -> Array:
    """The unit vectors, mapped."""
    url = Screen(str(folder)).index
    return read_array(url, read_manifest(url), "cell", "vectors")


def unit_queries(kind: str) -> Array:
    return to_unit(np.concatenate(list(blocks(kind, QUERIES * CELLS, 2)))[::CELLS])


def exact(folder: Path, queries: Array, _truth: Array | None, _depth: int) -> dict[str, Any]:
    """All vectors compared, from the map."""
    index = Index(vectors_of(folder))
    before = memory()
    told = ask(lambda query: index.search(query, NEIGHBOURS)[1], queries[:20], None)
    truth = index.search(queries, NEIGHBOURS)[1]
    return told | {"recall": 1.0, "held": memory() - before, "truth": truth.tolist()}


def flat(folder: Path, queries: Array, truth: Array, _depth: int) -> dict[str, Any]:
    """FAISS's exact index, in memory."""
    import faiss

    before = memory()
    index = faiss.IndexFlatIP(DIMENSION)
    vectors = vectors_of(folder)
    for start in range(0, len(vectors), CELLS):
        index.add(np.ascontiguousarray(vectors[start : start + CELLS]))
    told = ask(lambda query: index.search(query, NEIGHBOURS)[1], queries[:20], truth[:20])
    return told | {"held": memory() - before}


def compressed(folder: Path, queries: Array, truth: Array, _depth: int) -> dict[str, Any]:
    """The screen's index."""
    import faiss  # noqa: F401  # the library itself is not the index

    url = Screen(str(folder)).index
    before = memory()
    index = open_level(url, read_manifest(url), "cell")
    told = ask(lambda query: index.search(query, NEIGHBOURS)[1], queries, truth)
    held = memory() - before
    vectors = sum(int(line.split()[1]) for line in _smaps(".vectors.npy")) / 1024
    searcher = Searcher(str(folder))
    searcher.ids("cell")
    with_ids = memory() - before
    whole = ask(lambda query: searcher.query(vectors=query, k=NEIGHBOURS)["id"].to_numpy()[None], queries, None)
    return told | {"held": held, "with_ids": with_ids, "pages": vectors, "whole": whole["ms"]}


def _smaps(name: str) -> list[str]:
    """The line Rss of each mapping of a file."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(name)]
    return [next(line for line in lines[i:] if line.startswith("Rss:")) for i in starts]


def scann(folder: Path, queries: Array, truth: Array, depth: int) -> dict[str, Any]:
    """ScaNN: a scan of anisotropic 4-bit codes with an exact re-rank, everything in memory."""
    try:
        import scann as library
    except ImportError:
        return {"absent": "pip install scann"}
    before = memory()
    a, b = time.perf_counter(), time.process_time()
    with Peak() as peak:
        builder = library.scann_ops_pybind.builder(np.array(vectors_of(folder)), NEIGHBOURS, "dot_product")
        builder = builder.set_n_training_threads(1)
        index = builder.score_ah(4, anisotropic_quantization_threshold=0.2).reorder(depth).build()
        del builder
    made = {"wall": time.perf_counter() - a, "build_cpu": time.process_time() - b, "peak": peak.most - peak.start}
    told = ask(lambda query: np.asarray(index.search(query[0])[0])[None].astype(np.int64), queries, truth)
    return told | {"held": memory() - before} | made


def family(folder: Path, queries: Array, _truth: Array, _depth: int) -> dict[str, Any]:
    """Other indexes over the first 100,000 vectors, to choose among."""
    import faiss

    vectors = np.array(vectors_of(folder)[:100_000])
    truth = Index(vectors).search(queries, NEIGHBOURS)[1]
    rows = {}

    def row(name: str, make: Callable[[], tuple[Callable[[Array], Array], Any, str]]) -> None:
        start = time.process_time()
        search, held, settings = make()
        spent = time.process_time() - start
        rows[name] = ask(search, queries, truth) | {
            "build": 1e3 * spent / len(vectors),
            "held": faiss.serialize_index(held).nbytes / MIB,
            "settings": settings,
        }

    def ours(config: Any) -> tuple[Callable[[Array], Array], Any, str]:
        quantiser = train(vectors[: training_size(config, len(vectors))], config, len(vectors))
        codes = quantiser.encode(vectors)
        effort = tune(Index(vectors, quantiser, codes), config, np.arange(len(vectors)) // CELLS).effort
        index = Index(vectors, quantiser, codes, effort)
        assert index._scanner is not None
        return lambda query: index.search(query, NEIGHBOURS)[1], index._scanner._index, _said(effort)

    def factory(text: str, **settings: int) -> tuple[Callable[[Array], Array], Any, str]:
        index = faiss.index_factory(DIMENSION, text, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[:40_000])
        index.add(vectors)
        for name, value in settings.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        return lambda query: index.search(query, NEIGHBOURS)[1], index, said

    row("compressed (ours)", lambda: ours(CompressedIndex()))
    row("ivf (ours)", lambda: ours(IvfIndex(lists=512)))
    row("FAISS Flat", lambda: factory("Flat"))
    row("FAISS SQ8", lambda: factory("SQ8"))
    row("FAISS IVF512,SQ8", lambda: factory("IVF512,SQ8", nprobe=64))
    row("FAISS HNSW32", lambda: factory("HNSW32", efSearch=256))
    return rows


def _said(effort: Effort) -> str:
    return f"depth {effort.depth}" + (f", probes {effort.probes}" if effort.probes else "")


PARTS = {part.__name__: part for part in (exact, flat, compressed, scann, family)}


# --- tables --------------------------------------------------------------------------------------


def part(name: str, folder: Path, kind: str, n: int, **given: Any) -> dict[str, Any]:
    """Run a part in a process of its own."""
    arguments = json.dumps({"part": name, "folder": str(folder), "kind": kind, "n": n} | given)
    done = subprocess.run(
        [sys.executable, __file__, "--part"], input=arguments, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_part() -> None:
    """The other side of :func:`part`."""
    given = json.loads(sys.stdin.read())
    folder, kind = Path(given["folder"]), given["kind"]
    if given["part"] == "build":
        print(json.dumps(build(folder, given["n"])))
        return
    truth = np.asarray(given.get("truth") or [])
    print(json.dumps(PARTS[given["part"]](folder, unit_queries(kind), truth, given.get("depth", 0))))


def compare(kind: str, n: int) -> None:
    """Print the table of one kind of vectors."""
    size = 4 * n * DIMENSION / MIB
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write_screen(folder, kind, n)
        made = part("build", folder, kind, n)
        print(f"\n{n:,} × {DIMENSION}, {kind}: {size:,.0f} MiB of vectors")
        print(made["described"])
        spent = f"{made['cpu']:.0f} s of CPU, {made['wall']:.0f} s of wall clock"
        print(f"built from Parquet in {spent}; at most {made['peak']:,.0f} MiB held on the way")
        truth = part("exact", folder, kind, n)
        rows = {"exact, from the map": truth}
        given = {"truth": truth["truth"], "depth": made["depth"]}
        rows["exact, FAISS Flat"] = part("flat", folder, kind, n, **given)
        rows["compressed"] = ours = part("compressed", folder, kind, n, **given)
        rows["ScaNN"] = part("scann", folder, kind, n, **given)
        print(f"{'':<22} {'recall@10':>9} {'ms':>8} {'CPU ms':>8} {'MiB held':>9} {'of vectors':>10}")
        for name, row in rows.items():
            if "absent" in row:
                print(f"{name:<22} not installed: {row['absent']}")
                continue
            share = f"{row['held'] / size:.1%}"
            figures = f"{row['recall']:>9.4f} {row['ms']:>8.2f} {row['cpu']:>8.2f} {row['held']:>9,.0f} {share:>10}"
            print(f"{name:<22} {figures}")
        print(
            f"compressed: {ours['with_ids']:,.0f} MiB ({ours['with_ids'] / size:.1%}) with the ids of all cells, "
            f"{ours['pages']:,.0f} MiB of the vectors' file touched; a query through Searcher {ours['whole']:.2f} ms"
        )
        if "build_cpu" in rows["ScaNN"]:
            row = rows["ScaNN"]
            print(f"ScaNN built in {row['build_cpu']:.0f} s of CPU; at most {row['peak']:,.0f} MiB held")
        if kind == "embeddings":
            print(f"\nChoices over {min(n, 100_000):,} of them; the size of ours is without the vectors' file")
            print(f"{'':<20} {'recall@10':>9} {'ms':>8} {'MiB':>9} {'build, ms a vector':>19}")
            for name, row in part("family", folder, kind, n).items():
                figures = f"{row['recall']:>9.4f} {row['ms']:>8.2f} {row['held']:>9,.0f} {row['build']:>19.3f}"
                print(f"{name:<20} {figures}  {row['settings']}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--part"]:
        run_part()
    elif len(sys.argv) <= 2 and all(argument.isdigit() for argument in sys.argv[1:]):
        for kind in ("embeddings", "uniform noise"):
            compare(kind, int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
    else:
        sys.exit(__doc__)
