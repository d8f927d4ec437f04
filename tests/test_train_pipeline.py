"""Stage `train` as a pipeline: over nodes, over lost workers, and over screens that are less than ideal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from ray.cluster_utils import Cluster
from runs import Run, digests

from pipelines.config import ConfigError, RunConfig, load
from pipelines.run import run
from pipelines.units import StageError
from screening.simulation import NEGATIVE_CONTROL
from storage_schemas.checkpoint import CheckpointManifest, read_manifest

EPOCHS = 4


@pytest.fixture
def segmented(finished_screen: Path, tmp_path: Path) -> Path:
    """A screen whose segmentation is done, and nothing after it."""
    screen = tmp_path / "segmented"
    for part in ("calibration", "cells", "quality", "clips"):
        shutil.copytree(finished_screen / part, screen / part)
    manifest = json.loads((finished_screen / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"] = {"segment": manifest["stages"]["segment"]}
    (screen / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return screen


@pytest.fixture
def configure(small_screen: Path, small_settings: list[str]) -> Callable[..., RunConfig]:
    """The small screen's configuration with further settings."""

    def configured(*settings: str) -> RunConfig:
        return load(str(small_screen / "run.yaml"), [*small_settings[1::2], *settings])

    return configured


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def trained(screen: Path) -> CheckpointManifest:
    return read_manifest(str(screen / "checkpoint"))


def epochs(screen: Path) -> list[float]:
    return [metrics["epoch"] for metrics in trained(screen).history]


@pytest.mark.slow
def test_two_workers_on_two_nodes_train_and_outlive_the_loss_of_one(
    two_nodes: str, segmented: Path, small_screen: Path, small_settings: list[str], tmp_path: Path
) -> None:
    disturbed = tmp_path / "disturbed"
    shutil.copytree(segmented, disturbed)
    further = ("resources.train_workers=2", "train.p=4", f"train.epochs={EPOCHS}")
    options = [*small_settings, *(part for setting in further for part in ("--set", setting))]

    def start(screen: Path) -> Run:
        command = ("run", small_screen / "run.yaml", "--out", screen, "--update", "--stages", "train", *options)
        return Run(tmp_path / f"{screen.name}.log", *command, RAY_ADDRESS=two_nodes)

    calm = start(segmented)
    assert calm.wait() == 0, calm.said()
    assert epochs(segmented) == list(range(1, EPOCHS + 1))

    cut = start(disturbed)
    cut.wait_until(lambda: bool(list(disturbed.glob("train/runs/*/epoch_0002/manifest.json"))))
    workers = [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in name(process)]
    assert len({worker.ppid() for worker in workers}) == 2, f"not two workers on two nodes: {workers}"
    workers[0].kill()
    assert cut.wait() == 0, cut.said()
    assert epochs(disturbed) == list(range(1, EPOCHS + 1))
    assert trained(disturbed).history == trained(segmented).history


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("cut_off", [False, True], ids=["after the last epoch", "while Ray notes its checkpoint"])
def test_a_training_that_was_killed_at_its_end_goes_on(
    cut_off: bool, local_ray: None, finished_screen: Path, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    screen = tmp_path / "screen"
    shutil.copytree(finished_screen, screen)
    document = json.loads((screen / "manifest.json").read_text(encoding="utf-8"))
    document["stages"] = {name: document["stages"][name] for name in ("segment", "train")}
    document["stages"]["train"]["done"] = False
    (screen / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    shutil.rmtree(screen / "checkpoint")
    (screen / "train/metrics.parquet").unlink()
    if cut_off:
        (noted,) = screen.glob("train/runs/*/*.json")
        noted.write_bytes(noted.read_bytes()[:-40])
    assert run(configure(), str(screen), ("train",)) == 0
    parts = ("checkpoint", "train/metrics.parquet")
    assert digests(screen, *parts) == digests(finished_screen, *parts)


@pytest.mark.slow
def test_compounds_can_be_the_identities_and_validation_may_be_absent(
    local_ray: None, segmented: Path, configure: Callable[..., RunConfig]
) -> None:
    config = configure("train.label=compound", "split.validation_share=0", "train.epochs=1")
    assert run(config, str(segmented), ("train",), update=True) == 0
    table = pd.read_parquet(segmented / "split.parquet")
    compounds = set(table.loc[(table["split"] == "train") & (table["role"] != "negative_control"), "compound"])
    assert len(compounds) > 2
    assert set(trained(segmented).class_names) == compounds | {"negative control"}
    record = json.loads((segmented / "manifest.json").read_text(encoding="utf-8"))["stages"]["train"]
    assert any("no validation wells" in note for note in record["notes"])
    assert "validation_map" not in trained(segmented).history[0]


@pytest.mark.parametrize(("p", "workers"), [(3, 2), (2, 2)])
def test_identities_that_workers_cannot_share_are_refused(
    p: int, workers: int, local_ray: None, segmented: Path, configure: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=rf"train\.p={p} identities cannot be shared by {workers} workers"):
        run(configure(f"train.p={p}", f"resources.train_workers={workers}"), str(segmented), ("train",), update=True)
    assert not (segmented / "checkpoint").exists()


def test_one_identity_is_nothing_to_tell_apart(
    local_ray: None, segmented: Path, small_screen: Path, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    compounds = pd.read_csv(small_screen / "compounds.csv")
    compounds.assign(moa=None).to_csv(tmp_path / "compounds.csv", index=False)
    config = configure(f"inputs.compounds={tmp_path / 'compounds.csv'}")
    with pytest.raises(StageError, match=r"clips of 1 identities \['negative control'\], two are needed"):
        run(config, str(segmented), ("train",), update=True)
    assert NEGATIVE_CONTROL in set(compounds["compound"])
    assert not (segmented / "checkpoint").exists()
