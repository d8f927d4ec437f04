"""Splits: nothing tested on was trained on, whatever the screen looks like."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.splits import SPLITS, Split, SplitConfig, check_leaks, split
from storage_schemas.errors import InputError


def screen(moas: dict[str | None, int], replicates: int = 3, controls: int = 2) -> tuple[pd.DataFrame, pd.DataFrame]:
    names = [(f"{moa}-{i}", moa) for moa, n in moas.items() for i in range(n)]
    rows = []
    for replicate in range(1, replicates + 1):
        roles = [(name, "treatment") for name, _ in names] + [("DMSO", "negative_control")] * controls
        for i, (name, role) in enumerate(roles):
            rows.append((f"plate{replicate}", f"A{i + 1:02d}", name, role, str(replicate)))
    plate_map = pd.DataFrame(rows, columns=["plate", "well", "compound", "role", "replicate"])
    compounds = pd.DataFrame([*names, ("DMSO", None)], columns=["compound", "moa"])
    return plate_map, compounds


def run(moas: dict[str | None, int], seed: int = 0, config: SplitConfig | None = None, **form: int) -> Split:
    return split(*screen(moas, **form), config or SplitConfig(), seed)


def test_a_whole_screen() -> None:
    table, notes = run({"a": 5, "b": 4})
    check_leaks(table)
    assert list(table.columns) == [
        "plate", "well", "compound", "moa", "role", "replicate", "split",
    ]  # fmt: skip
    by_compound = table[table["replicate"] == "1"].set_index("compound")["split"]
    for moa, n in {"a": 5, "b": 4}.items():
        parts = [by_compound[f"{moa}-{i}"] for i in range(n)]
        assert sorted(parts) == ["test_compound", *["train"] * (n - 2), "validation"]
    assert set(by_compound["DMSO"]) == {"train"}
    held_out = table[table["replicate"] == "3"]
    trained = held_out["compound"].map(lambda name: name != "DMSO" and by_compound[name] == "train")
    assert (held_out["split"] == trained.map({True: "test_replicate", False: "unused"})).all()
    assert notes == ["Replicate 3 is held out: nothing in it is trained on."]


@settings(max_examples=60, deadline=None)
@given(
    moas=st.dictionaries(st.sampled_from(["a", "b", "c", None]), st.integers(1, 7), max_size=4),
    replicates=st.integers(1, 4),
    controls=st.integers(0, 2),
    seed=st.integers(0, 99),
    validation=st.sampled_from([0.0, 0.2, 0.6]),
    test=st.sampled_from([0.0, 0.25, 0.9]),
    hold_out=st.booleans(),
)
def test_any_screen_goes_through_without_a_leak(
    moas: dict[str | None, int],
    replicates: int,
    controls: int,
    seed: int,
    validation: float,
    test: float,
    hold_out: bool,
) -> None:
    config = SplitConfig(validation_share=validation, test_share=test, hold_out_replicate=hold_out)
    table, notes = run(moas, seed, config, replicates=replicates, controls=controls)
    check_leaks(table)
    assert set(table["split"]) <= set(SPLITS)
    assert len(table) == replicates * (sum(moas.values()) + controls)
    for moa in set(moas) - {None}:
        assert "train" in set(table["split"][table["moa"] == moa])
    assert (table["split"][table["moa"].isna() & (table["role"] == "treatment")] == "unused").all()
    if moas and validation > 0 and "validation" not in set(table["split"]):
        assert any("no validation" in note for note in notes)


def test_the_draw_follows_the_seed_and_not_the_order_of_rows() -> None:
    plate_map, compounds = screen({"a": 6, "b": 6})
    first = split(plate_map, compounds, SplitConfig(), 1).table
    shuffled = split(
        plate_map.sample(frac=1, random_state=0), compounds.iloc[::-1], SplitConfig(), 1
    ).table.sort_index()
    pd.testing.assert_frame_equal(first, shuffled)
    assert any(not first.equals(split(plate_map, compounds, SplitConfig(), seed).table) for seed in (2, 3))


def test_the_last_replicate_is_the_last_by_number() -> None:
    table, _ = run({"a": 4}, replicates=10)
    assert set(table["replicate"][table["split"] == "test_replicate"]) == {"10"}


def test_a_plate_of_three_wells_says_what_cannot_be_tested() -> None:
    table, notes = run({"a": 1, "b": 1}, replicates=1, controls=1)
    assert set(table["split"]) == {"train"}
    assert len(notes) == 3
    assert "one replicate" in notes[0]


def test_a_compound_without_wells_in_training_is_not_tested_on_the_replicate() -> None:
    plate_map, compounds = screen({"a": 1, "b": 2}, replicates=2)
    plate_map = plate_map[(plate_map["compound"] != "a-0") | (plate_map["replicate"] == "2")]
    table, _ = split(plate_map, compounds, SplitConfig(), 0)
    assert set(table["split"][table["compound"] == "a-0"]) == {"unused"}


def test_a_compound_that_is_not_listed_is_named() -> None:
    plate_map, compounds = screen({"a": 2})
    with pytest.raises(InputError, match="a-1"):
        split(plate_map, compounds[compounds["compound"] != "a-1"], SplitConfig(), 0)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", "gallery", "unknown parts"),
        ("well", "A01", "more than once"),
    ],
)
def test_a_broken_table_is_refused(column: str, value: str, message: str) -> None:
    table = run({"a": 5}).table
    table[column] = value
    with pytest.raises(InputError, match=message):
        check_leaks(table)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("test_compound", "compound .* is in test_compound and in train"),
        ("validation", "compound .* is in validation and in train"),
        ("test_replicate", "replicate 1 is in test_replicate and in train"),
    ],
)
def test_a_leak_is_refused(part: str, message: str) -> None:
    table = run({"a": 6}).table
    row = table.index[(table["split"] == "train") & (table["role"] == "treatment")][0]
    table.loc[row, "split"] = part
    with pytest.raises(InputError, match=message):
        check_leaks(table)


def test_a_compound_without_a_mechanism_is_trained_on_only_where_compounds_are_told_apart() -> None:
    plate_map = pd.DataFrame(
        {
            "plate": ["p1", "p1", "p2", "p2"],
            "well": ["A01", "A02", "A01", "A02"],
            "compound": ["both", "first", "both", "last"],
            "role": "treatment",
            "replicate": ["1", "1", "2", "2"],
        }
    )
    compounds = pd.DataFrame({"compound": ["both", "first", "last"], "moa": None})
    by_moa = split(plate_map, compounds, SplitConfig(), seed=0).table
    by_compound = split(plate_map, compounds, SplitConfig(), seed=0, label="compound").table
    assert set(by_moa["split"]) == {"unused"}
    # `last` is only in the held-out replicate: it was never trained on, so there is nothing to test there.
    assert by_compound["split"].tolist() == ["train", "train", "test_replicate", "unused"]
