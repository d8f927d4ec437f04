"""The vote of a compound's cells against a loop over cells and pairs, its p-value, and what is near nothing known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from indexed_screens import write_screen

from pipelines.predict import NO_EFFECT, NONE_KNOWN, PredictionConfig, predict
from pipelines.vectors import read_profiles
from screening import prediction
from screening.prediction import (
    COLUMNS,
    k_nearest,
    novelty,
    share_p_values,
    shares_of_compounds,
    tally,
    vote,
)
from screening.retrieval import unit_rows
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen
from storage_schemas.tables import ACTIVITY, COMPOUNDS, open_table, write_table


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


def test_vote_of_three_cells_written_by_hand() -> None:
    query = np.array([[1, 0], [0.8, 0.6], [0, 1]])
    gallery = np.array([[1, 0], [0, 1], [0.6, 0.8]])
    table = vote(query, ["new"] * 3, gallery, ["X", "Y", "Y"], ["a", "b", "c"])
    # Nearest: the first, the third (0.96 against 0.8 and 0.6), the second.
    assert table["moa"].tolist() == ["Y", "X"]
    np.testing.assert_allclose(table["share"], [2 / 3, 1 / 3], rtol=1e-15)
    # Y: 1 - (0 + 0.6 + 1 + 0.6 + 0.96 + 0.8) / 6; X: 1 - (1 + 0.8 + 0) / 3.
    np.testing.assert_allclose(table["mean_distance"], [0.34, 0.4], rtol=1e-12)
    assert table["n_cells"].tolist() == [3, 3]


# --- several neighbours ----------------------------------------------------------------------


def test_k_nearest_by_loops() -> None:
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(5, 3)), rng.normal(size=(12, 3))
    gallery[4] = 3 * gallery[3]  # the same direction: by position
    groups = list("aabbc"), list("aabbccddeeff")
    found = k_nearest(query, groups[0], gallery, groups[1], 11)
    for i in range(5):
        candidates = [j for j in range(12) if groups[1][j] != groups[0][i]]
        cosines = {j: query[i] @ gallery[j] / np.linalg.norm(gallery[j]) for j in candidates}
        expected = sorted(candidates, key=lambda j: (-round(cosines[j], 9), j))
        assert found[i].tolist() == [*expected, -1]
    table = tally(found[:, :3], query, ["x"] * 5, groups[0], gallery, list("mmmmmmnnnnnn"), groups[1])
    assert table["share"].sum() == pytest.approx(1)
    assert table["n_cells"].tolist() == [15, 15]
    with pytest.raises(InputError, match="k is 0"):
        k_nearest(query, groups[0], gallery, groups[1], 0)


def test_shares_of_compounds_are_those_of_their_mechanisms_taken_apart() -> None:
    shares, asking, offered = shares_of_compounds(np.array([0, 2, 1, -1]), list("xxyz"), list("aab"))
    assert (asking, offered) == (["x", "y", "z"], ["a", "b"])
    assert shares.toarray().tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]


# --- p-values --------------------------------------------------------------------------------


def p_by_all_labelings(row: Any, own: int | None, moa: list[str | None], label: str) -> float:
    """The share of all ways to deal the other compounds' mechanisms that give the label as much."""
    dealt = [g for g in range(len(moa)) if moa[g] is not None and g != own]
    observed = sum(row[g] for g in dealt if moa[g] == label)
    scores = [
        sum(row[g] for g, each in zip(dealt, order, strict=True) if each == label)
        for order in itertools.permutations([moa[g] for g in dealt])
    ]
    return sum(bool(score >= observed - 1e-12) for score in scores) / len(scores)


def test_p_values_are_those_of_all_labelings() -> None:
    moa = ["x", "x", "y", "y", "z", None, "x"]
    equal = np.array([0.25, 0, 0.25, 0.25, 0, 0.25, 0])
    unequal = np.array([0.5, 0.2, 0.1, 0, 0.2, 0, 0])
    p, names = share_p_values(np.array([equal, unequal, 0 * equal]), [6, None, None], moa, 20_000)
    assert names == ["x", "y", "z"]
    for m, label in enumerate(names[:2]):
        assert p[0, m] == pytest.approx(p_by_all_labelings(equal, 6, moa, label), abs=1e-15)
        assert p[1, m] == pytest.approx(p_by_all_labelings(unequal, None, moa, label), abs=0.015)
    assert p[0, 2] == 1
    assert (p[2] == 1).all()


def test_p_values_do_not_depend_on_who_else_asks() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(10), size=6)
    moa = list("aaabbbccdd")
    together = share_p_values(shares, [None] * 6, moa, 500)[0]
    alone = share_p_values(shares[3:4], [None], moa, 500)[0]
    np.testing.assert_array_equal(together[3:4], alone)


def test_p_values_of_mechanisms_dealt_at_random_are_no_smaller_than_chance() -> None:
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(24, 0.3), size=300)
    labels = np.repeat(list("abcdef"), 4)
    p = [share_p_values(row[None], [None], list(rng.permutation(labels)), 499)[0][0, 0] for row in shares]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) <= level + 3 * math.sqrt(level * (1 - level) / 300)


# --- none of the known -----------------------------------------------------------------------


def compounds_of(rng: np.random.Generator, centres: Any, each: int, spread: float) -> Any:
    return np.repeat(centres, each, axis=0) + spread * rng.normal(size=(len(centres) * each, centres.shape[1]))


def test_novelty_by_loops() -> None:
    rng = np.random.default_rng(0)
    profiles, controls = rng.normal(size=(9, 4)), rng.normal(size=(5, 4))
    moa = ["x", "x", "x", "y", "y", "z", None, None, "y"]
    names = [f"c{i}" for i in range(9)]
    found = novelty(profiles, names, moa, controls, false_alarms=0.3)

    def nearest(vector: Any, candidates: list[int]) -> float:
        norm = float(np.linalg.norm(vector))
        return max(float(vector @ profiles[j]) / norm / float(np.linalg.norm(profiles[j])) for j in candidates)

    known = [i for i in range(9) if moa[i] is not None]
    similarity = [nearest(profiles[i], [j for j in known if j != i]) for i in range(9)]
    np.testing.assert_allclose(found.similarity, similarity, rtol=1e-12)
    tested = [i for i in known if moa[i] != "z"]  # alone of its mechanism: no compound shows what near is
    ordered = sorted(similarity[i] for i in tested)
    assert found.threshold == pytest.approx(ordered[int(0.3 * (len(ordered) - 1))])
    assert found.false_alarms == np.mean([similarity[i] < found.threshold - 1e-12 for i in tested]) <= 0.3
    without = [nearest(profiles[i], [j for j in known if moa[j] != moa[i]]) for i in tested]
    assert found.found == np.mean([value < found.threshold - 1e-12 for value in without])
    assert found.controls == np.mean([nearest(row, known) >= found.threshold for row in controls])
    assert found.n_known == len(tested)


def test_novelty_is_the_same_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    profiles, controls = rng.normal(size=(40, 6)), rng.normal(size=(7, 6))
    moa = [None if i % 5 == 0 else f"m{i % 7}" for i in range(40)]
    names = [f"c{i // 2}" for i in range(40)]  # a name may stand twice
    whole = novelty(profiles, names, moa, controls)
    monkeypatch.setattr(prediction, "_PAIRS", 70)
    parts = novelty(profiles, names, moa, controls)
    np.testing.assert_allclose(parts.similarity, whole.similarity, rtol=1e-12)
    assert parts[1:] == pytest.approx(whole[1:])
    alone = [sum(m == moa[i] and n != names[i] for m, n in zip(moa, names, strict=True)) == 0 for i in range(40)]
    assert whole.n_known == sum(moa[i] is not None and not alone[i] for i in range(40))


@pytest.mark.parametrize("seed", range(3))
def test_simulated_compounds_of_unseen_mechanisms_are_like_none_of_the_known(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, 40))
    seen, unseen = centres[:20], centres[20:]
    known = compounds_of(rng, seen, 6, 0.6)
    more, new = compounds_of(rng, seen, 10, 0.6), compounds_of(rng, unseen, 20, 0.6)
    profiles = np.concatenate([known, more, new])
    moa = [f"m{i // 6}" for i in range(120)] + [None] * 400
    found = novelty(profiles, [str(i) for i in range(520)], moa, rng.normal(size=(50, 40)))
    far = found.similarity < found.threshold
    assert far[320:].mean() >= 0.8
    assert far[120:320].mean() <= 0.15
    assert found.found >= 0.8
    assert found.false_alarms <= 0.1
    assert found.controls <= 0.2


def test_without_two_compounds_of_a_mechanism_nothing_can_be_calibrated() -> None:
    found = novelty(np.eye(3), ["a", "b", "c"], ["x", "y", None], np.zeros((0, 3)))
    assert found.n_known == 0
    assert math.isnan(found.threshold)


# --- of a screen -----------------------------------------------------------------------------

COMPOUND = "uncoupler-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("predicted") / "screen"
    write_screen(where)
    return where


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return write_screen(tmp_path / "screen")


def set_moas(screen: Screen, moa: dict[str, str | None]) -> None:
    table = open_table(screen.compounds, COMPOUNDS).to_pandas()
    now = [moa.get(name, known) for name, known in zip(table["compound"], table["moa"], strict=True)]
    write_table(screen.compounds, table.assign(moa=pd.Series(now, dtype=object)), COMPOUNDS)


def test_cells_of_a_screen_vote_as_their_embeddings_do(folder: Path) -> None:
    votes = predict(Screen(str(folder)), COMPOUND).table
    assert set(votes["compound"]) == {COMPOUND}
    assert set(votes["moa"]) == {"uncoupler", "potassium ionophore", NO_EFFECT}
    assert votes["share"].sum() == pytest.approx(1)
    assert votes["share"].is_monotonic_decreasing
    assert (votes["n_votes"] == 24).all()
    assert (votes["true_moa"] == "uncoupler").all()
    assert (votes["call"] == "uncoupler").all()
    assert votes.set_index("moa")["p_value"].isna().to_dict() == {
        "uncoupler": False,
        "potassium ionophore": False,
        NO_EFFECT: True,
    }


@pytest.mark.parametrize("level", ["cell", "well", "compound"])
def test_all_compounds_with_their_first_choice(folder: Path, level: Any) -> None:
    screen = Screen(str(folder))
    found = predict(screen, level=level)
    names = {f"{moa}-{i}" for moa in ("uncoupler", "potassium-ionophore") for i in (1, 2, 3)}
    assert found.table["compound"].is_unique
    assert set(found.table["compound"]) == names
    for row in found.table.itertuples():
        assert predict(screen, str(row.compound), level).table["moa"][0] == row.moa
    assert "so have 0% of 6 known compounds (false alarms)" in found.notes[0]


def test_profiles_vote_for_their_neighbours(folder: Path) -> None:
    screen = Screen(str(folder))
    votes = predict(screen, COMPOUND, "compound", PredictionConfig(k=2)).table.set_index("moa")
    metadata, profiles = read_profiles(screen, "compound")
    unit = unit_rows(profiles)
    row = int(np.flatnonzero(metadata["compound"] == COMPOUND)[0])
    others = metadata.assign(cosine=unit @ unit[row]).drop(index=row)
    others = others[others["moa"].notna()].sort_values("cosine", ascending=False)
    for moa, share in others["moa"][:2].value_counts(normalize=True).items():
        assert votes.at[moa, "share"] == pytest.approx(share)
    # Two of two neighbours among two of five: one way in ten.
    assert votes.at["uncoupler", "p_value"] == pytest.approx(1 / 10 if votes.at["uncoupler", "share"] == 1 else 7 / 10)


def test_of_many_cells_as_many_of_each_compound_vote(folder: Path) -> None:
    screen = Screen.open(str(folder))
    all_vote = predict(screen, level="cell")
    # Seven compounds of 24 cells each, the controls of 48.
    some = predict(screen, level="cell", config=PredictionConfig(max_cells=70))
    assert set(some.table["n_votes"]) == {10}
    assert set(all_vote.table["n_votes"]) == {24}
    assert some.notes == ("70 of 192 cells vote, drawn alike from each compound (max_cells)", *all_vote.notes)
    assert set(some.table["call"]) <= {*all_vote.table["call"]}
    again = predict(screen, level="cell", config=PredictionConfig(max_cells=10**6))
    pd.testing.assert_frame_equal(again.table, all_vote.table)


def test_predictions_are_kept_until_something_changes(screen: Screen) -> None:
    first = predict(screen).table
    url = screen.predictions("cell", "parquet")
    before = store.read_bytes(url)
    pd.testing.assert_frame_equal(predict(screen).table, first)
    assert store.read_bytes(url) == before
    set_moas(screen, {COMPOUND: "potassium ionophore"})
    assert predict(screen).table.set_index("compound")["true_moa"][COMPOUND] == "potassium ionophore"
    assert store.read_bytes(url) != before


def test_a_compound_alone_of_its_mechanism_is_told_why(screen: Screen) -> None:
    set_moas(screen, {COMPOUND: "something else"})
    row = predict(screen).table.set_index("compound").loc[COMPOUND]
    assert row["note"] == "alone of its mechanism: no other compound votes for it"
    set_moas(screen, {f"{moa}-{i}": None for moa in ("uncoupler", "potassium-ionophore") for i in (1, 2, 3)})
    with pytest.raises(InputError, match="no compound here has a known MOA"):
        predict(screen)
    set_moas(screen, {COMPOUND: "uncoupler"})
    table = predict(screen, level="compound").table.set_index("compound")
    assert table["note"][COMPOUND] == "no other compound has a known mechanism: nothing votes"
    assert pd.isna(table["call"][COMPOUND])


def test_what_is_far_from_all_and_what_is_still_are_called_so(screen: Screen) -> None:
    set_moas(screen, {f"uncoupler-{i}": None for i in (1, 2, 3)})
    table = predict(screen, level="compound").table.set_index("compound")
    assert (table["call"][["uncoupler-1", "uncoupler-2", "uncoupler-3"]] == NONE_KNOWN).all()
    names = list(table.index)
    activity = pd.DataFrame({"compound": names, "active": [name != "uncoupler-1" for name in names]})
    write_table(screen.statistics("activity"), activity.reindex(columns=ACTIVITY.schema.names), ACTIVITY)
    assert predict(screen, level="compound").table.set_index("compound")["call"]["uncoupler-1"] == NO_EFFECT


def test_what_cannot_be_predicted_is_named(screen: Screen, command: Command) -> None:
    with pytest.raises(InputError, match="'DMSO' is a negative control"):
        predict(screen, "DMSO")
    done = command("predict", screen.url, "--compound", "uncoupler1")
    assert (done.code, done.out) == (1, "")
    assert "compound 'uncoupler1' has nothing that could vote; did you mean uncoupler-1" in done.err
    store.remove(store.join(screen.url, "embeddings"))
    with pytest.raises(InputError, match="has no embeddings of cells; predict from --level well or compound"):
        predict(screen, level="cell")
    assert set(predict(screen).table["n_votes"]) == {5}


@pytest.mark.parametrize("arguments", [(), ("--compound", COMPOUND), ("--level", "well", "-k", "3")])
def test_predictions_on_the_command_line(folder: Path, command: Command, arguments: tuple[str, ...]) -> None:
    compound = COMPOUND if "--compound" in arguments else None
    level: Any = "well" if "--level" in arguments else None
    expected = predict(Screen(str(folder)), compound, level, PredictionConfig(k=3 if level else None))
    done = command("predict", folder, *arguments, "--format", "json")
    assert done.code == 0
    rows = json.loads(done.out)
    assert [(row["compound"], row["moa"]) for row in rows] == list(
        zip(expected.table["compound"], expected.table["moa"], strict=True)
    )
    assert list(rows[0]) == list(expected.table.columns)
    said = command("predict", folder, *arguments).out.splitlines()
    assert len(said) == 1 + len(expected.table) + len(expected.notes)
    assert said[-1] == f"note: {expected.notes[-1]}"
