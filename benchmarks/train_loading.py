"""Does loading keep the training step busy? Steps a second through the real loader, beside batches held in memory.

Run: ``python benchmarks/train_loading.py [CPUS]``. Once with the network and the batches of the demo, a ResNet-10 of
width 16, and once with MitoReID's, a ResNet-18 of width 64 and clips of 16 × 112². The loader reads clips, augments
them in a Ray actor and hands them over through Ray's object store, as in `screening train`; in memory lie the same
batches, read before. Both train in this process and take turns, the held batches before and after the loaded ones.
Shares of the speed are of seconds on the clock, which other work on the machine disturbs; the share of the time that a
step waits for its batch says the same and is disturbed less. In the first epoch clips come from Zarr, later from the
reader's cache.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

CLASSES, ROUNDS = 8, 3


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        model: the network.
        shape: (C, T, H, W) of a clip.
        wells: arrays that clips lie in.
        clips: of each.
        p: identities a batch.
        k: clips an identity.
        steps: that are timed together.
    """

    model: ModelConfig
    shape: tuple[int, int, int, int]
    wells: int
    clips: int
    p: int
    k: int
    steps: int


CASES = (
    Case(ModelConfig(depth=10, width=16), (3, 8, 64, 64), wells=32, clips=15, p=8, k=4, steps=20),
    Case(ModelConfig(depth=18, width=64), (3, 16, 112, 112), wells=16, clips=2, p=4, k=2, steps=4),
)


def job(case: Case, folder: str, threads: int) -> train._Job:
    """A training on clips of noise."""
    rng = np.random.default_rng(0)
    urls = [f"{folder}/{well}.zarr" for well in range(case.wells)]
    for url in urls:
        pixels = rng.poisson(20, (case.clips, *case.shape)).astype(np.uint8)
        write_clips(url, pixels, ["a", "b", "c"], range(case.shape[1]))
    n = np.arange(case.wells * case.clips)
    where = np.repeat(np.array(urls, object), case.clips)
    clips = ClipTable(where, n % case.clips, n // case.clips % CLASSES, n.astype(object))
    # So many epochs that the loader never comes to an end.
    config = TrainConfig(epochs=100, p=case.p, k=case.k)
    nothing = clips.take(np.arange(0))
    return train._Job(
        model=case.model,
        initial=RandomWeights(),
        phases=(train._Phase("train", config, clips, tuple(map(str, range(CLASSES)))),),
        augment=AugmentConfig(),
        seed=0,
        query=nothing,
        gallery=nothing,
        groups={},
        channels=("a", "b", "c"),
        n_frames=case.shape[1],
        normalisation=Normalisation(mean=(0.08,) * 3, std=(0.02,) * 3),
        threads=threads,
        readers=1,
        cache_bytes=2**30,
        fingerprint="benchmark",
        events=None,
    )


def timed(state: TrainingState, batches: Iterator[dict[str, Any]], steps: int) -> tuple[float, float]:
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


def measure(case: Case, cpus: int) -> None:
    """Print a row a round and the median share."""
    with tempfile.TemporaryDirectory() as folder:
        made = job(case, folder, cpus)
        (phase,) = made.phases
        epoch = len(train._plan(made, phase, 0))
        state = TrainingState.make(
            made.model, phase.config, made.normalisation, n_classes=CLASSES, steps_per_epoch=epoch, seed=0
        )
        loader = train._batches(made, phase, 0, 0, 1)
        held = [next(loader) for _ in range(case.steps)]
        loader.close()
        timed(state, iter(held), 3)
        print(f"{case.p * case.k} clips of {case.shape} a step, ResNet-{case.model.depth} of width {case.model.width}")
        shares, waits = [], []
        before, _ = timed(state, iter(held), case.steps)
        for _ in range(ROUNDS):
            loader = train._batches(made, phase, 0, 0, 1)
            next(loader)  # which waits for the actor's start
            _, waited_first = timed(state, loader, epoch)
            loaded, waited = timed(state, loader, case.steps)
            loader.close()
            after, _ = timed(state, iter(held), case.steps)
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


def main(cpus: int) -> None:
    """Measure all cases."""
    torch.set_num_threads(cpus)
    print(f"{cpus} CPU(s), torch {torch.__version__}")
    with cluster(ResourcesConfig(cpus=cpus, object_store_mb=256)):
        for case in CASES:
            measure(case, cpus)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
