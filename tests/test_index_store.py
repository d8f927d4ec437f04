from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.index import LEVELS, IndexManifest, read_level, read_manifest, write_level, write_manifest
from storage_schemas.tables import PLATE_MAP, write_table

MANIFEST = IndexManifest("cosine", "abc", 4, {"compound": 2, "well": 3})


def ids_of(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            # Not sorted: positions in the index are what the order means.
            "id": [f"p/B{n - i:02d}" for i in range(n)],
            "compound": [f"c{i}" for i in range(n)],
            "moa": [None if i else "α" for i in range(n)],
            "plate": pd.Series([None] * n, dtype=object),
            "n_cells": range(n),
        }
    )


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "index") if request.param == "local" else f"memory://{uuid.uuid4().hex}/index"


def test_an_index_reads_back(url: str) -> None:
    for n, level in enumerate(LEVELS):
        write_level(url, level, bytes([n]) * 10, ids_of(n))
    write_manifest(url, MANIFEST)
    assert read_manifest(url) == MANIFEST
    for n, level in enumerate(LEVELS):
        data, ids = read_level(url, level)
        assert data == bytes([n]) * 10
        assert ids["id"].tolist() == ids_of(n)["id"].tolist()
        assert ids["n_cells"].tolist() == list(range(n))
        assert ids["moa"].isna().tolist() == [bool(i) for i in range(n)]
        assert ids["moa"].dropna().tolist() == ["α"] * min(n, 1)


def test_levels_without_a_manifest_are_no_index(url: str) -> None:
    write_level(url, "well", b"x", ids_of(2))
    with pytest.raises(SchemaError, match=r"index/manifest\.json: no such file"):
        read_manifest(url)


def test_missing_parts_are_named(url: str) -> None:
    write_level(url, "well", b"x", ids_of(2))
    with pytest.raises(SchemaError, match=r"cell\.faiss: no such file"):
        read_level(url, "cell")
    store.remove(store.join(url, "well.parquet"))
    with pytest.raises(SchemaError, match=r"well\.parquet: no such file"):
        read_level(url, "well")


def test_ids_of_another_form_or_cut_short_are_refused(url: str) -> None:
    write_level(url, "well", b"x", ids_of(2))
    where = store.join(url, "well.parquet")
    whole = store.read_bytes(where)
    store.write_bytes(where, whole[:-1])
    with pytest.raises(SchemaError, match=r"well\.parquet"):
        read_level(url, "well")
    write_table(
        where, pd.DataFrame({name: ["x"] for name in PLATE_MAP.schema.names}).assign(concentration=1), PLATE_MAP
    )
    with pytest.raises(SchemaError, match="expected form 'index_ids'"):
        read_level(url, "well")
    with pytest.raises(SchemaError, match=r"missing: \['moa'\]"):
        write_level(url, "well", b"x", ids_of(2).drop(columns="moa"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"form": "checkpoint"}, "not the manifest of an index"),
        ({"version": 2}, "expected an index of version 1"),
        ({"extra": 1}, "incomplete"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_manifest(str(tmp_path), MANIFEST)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(SchemaError, match=problem) as caught:
        read_manifest(str(tmp_path))
    assert caught.value.path == str(path)


@pytest.mark.parametrize("text", ["", "[]", '{"form": "index", "version": 1}'])
def test_broken_manifests_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SchemaError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))
