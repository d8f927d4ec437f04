"""A trained network on disk: a folder with weights, what they need to be used, and how to go on training.

``model.safetensors`` holds the weights, ``training.pt`` (optional) the optimisers' state as opaque bytes, and
``manifest.json``, written last, everything else. A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from storage_schemas import store
from storage_schemas.errors import SchemaError

VERSION = 1


@dataclass(frozen=True)
class CheckpointManifest:
    """What the weights belong to.

    Attributes:
        model: the network's configuration, as JSON.
        class_names: label -> name, in the order of the logits.
        channels: channel names, in the order the network was fed.
        n_frames: frames of a clip.
        mean: per channel, of intensities on [0, 1].
        std: likewise.
        embedding_dim: length of an embedding.
        epoch: after which epoch of its phase of the training these weights stood, the best so far.
        history: of each epoch so far its ``phase``, its number in that (``epoch``), losses and metrics.
        fingerprint: of the training stage.
    """

    model: dict[str, Any]
    class_names: tuple[str, ...]
    channels: tuple[str, ...]
    n_frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embedding_dim: int
    epoch: int
    history: tuple[dict[str, Any], ...]
    fingerprint: str

    def check_channels(self, url: str, channels: Sequence[str]) -> None:
        """Refuse clips that the network was not trained on.

        Raises:
            SchemaError: if the clips at ``url`` have other channels, or in another order.
        """
        if list(channels) != list(self.channels):
            raise SchemaError(url, f"has the channels {list(channels)}, the network {list(self.channels)}")


def write_checkpoint(
    url: str,
    manifest: CheckpointManifest,
    weights: dict[str, NDArray[Any]],
    training: bytes | None = None,
) -> None:
    """Write a checkpoint folder; its manifest comes last and makes it whole."""
    store.remove(store.join(url, "manifest.json"))
    # `save` takes an array's memory as it lies, which for a strided one is in another order.
    contiguous = {name: np.asarray(array, order="C") for name, array in weights.items()}
    store.write_bytes(store.join(url, "model.safetensors"), save(contiguous))
    if training is None:
        # An older one would not belong to these weights.
        store.remove(store.join(url, "training.pt"))
    else:
        store.write_bytes(store.join(url, "training.pt"), training)
    document = {"form": "checkpoint", "version": VERSION, **asdict(manifest)}
    store.write_json(store.join(url, "manifest.json"), document)


def read_manifest(url: str) -> CheckpointManifest:
    """What a checkpoint's weights belong to.

    Raises:
        SchemaError: if there is no whole checkpoint, or one of another version.
    """
    where = store.join(url, "manifest.json")
    document = store.read_json(where)
    if not isinstance(document, dict) or document.pop("form", None) != "checkpoint":
        raise SchemaError(where, "is not the manifest of a checkpoint")
    if document.pop("version", None) != VERSION:
        raise SchemaError(where, f"expected a checkpoint of version {VERSION}")
    try:
        manifest = CheckpointManifest(**document)
        # JSON has lists only.
        return replace(
            manifest,
            class_names=tuple(manifest.class_names),
            channels=tuple(manifest.channels),
            mean=tuple(manifest.mean),
            std=tuple(manifest.std),
            history=tuple(manifest.history),
        )
    except TypeError as error:
        raise SchemaError(where, f"is incomplete: {error}") from error


def read_weights(url: str) -> dict[str, NDArray[Any]]:
    """Tensor name -> array.

    Raises:
        SchemaError: if the file is missing or not safetensors.
    """
    where = store.join(url, "model.safetensors")
    try:
        return {name: np.asarray(array) for name, array in load(store.read_bytes(where)).items()}
    except SafetensorError as error:
        raise SchemaError(where, f"is not a safetensors file ({error})") from error


def weights_digest(url: str) -> str:
    """What tells a network's weights from all others: equal weights have equal digests.

    Raises:
        SchemaError: if there are none.
    """
    return hashlib.sha256(store.read_bytes(store.join(url, "model.safetensors"))).hexdigest()[:16]


def read_training(url: str) -> bytes:
    """The optimisers' state, as it was written.

    Raises:
        SchemaError: if the checkpoint was written without.
    """
    return store.read_bytes(store.join(url, "training.pt"))
