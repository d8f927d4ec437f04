from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.truth import Labels, Truth

WELL = WellKey("plate 1", "B02")
LABELS: dict[str, tuple[Labels, Labels]] = {
    site: tuple(np.random.default_rng(i).integers(0, 9, (2, 3, 4 + i, 5), dtype=np.int32))  # type: ignore[misc]
    for i, site in enumerate(("0", "s.1"))
}
PARENTS = {
    "0": pd.DataFrame({"track": [3, 4], "parent": [1, 1], "frame": [2, 2]}),
    "s.1": pd.DataFrame({"track": [], "parent": [], "frame": []}),
}
BAD_FRAMES = {"0": [], "s.1": [0, 2]}


@pytest.fixture(params=["local", "memory"])
def truth(request: pytest.FixtureRequest, tmp_path: Path) -> Truth:
    return Truth(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_truth_reads_back(truth: Truth) -> None:
    assert not truth.has(WELL)
    truth.write(WELL, LABELS, PARENTS, BAD_FRAMES)
    assert truth.has(WELL)
    assert not truth.has(WellKey("plate 1", "B03"))
    for site, (nuclei, cells) in LABELS.items():
        back = truth.read(WELL, site)
        np.testing.assert_array_equal(back.nuclei, nuclei)
        np.testing.assert_array_equal(back.cells, cells)
        assert back.nuclei.dtype == back.cells.dtype == np.int32
        assert back.bad_frames.tolist() == BAD_FRAMES[site]
        assert back.bad_frames.dtype == back.parents.dtype == np.int64
    assert truth.read(WELL, "0").parents.tolist() == [[3, 1, 2], [4, 1, 2]]
    assert truth.read(WELL, "s.1").parents.shape == (0, 3)


def test_columns_of_parents_are_found_by_name(truth: Truth) -> None:
    shuffled = {"0": PARENTS["0"][["frame", "parent", "track"]]}
    truth.write(WELL, {"0": LABELS["0"]}, shuffled, {"0": []})
    assert truth.read(WELL, "0").parents.tolist() == [[3, 1, 2], [4, 1, 2]]


def test_what_is_not_there_is_named(truth: Truth) -> None:
    with pytest.raises(SchemaError, match=r"truth/plate 1/B02\.npz: no such file"):
        truth.read(WELL, "0")
    truth.write(WELL, LABELS, PARENTS, BAD_FRAMES)
    with pytest.raises(SchemaError, match=r"B02\.npz: has no site 's'"):
        truth.read(WELL, "s")


def test_a_truncated_file_is_named(truth: Truth) -> None:
    truth.write(WELL, LABELS, PARENTS, BAD_FRAMES)
    url = store.join(truth.url, "truth", WELL.plate, f"{WELL.well}.npz")
    whole = store.read_bytes(url)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        store.write_bytes(url, whole[:length])
        with pytest.raises(SchemaError, match=r"B02\.npz: is not a readable"):
            truth.read(WELL, "0")
