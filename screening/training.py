"""Training the embedding network, step by step; where clips come from is the caller's business.

The loss is MitoReID's: cross-entropy with label smoothing, the batch-hard triplet loss, and the
centre loss, whose centres learn at a rate of their own. All that a run needs to go on exactly where
it stopped is in :meth:`TrainingState.state_dict`; the random numbers of sampling and augmentation
are made by the caller from the run's seed and the epoch, so none are kept here.

Workers that train together (the processes of torch's default group) each take an equal share of
every batch; their losses and gradients are those that one worker would find on the whole batch.

Axis letters: N clips, C channels, T frames, H, W (px), D embedding dimension, I identities
(classes).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from screening.distributed import gather, rank, synchronise_batchnorm, total, workers
from screening.i3d import I3DResNet, ModelConfig, frames_seen
from screening.losses import center_losses, mislabelled_as_control, triplet_losses
from storage_schemas.base import Config
from storage_schemas.clips import Clips, white
from storage_schemas.errors import InputError


class TrainingError(InputError):
    """Training cannot go on with these clips or settings."""


class SGD(Config):
    """Gradient descent with Nesterov momentum: MitoReID's, which starts from pretrained weights."""

    method: Literal["sgd"] = Field("sgd", description="gradient descent with Nesterov momentum")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    momentum: float = Field(0.9, gt=0, lt=1, description="Nesterov momentum")
    weight_decay: float = Field(1e-3, ge=0, description="L2 penalty on the weights")


class AdamW(Config):
    """Adam with decoupled weight decay: learns from scratch in few epochs."""

    method: Literal["adamw"] = Field("adamw", description="Adam with decoupled weight decay")
    lr: float = Field(2e-3, gt=0, description="learning rate")
    weight_decay: float = Field(1e-2, ge=0, description="decay of the weights, times the learning rate")


class CosineSchedule(Config):
    """Linear warm-up, then half a cosine down to ``floor``, an update at a time."""

    method: Literal["cosine"] = Field("cosine", description="linear warm-up, then half a cosine")
    warmup_epochs: float = Field(1.0, ge=0, description="epochs until the full learning rate")
    floor: float = Field(0.01, ge=0, le=1, description="final learning rate, share of the full one")


class PlateauSchedule(Config):
    """A lower learning rate whenever the validation metric has stopped rising."""

    method: Literal["plateau"] = Field("plateau", description="lower when validation has stopped rising")
    factor: float = Field(0.1, gt=0, lt=1, description="what the learning rate is multiplied by")
    patience: int = Field(10, ge=0, description="epochs without a better metric before that")


class MislabelRule(Config):
    """When clips that look like controls are left out (:func:`screening.losses.mislabelled_as_control`)."""

    limit: int = Field(5, ge=1, description="clips of a batch that are too many to be left out")
    after_epochs: int = Field(5, ge=0, description="epochs of learning from all clips before that")


Stage = Literal["stem", "layer1", "layer2", "layer3", "layer4"]


class TrainConfig(Config):
    """How the network is trained."""

    label: Literal["moa", "compound"] = Field(
        "moa", description="what counts as an identity: the mechanism of action or the compound"
    )
    epochs: int = Field(60, ge=1, description="epochs, each a visit to every clip")
    p: int = Field(32, ge=2, description="identities a batch")
    k: int = Field(4, ge=2, description="clips an identity in a batch")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    triplet_weight: float = Field(1.0, ge=0, description="weight of the batch-hard triplet loss; 0: without")
    margin: float = Field(0.3, ge=0, description="margin of the triplet loss, embedding units")
    center_weight: float = Field(0.01, ge=0, description="weight of the centre loss; 0: without")
    center_lr: float = Field(0.05, gt=0, description="learning rate of the class centres")
    optimizer: Annotated[SGD | AdamW, Field(discriminator="method")] = Field(
        AdamW(), description="how the weights follow the gradient"
    )
    schedule: Annotated[CosineSchedule | PlateauSchedule, Field(discriminator="method")] = Field(
        CosineSchedule(), description="how the learning rate changes"
    )
    mislabel: MislabelRule | None = Field(
        None,
        description="leave out clips that the network takes for controls while a batch has fewer than limit, "
        "after so many epochs: {limit: 5, after_epochs: 5}; null: learn from all",
    )
    freeze: tuple[Stage, ...] = Field(
        (),
        description="parts of the network that stay as they start, weights and statistics: stem, layer1, ..., layer4",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the network's gradient, which is scaled down to it; null: any"
    )
    accumulate: int = Field(
        1, ge=1, description="batches whose mean gradient makes a step; each seeks its triplets in itself"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of the network's arithmetic; bf16 where the device has instructions for it"
    )
    channels_last: bool = Field(True, description="activations with the channels of a pixel side by side in memory")
    compile: bool = Field(False, description="translate the network by torch.compile, which takes about a minute first")
    sync_batchnorm: bool = Field(
        True, description="batch normalisation sees the clips of all workers; false: of each its own"
    )
    triplet_scope: Literal["all", "worker"] = Field(
        "all", description="where a clip's triplet is sought: among the clips of all workers or of its own"
    )
    validation_clips: int = Field(
        512,
        ge=1,
        description="clips of validation compounds, and of trained ones to look them up among",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many epochs without a better validation metric; null: never",
    )


class Normalisation(Config):
    """What clips are centred and scaled by; kept with the weights, which need it."""

    mean: tuple[float, ...] = Field(description="mean of each channel, of intensities from 0 to 1")
    std: tuple[float, ...] = Field(description="standard deviation of each channel, likewise")

    @classmethod
    def measure(cls, batches: Iterable[Clips]) -> Normalisation:
        """Mean and standard deviation of each channel over batches of clips (N, C, T, H, W), all of one type.

        Raises:
            TrainingError: if there are no clips.
        """
        counts: NDArray[np.int64] | None = None  # (C, bit patterns of a pixel): exact, whatever the number of clips
        value = np.zeros(0)
        for clips in batches:
            pattern = np.dtype(f"u{clips.itemsize}")
            patterns = np.arange(256**clips.itemsize).astype(pattern)
            # Of half floats some patterns are no numbers; no clip has them.
            pixel = patterns.view(clips.dtype)
            value = np.where(np.isfinite(pixel), pixel, 0).astype(np.float64) / white(clips.dtype)
            by_channel = np.moveaxis(clips.view(pattern), 1, 0)
            batch = np.stack([np.bincount(c.ravel(), minlength=len(value)) for c in by_channel])
            counts = batch if counts is None else counts + batch
        if counts is None or not counts.sum():
            raise TrainingError("there are no clips to measure the normalisation on")
        share = counts / counts.sum(axis=1, keepdims=True)
        mean = share @ value
        variance = (share * (value - mean[:, None]) ** 2).sum(axis=1)
        # A channel without any contrast must not become infinite.
        std = np.maximum(np.sqrt(variance), 1 / 255)
        return cls(mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def apply(self, clips: Tensor) -> Tensor:
        """Normalise clips (N, C, T, H, W) of any stored type into float32.

        The result lies in memory as ``channels_last_3d``, which 3D convolutions on a CPU prefer.

        Raises:
            InputError: if the clips have another number of channels.
        """
        if clips.shape[1] != len(self.mean):
            raise InputError(f"clips have {clips.shape[1]} channels but the network is made for {len(self.mean)}")
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(self.mean, device=clips.device).reshape(shape)
        std = torch.tensor(self.std, device=clips.device).reshape(shape)
        x = clips.float().mul_(1 / (white(clips.dtype) * std)).sub_(mean / std)
        # Reordered last: planes are scaled faster than pixels whose channels lie side by side.
        return x.contiguous(memory_format=torch.channels_last_3d)


class Learner(nn.Module):
    """Network and class centres as one module: one wrapper (DDP) averages both gradients.

    Args:
        network: as it starts.
        n_classes: identities to tell apart.
        config: how to train it.
        control: the class of the negative controls, if there is one.
    """

    def __init__(self, network: I3DResNet, n_classes: int, config: TrainConfig, control: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.control = control
        self.centers = nn.Parameter(
            torch.randn(n_classes, network.embedding_dim), requires_grad=config.center_weight > 0
        )
        for module in self._frozen():
            module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        names = [("conv1", "bn1") if stage == "stem" else (stage,) for stage in self.config.freeze]
        return [self.network.get_submodule(name) for stage in names for name in stage]

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation; frozen parts stay in evaluation, so that their statistics stay too."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, x: Tensor, label: Tensor, leave_out: bool = False) -> dict[str, Tensor]:
        """The losses of a batch, or of this worker's share of one.

        Args:
            x: (N, C, T, H, W) float32, normalised; each worker has as many.
            label: (N,) int64.
            leave_out: whether clips that look mislabelled are left out of the losses.

        Returns:
            Scalars: ``loss`` (the sum to minimise), its terms before weighting, the share
                ``accuracy`` of clips classified rightly and, with ``leave_out``, the share
                ``left_out``. The mean over all workers is that of the whole batch.
        """
        config = self.config
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits, embedding = self.network(x)
        logits, embedding = logits.float(), embedding.float()
        predicted = logits.argmax(dim=1)
        kept = torch.ones_like(label, dtype=torch.bool)
        if leave_out:
            kept = ~self._mislabelled(predicted, label)
        # Workers may keep different numbers of clips, so a clip's weight is its share of all that are kept.
        weight = kept * (workers() / total(kept.sum()).clamp(min=1))
        smoothing = config.label_smoothing
        identity = functional.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        terms = {"identity": (weight * identity).sum()}
        loss = terms["identity"]
        if config.triplet_weight > 0:
            spread = gather if config.triplet_scope == "all" else nn.Identity()
            others, other_label = spread(embedding), spread(label)
            if leave_out:
                among = spread(kept)
                others, other_label = others[among], other_label[among]
            triplet = triplet_losses(embedding, label, others, other_label, config.margin)
            terms["triplet"] = (weight * triplet).sum()
            loss = loss + config.triplet_weight * terms["triplet"]
        if config.center_weight > 0:
            terms["center"] = (weight * center_losses(embedding, label, self.centers)).sum()
            loss = loss + config.center_weight * terms["center"]
        shares = {"accuracy": (predicted == label).float().mean()}
        if leave_out:
            shares["left_out"] = (~kept).float().mean()
        return {"loss": loss, **terms, **shares}

    def _mislabelled(self, predicted: Tensor, label: Tensor) -> Tensor:
        rule = self.config.mislabel
        assert rule is not None
        assert self.control is not None
        whole = mislabelled_as_control(gather(predicted), gather(label), self.control, rule.limit)
        return whole.chunk(workers())[rank()]


class TrainingState:
    """A network in training: everything that changes from epoch to epoch.

    Make one with :meth:`make`; then for each epoch call :meth:`step` for each batch and
    :meth:`end_epoch`, until :attr:`finished`.

    Attributes:
        network: the bare network, never wrapped.
        epoch: epochs ended so far.
        best: the best validation metric so far, None before the first.
        best_epoch: the epoch that had it, counted from 1; 0 before the first.
        best_weights: the network's tensors after that epoch, on the CPU.
    """

    def __init__(
        self,
        learner: Learner,
        config: TrainConfig,
        normalisation: Normalisation,
        steps_per_epoch: int,
        wrap: Callable[[nn.Module], nn.Module],
    ) -> None:
        self.network = learner.network
        self.config = config
        self.normalisation = normalisation
        self._learner = learner
        self._wrapped = wrap(learner)
        self._optimizer = _make_optimizer(self.network, config.optimizer)
        self._center_optimizer = torch.optim.SGD([learner.centers], lr=config.center_lr)
        self._schedule = _make_schedule(self._optimizer, config, -(-steps_per_epoch // config.accumulate))
        self._steps_per_epoch = steps_per_epoch
        self._steps = 0  # of this epoch
        self.epoch = 0
        self.best: float | None = None
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}

    @classmethod
    def make(
        cls,
        model: ModelConfig,
        config: TrainConfig,
        normalisation: Normalisation,
        *,
        n_classes: int,
        steps_per_epoch: int,
        seed: int,
        control: int | None = None,
        initial: Callable[[I3DResNet], object] | None = None,
        device: torch.device | str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> TrainingState:
        """Start a training.

        Args:
            model: the shape of the network; it gets as many input channels as ``normalisation``
                has.
            config: how to train it.
            normalisation: of the training clips.
            n_classes: identities to tell apart; labels count from 0.
            steps_per_epoch: batches an epoch.
            seed: of the first weights; torch's global random state is left as it was.
            control: the class of the negative controls, which ``config.mislabel`` needs.
            initial: called with the network as drawn, to give it other weights in place: those of
                another training, whose classifier had other classes, or of a file
                (:func:`screening.initialisation.initialise`).
            device: where to train.
            wrap: applied to the module whose ``forward`` gives the loss, before the optimisers are
                made; DDP goes here.

        Raises:
            TrainingError: if there are fewer than two classes, or no controls where they are needed.
        """
        if n_classes < 2:
            raise TrainingError(f"training needs at least two identities, got {n_classes}")
        if config.mislabel is not None and control is None:
            raise TrainingError(
                "train.mislabel leaves out clips that are taken for negative controls, but no clip trained on is of "
                "one: set it to null, or train on wells whose role is negative_control"
            )
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            network = I3DResNet(model, in_channels=len(normalisation.mean), n_classes=n_classes)
            learner = Learner(network, n_classes, config, control)
            if initial is not None:
                initial(network)
        if config.sync_batchnorm and workers() > 1:
            synchronise_batchnorm(network)
        learner.to(device)
        if config.channels_last:
            # The argument is missing from torch's annotations.
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if config.compile:
            network.compile()
        return cls(learner, config, normalisation, steps_per_epoch, wrap)

    def step(self, clips: Tensor, label: Tensor, names: Sequence[str] = ()) -> dict[str, float]:
        """Learn from one batch; each worker calls it with its share, all with as many clips.

        The weights change with the last of every ``config.accumulate`` batches, and with the last
        of an epoch.

        Args:
            clips: (N, C, T, H, W) as stored, on any device; augmented already.
            label: (N,) int64.
            names: of the clips, for the message if the loss is not a number.

        Returns:
            The losses of the batch (see :meth:`Learner.forward`), over all workers, and the
                learning rate ``lr`` it was learnt with.

        Raises:
            TrainingError: if the loss is not finite; the weights are left as they were. All workers
                raise it, each with the names of its own clips.
        """
        config = self.config
        device = self._learner.centers.device
        frames = frames_seen(self.network.config, clips.shape[2])
        x = self.normalisation.apply(clips[:, :, frames].to(device, non_blocking=True))
        if not config.channels_last:
            x = x.contiguous()
        place = self._steps % self._steps_per_epoch
        first = place - place % config.accumulate
        together = min(config.accumulate, self._steps_per_epoch - first)
        last = place == first + together - 1
        self._learner.train()
        # DDP need not average gradients that are to be added to.
        with contextlib.nullcontext() if last else getattr(self._wrapped, "no_sync", contextlib.nullcontext)():
            leave_out = config.mislabel is not None and self.epoch >= config.mislabel.after_epochs
            terms = self._wrapped(x, label.to(device, non_blocking=True), leave_out)
            means = total(torch.stack(list(terms.values()))) / workers()
            values = dict(zip(terms, means.tolist(), strict=True))
            lr = float(self._optimizer.param_groups[0]["lr"])
            if not math.isfinite(values["loss"]):
                raise TrainingError(
                    f"the loss is {values['loss']} in epoch {self.epoch + 1} at learning rate {lr:g} "
                    f"(labels {label.tolist()}{''.join(', ' + name for name in names)}): "
                    "look at these clips, or lower train.optimizer.lr"
                )
            if place == first:
                self._optimizer.zero_grad()
                self._center_optimizer.zero_grad()
            (terms["loss"] / together).backward()
        self._steps += 1
        if last:
            self._update()
        return {**values, "lr": lr}

    def _update(self) -> None:
        """Follow the gradient that has been gathered."""
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        self._optimizer.step()
        self._step_centers()
        if isinstance(self._schedule, LambdaLR):
            self._schedule.step()

    def _step_centers(self) -> None:
        gradient = self._learner.centers.grad
        if gradient is not None:
            # The centres' rate should not depend on how much the centre loss weighs for the
            # network.
            gradient.div_(self.config.center_weight)
            self._center_optimizer.step()

    def end_epoch(self, metric: float | None) -> bool:
        """Close an epoch with its validation metric, which should be as high as possible.

        Args:
            metric: None or NaN if there is nothing to validate on; the last epoch then counts as
                the best.

        Returns:
            Whether this epoch is the best so far.
        """
        self.epoch += 1
        self._steps = 0
        if metric is not None and math.isnan(metric):
            metric = None
        if isinstance(self._schedule, ReduceLROnPlateau) and metric is not None:
            self._schedule.step(metric)
        improved = metric is None or self.best is None or metric > self.best
        if improved:
            self.best = metric
            self.best_epoch = self.epoch
            self.best_weights = {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in self.network.state_dict().items()
            }
        return improved

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the metric has not risen for ``patience`` epochs."""
        patience = self.config.patience
        stale = patience is not None and self.epoch - self.best_epoch >= patience
        return self.epoch >= self.config.epochs or stale

    def state_dict(self) -> dict[str, Any]:
        """All that changes from epoch to epoch, in a form that ``torch.load(weights_only=True)`` reads back.

        Between epochs only: batches of one that has begun are not counted in it.
        """
        return {
            "learner": self._learner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "center_optimizer": self._center_optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a training made with the same arguments.

        Raises:
            TrainingError: if the tensors do not fit this network.
        """
        try:
            self._learner.load_state_dict(state["learner"])
        except RuntimeError as error:
            raise TrainingError(f"the checkpoint is of another network: {error}") from error
        self._optimizer.load_state_dict(state["optimizer"])
        self._center_optimizer.load_state_dict(state["center_optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.epoch = state["epoch"]
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.best_weights = state["best_weights"]


def _make_optimizer(network: nn.Module, config: SGD | AdamW) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    if isinstance(config, AdamW):
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )


def _make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int
) -> LambdaLR | ReduceLROnPlateau:
    schedule = config.schedule
    if isinstance(schedule, PlateauSchedule):
        return ReduceLROnPlateau(optimizer, mode="max", factor=schedule.factor, patience=schedule.patience)
    warmup = schedule.warmup_epochs * updates_per_epoch
    end = config.epochs * updates_per_epoch
    floor = schedule.floor

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(end - warmup, 1), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
