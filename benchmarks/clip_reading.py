"""What it costs to read a training batch: from Zarr, from the reader's cache, and the plain copy that bounds both.

Run: ``python benchmarks/clip_reading.py``. Interleaved runs, medians of CPU seconds of one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from pipelines.clip_batches import ClipCache, ClipTable
from storage_schemas.clips import write_clips

WELLS, CLIPS, BATCH, ROUNDS = 40, 12, 36, 30
SHAPE = (3, 8, 64, 64)


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call, threads included."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    """Print a row a way of reading: milliseconds a batch and the ratio to the plain copy."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"{folder}/{well}.zarr" for well in range(WELLS)]
        pixels = rng.poisson(20, (WELLS * CLIPS, *SHAPE)).astype(np.uint8)
        for well, url in enumerate(urls):
            write_clips(url, pixels[well * CLIPS : (well + 1) * CLIPS], ["a", "b", "c"], range(8))
        n = WELLS * CLIPS
        number = np.arange(n)
        table = ClipTable(
            np.repeat(np.array(urls, object), CLIPS), number % CLIPS, np.zeros(n, np.int64), number.astype(object)
        )
        cache = ClipCache(2**30)
        table.read(cache)
        times: dict[str, list[float]] = {"from Zarr": [], "from the cache": [], "plain copy": []}
        for _ in range(ROUNDS):
            positions = rng.choice(n, BATCH, replace=False)
            batch = table.take(positions)
            assert np.array_equal(batch.read(), pixels[positions])
            times["from Zarr"].append(cpu_seconds(batch.read))
            times["from the cache"].append(cpu_seconds(lambda batch=batch: batch.read(cache)))
            times["plain copy"].append(cpu_seconds(lambda positions=positions: pixels[positions]))
        floor = statistics.median(times["plain copy"])
        print(f"{BATCH} clips of {SHAPE} uint8, drawn from {WELLS} wells")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(f"{name:<15} {1e3 * median:8.2f} ms CPU a batch, {median / floor:6.1f} × the plain copy")


if __name__ == "__main__":
    main()
