"""Stage `train`: clips in; a network that embeds cells out.

Ray Train runs the workers and keeps their checkpoints, one an epoch, so that a run that loses a worker, a node or
everything goes on from the last one. Reading and augmenting run in actors anywhere in the cluster, ahead of the
training step.

A training has a phase or two: on compounds, if that is asked for (`pretrain`), then on what `train.label` says, from
the weights that the first phase was best with.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from pipelines import events
from pipelines.checkpoints import storage
from pipelines.clip_batches import BatchStream, ClipTable, clip_table
from pipelines.cluster import training_cpus
from pipelines.config import ConfigError, ResourcesConfig, RunConfig, configuration_of, with_cells_of
from pipelines.inputs import Inputs, open_inputs
from pipelines.loggers import Log, Training, check_loggers, open_loggers
from pipelines.progress import progress
from pipelines.split import make_split
from pipelines.units import Counts, StageError
from screening.augmentation import AugmentConfig
from screening.embedding import embed
from screening.i3d import I3DResNet, ModelConfig, frames_seen
from screening.initialisation import CheckpointWeights, InitialWeights, RandomWeights, initialise, read_initial_weights
from screening.retrieval import rank
from screening.sampling import pk_batches
from screening.splits import is_of_cells
from screening.training import Normalisation, TrainConfig, TrainingError, TrainingState
from storage_schemas import store
from storage_schemas.checkpoint import (
    CheckpointManifest,
    read_manifest,
    read_training,
    read_weights,
    write_checkpoint,
)
from storage_schemas.clips import channel_names, open_clips
from storage_schemas.errors import InputError, SchemaError, StoreError
from storage_schemas.screen import Screen
from storage_schemas.screen import fingerprint as digest
from storage_schemas.tables import SPLIT, TRAINING_METRICS, write_table

OUTPUT_VERSION = 3  # raised when the same configuration gives another network

CONTROL_CLASS = "negative control"

PhaseName = Literal["pretrain", "train"]
OnEpoch: TypeAlias = Callable[[Mapping[str, Any]], None]

_NORMALISATION_CLIPS = 2048  # clips that the normalisation is measured on
_VALIDATION_BATCH = 64
_STREAMS: dict[PhaseName, tuple[int, int]] = {"pretrain": (6, 7), "train": (2, 3)}  # of random numbers: plan, changes
_STARTS = 5  # times that Ray Train waits a minute for room, which a cluster that grows has by then
_RESTARTED = {"max_restarts": -1, "max_task_retries": -1}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class _Phase:
    """What is trained on, and how.

    Attributes:
        name: which phase.
        config: how to train.
        clips: with their class.
        class_names: what they are told apart as.
    """

    name: PhaseName
    config: TrainConfig
    clips: ClipTable
    class_names: tuple[str, ...]

    @property
    def control(self) -> int | None:
        """The class of the negative controls, if they have one."""
        return self.class_names.index(CONTROL_CLASS) if CONTROL_CLASS in self.class_names else None


@dataclass(frozen=True)
class _Job:
    """All that a training worker needs."""

    model: ModelConfig
    initial: InitialWeights
    phases: tuple[_Phase, ...]
    augment: AugmentConfig
    seed: int
    query: ClipTable  # for validation
    gallery: ClipTable  # of the training wells, to look them up among
    groups: dict[str, int]  # well -> number of its replicate and compound, within which nothing is looked up
    channels: tuple[str, ...]
    n_frames: int
    normalisation: Normalisation
    threads: int
    readers: int
    cache_bytes: int
    fingerprint: str
    events: Queue


def train(
    config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str, on_epoch: OnEpoch | None = None
) -> tuple[Counts, list[str]]:
    """Split the wells, train the network and keep the best epoch's.

    Args:
        config: of the run.
        inputs: its plates and tables.
        screen: that is trained on.
        fingerprint: of all that the network depends on.
        on_epoch: called with the metrics of every epoch, also of those of an earlier run that this one goes on from,
            from another thread.

    Returns:
        Counts, and notes for the reader.

    Raises:
        InputError: if there are too few clips or identities to train on, the initial weights do not fit, or training
            cannot go on.
        StageError: if training fails more often than allowed.
    """
    table, notes = make_split(config, inputs, screen)
    write_table(screen.split, table, SPLIT, fingerprint)
    if config.network is not None:
        return _counts_of_split(table), [*notes, _take(config.network, inputs, screen, fingerprint)]

    phases = _phases(config, screen, table)
    notes = [*notes, *(note for phase in phases for note in _few_clips(phase))]
    query, gallery = _validation_clips(screen, table)
    rng = np.random.default_rng([config.seed, 1])
    clips = phases[-1].clips
    first = open_clips(clips.url[0])
    channels = tuple(channel_names(first))
    notes += _initial_notes(config, len(channels), phases[0].class_names)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    job = _Job(
        model=config.model,
        initial=config.initial,
        phases=phases,
        augment=config.augment,
        seed=config.seed,
        query=_some(query, config.train.validation_clips, rng),
        gallery=_some(gallery, config.train.validation_clips, rng),
        groups=_groups(table),
        channels=channels,
        n_frames=first.shape[2],
        normalisation=_measured(config, clips),
        threads=training_cpus(config.resources).threads,
        readers=config.resources.train_readers,
        cache_bytes=config.resources.train_cache_mb * 2**20,
        fingerprint=fingerprint,
        # Beside the driver: on a node that is lost it would take the training with it.
        events=Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here, **_RESTARTED}),
    )
    if not _validates(job):
        notes.append("no validation wells: the last epoch is kept, not the best")
    logged = Training(
        title=config.title,
        folder=store.parent(screen.training_metrics),
        key=digest(fingerprint, screen.url),
        config=config.model_dump(mode="json"),
    )
    with open_loggers(config.logging, logged) as log:
        last = _fit(config.resources, screen, job, log, on_epoch)

    manifest = read_manifest(last)
    _write_metrics(screen, manifest.history, fingerprint)
    write_checkpoint(screen.checkpoint, manifest, read_weights(last), read_training(last))
    counts = _counts_of_split(table) | {"clips": len(clips.label), "classes": len(phases[-1].class_names)}
    trained = pd.Series([metrics["phase"] for metrics in manifest.history]).value_counts()
    counts["epochs"] = int(trained["train"])
    if "pretrain" in trained:
        counts |= {"pretraining: classes": len(phases[0].class_names), "pretraining: epochs": int(trained["pretrain"])}
    return counts, notes


def _counts_of_split(table: pd.DataFrame) -> Counts:
    rows = "cells" if is_of_cells(table) else "wells"
    return {f"{rows}: {name}": int(n) for name, n in table["split"].value_counts().items()}


def _take(network: str, inputs: Inputs, screen: Screen, fingerprint: str) -> str:
    """Make another screen's network this one's; what is to be said of that."""
    manifest = read_manifest(network)
    done = screen.done_units("segment")
    clips = screen.clips(next(well for well in inputs.wells if well in done))
    manifest.check_channels(clips, channel_names(open_clips(clips)))
    _write_metrics(screen, manifest.history, fingerprint)
    write_checkpoint(screen.checkpoint, replace(manifest, fingerprint=fingerprint), read_weights(network))
    return (
        f"the network is that of {network} and was not trained here; it may have been trained on compounds, plates or "
        "cells that the held-out tests ask about, and then they flatter it"
    )


def normalisation(url: str) -> pd.DataFrame:
    """What the clips of a segmented screen are centred and scaled by when it is trained on, as its configuration says.

    Returns:
        A row a channel: ``channel``, and ``mean`` and ``std`` of the training clips' intensities from 0 to 1.

    Raises:
        InputError: if it is no screen that `screening run` has segmented, or has nothing to train on.
    """
    screen = Screen.open(store.absolute(url))
    config = configuration_of(screen)
    inputs = open_inputs(with_cells_of(config, screen.url).inputs)
    clips = _phases(config, screen, make_split(config, inputs, screen).table)[-1].clips
    measured = _measured(config, clips)
    channels = channel_names(open_clips(clips.url[0]))
    return pd.DataFrame({"channel": channels, "mean": measured.mean, "std": measured.std})


def check_settings(config: RunConfig, url: str) -> None:
    """Find before hours of work what the training would have met.

    Args:
        config: of the run.
        url: of the screen.

    Raises:
        InputError: if the network or the initial weights cannot be read or do not fit, or a library for logging is
            missing.
    """
    if config.network is not None:
        if config.network.rstrip("/") == Screen(url).checkpoint:
            raise ConfigError(f"network: {config.network} is where this run puts its network; choose another --out")
        read_manifest(config.network)
        return
    check_loggers(config.logging)
    initial = config.initial
    if isinstance(initial, CheckpointWeights) and initial.path.rstrip("/") == Screen(url).checkpoint:
        raise ConfigError(f"initial.path: {initial.path} is where this run writes its network; choose another --out")
    # Channels and classes are known later; whatever they are, weights that fit now fit then.
    _initial_notes(config, 3, ())


def weights_identity(config: RunConfig) -> list[str]:
    """What tells the content of the file that weights are taken or start from from others; nothing without a file.

    Raises:
        SchemaError: if it is missing.
    """
    initial = config.initial
    if config.network is not None:
        setting, url = "network", store.join(config.network, "model.safetensors")
    elif isinstance(initial, RandomWeights):
        return []
    elif isinstance(initial, CheckpointWeights):
        setting, url = "initial.path", store.join(initial.path, "model.safetensors")
    else:
        setting, url = "initial.path", initial.path
    fs, path = store.filesystem(url)
    if not fs.exists(path):
        raise SchemaError(url, f"no such file, which {setting} names")
    return [_content(url, fs.ukey(path))]


@lru_cache(maxsize=8)
def _content(url: str, _version: str) -> str:
    return hashlib.sha256(store.read_bytes(url)).hexdigest()


# --- initial weights -----------------------------------------------------------------------------


def _initial_notes(config: RunConfig, channels: int, class_names: Sequence[str]) -> list[str]:
    """What of the file of the initial weights is not taken, and why."""
    if isinstance(config.initial, RandomWeights):
        return []
    network = I3DResNet(config.model, channels, max(2, len(class_names)))
    return [f"initial weights: {note}" for note in _give_initial(network, config.initial, class_names)]


def _give_initial(network: I3DResNet, initial: InitialWeights, class_names: Sequence[str]) -> list[str]:
    tensors = read_initial_weights(initial)
    notes = []
    if isinstance(initial, CheckpointWeights):
        theirs = read_manifest(initial.path).class_names
        if list(theirs) != list(class_names):
            # As many of other names would be taken for the same.
            tensors = _without_classifier(tensors)
            notes.append(f"the classifier is not taken: it tells {_listed(theirs)} apart, here {_listed(class_names)}")
    return [*notes, *initialise(network, tensors, initial.method)]


def _without_classifier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- the driver ----------------------------------------------------------------------------------


def _fit(resources: ResourcesConfig, screen: Screen, job: _Job, log: Log, on_epoch: OnEpoch | None) -> str:
    """Run Ray Train to its end, or on from where an earlier run was cut off; the last checkpoint's folder."""
    workers = resources.train_workers
    asked = {
        "CPU": training_cpus(resources).asked,
        "GPU": resources.train_gpus,
        "memory": float(resources.train_memory_mb * 2**20),
    }
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=resources.train_gpus > 0,
            resources_per_worker={name: amount for name, amount in asked.items() if amount},
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=job.fingerprint,
            **storage(screen.training_runs),
            failure_config=ray.train.FailureConfig(
                max_failures=resources.train_max_failures, controller_failure_limit=_STARTS
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[_EndOnMistake()],
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(screen, job, log, on_epoch, stop), daemon=True)
    watcher.start()
    try:
        result = _controlled(trainer, store.join(screen.training_runs, job.fingerprint), resources.train_max_failures)
    except (
        ray.train.TrainingFailedError,
        ray.exceptions.RayTaskError,
        ray.exceptions.RayActorError,
        InputError,
    ) as error:
        # Its frames hold what Ray Train runs on, which would keep its room in the cluster.
        raise _explained(error.with_traceback(None), resources) from None
    finally:
        stop.set()
        watcher.join()
        job.events.shutdown(force=True)  # asked to end, it would be started again
    assert result.checkpoint is not None, "each epoch reports a checkpoint"
    path: str = result.checkpoint.path
    return path if store.is_local(screen.url) else f"{screen.url.partition('://')[0]}://{path}"


def _controlled(trainer: ray.train.torch.TorchTrainer, folder: str, failures: int) -> ray.train.Result:
    """Train, and go on from the last checkpoint if the process is lost that watches over Ray Train's workers."""
    for left in range(failures, -1, -1):
        _mend(folder)
        try:
            return trainer.fit()
        except ray.exceptions.RayActorError as error:
            if not left:
                raise
            why = str(error).partition("\n")[0]
            events.warning("training_restarted", f"train: started again: {why}", error=str(error))
    raise AssertionError("it returns or raises")


class _EndOnMistake(ray.train.UserCallback):
    """Ends the training when a worker meets what only the user can mend: it would meet it again."""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Raise, which ends the run, all mistakes of the workers at once; other errors are retried by Ray Train."""
        met = [_mistake(error) for _, error in sorted(worker_exceptions.items())]
        messages = list(dict.fromkeys(str(mistake) for mistake in met if mistake is not None))
        if messages:
            raise StageError("train: " + "\n".join(messages))


def _mistake(error: BaseException | None) -> InputError | None:
    """What the user can mend, among the causes of an error; a store that does not answer for now is no such thing."""
    while error is not None and not isinstance(error, InputError):
        error = _inner(error)
    return None if isinstance(error, StoreError) and not error.lasting else error


def _explained(error: BaseException, resources: ResourcesConfig) -> StageError:
    """What Ray Train gave up for, in words that help."""
    mistake = _mistake(error)
    if mistake is not None:
        return StageError(str(mistake))
    if isinstance(error, StoreError):
        return StageError(f"train: {error}; say the same again once it answers")
    if hasattr(error, "controller_failure"):
        return StageError(
            f"train: {resources.train_workers} worker(s) could not be started, after {_STARTS} tries "
            f"({_innermost(error).partition('. ')[0]}): set resources.train_workers, train_gpus or train_memory_mb "
            "lower, or give the cluster more room"
        )
    causes = getattr(error, "worker_failures", None) or {0: error}
    return StageError(
        f"train: workers failed more often than resources.train_max_failures={resources.train_max_failures} allows; "
        f"the last: {_innermost(next(iter(causes.values())))}\nA worker that was killed may have been without memory: "
        "set train.p, train.k or resources.train_cache_mb lower"
    )


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
    inner = _inner(error)
    return str(error) if inner is None else _innermost(inner)


def _inner(error: BaseException) -> BaseException | None:
    """What an error was raised for, which Ray keeps under names of its own."""
    kept = [getattr(error, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
    return next((inner for inner in [*kept, error.__cause__] if isinstance(inner, BaseException)), None)


def _watch(screen: Screen, job: _Job, log: Log, on_epoch: OnEpoch | None, stop: threading.Event) -> None:
    """Show, log, pass on and write down epochs as workers report them.

    Workers that start again tell of all epochs that they go on from; each counts once.
    """
    history: list[dict[str, Any]] = []
    with progress("train", sum(phase.config.epochs for phase in job.phases), "epochs") as advance:
        while not stop.is_set() or not job.events.empty():
            try:
                metrics = job.events.get(timeout=0.5)
            except Empty:
                continue
            if _place(metrics) in map(_place, history):
                continue
            history.append(metrics)
            phase = f"{metrics['phase']}: " if len(job.phases) > 1 else ""
            shown = {name: metrics[name] for name in ("loss", "accuracy", "validation_map") if name in metrics}
            advance(phase + ", ".join(f"{name} {value:.3g}" for name, value in shown.items()))
            log(len(history), {f"{metrics['phase']}/{name}": value for name, value in _numbers(metrics).items()})
            # All are written once more in the end, and what a store refuses for good is met by the workers, too.
            with suppress(StoreError):
                _write_metrics(screen, history, job.fingerprint)
            if on_epoch is not None:
                on_epoch(metrics)


def _place(metrics: dict[str, Any]) -> tuple[str, float]:
    return metrics["phase"], metrics["epoch"]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """What was measured in an epoch."""
    return {name: value for name, value in sorted(metrics.items()) if name not in ("phase", "epoch")}


# --- which clips ---------------------------------------------------------------------------------


def _phases(config: RunConfig, screen: Screen, table: pd.DataFrame) -> tuple[_Phase, ...]:
    plan: list[tuple[PhaseName, TrainConfig]] = [("train", config.train)]
    if config.pretrain.epochs:
        plan.insert(0, ("pretrain", _pretraining(config)))
    return tuple(_Phase(name, how, *_training_clips(how, screen, table)) for name, how in plan)


def _pretraining(config: RunConfig) -> TrainConfig:
    """How compounds are trained on: as all else, but for what the group pretrain says.

    Nothing is frozen: what `train.freeze` keeps is learnt here.
    """
    own, after = config.pretrain, config.train
    changed = {"label": "compound", "epochs": own.epochs, "p": own.p or after.p, "k": own.k or after.k, "freeze": ()}
    optimizer = after.optimizer if own.lr is None else after.optimizer.model_copy(update={"lr": own.lr})
    return after.model_copy(update={**changed, "optimizer": optimizer})


def _training_clips(how: TrainConfig, screen: Screen, table: pd.DataFrame) -> tuple[ClipTable, tuple[str, ...]]:
    wells = table[table["split"] == "train"]
    identity = identities(wells, how.label)
    class_names = tuple(sorted(set(identity.dropna())))
    clips = clip_table(screen, wells.assign(label=identity.map(_codes(class_names))))
    present, counts = np.unique(clips.label[clips.label >= 0], return_counts=True)
    if len(present) < 2:
        named = [class_names[label] for label in present]
        raise StageError(
            f"train: the training wells have clips of {len(present)} identities {named}, two are needed; "
            f"give more compounds a {how.label} in the tables, or look at why wells have no clips"
        )
    if counts.max() < how.k:
        raise StageError(
            f"train: no identity ({how.label}) has k={how.k} clips to make a batch of, the most is {counts.max()}: set "
            "train.k or pretrain.k lower, or give more wells or sites"
        )
    clips = clips.take(np.flatnonzero(clips.label >= 0))
    return clips, class_names


def _few_clips(phase: _Phase) -> list[str]:
    """A note on identities of which clips come more than once in a batch."""
    counts = np.bincount(phase.clips.label, minlength=len(phase.class_names))
    few = [name for name, count in zip(phase.class_names, counts.tolist(), strict=True) if 0 < count < phase.config.k]
    k = phase.config.k
    return [f"{phase.name}: fewer than k={k} clips, repeated within a batch, of {_listed(few)}"] if few else []


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


def identities(split: pd.DataFrame, label: str) -> pd.Series[str]:
    """What the cells of each row of a split are trained to be told apart by; controls are a class of their own."""
    identity = split[label].astype(object)
    return identity.mask(split["role"] == "negative_control", CONTROL_CLASS)


def _some(clips: ClipTable, count: int, rng: np.random.Generator) -> ClipTable:
    """At most ``count`` of the clips, drawn evenly, in order."""
    n = len(clips.label)
    return clips.take(np.sort(rng.choice(n, min(n, count), replace=False)))


def _measured(config: RunConfig, clips: ClipTable) -> Normalisation:
    return Normalisation.measure(_blocks(_some(clips, _NORMALISATION_CLIPS, np.random.default_rng([config.seed, 8]))))


def _blocks(clips: ClipTable) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, len(clips.label), _VALIDATION_BATCH):
        yield clips.take(np.arange(start, min(start + _VALIDATION_BATCH, len(clips.label)))).read()


# --- in a worker ---------------------------------------------------------------------------------


def _worker(config: dict[str, Any]) -> None:
    """Train from the last checkpoint, or from the start, to the end; one report an epoch."""
    try:
        _train(config["job"])
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
            raise TrainingError(
                f"a worker has not enough memory for its share of a batch ({str(error).partition(chr(10))[0]}): set "
                "train.p or train.k lower, train with more workers, or take smaller clips"
            ) from error
        raise


def _train(job: _Job) -> None:
    torch.set_num_threads(min(job.threads, os.cpu_count() or 1))
    stored: dict[str, Any] | None = None
    history: list[dict[str, Any]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            history = list(read_manifest(folder).history)
            stored = torch.load(io.BytesIO(read_training(folder)), map_location="cpu", weights_only=True)
    if ray.train.get_context().get_world_rank() == 0:
        for metrics in history:
            job.events.put(metrics)
    names = [phase.name for phase in job.phases]
    best: dict[str, Tensor] | None = None  # weights of the phase before
    for phase in job.phases[names.index(stored["phase"]) if stored else 0 :]:
        state = _start(job, phase, best)
        if stored is not None:
            state.load_state_dict(stored["state"])
            stored = None
        _train_phase(job, phase, state, history)
        best = state.best_weights


def _start(job: _Job, phase: _Phase, best: dict[str, Tensor] | None) -> TrainingState:
    """A phase at its start, with the weights of the phase before but for its classifier, or the initial ones."""
    context = ray.train.get_context()
    if best is None:
        initial = partial(_give_initial, initial=job.initial, class_names=phase.class_names)
    else:
        initial = partial(I3DResNet.load_state_dict, state_dict=_without_classifier(best), strict=False)
    return TrainingState.make(
        job.model,
        phase.config,
        job.normalisation,
        n_classes=len(phase.class_names),
        steps_per_epoch=len(_plan(job, phase, 0)),
        seed=job.seed,
        control=phase.control,
        initial=initial,
        device=ray.train.torch.get_device(),
        wrap=ray.train.torch.prepare_model if context.get_world_size() > 1 else lambda module: module,
    )


def _train_phase(job: _Job, phase: _Phase, state: TrainingState, history: list[dict[str, Any]]) -> None:
    """Train to the end of a phase, adding to the history."""
    context = ray.train.get_context()
    rank_, workers = context.get_world_rank(), context.get_world_size()
    # Batches and their order are a function of seed and epoch alone, so any worker can make its share of any epoch.
    n_batches = len(_plan(job, phase, 0))
    with closing(_batches(job, phase, state.epoch, rank_, workers)) as batches:
        while not state.finished:
            sums: dict[str, float] = {}
            for _ in range(n_batches):
                batch = next(batches)
                losses = state.step(torch.from_numpy(batch["clips"]), torch.from_numpy(batch["label"]), batch["name"])
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value / n_batches
            metrics = {"phase": phase.name, "epoch": state.epoch + 1, **sums}
            validated = _validate(job, state, batches, rank_, workers)
            if validated is not None:
                metrics["validation_map"] = validated
            state.end_epoch(validated)
            history.append(metrics)
            _report(job, phase, state, history, rank_)


def _report(job: _Job, phase: _Phase, state: TrainingState, history: list[dict[str, Any]], rank_: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank_ == 0:
            training = io.BytesIO()
            torch.save({"phase": phase.name, "state": state.state_dict()}, training)
            manifest = CheckpointManifest(
                model=job.model.model_dump(mode="json"),
                class_names=phase.class_names,
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
        ray.train.report(history[-1], checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{len(history):04d}")
    if rank_ == 0:
        job.events.put(history[-1])


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
    for _ in range(len(_validation_rows(job, rank_, workers))):
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


def _plan(job: _Job, phase: _Phase, epoch: int) -> np.ndarray[Any, Any]:
    """(batches, P·K) positions of an epoch's clips."""
    rng = np.random.default_rng([job.seed, _STREAMS[phase.name][0], epoch])
    return pk_batches(phase.clips.label, phase.config.p, phase.config.k, rng)


def _training_rows(job: _Job, phase: _Phase, epoch: int, rank_: int, workers: int) -> list[dict[str, Any]]:
    plan = _plan(job, phase, epoch)
    share = plan.shape[1] // workers
    start = rank_ * share
    return [
        {
            "kind": "train",
            "positions": positions[start : start + share],
            "seed": [job.seed, _STREAMS[phase.name][1], epoch, number],
            "start": start,
            "of": len(positions),
        }
        for number, positions in enumerate(plan)
    ]


def _validates(job: _Job) -> bool:
    return bool(len(job.query.label) and len(job.gallery.label))


def _validation_rows(job: _Job, rank_: int, workers: int) -> list[dict[str, Any]]:
    rows = []
    for kind, clips in (("query", job.query), ("gallery", job.gallery)):
        starts = range(0, len(clips.label) if _validates(job) else 0, _VALIDATION_BATCH)
        for start in starts:
            stop = min(start + _VALIDATION_BATCH, len(clips.label))
            rows.append({"kind": kind, "positions": np.arange(start, stop)})
    return rows[rank_::workers]


def _batches(job: _Job, phase: _Phase, first: int, rank_: int, workers: int) -> BatchStream:
    """All batches of a phase from an epoch on, in order: an epoch's training batches, then its validation batches."""
    rows = (
        row
        for epoch in range(first, phase.config.epochs)
        for row in _training_rows(job, phase, epoch, rank_, workers) + _validation_rows(job, rank_, workers)
    )
    sources = {"train": phase.clips, "query": job.query, "gallery": job.gallery}
    return BatchStream(rows, sources, job.augment, readers=job.readers, cache_bytes=job.cache_bytes)


def _write_metrics(screen: Screen, history: Sequence[dict[str, Any]], fingerprint: str) -> None:
    rows = [
        {"phase": metrics["phase"], "epoch": metrics["epoch"], "name": name, "value": value}
        for metrics in history
        for name, value in _numbers(metrics).items()
    ]
    write_table(screen.training_metrics, pd.DataFrame(rows), TRAINING_METRICS, fingerprint)
