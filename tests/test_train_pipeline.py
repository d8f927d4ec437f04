"""Stage `train` as a pipeline: what is trained on and from where, and how it ends where it cannot go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
import yaml
from cell_screens import CLIPS, MOAS, UNKNOWN, configuration, write_cells
from runs import Run, digests
from tensorboardX.proto.event_pb2 import Event

from pipelines import train
from pipelines.clip_batches import BatchReader
from pipelines.cluster import check_room, cluster
from pipelines.config import ConfigError, ResourcesConfig, RunConfig, load
from pipelines.inputs import Inputs, open_inputs
from pipelines.run import run
from pipelines.split import make_split
from pipelines.units import StageError
from screening.i3d import I3DResNet
from screening.initialisation import CheckpointWeights
from screening.training import TrainingError
from storage_schemas.checkpoint import CheckpointManifest, read_manifest, read_weights, write_checkpoint
from storage_schemas.clips import read_clips
from storage_schemas.errors import InputError, StoreError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import TRAINING_METRICS, open_table

CHANNELS = 2


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen of made-up cells; only to be read."""
    return write_cells(tmp_path_factory.mktemp("made_up") / "cells")


def opened(config: RunConfig) -> tuple[Inputs, Screen]:
    inputs = open_inputs(config.inputs)
    return inputs, Screen("/nowhere", inputs.cells)


def split_of(config: RunConfig) -> pd.DataFrame:
    return make_split(config, *opened(config)).table


def phases_of(config: RunConfig) -> tuple[train._Phase, ...]:
    return train._phases(config, opened(config)[1], split_of(config))


def trained(screen: Path) -> CheckpointManifest:
    return read_manifest(str(screen / "checkpoint"))


def notes(screen: Path) -> list[str]:
    record = json.loads((screen / "manifest.json").read_text(encoding="utf-8"))["stages"]["train"]
    found: list[str] = record["notes"]
    return found


def checkpoint_of(folder: Path, config: RunConfig, class_names: tuple[str, ...]) -> CheckpointWeights:
    """A checkpoint with weights of its own."""
    torch.manual_seed(5)
    network = I3DResNet(config.model, CHANNELS, len(class_names))
    manifest = CheckpointManifest(
        model=config.model.model_dump(mode="json"),
        class_names=class_names,
        channels=("one", "two"),
        n_frames=2,
        mean=(0.0,) * CHANNELS,
        std=(1.0,) * CHANNELS,
        embedding_dim=network.embedding_dim,
        epoch=1,
        history=(),
        fingerprint="test",
    )
    write_checkpoint(str(folder), manifest, {name: t.numpy() for name, t in network.state_dict().items()})
    return CheckpointWeights(path=str(folder))


# --- what is trained on ----------------------------------------------------------------------


def test_pretraining_is_on_training_compounds_alone_those_without_a_mechanism_too(cells: Path) -> None:
    config = configuration(cells, pretrain={"epochs": 2, "p": 8, "lr": 0.5}, train={"freeze": ["stem"]})
    table = split_of(config)
    by_part = {part: set(rows["compound"]) for part, rows in table.groupby("split")}
    pretraining, training = phases_of(config)
    assert (pretraining.name, training.name) == ("pretrain", "train")
    assert set(pretraining.class_names) == (by_part["train"] - {"DMSO"}) | {train.CONTROL_CLASS}
    assert UNKNOWN in pretraining.class_names
    assert training.class_names == tuple(sorted([*MOAS, train.CONTROL_CLASS]))
    assert by_part["validation"]
    assert by_part["test_compound"]
    # No clip of a phase is of a well that is not for training: neither a held-out compound nor a held-out replicate.
    wells = {(row.plate, row.well): row for row in table.itertuples()}
    for phase in (pretraining, training):
        for name in phase.clips.name:
            well = wells[tuple(name.split("/")[:2])]
            assert (well.split, well.replicate) == ("train", "1")
            assert well.compound not in by_part["validation"] | by_part["test_compound"]
    assert len(pretraining.clips.label) == len(training.clips.label) + CLIPS
    how = pretraining.config
    assert (how.label, how.epochs, how.p, how.k, how.optimizer.lr, how.freeze) == ("compound", 2, 8, 2, 0.5, ())
    assert training.config == config.train


def test_without_pretraining_there_is_one_phase_and_unknown_mechanisms_are_left_out(cells: Path) -> None:
    (phase,) = phases_of(configuration(cells))
    assert phase.name == "train"
    assert split_of(configuration(cells)).query("compound == @UNKNOWN")["split"].unique().tolist() == ["unused"]


def test_pretraining_goes_before_another_training(cells: Path) -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.epochs goes before train\.label=moa"):
        configuration(cells, pretrain={"epochs": 1}, train={"label": "compound"})


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("phase", [0, 1])
def test_the_shares_of_all_workers_are_the_batch_of_one(workers: int, phase: int, cells: Path) -> None:
    """The same clips with the same labels, changed alike: what one worker would see."""
    job = job_of(configuration(cells, pretrain={"epochs": 1}, train={"p": 8}))
    reader = BatchReader({"train": job.phases[phase].clips}, job.augment, 0)

    def read(rank: int, of: int) -> list[dict[str, Any]]:
        return [reader.read(row) for row in train._training_rows(job, job.phases[phase], 1, rank, of)]

    shares = [read(rank, workers) for rank in range(workers)]
    for whole, *parts in zip(read(0, 1), *shares, strict=True):
        for part in parts:
            assert len(np.unique(part["label"])) > 1
        for name in ("clips", "label", "name"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_batches_come_in_order_also_when_a_reader_is_lost(cells: Path) -> None:
    job = replace(job_of(configuration(cells)), readers=2)
    (phase,) = job.phases
    rows = [row for epoch in range(phase.config.epochs) for row in train._training_rows(job, phase, epoch, 0, 1)]
    here = BatchReader({"train": phase.clips}, job.augment, 0)
    assert len(rows) > 4, "some are asked for only after the loss"
    with cluster(ResourcesConfig(cpus=2)), closing(train._batches(job, phase, 0, 0, 1)) as stream:
        for number, row in enumerate(rows):
            if number == 1:
                os.kill(ray.get(stream._readers[0].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
            batch = next(stream)
            while batch["kind"] != "train":
                batch = next(stream)
            wanted = here.read(row)
            for name in ("clips", "label", "name"):
                np.testing.assert_array_equal(batch[name], wanted[name])
        assert "train" not in {batch["kind"] for batch in stream}


def test_clips_that_cannot_be_read_are_named(cells: Path, tmp_path: Path) -> None:
    job = job_of(configuration(cells))
    (phase,) = job.phases
    gone = replace(phase.clips, url=np.full_like(phase.clips.url, str(tmp_path / "gone.zarr")))
    with cluster(ResourcesConfig(cpus=2)):
        stream = train._batches(job, replace(phase, clips=gone), 0, 0, 1)
        with closing(stream), pytest.raises(TrainingError, match=r"gone\.zarr: is not a readable Zarr array"):
            next(stream)


def test_epochs_and_phases_have_batches_of_their_own(cells: Path) -> None:
    job = job_of(configuration(cells, pretrain={"epochs": 1}))
    pretraining, training = job.phases
    same = (train._plan(job, training, 0), train._plan(job, training, 0))
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(train._plan(job, training, 0), train._plan(job, training, 1))
    alike = train._Phase("pretrain", training.config, training.clips, training.class_names)
    assert not np.array_equal(train._plan(job, training, 0), train._plan(job, alike, 0))
    assert (
        train._training_rows(job, pretraining, 0, 0, 1)[0]["seed"]
        != (train._training_rows(job, training, 0, 0, 1)[0]["seed"])
    )


def job_of(config: RunConfig) -> train._Job:
    """A job as workers get it, of which only what is read from clips counts."""
    _, screen = opened(config)
    query, gallery = train._validation_clips(screen, split_of(config))
    return train._Job(
        model=config.model,
        initial=config.initial,
        phases=phases_of(config),
        augment=config.augment,
        seed=config.seed,
        query=query,
        gallery=gallery,
        groups={},
        channels=("one", "two"),
        n_frames=2,
        normalisation=train.Normalisation(mean=(0.0, 0.0), std=(1.0, 1.0)),
        threads=1,
        readers=1,
        cache_bytes=0,
        fingerprint="test",
        events=None,
    )


def test_identities_with_few_clips_are_named_and_where_all_have_few_k_is_too_large(cells: Path) -> None:
    (phase,) = phases_of(configuration(cells))
    assert train._few_clips(phase) == []
    one = np.flatnonzero(phase.clips.label == 0)[:1]
    few = phase.clips.take(np.concatenate([one, np.flatnonzero(phase.clips.label != 0)]))
    (note,) = train._few_clips(train._Phase("train", phase.config, few, phase.class_names))
    assert note == f"train: fewer than k=2 clips, repeated within a batch, of {phase.class_names[0]}"
    with pytest.raises(StageError, match=rf"no identity \(moa\) has k={CLIPS + 1} clips .* the most is {CLIPS}"):
        phases_of(configuration(cells, train={"k": CLIPS + 1}))


def test_one_identity_is_nothing_to_tell_apart(cells: Path, tmp_path: Path) -> None:
    compounds = pd.read_parquet(cells / "compounds.parquet").assign(moa=None)
    compounds.to_csv(tmp_path / "compounds.csv", index=False)
    config = configuration(cells, inputs={"cells": str(cells), "compounds": str(tmp_path / "compounds.csv")})
    with pytest.raises(StageError, match=r"clips of 1 identities \['negative control'\], two are needed"):
        phases_of(config)


@pytest.mark.parametrize(("key", "p", "workers"), [("train.p", 3, 2), ("train.p", 2, 2), ("pretrain.p", 5, 2)])
def test_identities_that_workers_cannot_share_are_refused(key: str, p: int, workers: int, cells: Path) -> None:
    group = key.partition(".")[0]
    with pytest.raises(ConfigError, match=rf"{key}={p} identities cannot be shared by {workers} workers"):
        configuration(cells, **{group: {"p": p}}, resources={"train_workers": workers})


def test_the_normalisation_is_that_of_the_training_clips(cells: Path, tmp_path: Path) -> None:
    config = configuration(cells)
    screen = Screen(str(tmp_path / "screen"))
    document = config.model_dump(mode="json")
    screen.write_manifest(Manifest(software={}, config=document, inputs="", cells=str(cells)))
    for name in ("plate_map.parquet", "compounds.parquet"):
        shutil.copy(cells / name, tmp_path / "screen")
    pixels = []
    for row in split_of(config).query("split == 'train'").itertuples():
        pixels.append(read_clips(Screen(str(cells)).clips(WellKey(row.plate, row.well)), slice(None)))
    light = np.concatenate(pixels).astype(np.float64) / 255
    table = train.normalisation(screen.url)
    assert table["channel"].tolist() == ["one", "two"]
    np.testing.assert_allclose(table["mean"], light.mean(axis=(0, 2, 3, 4)))
    np.testing.assert_allclose(table["std"], light.std(axis=(0, 2, 3, 4)))


# --- initial weights -------------------------------------------------------------------------


def test_the_classifier_of_a_checkpoint_is_taken_for_the_same_classes_only(cells: Path, tmp_path: Path) -> None:
    config = configuration(cells)
    ours = tuple(sorted([*MOAS, train.CONTROL_CLASS]))
    network = I3DResNet(config.model, CHANNELS, len(ours))
    for names, taken in ((ours, True), (("a", "b", "c"), False)):
        initial = checkpoint_of(tmp_path / names[0], config, names)
        before = network.classifier.weight.detach().clone()
        said = train._give_initial(network, initial, ours)
        theirs = read_weights(initial.path)
        np.testing.assert_array_equal(network.state_dict()["conv1.weight"].numpy(), theirs["conv1.weight"])
        expected = theirs["classifier.weight"] if taken else before.numpy()
        np.testing.assert_array_equal(network.classifier.weight.detach().numpy(), expected)
        assert any("the classifier is not taken: it tells a, b, c apart" in note for note in said) == (not taken)


def test_a_relative_path_of_weights_is_relative_to_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inputs: {cells: cells}\ninitial: {method: kinetics, path: weights/r18.pth}\n", encoding="utf-8")
    initial = load(str(path)).initial
    assert not isinstance(initial, train.RandomWeights)
    assert initial.path == f"{tmp_path}/weights/r18.pth"


def test_other_content_under_the_same_name_is_another_start(cells: Path, tmp_path: Path) -> None:
    config = configuration(cells)
    names = tuple("abc")
    initial = checkpoint_of(tmp_path / "checkpoint", config, names)
    started = config.model_copy(update={"initial": initial})
    first = train.weights_identity(started)
    assert train.weights_identity(started) == first
    copied = checkpoint_of(tmp_path / "copy", config, names)
    assert train.weights_identity(config.model_copy(update={"initial": copied})) == first
    taken = config.model_copy(update={"network": initial.path})
    assert train.weights_identity(taken) == first
    weights = read_weights(initial.path)
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    write_checkpoint(initial.path, read_manifest(initial.path), weights)
    assert train.weights_identity(started) == train.weights_identity(taken) != first
    assert train.weights_identity(config) == []


def test_weights_that_cannot_be_used_are_found_before_anything_is_done(cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "screen"
    config = configuration(cells)
    wide = configuration(cells, model={"width": 8})
    other = checkpoint_of(tmp_path / "wide", wide, tuple("ab"))
    own = {"method": "checkpoint", "path": str(out / "checkpoint")}
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    for initial, said in (
        ({"method": "kinetics", "path": str(tmp_path / "absent.pth")}, "absent.pth: no such file"),
        ({"method": "kinetics", "path": str(tmp_path / "odd.pth")}, "kinetics"),
        (other.model_dump(), r"of width 8, and the network is a .* of width 4: set .*model\.width=8"),
        (own, r"is where this run writes its network; choose another --out"),
    ):
        with pytest.raises(InputError, match=said):
            run(configuration(cells, initial=initial), str(out), ("train",))
    assert not out.exists()
    assert config.initial == train.RandomWeights()


# --- faults ----------------------------------------------------------------------------------


def test_a_mistake_among_the_errors_of_workers_ends_the_training() -> None:
    collateral = RuntimeError("connection closed by peer")
    ending = train._EndOnMistake()
    ending.after_exception(None, {0: collateral})
    nested = RuntimeError("wrapped")
    nested.__cause__ = TrainingError("the loss is nan (p1/A01/0/1)")
    with pytest.raises(StageError, match=r"^train: the loss is nan \(p1/A01/0/1\)\nanother$"):
        ending.after_exception(None, {2: TrainingError("another"), 1: nested, 0: collateral})


def test_a_store_that_does_not_answer_is_no_mistake() -> None:
    """Ray Train tries again what is not raised here."""
    ending = train._EndOnMistake()
    ending.after_exception(None, {0: StoreError("s3://bucket/clips", "slow down")})
    with pytest.raises(StageError, match="access denied"):
        ending.after_exception(None, {0: StoreError("s3://bucket/clips", "access denied", lasting=True)})


def test_a_store_that_is_away_is_not_told_as_lost_workers() -> None:
    told = train._explained(StoreError("s3://bucket/runs", "the store does not answer"), ResourcesConfig())
    assert str(told) == "train: s3://bucket/runs: the store does not answer; say the same again once it answers"


class Controlled:
    """A training whose controller is lost at first."""

    def __init__(self, lost: int) -> None:
        self.lost = lost

    def fit(self) -> str:
        self.lost -= 1
        if self.lost >= 0:
            raise ray.exceptions.ActorDiedError()
        return "trained"


def test_a_lost_controller_is_replaced_as_often_as_workers_may_fail(tmp_path: Path) -> None:
    assert train._controlled(Controlled(2), str(tmp_path), failures=2) == "trained"
    with pytest.raises(ray.exceptions.RayActorError):
        train._controlled(Controlled(3), str(tmp_path), failures=2)


def test_running_out_of_memory_is_said_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(job: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(train, "_train", greedy)
    with pytest.raises(TrainingError, match=r"not enough memory for its share of a batch .* set train\.p or train\.k"):
        train._worker({"job": None})

    def broken(job: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(train, "_train", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train._worker({"job": None})


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_the_training_at_once(local_ray: None, cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "screen"
    config = configuration(cells, train={"optimizer": {"method": "sgd", "lr": 1e30}})
    with pytest.raises(StageError, match=r"^train: the loss is (nan|inf).*p1/A\d\d/0/\d.*lower train\.optimizer\.lr$"):
        run(config, str(out), ("train",))
    assert not (out / "checkpoint").exists()
    assert_all_is_free()


@pytest.mark.slow
def test_a_clip_that_only_workers_read_ends_the_training_where_it_cannot_be_read(
    local_ray: None, cells: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "cells"
    shutil.copytree(cells, broken)
    config = configuration(broken)
    validation = next(split_of(config).query("split == 'validation'").itertuples())
    (chunk,) = (
        path for path in (broken / f"clips/{validation.plate}/{validation.well}.zarr/c").rglob("*") if path.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(StageError, match=rf"^train: .*{validation.well}\.zarr"):
        run(config, str(tmp_path / "screen"), ("train",))
    assert_all_is_free()


def assert_all_is_free() -> None:
    """What a training ran on must be there for those that come after it."""
    end = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.2)


@pytest.mark.slow
def test_workers_that_find_no_room_are_not_waited_for_without_end(
    local_ray: None, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    config = configuration(cells, resources={"train_memory_mb": 10**8})
    with pytest.raises(StageError, match=r"1 worker\(s\) could not be started, .* set .* train_memory_mb lower"):
        run(config, str(tmp_path / "screen"), ("train",))


def test_more_memory_than_the_machine_has_is_refused(local_ray: None) -> None:
    with pytest.raises(InputError, match=r"resources\.train_memory_mb asks for 2e\+08 MiB of memory and there are"):
        check_room(ResourcesConfig(train_memory_mb=10**8, train_workers=2))


# --- whole trainings -------------------------------------------------------------------------

PRETRAINED = {"pretrain": {"epochs": 2}, "logging": [{"method": "tensorboard"}]}


@pytest.fixture(scope="module")
def pretrained(local_ray: None, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen that was trained in two phases; only to be read."""
    out = tmp_path_factory.mktemp("pretrained") / "screen"
    assert run(configuration(cells, **PRETRAINED), str(out), ("train",)) == 0
    return out


def epochs(screen: Path) -> list[tuple[str, int]]:
    return [(metrics["phase"], metrics["epoch"]) for metrics in trained(screen).history]


BOTH_PHASES = [("pretrain", 1), ("pretrain", 2), ("train", 1), ("train", 2), ("train", 3)]


@pytest.mark.slow
def test_two_phases_leave_the_network_of_the_second_and_the_numbers_of_both(pretrained: Path) -> None:
    manifest = trained(pretrained)
    assert manifest.class_names == tuple(sorted([*MOAS, train.CONTROL_CLASS]))
    assert epochs(pretrained) == BOTH_PHASES
    best = max((m for m in manifest.history if m["phase"] == "train"), key=lambda m: (m["validation_map"], -m["epoch"]))
    assert manifest.epoch == best["epoch"]
    table = open_table(str(pretrained / "train/metrics.parquet"), TRAINING_METRICS).to_pandas()
    for metrics in manifest.history:
        rows = table[(table["phase"] == metrics["phase"]) & (table["epoch"] == metrics["epoch"])]
        expected = {name: value for name, value in metrics.items() if name not in ("phase", "epoch")}
        assert dict(zip(rows["name"], rows["value"], strict=True)) == expected
    logged = scalars(pretrained / "train/tensorboard")
    assert [step for name, step, _ in logged if name == "pretrain/loss"] == [1, 2]
    assert [step for name, step, _ in logged if name == "train/loss"] == [3, 4, 5]
    losses = [value for name, _, value in logged if name.endswith("/loss")]
    assert losses == pytest.approx([metrics["loss"] for metrics in manifest.history])
    assert any("no known MOA: they are trained on" in note for note in notes(pretrained))
    measured = train.normalisation(str(pretrained))
    assert (tuple(measured["mean"]), tuple(measured["std"])) == (manifest.mean, manifest.std)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_best_of_pretraining_with_a_new_classifier(
    pretrained: Path, cells: Path, local_ray: None, tmp_path: Path
) -> None:
    """One epoch at a learning rate of next to nothing leaves the weights where they start from."""
    config = configuration(
        cells,
        pretrain={"epochs": 2, "lr": 2e-3},
        train={"epochs": 1, "optimizer": {"method": "adamw", "lr": 1e-12, "weight_decay": 0.0}},
    )
    out = tmp_path / "screen"
    assert run(config, str(out), ("train",)) == 0
    (before,) = out.glob("train/runs/*/epoch_0002")
    stored = torch.load(before / "training.pt", weights_only=True)
    assert stored["phase"] == "pretrain"
    best, after = stored["state"]["best_weights"], read_weights(str(out / "checkpoint"))
    for name, tensor in best.items():
        if name.startswith("classifier."):
            assert tensor.shape[0] == 4
            assert after[name].shape[0] == 3
        elif "running" not in name and "num_batches" not in name:
            np.testing.assert_allclose(after[name], tensor.numpy(), atol=1e-8)
    assert not torch.equal(best["conv1.weight"], fresh(config)["conv1.weight"])


def fresh(config: RunConfig) -> dict[str, torch.Tensor]:
    """The network's tensors as the run's seed draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(config.seed)
        return I3DResNet(config.model, CHANNELS, 4).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["none", "the list of checkpoints is cut off"])
def test_a_training_that_was_killed_at_its_end_goes_on(
    damage: str, pretrained: Path, cells: Path, local_ray: None, tmp_path: Path
) -> None:
    screen = tmp_path / "screen"
    shutil.copytree(pretrained, screen)
    document = json.loads((screen / "manifest.json").read_text(encoding="utf-8"))
    document["stages"]["train"]["done"] = False
    (screen / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    shutil.rmtree(screen / "checkpoint")
    (screen / "train/metrics.parquet").unlink()
    if damage != "none":
        (noted,) = screen.glob("train/runs/*/*.json")
        noted.write_bytes(noted.read_bytes()[:-40])
    assert run(configuration(cells, **PRETRAINED), str(screen), ("train",)) == 0
    parts = ("checkpoint", "train/metrics.parquet")
    assert digests(screen, *parts) == digests(pretrained, *parts)
    assert scalars(screen / "train/tensorboard") == scalars(pretrained / "train/tensorboard")


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of everything in TensorBoard's event files (length, checksum, event, checksum)."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[length + 16 :]
    return found


@pytest.mark.slow
def test_kills_in_both_phases_cost_no_epoch_and_change_no_bit(cells: Path, tmp_path: Path) -> None:
    """N epochs are k epochs, a kill, and N - k epochs."""
    configuration_file = tmp_path / "run.yaml"
    document = configuration(cells, **PRETRAINED).model_dump(mode="json")
    configuration_file.write_text(yaml.safe_dump(document), encoding="utf-8")
    calm, screen = tmp_path / "calm", tmp_path / "screen"

    def start(out: Path) -> Run:
        return Run(tmp_path / f"{out.name}.log", "run", configuration_file, "--out", out, "--stages", "train")

    undisturbed = start(calm)
    assert undisturbed.wait() == 0, undisturbed.said()
    for epoch in (1, 3):
        cut = start(screen)
        cut.wait_until(lambda epoch=epoch: bool(list(screen.glob(f"train/runs/*/epoch_{epoch:04d}/manifest.json"))))
        cut.kill("tree")
        assert not (screen / "checkpoint").exists()
    last = start(screen)
    assert last.wait() == 0, last.said()
    assert epochs(screen) == BOTH_PHASES
    parts = ("checkpoint", "train/metrics.parquet", "split.parquet")
    assert digests(screen, *parts) == digests(calm, *parts)


@pytest.mark.slow
def test_a_training_starts_from_weights_on_disk_and_validation_may_be_absent(
    local_ray: None, cells: Path, tmp_path: Path
) -> None:
    config = configuration(cells, train={"label": "compound", "epochs": 1}, split={"validation_share": 0})
    initial = checkpoint_of(tmp_path / "initial", config, tuple("abcde"))
    out = tmp_path / "screen"
    assert run(config.model_copy(update={"initial": initial}), str(out), ("train",)) == 0
    said = " ".join(notes(out))
    assert "initial weights: the classifier is not taken: it tells a, b, c and 2 more apart" in said
    assert "no validation wells: the last epoch is kept" in said
    table = pd.read_parquet(out / "split.parquet")
    compounds = set(table.loc[(table["split"] == "train") & (table["role"] != "negative_control"), "compound"])
    assert set(trained(out).class_names) == compounds | {train.CONTROL_CLASS}
    assert UNKNOWN in compounds
    assert "validation_map" not in trained(out).history[0]
    # Other content under the same path is another run.
    weights = read_weights(initial.path)
    weights["conv1.weight"] = weights["conv1.weight"] * 2
    write_checkpoint(initial.path, read_manifest(initial.path), weights)
    with pytest.raises(ConfigError, match="or the file of the initial weights"):
        run(config.model_copy(update={"initial": initial}), str(out), ("train",))
