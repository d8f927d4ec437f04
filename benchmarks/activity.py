"""What statistics cost, and which null the mean of average precisions needs.

OMP_NUM_THREADS=1 python benchmarks/activity.py
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from screening import statistics


def main() -> None:
    rng = np.random.default_rng(0)
    _warm_up()
    print("CPU seconds of one core, and the most memory so far (MB)")
    n, replicates, controls, features = 2000, 4, 300, 352
    profiles = rng.normal(size=(n * replicates + controls, features)).astype(np.float32)
    perturbation = np.concatenate([np.repeat(np.arange(n), replicates), np.full(controls, -1)])
    plate = np.zeros(len(profiles))
    timed(
        "activity, 2,000 x 4 wells, 300 controls", statistics.activity, profiles, perturbation, plate, perturbation < 0
    )
    treated = perturbation >= 0
    timed("reproducibility of the same", statistics.reproducibility, profiles[treated], perturbation[treated])
    for size in (5000, 10_000):
        compounds = rng.normal(size=(size, features)).astype(np.float32)
        labels = [[f"m{i % 500}"] for i in range(size)]
        timed(f"consistency of 500 labels, {size:,} compounds", statistics.consistency, compounds, labels)
    compounds = compounds[:5000]
    labels = [[f"t{j}" for j in rng.choice(800, rng.integers(1, 4), replace=False)] for _ in range(5000)]
    timed("... of 800 targets, up to 3 a compound, 5,000", statistics.consistency, compounds, labels)
    dose = np.tile([1.0, 3, 10, 30, 100, 300], 2 * n)
    timed(
        "doses, 2,000 x 12 wells", statistics.dose_response, np.repeat(np.arange(n), 12), dose, rng.normal(size=12 * n)
    )

    print("\nshare of p-values up to 0.05 | 0.01 where nothing acts, 4 replicates among 60 controls")
    for name in ("isotropic", "ten factors"):
        nulls = {"comonotone": [], "independent": [], "relabelled": []}  # type: dict[str, list[float]]
        for _ in range(400):
            wells = rng.normal(size=(64, 100))
            if name == "ten factors":
                wells = (
                    rng.normal(size=(64, 10)) @ rng.normal(size=(10, 100)) * rng.lognormal(size=(64, 1)) + 0.3 * wells
                )
            for null, p in p_values(wells, rng).items():
                nulls[null].append(p)
        for null, p_of in nulls.items():
            print(f"{name:12} {null:12} {np.mean(np.array(p_of) <= 0.05):.3f} | {np.mean(np.array(p_of) <= 0.01):.3f}")


def timed(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    start = time.process_time()
    function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:48} {time.process_time() - start:7.1f} s {peak:8.0f}", flush=True)


def p_values(wells: npt.NDArray[np.float64], rng: np.random.Generator) -> dict[str, float]:
    """Of four wells among others: the precisions of all queries taken for the same, for independent, or as they are."""
    is_control = np.arange(len(wells)) >= 4
    codes = np.where(is_control, -1, 0)
    row = statistics.activity(wells, codes, np.zeros(len(wells)), is_control, 999)
    observed = float(row["mean_average_precision"][0])
    # The average precision of three among the others, in random order.
    ranks = np.sort(np.argsort(rng.random((4 * 999, len(wells) - 1)), axis=1)[:, :3], axis=1) + 1
    alone = (np.arange(1, 4) / ranks).mean(axis=1).reshape(4, 999)
    count = {"comonotone": (alone[0] >= observed - 1e-12).sum(), "independent": (alone.mean(axis=0) >= observed).sum()}
    return {name: (each + 1) / 1000 for name, each in count.items()} | {"relabelled": float(row["p_value"][0])}


def _warm_up() -> None:
    wells = np.random.default_rng(0).normal(size=(40, 5))
    statistics.activity(wells, np.repeat(np.arange(10), 4), np.zeros(40), np.arange(40) < 8, 100)
    statistics.reproducibility(wells, np.repeat(np.arange(10), 4), 100)
    statistics.consistency(wells, [["a"] if i % 2 else ["b"] for i in range(40)], 100)


if __name__ == "__main__":
    main()
