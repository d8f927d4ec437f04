"""What the steps of training cost, beside the plain way of doing the same.

Run: ``python benchmarks/training.py``. One process, one thread, interleaved runs, medians of CPU seconds. The plain
triplet loss is the loop over anchors of common re-identification code, with all distances worked out before it or each
anchor's own in it; the plain augmentation takes a clip frame by frame through PIL, as MitoReID does (its
blur, too, is drawn for each frame); the plain normalisation goes through floats from 0 to 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from screening.augmentation import AugmentConfig, _apply_torch, augment, draw
from screening.i3d import ModelConfig
from screening.losses import batch_hard_triplet_loss
from screening.memory import keep_freed_memory
from screening.training import Normalisation, TrainConfig, TrainingState

ROUNDS, CALLS = 9, 5
BATCH, IDENTITIES = 256, 64
CLIPS, CHANNELS, FRAMES, SIZE, CROP = 4, 3, 16, 128, 112
AUGMENT = AugmentConfig()
NORMALISATION = Normalisation(mean=(0.023, 0.060, 0.015), std=(0.042, 0.128, 0.032))


def looped_triplet(embedding: torch.Tensor, label: torch.Tensor, margin: float) -> torch.Tensor:
    """Batch-hard, anchor by anchor."""
    squared = embedding.pow(2).sum(dim=1, keepdim=True)
    distance = torch.addmm(squared + squared.t(), embedding, embedding.t(), alpha=-2).clamp(min=1e-12).sqrt()
    same = label[:, None] == label
    positives, negatives = [], []
    for i in range(len(label)):
        positives.append(distance[i][same[i]].max().unsqueeze(0))
        negatives.append(distance[i][~same[i]].min().unsqueeze(0))
    to_positive, to_negative = torch.cat(positives), torch.cat(negatives)
    return functional.margin_ranking_loss(to_negative, to_positive, torch.ones_like(to_negative), margin=margin)


def looped_distances(embedding: torch.Tensor, label: torch.Tensor, margin: float) -> torch.Tensor:
    """Batch-hard, anchor by anchor, its distances too."""
    losses = []
    for i in range(len(label)):
        distance = (embedding[i] - embedding).pow(2).sum(dim=1).clamp(min=1e-12).sqrt()
        same = label == label[i]
        losses.append(functional.relu(margin + distance[same].max() - distance[~same].min()))
    return torch.stack(losses).mean()


def backward(loss: Callable[..., torch.Tensor], embedding: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The gradient of a triplet loss."""
    embedding.grad = None
    loss(embedding, label, 0.3).backward()
    assert embedding.grad is not None
    return embedding.grad


def plain_augment(clips: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate, resize, flip, blur and crop each frame (H, W, 3) of clips (N, T, H, W, 3)."""
    result = []
    for clip in clips:
        angle, scale, flip = rng.uniform(0, 90), rng.uniform(0.8, 1.2), rng.random() < 0.5
        side = round(SIZE * scale)
        left, top = (round((side - CROP) / 2 + rng.uniform(-8, 8)) for _ in "xy")
        frames = []
        for frame in clip:
            image = Image.fromarray(frame).rotate(angle, Image.Resampling.BILINEAR)
            image = image.resize((side, side), Image.Resampling.BILINEAR)
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if rng.random() < AUGMENT.blur_probability:
                image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, AUGMENT.max_blur)))
            frames.append(np.asarray(image.crop((left, top, left + CROP, top + CROP))))
        result.append(np.stack(frames))
    return np.stack(result)


def plain_normalise(clips: torch.Tensor) -> torch.Tensor:
    """Shares of white, then centred and scaled."""
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1, 1) for values in (NORMALISATION.mean, NORMALISATION.std))
    return ((clips.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last_3d)


def step(**settings: object) -> Callable[[], object]:
    """A training step of a ResNet-18."""
    config = TrainConfig.model_validate(settings)
    state = TrainingState.make(ModelConfig(), config, NORMALISATION, n_classes=4, steps_per_epoch=10**6, seed=0)
    clips = torch.randint(0, 256, (CLIPS, CHANNELS, FRAMES, CROP, CROP), dtype=torch.uint8)
    label = torch.arange(CLIPS) // 2
    return lambda: state.step(clips, label)


def measure(title: str, ways: dict[str, Callable[[], object]], rounds: int = ROUNDS, calls: int = CALLS) -> None:
    """Print a row a way: median CPU milliseconds of a call, and how many times faster than the first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            for _ in range(calls):
                way()
            seconds[name].append((time.process_time() - start) / calls)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    print(title)
    for name, median in medians.items():
        print(f"  {name:<44} {1e3 * median:9.2f} ms CPU {next(iter(medians.values())) / median:7.1f} ×", flush=True)


def main() -> None:
    """Print a table a step of training."""
    keep_freed_memory()  # all ways gain by it
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    label = torch.arange(BATCH) // (BATCH // IDENTITIES)
    for dimension in (128, 512, 2048):
        embedding = torch.randn(BATCH, dimension).relu().requires_grad_()
        ways = {
            "loop over anchors": looped_triplet,
            "loop over anchors and their distances": looped_distances,
            "ours": batch_hard_triplet_loss,
        }
        expected = backward(looped_distances, embedding, label).clone()
        for way in ways.values():
            torch.testing.assert_close(backward(way, embedding, label), expected, rtol=1e-3, atol=1e-6)
        title = f"batch-hard triplet loss, forward and backward, {BATCH} clips, {dimension} values each"
        measure(title, {name: lambda w=way, e=embedding: backward(w, e, label) for name, way in ways.items()})

    clips = torch.randint(0, 256, (CLIPS, CHANNELS, FRAMES, SIZE, SIZE), dtype=torch.uint8)
    frames = np.ascontiguousarray(clips.permute(0, 2, 3, 4, 1).numpy())
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    measure(
        f"augmentation of {CLIPS} clips of {CHANNELS} × {FRAMES} × {SIZE}²",
        {
            f"frame by frame with PIL, cropped to {CROP}²": lambda: plain_augment(frames, rng),
            "one warp by torch, as on a GPU": lambda: _apply_torch(
                clips.flatten(1, 2), draw(CLIPS, AUGMENT, generator), AUGMENT.padding, 2
            ),
            "one warp by OpenCV, ours on a CPU": lambda: augment(clips, AUGMENT, generator),
        },
    )
    ways = {"plain": plain_normalise, "ours": NORMALISATION.apply}
    torch.testing.assert_close(*(way(clips) for way in ways.values()))
    measure(
        "normalisation of the same clips to channels last", {name: lambda w=way: w(clips) for name, way in ways.items()}
    )
    choices = {
        "channels_last=false": {"channels_last": False},
        "default": {},
        "precision=bf16": {"precision": "bf16"},
        "compile=true": {"compile": True},
    }
    title = f"a training step of ResNet-18, {CLIPS} clips of {CHANNELS} × {FRAMES} × {CROP}²"
    measure(title, {name: step(**settings) for name, settings in choices.items()}, rounds=3, calls=1)


if __name__ == "__main__":
    main()
