"""Training over two nodes (two raylets on this machine): what one worker learns, though workers and nodes are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from cell_screens import configuration, write_cells
from ray.cluster_utils import Cluster
from runs import Run

from storage_schemas.checkpoint import CheckpointManifest, read_manifest, read_weights

pytestmark = pytest.mark.slow

EPOCHS = 4
MEMORY = 100 * 2**20


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen of made-up cells; only to be read."""
    return write_cells(tmp_path_factory.mktemp("made_up") / "cells")


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A cluster of two nodes with one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY})
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start(cells: Path, tmp_path: Path, nodes: Cluster) -> Callable[..., Run]:
    """Starts a training on the cluster into a folder of that name."""

    def started(name: str, workers: int, **train: Any) -> Run:
        path = tmp_path / f"{name}.yaml"
        config = configuration(
            cells,
            train={"epochs": EPOCHS, **train},
            # Of one training run the epochs are the same, whoever is lost; two are lost here.
            resources={"train_workers": workers, "train_cpus": 0.25, "train_max_failures": 3},
        )
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        command = ("run", path, "--out", tmp_path / name, "--stages", "train")
        return Run(tmp_path / f"{name}.log", *command, RAY_ADDRESS=nodes.address, OMP_NUM_THREADS="1")

    return started


def trained(screen: Path) -> CheckpointManifest:
    return read_manifest(str(screen / "checkpoint"))


def epochs(screen: Path) -> list[int]:
    return [metrics["epoch"] for metrics in trained(screen).history]


def reached(screen: Path, epoch: int) -> Callable[[], bool]:
    return lambda: bool(list(screen.glob(f"train/runs/*/epoch_{epoch:04d}/manifest.json")))


def workers_of(nodes: Cluster) -> dict[int, psutil.Process]:
    """Process id of a raylet -> the training worker on its node."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found[process.ppid()] = process
        except psutil.Error:
            continue
    return found


def test_two_workers_on_two_nodes_learn_what_one_learns(
    start: Callable[..., Run], nodes: Cluster, tmp_path: Path
) -> None:
    """The same global batches: the same losses but for rounding, which grows from step to step."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start("one", workers=1)
    assert alone.wait() == 0, alone.said()
    together = start("two", workers=2)
    together.wait_until(reached(two, 1))
    assert len(workers_of(nodes)) == 2, "not one worker a node"
    assert together.wait() == 0, together.said()
    assert epochs(one) == epochs(two) == list(range(1, EPOCHS + 1))
    for ours, theirs in zip(trained(two).history, trained(one).history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "identity", "triplet", "center", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (name, ours["epoch"])
    first = trained(two).history[0], trained(one).history[0]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    # Two that had learnt by themselves would differ at once.
    assert len({round(metrics["loss"], 3) for metrics in trained(one).history}) == EPOCHS


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_a_training_outlives_the_loss_of_a_worker_or_a_node(
    lost: str, start: Callable[..., Run], nodes: Cluster, tmp_path: Path
) -> None:
    """It goes on from the last checkpoint; without the node, both workers go on on the one that is left."""
    screen = tmp_path / "screen"
    run = start("screen", workers=2)
    run.wait_until(reached(screen, 2))
    workers = workers_of(nodes)
    assert len(workers) == 2, "not one worker a node"
    (other,) = nodes.worker_nodes
    raylet = next(
        info.process for infos in other.all_processes.values() for info in infos if "raylet" in str(info.process.args)
    )
    if lost == "worker":
        workers[raylet.pid].kill()
    else:
        nodes.remove_node(other, allow_graceful=False)
    assert run.wait() == 0, run.said()
    assert epochs(screen) == list(range(1, EPOCHS + 1))
    manifest, weights = trained(screen), read_weights(str(screen / "checkpoint"))
    assert all(np.isfinite(metrics["loss"]) for metrics in manifest.history)
    assert all(np.isfinite(weight).all() for weight in weights.values())
    assert weights["classifier.weight"].shape[0] == len(manifest.class_names)
