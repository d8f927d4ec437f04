"""The vote of a compound's cells against a loop over cells and pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from screening.prediction import COLUMNS, vote
from storage_schemas.errors import InputError


def vote_by_loops(
    query: Any, compound: Any, gallery: Any, moa: Any, g_compound: Any, exclude: bool
) -> list[tuple[str, str, float, float, int]]:
    def distance(a: Any, b: Any) -> float:
        return 1 - float(a @ b) / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b))

    rows = []
    for name in dict.fromkeys(compound):
        cells = [i for i in range(len(query)) if compound[i] == name]
        candidates = [j for j in range(len(gallery)) if moa[j] is not None and not (exclude and g_compound[j] == name)]
        votes = []
        for i in cells:
            if candidates:
                votes.append(moa[min(candidates, key=lambda j: (distance(query[i], gallery[j]), j))])
        table = []
        for each in {m for m in moa if m is not None}:
            pairs = [distance(query[i], gallery[j]) for i in cells for j in candidates if moa[j] == each]
            mean = sum(pairs) / len(pairs) if pairs else math.nan
            share = votes.count(each) / len(votes) if votes else 0.0
            table.append((name, each, share, mean, len(votes)))
        rows += sorted(table, key=lambda r: (-r[2], math.inf if math.isnan(r[3]) else r[3], r[1]))
    return rows


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_vote_is_what_the_loop_says(seed: int, exclude: bool) -> None:
    rng = np.random.default_rng(seed)
    of_compound = {"c0": "x", "c1": "x", "c2": "y", "c3": "y", "c4": "z", "c5": None}
    g_compound = rng.choice(list(of_compound), 60)
    moa = [of_compound[c] for c in g_compound]
    gallery = rng.normal(size=(60, 6)) + 1
    compound = rng.choice(["c4", "c0", "c2", "new"], 25)
    query = rng.normal(size=(25, 6))
    table = vote(query, compound, gallery, moa, g_compound, exclude_same_compound=exclude)
    expected = vote_by_loops(query, compound, gallery, moa, g_compound, exclude)
    assert tuple(table.columns) == COLUMNS
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected, columns=list(COLUMNS)), check_dtype=False, rtol=1e-9)


def test_shares_add_up_and_order_is_share_then_distance() -> None:
    gallery = np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0.2]])
    query = np.array([[1, 0.01], [0.02, 1]])
    table = vote(query, ["new", "new"], gallery, ["x", "x", "y", "z"], ["a", "b", "c", "d"])
    assert table.groupby("compound")["share"].sum().tolist() == [1.0]
    assert table["share"].tolist() == [0.5, 0.5, 0.0]
    assert table["mean_distance"][0] < table["mean_distance"][1]
    assert table["n_cells"].tolist() == [2, 2, 2]


def test_a_compound_with_only_itself_in_the_gallery_has_no_votes() -> None:
    table = vote(np.eye(2), ["a", "a"], np.eye(2), ["x", "x"], ["a", "a"])
    assert table["share"].tolist() == [0.0]
    assert table["n_cells"].tolist() == [0]
    assert table["mean_distance"].isna().all()


@pytest.mark.parametrize(("n", "n_gallery"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_ask_or_to_find_is_an_empty_table(n: int, n_gallery: int) -> None:
    table = vote(np.ones((n, 2)), ["a"] * n, np.ones((n_gallery, 2)), ["x"] * n_gallery, ["b"] * n_gallery)
    assert tuple(table.columns) == COLUMNS
    assert table.empty


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="3 embeddings, 2 MOAs and 3 compounds"):
        vote(np.ones((1, 2)), ["a"], np.ones((3, 2)), ["x", "y"], ["a", "b", "c"])
    with pytest.raises(InputError, match="query_group has 2 entries for 1 vectors"):
        vote(np.ones((1, 2)), ["a", "b"], np.ones((1, 2)), ["x"], ["c"])
    with pytest.raises(InputError, match="not finite"):
        vote(np.full((1, 2), np.inf), ["a"], np.ones((1, 2)), ["x"], ["c"])
