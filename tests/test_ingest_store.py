from __future__ import annotations

import uuid
from collections.abc import Callable

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.ingest import IngestRecord, WellRecord, read_record
from storage_schemas.missing import COLUMNS, MISSING, read_missing, write_missing
from storage_schemas.plate import list_wells

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8)
rows = st.tuples(
    names, names, st.integers(0, 10**15), names, st.integers(0, 99), st.booleans(), st.sampled_from(["zeros", "no"])
)


@pytest.fixture(params=["local", "memory"], scope="session")
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Gives an empty place at each call."""
    if request.param == "local":
        return lambda: str(tmp_path_factory.mktemp("plate"))
    return lambda: f"memory://{uuid.uuid4().hex}"


@given(wanted=st.lists(rows, max_size=5))
@settings(max_examples=30, deadline=None)
def test_missing_planes_read_back(fresh: Callable[[], str], wanted: list[tuple[object, ...]]) -> None:
    url = fresh()
    write_missing(url, pd.DataFrame(wanted, columns=COLUMNS))
    found = read_missing(url)
    assert list(found.columns) == COLUMNS
    assert list(found.itertuples(index=False, name=None)) == wanted
    assert store.exists(store.join(url, MISSING)) == bool(wanted)
    write_missing(url, found.head(0))
    assert read_missing(url).empty


@pytest.mark.parametrize("text", ["well,site\nB02,1\n", "", ",".join(COLUMNS) + "\nB02,1,soon,1,1,True,no\n"])
def test_other_files_are_no_list_of_missing_planes(fresh: Callable[[], str], text: str) -> None:
    url = fresh()
    store.write_bytes(store.join(url, MISSING), text.encode())
    with pytest.raises(SchemaError, match=MISSING):
        read_missing(url)


def test_a_record_reads_back_and_other_notes_are_refused(fresh: Callable[[], str]) -> None:
    url = fresh()
    record = IngestRecord(wells={"B02": WellRecord(fingerprint="f", planes=3)}, failed={"B03": "is truncated"})
    list_wells(url, "p", ["B02"], record.model_dump())
    assert read_record(url) == record
    list_wells(url, "p", ["B02"])
    assert read_record(url) == IngestRecord()
    list_wells(url, "p", ["B02"], {"version": 2})
    with pytest.raises(SchemaError, match="its ingest record is not usable"):
        read_record(url)
