from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas import screen as screens
from storage_schemas import store
from storage_schemas.errors import SchemaError, StoreError
from storage_schemas.keys import WellKey
from storage_schemas.screen import STAGES, Failure, Manifest, Screen, Stage, StageRecord, fingerprint

B02, C11 = WellKey("plate 1", "B02"), WellKey("plate 2", "C11")

MANIFEST = Manifest(
    software={"screening": "0.1.0"},
    config={"seed": 1, "nested": {"α": [1.5, None]}},
    inputs="0123456789abcdef",
    stages={"segment": StageRecord(fingerprint="abc", done=True, counts={"wells": 2}, notes=["one"], seconds=1.5)},
)


@pytest.fixture(params=["local", "memory"])
def screen(request: pytest.FixtureRequest, tmp_path: Path) -> Screen:
    return Screen(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}/screen")


def paths(screen: Screen) -> dict[str, str]:
    """Every place a run writes to, with the stage that does; spelt out, since the layout is a promise to readers."""
    return {
        screen.manifest_url: "manifest.json",
        screen.plate_map: "plate_map.parquet",
        screen.compounds: "compounds.parquet",
        screen.calibration("plate 1"): "segment: calibration/plate 1.npz",
        screen.cells(B02): "segment: cells/plate 1/B02.parquet",
        screen.quality(B02): "segment: quality/plate 1/B02.parquet",
        screen.clips(B02): "segment: clips/plate 1/B02.zarr",
        screen.sequences: "segment: sequences.parquet",
        screen.split: "train: split.parquet",
        screen.training_runs: "train: train/runs",
        screen.training_metrics: "train: train/metrics.parquet",
        screen.checkpoint: "train: checkpoint",
        screen.embeddings(B02): "embed: embeddings/plate 1/B02.parquet",
        screen.profiles("raw"): "index: profiles/raw.parquet",
        screen.profiles("well"): "index: profiles/well.parquet",
        screen.profiles("treatment"): "index: profiles/treatment.parquet",
        screen.profiles("features"): "index: profiles/features.parquet",
        screen.profiles("compound"): "index: profiles/compound.parquet",
        screen.profiles("normalisation"): "index: profiles/normalisation.parquet",
        screen.predictions("cell", "parquet"): "index: predictions/cell.parquet",
        screen.index: "index: index",
        screen.statistics("activity"): "statistics: statistics/activity.parquet",
        screen.evaluation: "evaluate: evaluation.json",
        screen.report: "report: report.html",
    }


def test_paths_are_the_documented_ones(screen: Screen) -> None:
    for url, expected in paths(screen).items():
        assert url == f"{screen.url}/{expected.rpartition(': ')[2]}"
    assert Screen(screen.url + "/").report == screen.report


def test_a_screen_that_takes_cells_knows_where_they_lie(screen: Screen) -> None:
    with pytest.raises(SchemaError, match="is not a screen"):
        Screen.open(screen.url)
    screen.write_manifest(MANIFEST)
    assert Screen.open(screen.url) == screen
    screen.write_manifest(MANIFEST.model_copy(update={"cells": "/data/cells"}))
    assert Screen.open(screen.url).segmented == Screen("/data/cells")
    assert Screen.open(screen.url).sequences == "/data/cells/sequences.parquet"


def test_a_record_replaces_that_of_its_stage_and_no_other(screen: Screen) -> None:
    screen.write_manifest(MANIFEST)
    record = StageRecord(fingerprint="def")
    screen.write_record("train", record)
    assert screen.read_manifest() == MANIFEST.model_copy(update={"stages": {**MANIFEST.stages, "train": record}})


def test_what_is_in_a_folder_that_is_no_screen(screen: Screen) -> None:
    assert screen.foreign_names() == []
    store.write_bytes(store.join(screen.url, ".hidden"), b"")
    assert screen.foreign_names() == []
    store.write_bytes(store.join(screen.url, "photo.jpg"), b"")
    assert screen.foreign_names() == ["photo.jpg"]
    screen.write_manifest(MANIFEST)
    assert screen.foreign_names() == []


@pytest.mark.parametrize("stage", STAGES)
def test_removing_a_stage_removes_all_it_wrote_and_nothing_else(screen: Screen, stage: Stage) -> None:
    folders = (screen.clips(B02), screen.training_runs, screen.checkpoint, screen.index)
    files = {(store.join(url, "part") if url in folders else url): owner for url, owner in paths(screen).items()}
    for url in files:
        store.write_bytes(url, b"1")
    for other in STAGES:
        screen.write_failures(other, B02, [Failure("plate 1/B02", "ValueError", "x")])
    screen.remove_stage(stage)
    screen.remove_stage(stage)
    for url, owner in files.items():
        assert store.exists(url) == (not owner.startswith(f"{stage}:")), url
    for other in STAGES:
        assert len(screen.failures(other)) == (other != stage)


def test_tables_that_commit_units_go_first(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is interrupted must not leave units that count as done without their clips."""
    removed: list[str] = []
    monkeypatch.setattr(store, "remove", removed.append)
    screen.remove_stage("segment")
    assert removed[0] == screen.url + "/cells"


# --- units of work ---------------------------------------------------------------------------


def test_units_are_done_when_their_table_is_there(screen: Screen) -> None:
    assert screen.done_units("segment") == set()
    for well in (B02, C11):
        store.write_bytes(screen.cells(well), b"")
        store.write_bytes(screen.quality(well), b"")
    store.write_bytes(screen.embeddings(C11), b"")
    store.write_bytes(store.join(screen.url, "cells", "README.txt"), b"")
    store.write_bytes(store.join(screen.url, "cells", "B05.parquet"), b"")
    store.write_bytes(store.join(screen.url, "cells", "plate 1", ".B03.parquet.1234.partial"), b"")
    store.write_bytes(store.join(screen.url, "cells", "plate 1", "notes.txt"), b"")
    assert screen.done_units("segment") == {B02, C11}
    assert screen.done_units("embed") == {C11}


def test_an_unfinished_write_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(str(tmp_path))

    def raising(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", raising)
    with pytest.raises(StoreError, match="full"):
        store.write_bytes(screen.cells(B02), b"1")
    assert screen.done_units("segment") == set()


def test_a_table_of_no_well_is_named(screen: Screen) -> None:
    store.write_bytes(store.join(screen.url, "cells", "plate 1", "copy of B02.parquet"), b"")
    with pytest.raises(SchemaError, match=r"cells/plate 1/copy of B02\.parquet.*remove it"):
        screen.done_units("segment")


def test_failures_are_kept_until_replaced(screen: Screen) -> None:
    whole = Failure("plate 2/C11", "SchemaError", "x.zarr: is broken\nbadly")
    sites = [Failure("plate 1/B02/1", "blank", "ä"), Failure("plate 1/B02/3", "unreadable", "y")]
    assert screen.failures("segment") == screen.failures("segment", B02) == []
    screen.write_failures("segment", C11, [whole])
    screen.write_failures("segment", B02, [Failure("plate 1/B02", "KeyError", "first")])
    screen.write_failures("segment", B02, sites)
    screen.write_failures("embed", B02, [Failure("plate 1/B02", "MemoryError", "")])
    assert screen.failures("segment") == [*sites, whole]
    assert screen.failures("segment", B02) == sites
    assert screen.failed_units("segment") == {B02, C11}
    screen.write_failures("segment", B02, [])
    screen.write_failures("segment", B02, [])
    assert screen.failures("segment") == [whole]
    assert screen.failed_units("segment") == {C11}
    assert screen.failures("embed") == [Failure("plate 1/B02", "MemoryError", "")]


def test_a_unit_is_removed_with_what_commits_it_first(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    for well in (B02, C11):
        for url in (screen.cells(well), screen.quality(well), store.join(screen.clips(well), "part")):
            store.write_bytes(url, b"1")
    removed: list[str] = []
    remove = store.remove
    monkeypatch.setattr(store, "remove", lambda url: (removed.append(url), remove(url)))
    screen.remove_unit(B02)
    assert removed[0] == screen.cells(B02)
    assert screen.done_units("segment") == {C11}
    assert not any(store.exists(url) for url in (screen.quality(B02), screen.clips(B02)))
    assert all(store.exists(url) for url in (screen.quality(C11), screen.clips(C11)))


def test_outputs_tell_apart_what_was_done_again(screen: Screen) -> None:
    """Stages after `segment` go by this: embeddings of a well whose sites have been mended must not stay."""
    for well in (B02, C11):
        store.write_bytes(screen.cells(well), b"1")
        store.write_bytes(screen.calibration(well.plate), b"1")
    before = screen.outputs("segment")
    assert screen.outputs("segment") == screen.outputs("segment", map) == before
    store.write_bytes(screen.cells(C11), b"2")
    mended = screen.outputs("segment")
    store.write_bytes(screen.calibration(C11.plate), b"2")
    again = screen.outputs("segment")
    store.remove(screen.cells(B02))
    assert len({tuple(outputs) for outputs in (before, mended, again, screen.outputs("segment"))}) == 4


# --- manifest --------------------------------------------------------------------------------


def test_a_manifest_reads_back(screen: Screen) -> None:
    assert not screen.exists()
    with pytest.raises(SchemaError, match="is not a screen: there is nothing at that place"):
        screen.read_manifest()
    store.write_bytes(store.join(screen.url, "notes.txt"), b"")
    with pytest.raises(SchemaError, match=r"is not a screen: it has no manifest\.json"):
        screen.read_manifest()
    screen.write_manifest(MANIFEST)
    assert screen.exists()
    assert screen.read_manifest() == MANIFEST


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"form": "index"},
        {"software": None},
        {"unknown": 1},
        {"stages": {"segment": {}}},
        {"stages": {"segment": {"fingerprint": "a", "done": "perhaps"}}},
        {"stages": {"segment": {"fingerprint": "a", "extra": 1}}},
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    screen = Screen(str(tmp_path))
    document = MANIFEST.model_dump(mode="json") | changes
    store.write_json(screen.manifest_url, document)
    with pytest.raises(SchemaError, match=r"manifest\.json: is not the manifest of a screen of version 1"):
        screen.read_manifest()


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_broken_manifests_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SchemaError, match=r"manifest\.json"):
        Screen(str(tmp_path)).read_manifest()


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(str(tmp_path))
    screen.write_manifest(MANIFEST)

    def raising(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", raising)
    with pytest.raises(StoreError, match="full"):
        screen.write_manifest(MANIFEST.model_copy(update={"config": {}}))
    assert screen.read_manifest() == MANIFEST
    assert store.list_names(str(tmp_path)) == ["manifest.json"]


# --- fingerprints ----------------------------------------------------------------------------

VALUE = {"b": [1, 2.5, None, True], "a": "α"}


def test_a_fingerprint_never_changes() -> None:
    """Pinned: another digest of equal values would make every screen that exists begin anew."""
    text = '[{"a":"\\u03b1","b":[1,2.5,null,true]},"x"]'
    assert fingerprint(VALUE, "x") == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert fingerprint(dict(reversed(VALUE.items())), "x") == fingerprint(VALUE, "x")


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    script = f"from storage_schemas.screen import fingerprint; print(fingerprint(*{json.dumps([VALUE['a'], 1.5])}))"
    for seed in ("0", "1"):
        ended = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(screens.__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout.strip() == fingerprint(VALUE["a"], 1.5)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(documents, documents)
def test_fingerprints_are_equal_exactly_when_values_are(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint(one) == fingerprint(other)) == same
    assert fingerprint(one) != fingerprint(one, other)
    assert fingerprint(json.loads(json.dumps(one))) == fingerprint(one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_has_no_one_text_has_no_fingerprint(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        fingerprint(value)
