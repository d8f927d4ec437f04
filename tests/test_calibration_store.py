from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from storage_schemas import store
from storage_schemas.calibration import FIELDS, FLAT_FIELD, Float32s, read_calibration, write_calibration
from storage_schemas.errors import SchemaError, StoreError

floats = st.floats(-1e6, 1e6, width=32)


@given(st.data(), st.integers(1, 4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_calibration_reads_back(data: st.DataObject, channels: int, has_field: bool) -> None:
    known = floats | st.just(float("nan"))  # what no sampled frame tells
    calibration = {name: data.draw(npst.arrays("float32", channels, elements=known)) for name in FIELDS}
    if has_field:
        calibration[FLAT_FIELD] = data.draw(npst.arrays("float32", (channels, 3, 5), elements=floats))
    write_calibration("memory://calibration/p.npz", calibration)
    back = read_calibration("memory://calibration/p.npz")
    assert back.keys() == calibration.keys()
    for name, read in back.items():
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, calibration[name])


def calibration() -> dict[str, Float32s]:
    return {name: np.arange(2, dtype=np.float32) + i for i, name in enumerate(FIELDS)}


def written(path: Path) -> bytes:
    write_calibration(str(path), {**calibration(), FLAT_FIELD: np.ones((2, 8, 8), np.float32)})
    return path.read_bytes()


def test_truncated_calibrations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    whole = written(path)
    for length in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(SchemaError, match=r"p\.npz: is not a readable"):
            read_calibration(str(path))


def test_a_missing_calibration_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"gone\.npz: no such file"):
        read_calibration(str(tmp_path / "gone.npz"))


def save(path: Path, **fields: Any) -> str:
    sink = io.BytesIO()
    np.savez(sink, allow_pickle=True, **fields)
    path.write_bytes(sink.getvalue())
    return str(path)


ONES = np.ones(2, np.float32)
ALL = {"version": 2, **dict.fromkeys(FIELDS, ONES)}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({**ALL, "version": 1}, "expected a calibration of version 2, found 1"),
        ({name: ONES for name in FIELDS}, r"not a calibration: it holds \['focus', 'glare', 'high', 'low',"),
        ({"version": 2, "offset": ONES, "low": ONES}, "not a calibration"),
        ({**ALL, "gain": ONES}, "not a calibration"),
        ({}, "not a calibration"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        read_calibration(save(tmp_path / "p.npz", **fields))


class _Payload:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (_Payload, "ran", True)


def test_a_pickled_payload_is_refused_and_never_run(tmp_path: Path) -> None:
    payload = np.array([_Payload()], dtype=object)
    url = save(tmp_path / "p.npz", **{**ALL, "offset": payload})
    with pytest.raises(SchemaError, match=r"p\.npz"):
        read_calibration(url)
    sink = io.BytesIO()
    np.save(sink, payload, allow_pickle=True)
    (tmp_path / "p.npz").write_bytes(sink.getvalue())
    with pytest.raises(SchemaError, match=r"p\.npz"):
        read_calibration(url)
    assert not _Payload.ran


def test_a_failed_write_leaves_the_old_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.npz"
    whole = written(path)

    def raising(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", raising)
    with pytest.raises(StoreError, match="full"):
        write_calibration(str(path), calibration())
    assert path.read_bytes() == whole
    assert store.list_names(str(tmp_path)) == ["p.npz"]
