"""Clips to embeddings with a trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from screening.i3d import I3DResNet, ModelConfig
from screening.training import Normalisation
from storage_schemas.base import Config
from storage_schemas.checkpoint import CheckpointManifest
from storage_schemas.clips import Clips
from storage_schemas.errors import InputError


class EmbedConfig(Config):
    """How clips are fed to the network; nothing here changes an embedding beyond rounding."""

    batch_size: int | None = Field(
        None, ge=1, description="clips at a time; null: 8 on a CPU, whose caches then hold the activations, 64 on a GPU"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of the network's arithmetic; bf16 where the device has instructions for it"
    )
    read_clips: int = Field(64, ge=1, description="clips read at a time; bounds an actor's memory")


def restore(manifest: CheckpointManifest, weights: Mapping[str, NDArray[Any]]) -> tuple[I3DResNet, Normalisation]:
    """Make the network of a checkpoint, in evaluation mode on the CPU, and the normalisation it was trained with.

    Raises:
        InputError: if the weights are not those of the network that the manifest describes.
    """
    network = I3DResNet(
        ModelConfig.model_validate(manifest.model),
        in_channels=len(manifest.channels),
        n_classes=len(manifest.class_names),
    )
    try:
        network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    except RuntimeError as error:
        raise InputError(f"the checkpoint's weights do not fit its model settings: {error}") from error
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # a keyword its stub leaves out
    return network.eval(), Normalisation(mean=manifest.mean, std=manifest.std)


def embed(
    model: I3DResNet,
    clips: Clips | Tensor,
    normalisation: Normalisation,
    frames: Sequence[int],
    config: EmbedConfig | None = None,
) -> NDArray[np.float32]:
    """Embed clips, on the device that the network is on. The network is left in evaluation mode.

    Args:
        model: a trained network.
        clips: (N, C, T, H, W) of any stored type.
        normalisation: that the network was trained with.
        frames: of the clip that the network is fed (:func:`screening.i3d.frames_seen`).
        config: ``batch_size`` and ``precision`` are used; the defaults when None.

    Returns:
        (N, D) float32, after the neck; cosine distance compares them.

    Raises:
        InputError: if the clips have another number of channels than the network was trained with.
    """
    config = config or EmbedConfig()
    device = next(model.parameters()).device
    batch_size = config.batch_size or (8 if device.type == "cpu" else 64)
    model.eval()
    embeddings = np.empty((len(clips), model.embedding_dim), dtype=np.float32)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for start in range(0, len(clips), batch_size):
            batch = torch.as_tensor(clips[start : start + batch_size])[:, :, list(frames)]
            _, embedding = model(normalisation.apply(batch.to(device)))
            embeddings[start : start + batch_size] = embedding.float().cpu().numpy()
    return embeddings
