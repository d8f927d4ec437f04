"""Does loading keep the training step busy? Steps a second through the real loader, beside batches held in memory.

Run: ``python benchmarks/train_loading.py [CPUS]``. The network and the batches are those of the demo: a ResNet-10 of
width 16, 8 identities with 4 clips of 3 × 8 × 64² each. The loader reads clips, augments them in a Ray actor and hands
them over through Ray's object store, as in `screening train`; in memory lie the same batches, read before. Both train
in this process and take turns, the held batches before and after the loaded ones. Shares of the speed are of seconds on
the clock, which other work on the machine disturbs; the share of the time that a step waits for its batch says the same
and is disturbed less. In the first epoch clips come from Zarr, later from the reader's cache.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

from pipelines import train
from pipelines.clip_batches import ClipTable
from pipelines.cluster import cluster
from pipelines.config import ResourcesConfig
from screening.augmentation import AugmentConfig
from screening.i3d import ModelConfig
from screening.initialisation import RandomWeights
from screening.training import Normalisation, TrainConfig, TrainingState
from storage_schemas.clips import write_clips

SHAPE = (3, 8, 64, 64)
WELLS, CLIPS, CLASSES = 32, 15, 8
STEPS, ROUNDS = 20, 3


def job(folder: str, threads: int) -> train._Job:
    """A training on clips of noise."""
    rng = np.random.default_rng(0)
    urls = [f"{folder}/{well}.zarr" for well in range(WELLS)]
    for url in urls:
        write_clips(url, rng.poisson(20, (CLIPS, *SHAPE)).astype(np.uint8), ["a", "b", "c"], range(SHAPE[1]))
    n = np.arange(WELLS * CLIPS)
    clips = ClipTable(np.repeat(np.array(urls, object), CLIPS), n % CLIPS, n // CLIPS % CLASSES, n.astype(object))
    # So many epochs that the loader never comes to an end.
    config = TrainConfig(epochs=100, p=8, k=4)
    nothing = clips.take(np.arange(0))
    return train._Job(
        model=ModelConfig(depth=10, width=16),
        initial=RandomWeights(),
        phases=(train._Phase("train", config, clips, tuple(map(str, range(CLASSES)))),),
        augment=AugmentConfig(),
        seed=0,
        query=nothing,
        gallery=nothing,
        groups={},
        channels=("a", "b", "c"),
        n_frames=SHAPE[1],
        normalisation=Normalisation(mean=(0.08,) * 3, std=(0.02,) * 3),
        threads=threads,
        readers=1,
        cache_bytes=2**30,
        fingerprint="benchmark",
        events=None,
    )


def timed(state: TrainingState, batches: Iterator[dict], steps: int) -> tuple[float, float]:
    """Steps a second, and the share of the time that was spent waiting for batches."""
    waited = 0.0
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state.step(torch.tensor(batch["clips"]), torch.tensor(batch["label"]))
    seconds = time.perf_counter() - start
    return steps / seconds, waited / seconds


def main(cpus: int) -> None:
    """Print a row a round and the median share."""
    torch.set_num_threads(cpus)
    with tempfile.TemporaryDirectory() as folder, cluster(ResourcesConfig(cpus=cpus, object_store_mb=256)):
        made = job(folder, cpus)
        (phase,) = made.phases
        state = TrainingState.make(
            made.model,
            phase.config,
            made.normalisation,
            n_classes=CLASSES,
            steps_per_epoch=len(train._plan(made, phase, 0)),
            seed=0,
        )
        epoch = len(train._plan(made, phase, 0))
        loader = train._batches(made, phase, 0, 0, 1)
        held = [next(loader) for _ in range(STEPS)]
        loader.close()
        timed(state, iter(held), 3)
        print(f"{phase.config.p * phase.config.k} clips of {SHAPE} a step, {cpus} CPU(s), torch {torch.__version__}")
        shares, waits = [], []
        before, _ = timed(state, iter(held), STEPS)
        for _ in range(ROUNDS):
            loader = train._batches(made, phase, 0, 0, 1)
            next(loader)  # which waits for the actor's start
            _, waited_first = timed(state, loader, epoch)
            loaded, waited = timed(state, loader, STEPS)
            loader.close()
            after, _ = timed(state, iter(held), STEPS)
            shares.append(loaded / statistics.mean([before, after]))
            waits.append(waited)
            print(
                f"in memory {before:5.2f} and {after:5.2f} steps/s, loaded {loaded:5.2f}: {shares[-1]:.0%}; "
                f"waiting {waited:.1%} of the time, in the first epoch {waited_first:.1%}",
                flush=True,
            )
            before = after
        print(f"median share of the speed in memory {statistics.median(shares):.0%}, not waiting", end=" ")
        print(f"{1 - statistics.median(waits):.1%} of the time")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
