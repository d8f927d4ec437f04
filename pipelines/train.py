"""Stage `train`: clips in; a network that embeds cells out.

Ray Train runs the workers and keeps their checkpoints, one an epoch, so that a run that loses a worker, a node or
everything goes on from the last one. Each worker reads its batches through Ray Data from an index table, a row a
batch: reading and augmenting run in actors anywhere in the cluster, ahead of the training step.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util.queue import Empty, Queue

from pipelines.clip_batches import BatchReader, ClipTable, clip_table
from pipelines.cluster import READER_CPUS, quiet_ray_data, worker_cpus
from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.progress import progress
from pipelines.split import make_split
from pipelines.units import Counts, StageError
from screening.augmentation import AugmentConfig
from screening.embedding import embed
from screening.i3d import ModelConfig, frames_seen
from screening.retrieval import rank
from screening.sampling import pk_batches
from screening.splits import is_of_cells
from screening.training import Normalisation, TrainConfig, TrainingState
from storage_schemas import store
from storage_schemas.checkpoint import (
    CheckpointManifest,
    read_manifest,
    read_training,
    read_weights,
    write_checkpoint,
)
from storage_schemas.clips import channel_names, open_clips
from storage_schemas.errors import SchemaError
from storage_schemas.screen import Screen
from storage_schemas.tables import SPLIT, TRAINING_METRICS, write_table

OUTPUT_VERSION = 2  # raised when the same configuration gives another network

CONTROL_CLASS = "negative control"

_NORMALISATION_CLIPS = 2048  # clips that the normalisation is measured on
_VALIDATION_BATCH = 64
_ROWS_AHEAD = 2000  # batches planned in one Ray Data run: bounds the plan, spares starts


@dataclass(frozen=True)
class _Job:
    """All that a training worker needs."""

    model: ModelConfig
    train: TrainConfig
    augment: AugmentConfig
    seed: int
    clips: ClipTable  # of the training wells
    query: ClipTable  # for validation
    gallery: ClipTable  # of the training wells, to look them up among
    groups: dict[str, int]  # well -> number of its replicate and compound, within which nothing is looked up
    class_names: tuple[str, ...]
    channels: tuple[str, ...]
    n_frames: int
    normalisation: Normalisation
    threads: int
    readers: int
    cache_bytes: int
    fingerprint: str
    events: Queue


def train(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Split the wells, train the network and keep the best epoch's.

    Returns:
        Counts, and notes for the reader.

    Raises:
        InputError: if there are too few clips or identities to train on.
        StageError: if training fails more often than allowed.
    """
    workers = config.resources.train_workers
    table, notes = make_split(config, inputs, screen)
    write_table(screen.split, table, SPLIT, fingerprint)

    clips, class_names = _training_clips(config, screen, table)
    query, gallery = _validation_clips(screen, table)
    rng = np.random.default_rng([config.seed, 1])
    first = open_clips(clips.url[0])
    job = _Job(
        model=config.model,
        train=config.train,
        augment=config.augment,
        seed=config.seed,
        clips=clips,
        query=_some(query, config.train.validation_clips, rng),
        gallery=_some(gallery, config.train.validation_clips, rng),
        groups=_groups(table),
        class_names=class_names,
        channels=tuple(channel_names(first)),
        n_frames=first.shape[2],
        normalisation=Normalisation.measure(_blocks(_some(clips, _NORMALISATION_CLIPS, rng))),
        threads=max(1, int(ray.cluster_resources().get("CPU", 1) // workers)),
        readers=config.resources.train_readers,
        cache_bytes=config.resources.train_cache_mb * 2**20,
        fingerprint=fingerprint,
        events=Queue(actor_options={"num_cpus": 0}),
    )
    if not _validates(job):
        notes = [*notes, "no validation wells: the last epoch is kept, not the best"]
    last = _fit(config, screen, job)

    manifest = read_manifest(last)
    _write_metrics(screen, manifest, fingerprint)
    write_checkpoint(screen.checkpoint, manifest, read_weights(last), read_training(last))
    by_split = table["split"].value_counts()
    rows = "cells" if is_of_cells(table) else "wells"
    counts = {f"{rows}: {name}": int(n) for name, n in by_split.items()}
    counts |= {"clips": len(clips.label), "classes": len(class_names), "epochs": len(manifest.history)}
    return counts, list(notes)


def _fit(config: RunConfig, screen: Screen, job: _Job) -> str:
    """Run Ray Train to its end, or on from where an earlier run was cut off; the last checkpoint's folder."""
    resources = config.resources
    workers = resources.train_workers
    cpus = ray.cluster_resources().get("CPU", 1)
    _mend(store.join(screen.training_runs, job.fingerprint))
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=resources.train_gpus > 0,
            resources_per_worker={
                "CPU": worker_cpus(cpus, workers),
                **({"GPU": resources.train_gpus} if resources.train_gpus else {}),
            },
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=job.fingerprint,
            storage_path=screen.training_runs,
            failure_config=ray.train.FailureConfig(max_failures=resources.train_max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(job, stop), daemon=True)
    watcher.start()
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {0: error}
        raise StageError(f"train: {_innermost(next(iter(causes.values())))}") from error
    finally:
        stop.set()
        watcher.join()
        job.events.shutdown()
    assert result.checkpoint is not None, "each epoch reports a checkpoint"
    path: str = result.checkpoint.path
    return path if store.is_local(screen.url) else f"{screen.url.partition('://')[0]}://{path}"


def _mend(folder: str) -> None:
    """Remove a list of checkpoints of which a killed run wrote but a part.

    Ray Train writes it in place, and would refuse it for ever; without it training starts again, to the same end.
    """
    for name in store.list_names(folder):
        if name.endswith(".json"):
            try:
                store.read_json(store.join(folder, name))
            except SchemaError:
                store.remove(store.join(folder, name))


def _innermost(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error.__cause__
    return _innermost(cause) if isinstance(cause, BaseException) else str(error)


def _watch(job: _Job, stop: threading.Event) -> None:
    """Show epochs on the driver as workers report them."""
    with progress("train", job.train.epochs, "epochs") as advance:
        while not stop.is_set() or not job.events.empty():
            try:
                seen = job.events.get(timeout=0.5)
            except Empty:
                continue
            advance(", ".join(f"{name} {value:.3g}" for name, value in seen.items()))


# --- which clips ---------------------------------------------------------------------------------


def _training_clips(config: RunConfig, screen: Screen, table: pd.DataFrame) -> tuple[ClipTable, tuple[str, ...]]:
    wells = table[table["split"] == "train"]
    identity = _identity(wells, config.train.label)
    class_names = tuple(sorted(set(identity.dropna())))
    clips = clip_table(screen, wells.assign(label=identity.map(_codes(class_names))))
    present = np.unique(clips.label[clips.label >= 0])
    if len(present) < 2:
        named = [class_names[label] for label in present]
        raise StageError(
            f"train: the training wells have clips of {len(present)} identities {named}, two are needed; "
            f"give more compounds a {config.train.label} in the tables, or look at why wells have no clips"
        )
    clips = clips.take(np.flatnonzero(clips.label >= 0))
    return clips, class_names


def _validation_clips(screen: Screen, table: pd.DataFrame) -> tuple[ClipTable, ClipTable]:
    """Cells for validation, and training cells to look them up among, both by MOA."""
    known = table[table["moa"].notna() & (table["role"] != "negative_control")]
    known = known.assign(label=known["moa"].map(_codes(sorted(set(known["moa"])))))
    query, gallery = (clip_table(screen, known[known["split"] == part]) for part in ("validation", "train"))
    return query, gallery


def _groups(table: pd.DataFrame) -> dict[str, int]:
    number = table.groupby(["replicate", "compound"]).ngroup()
    return dict(zip(table["plate"] + "/" + table["well"], number.tolist(), strict=True))


def _codes(class_names: Sequence[str]) -> dict[str, int]:
    return {name: code for code, name in enumerate(class_names)}


def _identity(wells: pd.DataFrame, label: str) -> pd.Series[str]:
    """What each well's cells are trained to be told apart by; controls are a class of their own."""
    identity = wells[label].astype(object)
    return identity.mask(wells["role"] == "negative_control", CONTROL_CLASS)


def _some(clips: ClipTable, count: int, rng: np.random.Generator) -> ClipTable:
    """At most ``count`` of the clips, drawn evenly, in order."""
    n = len(clips.label)
    return clips.take(np.sort(rng.choice(n, min(n, count), replace=False)))


def _blocks(clips: ClipTable) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, len(clips.label), _VALIDATION_BATCH):
        yield clips.take(np.arange(start, min(start + _VALIDATION_BATCH, len(clips.label)))).read()


# --- in a worker ---------------------------------------------------------------------------------


def _worker(config: dict[str, Any]) -> None:
    """Train from the last checkpoint, or from the start, to the end; one report an epoch."""
    job: _Job = config["job"]
    quiet_ray_data()
    torch.set_num_threads(min(job.threads, os.cpu_count() or 1))
    context = ray.train.get_context()
    rank_, workers = context.get_world_rank(), context.get_world_size()
    # Batches and their order are a function of seed and epoch alone, so any worker can make its share of any epoch.
    n_batches = len(_plan(job, 0))
    state = TrainingState.make(
        job.model,
        job.train,
        job.normalisation,
        n_classes=len(job.class_names),
        steps_per_epoch=n_batches,
        seed=job.seed,
        control=job.class_names.index(CONTROL_CLASS) if CONTROL_CLASS in job.class_names else None,
        device=ray.train.torch.get_device(),
        wrap=ray.train.torch.prepare_model if workers > 1 else lambda module: module,
    )
    history: list[dict[str, float]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            history = list(read_manifest(folder).history)
            stored = torch.load(io.BytesIO(read_training(folder)), weights_only=True)
        state.load_state_dict(stored)
    if rank_ == 0:
        _show(job, history)
    batches = _batches(job, state.epoch, rank_, workers)
    while not state.finished:
        sums: dict[str, float] = {}
        for _ in range(n_batches):
            batch = next(batches)
            losses = state.step(torch.from_numpy(batch["clips"]), torch.from_numpy(batch["label"]), batch["name"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / n_batches
        metrics = {"epoch": float(state.epoch + 1), **sums}
        validated = _validate(job, state, batches, rank_, workers)
        if validated is not None:
            metrics["validation_map"] = validated
        state.end_epoch(validated)
        history.append(metrics)
        _report(job, state, history, rank_)


def _report(job: _Job, state: TrainingState, history: list[dict[str, float]], rank_: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank_ == 0:
            training = io.BytesIO()
            torch.save(state.state_dict(), training)
            manifest = CheckpointManifest(
                model=job.model.model_dump(mode="json"),
                class_names=job.class_names,
                channels=job.channels,
                n_frames=job.n_frames,
                mean=job.normalisation.mean,
                std=job.normalisation.std,
                embedding_dim=state.network.embedding_dim,
                epoch=state.best_epoch,
                history=tuple(history),
                fingerprint=job.fingerprint,
            )
            weights = {name: tensor.numpy() for name, tensor in state.best_weights.items()}
            write_checkpoint(folder, manifest, weights, training.getvalue())
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(history[-1], checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{state.epoch:04d}")
    if rank_ == 0:
        _show(job, history[-1:])


def _show(job: _Job, epochs: Sequence[dict[str, float]]) -> None:
    shown = ("loss", "accuracy", "validation_map")
    for metrics in epochs:
        job.events.put({name: metrics[name] for name in shown if name in metrics})


def _validate(
    job: _Job,
    state: TrainingState,
    batches: Iterator[dict[str, Any]],
    rank_: int,
    workers: int,
) -> float | None:
    """Mean average precision of the validation cells among training cells, each worker embedding its share of both."""
    if not _validates(job):
        return None
    frames = frames_seen(job.model, job.n_frames)
    found: dict[str, list[Any]] = {"query": [], "gallery": []}
    for _ in range(len(_validation_rows(job, 0, rank_, workers))):
        batch = next(batches)
        vectors = embed(state.network, batch["clips"], job.normalisation, frames)
        groups = [job.groups[name.rsplit("/", 2)[0]] for name in batch["name"]]
        found[batch["kind"]].append((vectors, batch["label"], groups))
    shares: list[Any] = [found]
    if workers > 1:
        shares = [None] * workers
        torch.distributed.all_gather_object(shares, found)
    score = rank(*_joined(shares, "query"), *_joined(shares, "gallery")).mean_average_precision
    return None if math.isnan(score) else score  # no query has an MOA that the gallery has


def _joined(shares: list[Any], kind: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Embeddings, labels and groups of one side, from all workers."""
    vectors, labels, groups = zip(*(part for share in shares for part in share[kind]), strict=True)
    return np.concatenate(vectors), np.concatenate(labels), np.concatenate(groups)


# --- reading -------------------------------------------------------------------------------------


def _plan(job: _Job, epoch: int) -> np.ndarray[Any, Any]:
    """(batches, P·K) positions of an epoch's clips."""
    rng = np.random.default_rng([job.seed, 2, epoch])
    return pk_batches(job.clips.label, job.train.p, job.train.k, rng)


def _training_rows(job: _Job, epoch: int, rank_: int, workers: int) -> list[dict[str, Any]]:
    plan = _plan(job, epoch)
    share = plan.shape[1] // workers
    start = rank_ * share
    return [
        {
            "kind": "train",
            "positions": positions[start : start + share],
            "seed": [job.seed, 3, epoch, number],
            "start": start,
            "of": len(positions),
        }
        for number, positions in enumerate(plan)
    ]


def _validates(job: _Job) -> bool:
    return bool(len(job.query.label) and len(job.gallery.label))


def _validation_rows(job: _Job, epoch: int, rank_: int, workers: int) -> list[dict[str, Any]]:
    rows = []
    for kind, clips in (("query", job.query), ("gallery", job.gallery)):
        starts = range(0, len(clips.label) if _validates(job) else 0, _VALIDATION_BATCH)
        for start in starts:
            stop = min(start + _VALIDATION_BATCH, len(clips.label))
            rows.append({"kind": kind, "positions": np.arange(start, stop), "seed": [epoch], "start": 0, "of": 0})
    return rows[rank_::workers]


def _batches(job: _Job, first: int, rank_: int, workers: int) -> Iterator[dict[str, Any]]:
    """All batches from an epoch on, in order: an epoch's training batches, then its validation batches."""
    sources = {"train": job.clips, "query": job.query, "gallery": job.gallery}
    rows: list[dict[str, Any]] = []
    for epoch in range(first, job.train.epochs):
        rows += _training_rows(job, epoch, rank_, workers)
        rows += _validation_rows(job, epoch, rank_, workers)
        if len(rows) < _ROWS_AHEAD and epoch + 1 < job.train.epochs:
            continue
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset.context.execution_options.preserve_order = True
        yield from dataset.map(
            BatchReader,
            fn_constructor_args=(sources, job.augment, job.cache_bytes),
            num_cpus=READER_CPUS,
            concurrency=job.readers,
        ).iter_rows()
        rows = []


def _write_metrics(screen: Screen, manifest: CheckpointManifest, fingerprint: str) -> None:
    rows = [
        {"epoch": int(metrics["epoch"]), "name": name, "value": value}
        for metrics in manifest.history
        for name, value in metrics.items()
        if name != "epoch"
    ]
    write_table(screen.training_metrics, pd.DataFrame(rows), TRAINING_METRICS, fingerprint)
