from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage_schemas import store
from storage_schemas.checkpoint import (
    CheckpointManifest,
    read_manifest,
    read_training,
    read_weights,
    write_checkpoint,
)
from storage_schemas.errors import SchemaError

MANIFEST = CheckpointManifest(
    model={"depth": 18, "temporal": "standard", "shortcut": None},
    class_names=("tubulin", "α-inhibitor"),
    channels=("nucleus", "mitochondria"),
    n_frames=16,
    mean=(0.1, 0.25),
    std=(0.3, 1 / 3),
    embedding_dim=512,
    epoch=7,
    history=({"loss": 1.5, "map": 0.25}, {"loss": 1.25}),
    fingerprint="abc",
)
WEIGHTS: dict[str, NDArray[Any]] = {
    "conv.weight": np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32),
    "bn.num_batches_tracked": np.array(12, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoint") if request.param == "local" else f"memory://{uuid.uuid4().hex}/checkpoint"


def assert_same(back: dict[str, NDArray[Any]], weights: dict[str, NDArray[Any]]) -> None:
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back[name], array)


def test_a_checkpoint_reads_back(url: str) -> None:
    write_checkpoint(url, MANIFEST, WEIGHTS, b"state\0")
    assert read_manifest(url) == MANIFEST
    assert_same(read_weights(url), WEIGHTS)
    assert read_training(url) == b"state\0"
    assert store.list_names(url) == ["manifest.json", "model.safetensors", "training.pt"]


def test_weights_in_any_memory_order_read_back(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    weights: dict[str, NDArray[Any]] = {"t": base.T, "f": np.asfortranarray(base), "s": base[:, ::2]}
    write_checkpoint(str(tmp_path), MANIFEST, weights)
    assert_same(read_weights(str(tmp_path)), weights)


def test_without_training_state_there_is_none(url: str) -> None:
    write_checkpoint(url, MANIFEST, WEIGHTS)
    with pytest.raises(SchemaError, match=r"training\.pt: no such file"):
        read_training(url)


def test_an_older_training_state_does_not_outlive_its_weights(url: str) -> None:
    write_checkpoint(url, MANIFEST, WEIGHTS, b"old")
    write_checkpoint(url, MANIFEST, WEIGHTS)
    with pytest.raises(SchemaError, match=r"training\.pt"):
        read_training(url)


def test_a_folder_without_a_manifest_is_no_checkpoint(url: str) -> None:
    with pytest.raises(SchemaError, match=r"manifest\.json: no such file"):
        read_manifest(url)
    write_checkpoint(url, MANIFEST, WEIGHTS)
    store.remove(store.join(url, "manifest.json"))
    with pytest.raises(SchemaError, match=r"manifest\.json: no such file"):
        read_manifest(url)


@pytest.mark.parametrize("stops_at", ["model.safetensors", "training.pt", "manifest.json"])
def test_an_interrupted_write_leaves_no_checkpoint_of_mixed_parts(
    url: str, monkeypatch: pytest.MonkeyPatch, stops_at: str
) -> None:
    write_checkpoint(url, MANIFEST, WEIGHTS, b"old")
    honest = store.write_bytes

    def stopping(place: str, data: bytes) -> None:
        if place.endswith(stops_at):
            raise KeyboardInterrupt
        honest(place, data)

    monkeypatch.setattr(store, "write_bytes", stopping)
    new = replace(MANIFEST, epoch=8)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(url, new, {"conv.weight": WEIGHTS["conv.weight"] + 1}, b"new")
    monkeypatch.undo()
    with pytest.raises(SchemaError, match=r"manifest\.json"):
        read_manifest(url)
    write_checkpoint(url, new, WEIGHTS, b"new")
    assert read_manifest(url) == new


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_weights_are_refused(data: st.DataObject) -> None:
    url = "memory://checkpoint-truncated"
    write_checkpoint(url, MANIFEST, WEIGHTS)
    where = store.join(url, "model.safetensors")
    whole = store.read_bytes(where)
    store.write_bytes(where, whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(SchemaError, match=r"model\.safetensors: is not a safetensors file"):
        read_weights(url)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"model\.safetensors: no such file"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"form": "index"}, "not the manifest of a checkpoint"),
        ({"form": None}, "not the manifest of a checkpoint"),
        ({"version": 2}, "expected a checkpoint of version 1"),
        ({"version": None}, "expected a checkpoint of version 1"),
        ({"epoch": None, "extra": 1}, "incomplete"),
        ({"extra": 1}, "incomplete"),
        ({"mean": 3}, "incomplete"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_checkpoint(str(tmp_path), MANIFEST, WEIGHTS)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(SchemaError, match=problem) as caught:
        read_manifest(str(tmp_path))
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", ["epoch", "fingerprint", "class_names"])
def test_a_manifest_without_a_part_is_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(str(tmp_path), MANIFEST, WEIGHTS)
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    del document[name]
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match=f"incomplete.*{name}"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"form": "checkp'])
def test_broken_manifests_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SchemaError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))
