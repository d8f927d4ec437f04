from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.index import (
    IndexManifest,
    LevelManifest,
    index_exists,
    new_build,
    read_array,
    read_ids,
    read_manifest,
)

VECTORS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
CODES = np.arange(14, dtype=np.uint8).reshape(7, 2)


def ids_of(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            # Not sorted: positions in the index are what the order means.
            "id": [f"p/B{n - i:02d}" for i in range(n)],
            "compound": [f"c{i % 2}" for i in range(n)],
            "moa": [None if i else "α" for i in range(n)],
            "plate": pd.Series([None] * n, dtype=object),
            "well": [f"B{n - i:02d}" for i in range(n)],
            "n_cells": range(n),
        }
    )


def write(url: str, n: int = 7) -> None:
    with new_build(url) as build:
        arrays = {
            "vectors": build.write_array(
                "well", "vectors", (3,), "float32", [VECTORS[:n][:2], VECTORS[:0], VECTORS[:n][2:]]
            ),
            "codes": build.write_array("well", "codes", (2,), "uint8", [CODES[:n]]),
        }
        level = LevelManifest(
            method="compressed", reason="", depth=100, arrays=arrays, ids=build.write_ids("well", ids_of(n))
        )
        np.testing.assert_array_equal(build.open_array("well", "vectors", arrays["vectors"]), VECTORS[:n])
        build.manifest = IndexManifest(embedder="abc", build=build.name, levels={"well": level})


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "index") if request.param == "local" else f"memory://{uuid.uuid4().hex}/index"


def test_an_index_reads_back(url: str) -> None:
    write(url)
    manifest = read_manifest(url)
    held = manifest.levels["well"]
    assert (held.count, held.dimension, manifest.embedder, manifest.metric) == (7, 3, "abc", "cosine")
    np.testing.assert_array_equal(read_array(url, manifest, "well", "vectors"), VECTORS)
    np.testing.assert_array_equal(read_array(url, manifest, "well", "codes"), CODES)
    ids = read_ids(url, manifest, "well")
    assert ids["id"].tolist() == ids_of(7)["id"].tolist()
    assert ids["n_cells"].tolist() == list(range(7))
    assert ids["compound"].cat.categories.tolist() == ["c0", "c1"]
    assert ids["moa"].dropna().tolist() == ["α"]


def test_vectors_are_mapped_and_not_read(tmp_path: Path) -> None:
    write(str(tmp_path))
    assert isinstance(read_array(str(tmp_path), read_manifest(str(tmp_path)), "well", "vectors"), np.memmap)


def test_a_new_build_takes_the_place_of_the_old_one(url: str) -> None:
    write(url)
    old = read_manifest(url)
    mapped = read_array(url, old, "well", "vectors")
    write(url, 5)
    new = read_manifest(url)
    assert new.levels["well"].count == 5
    assert store.list_names(url) == sorted([new.build, "manifest.json"])
    # Who has opened the old one goes on with it.
    np.testing.assert_array_equal(mapped, VECTORS)


def test_a_build_that_fails_leaves_the_old_index(url: str) -> None:
    write(url)
    before = store.list_names(url)

    def blocks() -> Any:
        yield VECTORS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_build(url) as build:
        build.write_array("well", "vectors", (3,), "float32", blocks())
    assert store.list_names(url) == before
    np.testing.assert_array_equal(read_array(url, read_manifest(url), "well", "vectors"), VECTORS)


def test_an_index_of_nothing_reads_back(url: str) -> None:
    write(url, 0)
    manifest = read_manifest(url)
    assert read_array(url, manifest, "well", "vectors").shape == (0, 3)
    assert read_ids(url, manifest, "well").empty


def test_levels_without_a_manifest_are_no_index(url: str) -> None:
    write(url)
    store.remove(store.join(url, "manifest.json"))
    assert not index_exists(url)
    with pytest.raises(SchemaError, match=r"index/manifest\.json: no such file"):
        read_manifest(url)


def test_missing_parts_are_named(url: str) -> None:
    write(url)
    manifest = read_manifest(url)
    for name in ("well.vectors.npy", "well.codes.npy", "well.parquet"):
        store.remove(store.join(url, manifest.build, name))
    for name in ("vectors", "codes"):
        with pytest.raises(SchemaError, match=rf"well\.{name}\.npy: no such file"):
            read_array(url, manifest, "well", name)
    with pytest.raises(SchemaError, match=r"well\.parquet: no such file"):
        read_ids(url, manifest, "well")
    with pytest.raises(SchemaError, match="has no array 'lists'"):
        read_array(url, manifest, "well", "lists")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_altered_array_is_taken_for_the_index(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Truncated, lengthened, or any byte changed but the vectors' own values: refused, never a crash."""
    folder = tmp_path_factory.mktemp("index")
    write(str(folder))
    manifest = read_manifest(str(folder))
    name = data.draw(st.sampled_from(["vectors", "codes"]))
    file = folder / manifest.build / f"well.{name}.npy"
    good = file.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "longer", "changed"]))
    if kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "longer":
        bad = good + data.draw(st.binary(min_size=1, max_size=40))
    else:
        end = len(good) if name == "codes" else len(good) - VECTORS.nbytes
        at, flip = data.draw(st.integers(0, end - 1)), data.draw(st.integers(1, 255))
        bad = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
    file.write_bytes(bad)
    try:
        found = read_array(str(folder), manifest, "well", name)
    except SchemaError:
        return
    # A byte of the header may have become another that means the same.
    assert kind == "changed"
    np.testing.assert_array_equal(found, VECTORS if name == "vectors" else CODES)


@pytest.mark.parametrize(
    "array",
    [VECTORS[:6], VECTORS.T, VECTORS.astype(np.float64), VECTORS.astype(">f4"), np.asfortranarray(VECTORS)],
    ids=["rows", "shape", "dtype", "order", "fortran"],
)
def test_vectors_of_another_index_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    write(str(tmp_path))
    manifest = read_manifest(str(tmp_path))
    np.save(tmp_path / manifest.build / "well.vectors.npy", array)
    with pytest.raises(SchemaError, match="truncated or of another screen"):
        read_array(str(tmp_path), manifest, "well", "vectors")


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    write(str(tmp_path))
    manifest = read_manifest(str(tmp_path))
    np.save(tmp_path / manifest.build / "well.vectors.npy", np.asarray([{}, []], object), allow_pickle=True)
    with pytest.raises(SchemaError, match=r"well\.vectors\.npy"):
        read_array(str(tmp_path), manifest, "well", "vectors")


def test_ids_of_another_index_are_refused(url: str) -> None:
    write(url)
    manifest = read_manifest(url)
    where = store.join(url, manifest.build, "well.parquet")
    whole = store.read_bytes(where)
    store.write_bytes(where, whole[:-1])
    with pytest.raises(SchemaError, match=r"well\.parquet: is not what the manifest says"):
        read_ids(url, manifest, "well")
    store.write_bytes(where, whole)
    arrays = {"vectors": manifest.levels["well"].arrays["vectors"].model_copy(update={"shape": (6, 3)})}
    held = manifest.levels["well"].model_copy(update={"arrays": arrays})
    with pytest.raises(SchemaError, match="has 7 rows for 6 vectors"):
        read_ids(url, manifest.model_copy(update={"levels": {"well": held}}), "well")


def change(document: dict[str, Any], *path: str, value: Any) -> None:
    for part in path[:-1]:
        document = document[part]
    document[path[-1]] = value


ARRAY = ("levels", "well", "arrays", "vectors")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda d: change(d, "form", value="checkpoint"), "not the manifest of an index"),
        (lambda d: change(d, "version", value=1), "expected an index of version 2"),
        (lambda d: change(d, "extra", value=1), "not whole .see extra"),
        (lambda d: change(d, "build", value="../../else"), "not whole .see build"),
        (lambda d: change(d, "build", value="0" * 12 + "\n"), "not whole .see build"),
        (lambda d: change(d, *ARRAY, "shape", value=[-7, 3]), "not whole"),
        (lambda d: change(d, *ARRAY, "shape", value=[7, 3, 1]), "has no vectors"),
        (lambda d: change(d, *ARRAY, "shape", value=[7, 0]), "has no vectors"),
        (lambda d: change(d, *ARRAY, "dtype", value="object"), "not whole"),
        (lambda d: change(d, *ARRAY, "dtype", value="uint8"), "has no vectors"),
        (lambda d: change(d, "levels", "well", "arrays", value={}), "has no vectors"),
        (lambda d: change(d, "levels", "well", "depth", value=-1), "not whole"),
        (lambda d: change(d, "levels", "plate", value={}), "not whole"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None], problem: str) -> None:
    write(str(tmp_path))
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match=problem) as caught:
        read_manifest(str(tmp_path))
    assert caught.value.path == str(path)


@pytest.mark.parametrize("text", ["", "[]", '{"form": "index", "version": 2}'])
def test_broken_manifests_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SchemaError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))


def test_a_size_beyond_all_files_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path))
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    change(document, *ARRAY, "shape", value=[2**62, 2**62])
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match="truncated"):
        read_array(str(tmp_path), read_manifest(str(tmp_path)), "well", "vectors")
