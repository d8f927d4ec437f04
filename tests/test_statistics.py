"""Statistics against loops over wells, pairs and relabelings; p-values under the null."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
from conftest import Command
from scipy import stats

from pipelines.config import ConfigError
from pipelines.profiles import write_profiles
from pipelines.statistics import compute, read_statistics
from pipelines.vectors import vector_column
from screening import statistics
from screening.profiles import Median, ProfilesConfig, Standardised
from screening.significance import (
    arrangements,
    at_least,
    benjamini_hochberg,
    enrichment,
    p_value,
    subsets,
)
from screening.statistics import (
    activity,
    consistency,
    control_distance,
    dose_response,
    reproducibility,
    separation,
    with_fdr,
)
from storage_schemas.errors import InputError
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, open_table, raw_profiles_form, write_table

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def cosine(a: Any, b: Any) -> float:
    length = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / length if length > 1e-9 else 0.0


def precision_by_loops(similar: dict[int, float], positives: set[int]) -> float:
    """Average precision among candidates; equal ones share their mean rank."""
    ranks = []
    for own in positives:
        above = sum(other > similar[own] + 1e-11 for other in similar.values())
        equal = sum(abs(other - similar[own]) <= 1e-11 for other in similar.values())
        ranks.append(above + (equal + 1) / 2)
    return sum((i + 1) / r for i, r in enumerate(sorted(ranks))) / len(ranks)


def map_by_loops(similarity: npt.NDArray[Any], members: Any, left_out: Any = None) -> float:
    scores = []
    for i in members:
        candidates = set(range(len(similarity))) - {i} - set(left_out[i] if left_out else ())
        scores.append(precision_by_loops({j: similarity[i, j] for j in candidates}, set(members) - {i}))
    return sum(scores) / len(scores)


def numbers(table: pd.DataFrame, row: Any, *columns: str) -> list[float]:
    """Some entries of a row."""
    return [float(table[column][row]) for column in columns]


# --- p-values --------------------------------------------------------------------------------


def test_all_subsets_of_strata_where_there_are_few() -> None:
    draws = subsets([(1, 2), (2, 3)], 100, 0)
    assert draws.complete
    expected = {(a, *b) for a in range(2) for b in itertools.combinations(range(2, 5), 2)}
    assert sorted(map(tuple, draws.members.tolist())) == sorted(expected)


def test_sampled_subsets_are_uniform_and_strata_independent() -> None:
    assert not subsets([(1, 40), (1, 40)], 1000, 7).complete
    pairs = pd.Series(list(map(tuple, subsets([(1, 40), (1, 40)], 1000, 7).members.tolist())))
    assert pairs.map(lambda pair: pair[0] + 40 == pair[1]).mean() < 0.1
    counts = pd.Series(list(map(tuple, np.sort(arrangements(2, 5, 20_000, (1,)), axis=1).tolist()))).value_counts()
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 0.001


def test_fewer_entries_begin_as_more() -> None:
    many = arrangements(6, 9, 50, (3,))
    assert all(len(set(row)) == 6 for row in many.tolist())
    np.testing.assert_array_equal(arrangements(2, 9, 50, (3,)), many[:, :2])
    with pytest.raises(InputError, match="3 entries cannot be chosen out of 2"):
        arrangements(3, 2, 10, (0,))


def test_p_counts_ties_and_adds_one_to_a_sample() -> None:
    null = [0.1, 0.5, 0.5 - 1e-15, 0.9]
    assert p_value(0.5, null, complete=True) == 3 / 4
    assert p_value(0.5, null, complete=False) == 4 / 5
    assert p_value(2.0, null, complete=False) == 1 / 5
    assert math.isnan(p_value(math.nan, null, complete=True))


@pytest.mark.parametrize("seed", range(3))
def test_benjamini_hochberg_by_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.choice([0.001, 0.02, 0.02, 0.3, 0.7, math.nan], 30)
    tested = [each for each in p if not math.isnan(each)]
    expected = []
    for each in p:
        bounds = [x * len(tested) / sum(y <= x for y in tested) for x in tested if x >= each]
        expected.append(math.nan if math.isnan(each) else min(1.0, *bounds))
    np.testing.assert_allclose(benjamini_hochberg(p), expected, **EXACT)
    table = with_fdr(pd.DataFrame({"p_value": p, "n": 1}), 0.05, "active")
    assert list(table) == ["p_value", "q_value", "active", "n"]
    assert table["active"].isna().tolist() == [math.isnan(each) for each in p]


def test_enrichment_is_that_of_all_lists() -> None:
    background = [["a"], ["a"], ["b"], ["b"], [], ["a", "b"], ["c"]]
    drawn = [background[i] for i in (0, 5, 4)]
    table = enrichment(drawn, background).set_index("label")
    for label in ("a", "b"):
        observed = sum(label in labels for labels in drawn)
        counts = [sum(label in labels for labels in some) for some in itertools.combinations(background, 3)]
        expected = sum(count >= observed for count in counts) / len(counts)
        assert table.loc[label, "p_value"] == pytest.approx(expected, abs=1e-15)
    assert table.loc["a", "fold"] == pytest.approx(2 / 3 / (3 / 7))
    assert at_least(12, 50, 40, 2000) == pytest.approx(stats.hypergeom.sf(11, 2000, 40, 50), rel=1e-9)
    with pytest.raises(InputError, match="more often than in what the list was drawn from"):
        enrichment([["a"], ["a"]], [["a"], ["b"]])


# --- activity --------------------------------------------------------------------------------


def wells(seed: int, replicates: int = 3, controls: int = 3, plates: int = 2, dims: int = 4) -> dict[str, Any]:
    """Four perturbations and controls on some plates, one replicate of a perturbation twice the same."""
    rng = np.random.default_rng(seed)
    perturbation = np.repeat(np.arange(4), replicates)
    plate = np.tile(np.arange(plates), 100)[: len(perturbation)]
    perturbation = np.concatenate([perturbation, np.full(controls * plates, -1)])
    plate = np.concatenate([plate, np.repeat(np.arange(plates), controls)])
    profiles = rng.normal(size=(len(plate), dims)) + 0.5 * (perturbation == 1)[:, None]
    profiles[1] = profiles[0]
    return {
        "profiles": profiles,
        "perturbation": perturbation,
        "plate": np.array([f"p{i}" for i in plate], object),
        "is_control": perturbation < 0,
    }


def activity_by_loops(data: dict[str, Any], code: int) -> tuple[float, float]:
    """The mAP, and the share of all relabelings within plates that reach it."""
    profiles, plate = data["profiles"], data["plate"]
    own = [i for i in range(len(plate)) if data["perturbation"][i] == code]
    pool = own + [i for i in range(len(plate)) if data["is_control"][i] and plate[i] in set(plate[own])]
    centred = []
    for i in pool:
        beside = [profiles[j] for j in pool if plate[j] == plate[i]]
        centred.append(profiles[i] - sum(beside) / len(beside))
    similarity = np.array([[cosine(a, b) for b in centred] for a in centred])
    observed = map_by_loops(similarity, range(len(own)))
    counts = pd.Series(plate[own]).value_counts()
    choices = [
        itertools.combinations([k for k, i in enumerate(pool) if plate[i] == name], count)
        for name, count in counts.items()
    ]
    null = [map_by_loops(similarity, list(itertools.chain(*parts))) for parts in itertools.product(*choices)]
    return observed, sum(score >= observed - 1e-11 for score in null) / len(null)


@pytest.mark.parametrize("seed", range(3))
def test_activity_by_loops(seed: int) -> None:
    data = wells(seed)
    table = activity(**data)
    for code in range(4):
        observed, p = activity_by_loops(data, code)
        np.testing.assert_allclose(numbers(table, code, "mean_average_precision", "p_value"), [observed, p], **EXACT)
        # Two positives among eight candidates, expected by going through all orders.
        orders = [sum((k + 1) / r for k, r in enumerate(c)) / 2 for c in itertools.combinations(range(1, 9), 2)]
        expected = sum(orders) / len(orders)
        np.testing.assert_allclose(numbers(table, code, "expected_precision"), expected, **EXACT)
        np.testing.assert_allclose(
            numbers(table, code, "normalised_precision"), (observed - expected) / (1 - expected), **EXACT
        )
    assert (table["n_relabelings"] == math.comb(5, 2) * 4).all() or (table["n_relabelings"] > 0).all()


def test_activity_of_a_sample_of_relabelings_by_loops() -> None:
    data = wells(5, replicates=4, controls=20, plates=1)
    table = activity(**data, n_permutations=200, seed=3)
    own = np.flatnonzero(data["perturbation"] == 2)
    pool = np.concatenate([np.flatnonzero(data["is_control"]), own])
    centred = data["profiles"][pool] - data["profiles"][pool].mean(axis=0)
    similarity = np.array([[cosine(a, b) for b in centred] for a in centred])
    observed = map_by_loops(similarity, range(20, 24))
    null = [map_by_loops(similarity, members) for members in subsets([(4, 24)], 200, 3).members.tolist()]
    count = sum(score >= observed - 1e-11 for score in null)
    np.testing.assert_allclose(numbers(table, 2, "mean_average_precision"), observed, **EXACT)
    assert table.loc[2, "p_value"] == (count + 1) / 201


def test_activity_does_not_depend_on_what_else_is_tested_nor_on_names_and_order() -> None:
    data = wells(1, replicates=4, controls=12)
    table = activity(**data)
    alone = np.isin(data["perturbation"], [-1, 2])
    part = activity(**{name: column[alone] for name, column in data.items()})
    pd.testing.assert_frame_equal(part.loc[[2]], table.loc[[2]])
    renamed = activity(**(data | {"plate": np.where(data["plate"] == "p0", "z", "a")}))
    pd.testing.assert_frame_equal(renamed, table)
    back = {name: column[::-1] for name, column in data.items()}
    found = activity(**back)["mean_average_precision"].astype(float)
    np.testing.assert_allclose(found, table["mean_average_precision"].astype(float), **EXACT)
    pd.testing.assert_frame_equal(activity(**data), table)


def test_what_cannot_be_tested_for_activity_says_why() -> None:
    profiles = np.random.default_rng(0).normal(size=(8, 3))
    table = activity(
        profiles,
        perturbation=np.array([0, 0, 1, 2, 2, 3, 3, -1]),
        plate=["a", "a", "a", "b", "b", "a", "b", "a"],
        is_control=[False] * 7 + [True],
    )
    none = "no negative control on its plates"
    assert table["excluded"].tolist() == [None, "one replicate only", none, none]
    assert table["mean_average_precision"].notna().tolist() == [True, False, False, False]
    assert table["n_replicates"].tolist() == [2, 1, 0, 1]


def test_activity_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(11)
    perturbation = np.array([0] * 4 + [-1] * 48)
    plate = np.concatenate([np.arange(4), np.repeat(np.arange(4), 12)])
    p = []
    for seed in range(300):
        # Few directions, lengths that differ, plates that differ: wells of a plate are still alike but for chance.
        profiles = rng.normal(size=(52, 6)) * rng.lognormal(size=(52, 1)) + 3 * rng.normal(size=(4, 6))[plate]
        p.append(float(activity(profiles, perturbation, plate, perturbation < 0, 999, seed)["p_value"][0]))
    assert stats.kstest(p, "uniform").pvalue > 0.01
    profiles[:4] += 50
    assert activity(profiles, perturbation, plate, perturbation < 0)["p_value"][0] == 1 / 10_001


@pytest.mark.parametrize(("controls", "share"), [(32, 0.08), (100, 0.08)])
def test_profiles_that_were_standardised_to_controls_are_not_active_for_that(controls: int, share: float) -> None:
    rng = np.random.default_rng(0)
    perturbation = np.concatenate([np.repeat(np.arange(200), 4), np.full(controls, -1)])
    profiles = rng.normal(size=(len(perturbation), 100))
    own = profiles[perturbation < 0]
    profiles = (profiles - own.mean(axis=0)) / own.std(axis=0, ddof=1)
    table = activity(profiles, perturbation, np.zeros(len(profiles)), perturbation < 0, 999)
    assert (table["p_value"] <= 0.05).mean() < share


# --- consistency -----------------------------------------------------------------------------


def consistency_by_loops(profiles: Any, labels: Any, label: str, slots: Any) -> float:
    """The mAP of a label when the compound in slot i is ``slots[i]``."""
    standing = {compound: i for i, compound in enumerate(slots)}
    similarity = np.array([[cosine(a, b) for b in profiles] for a in profiles])
    members = [i for i in slots if label in labels[standing[i]]]
    left_out = {
        i: [
            j for j in slots if label not in labels[standing[j]] and set(labels[standing[j]]) & set(labels[standing[i]])
        ]
        for i in members
    }
    return map_by_loops(similarity, members, left_out)


@pytest.mark.parametrize("seed", range(3))
def test_consistency_of_single_labels_by_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [["a"], ["b"], ["a"], ["c"], ["b"], [], ["a"], ["b"], ["d"]]
    profiles = rng.normal(size=(9, 3))
    profiles[2] = 2 * profiles[0]
    table = consistency(profiles, labels).set_index("label")
    assert table["excluded"].tolist() == [None, None, "one compound only", "one compound only"]
    known = [i for i, each in enumerate(labels) if each]
    for label in ("a", "b"):
        members = [k for k, i in enumerate(known) if label in labels[i]]
        similarity = np.array([[cosine(profiles[i], profiles[j]) for j in known] for i in known])
        observed = map_by_loops(similarity, members)
        null = [map_by_loops(similarity, some) for some in itertools.combinations(range(8), 3)]
        p = sum(score >= observed - 1e-11 for score in null) / len(null)
        np.testing.assert_allclose(numbers(table, label, "mean_average_precision", "p_value"), [observed, p], **EXACT)


def test_consistency_of_many_labels_by_loops() -> None:
    rng = np.random.default_rng(4)
    labels = [list(rng.choice(list("abcde"), rng.integers(1, 4), replace=False)) for _ in range(14)]
    profiles = rng.normal(size=(14, 3))
    table = consistency(profiles, labels, n_permutations=100, seed=2).set_index("label")
    for label in ("a", "d"):
        observed = consistency_by_loops(profiles, labels, label, range(14))
        np.testing.assert_allclose(numbers(table, label, "mean_average_precision"), observed, **EXACT)
        slots = [i for i in range(14) if label in labels[i]]
        slots += [i for i in range(14) if i not in slots and any(set(labels[i]) & set(labels[j]) for j in slots)]
        sizes = []
        for i in slots[: sum(label in labels[i] for i in range(14))]:
            sizes.append(sum(label not in labels[j] and bool(set(labels[j]) & set(labels[i])) for j in range(14)))
        null = []
        for drawn in arrangements(len(slots), 14, 100, (2,)).tolist():
            # The compounds that are drawn stand in the slots; the rest keep to the rest.
            rest = iter(sorted(set(range(14)) - set(drawn)))
            standing = dict(zip(slots, drawn, strict=True))
            null.append(
                consistency_by_loops(
                    profiles, labels, label, [standing[i] if i in standing else next(rest) for i in range(14)]
                )
            )
        assert table.loc[label, "p_value"] == (sum(score >= observed - 1e-11 for score in null) + 1) / 101
        harmonic = [sum(1 / r for r in range(1, 14 - size)) for size in sizes]
        k = len(sizes) - 1
        expected = [
            (h + (k - 1) / (12 - size) * (13 - size - h)) / (13 - size) for h, size in zip(harmonic, sizes, strict=True)
        ]
        np.testing.assert_allclose(numbers(table, label, "expected_precision"), sum(expected) / len(expected), **EXACT)


@pytest.mark.parametrize("size", [1, 5_000, 10**9])
def test_consistency_is_the_same_for_any_chunk_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = [list(rng.choice(list("abcdefgh"), rng.integers(0, 3), replace=False)) for _ in range(60)]
    profiles = np.round(rng.normal(size=(60, 4)))  # many ties
    expected = consistency(profiles, labels, 500)
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", size)
    pd.testing.assert_frame_equal(consistency(profiles, labels, 500), expected)


def test_a_label_has_the_same_relabelings_whatever_the_others_are() -> None:
    rng = np.random.default_rng(2)
    profiles = rng.normal(size=(30, 4))
    one = [["x"] if i < 4 else ["rest"] for i in range(30)]
    other = [["x"] if i < 4 else [f"rest {i // 7}"] for i in range(30)]
    first, second = (consistency(profiles, labels).set_index("label").loc[["x"]] for labels in (one, other))
    pd.testing.assert_frame_equal(first, second)


def test_consistency_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(5)
    p = []
    for seed in range(60):
        profiles = rng.normal(size=(60, 5)) * rng.lognormal(size=(60, 1)) + 0.5
        labels = [[f"{rng.integers(9)}"] for _ in range(60)]
        p += consistency(profiles, labels, 999, seed)["p_value"].dropna().astype(float).tolist()[:3]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_a_label_of_all_compounds_cannot_be_tested() -> None:
    table = consistency(np.eye(3), [["a"], ["a"], ["a", "b"]])
    assert table["excluded"].tolist() == ["no compound without it", "one compound only"]
    assert consistency(np.eye(2), [[], []]).empty


# --- reproducibility, controls, doses --------------------------------------------------------


def test_replicates_correlate_as_loops_say() -> None:
    rng = np.random.default_rng(0)
    profiles = rng.normal(size=(24, 20)) + np.repeat(rng.normal(size=(2, 20)), [4, 20], axis=0)
    perturbation = np.array([0] * 4 + [1] * 3 + [2] + [3] * 8 + [4] * 8)
    table = reproducibility(profiles, perturbation, 500)
    for code, size in ((0, 4), (1, 3)):
        own = np.flatnonzero(perturbation == code)
        pairs = [np.corrcoef(profiles[i], profiles[j])[0, 1] for i, j in itertools.combinations(own, 2)]
        assert len(pairs) == math.comb(size, 2)
        np.testing.assert_allclose(numbers(table, code, "replicate_correlation"), np.median(pairs), **EXACT)
    assert table["replicates"].isna().tolist() == [False, False, True, True, True]
    alike = np.repeat(rng.normal(size=(30, 20)), 3, axis=0) + 0.1 * rng.normal(size=(90, 20))
    table = reproducibility(alike, np.repeat(np.arange(30), 3), 500)
    assert table["replicates"].all()
    assert (table["replicate_p_value"] == 1 / 501).all()
    # Of few perturbations many groups of wells are drawn, too.
    few = reproducibility(alike[:12], np.repeat(np.arange(4), 3), 500)
    assert (few["replicate_p_value"] == 1 / 501).all()


def test_replicates_that_are_none_replicate_as_often_as_chance_has_it() -> None:
    rng = np.random.default_rng(1)
    table = reproducibility(rng.normal(size=(900, 30)), np.repeat(np.arange(300), 3), 2000)
    assert 0.02 < table["replicates"].mean() < 0.09
    assert stats.kstest(table["replicate_p_value"].to_numpy(float), "uniform").pvalue > 0.01


def test_separation_by_loops() -> None:
    rng = np.random.default_rng(3)
    negative, positive = rng.normal(size=(5, 8)), rng.normal(size=(4, 8)) + 3
    found = separation(np.concatenate([negative, positive]), np.arange(9) < 5, np.arange(9) >= 5)
    placed: dict[str, list[float]] = {"negative": [], "positive": []}
    for name, wells_here in (("negative", negative), ("positive", positive)):
        for i in range(len(wells_here)):
            others = np.mean([w for j, w in enumerate(wells_here) if j != i], axis=0)
            start = others if name == "negative" else negative.mean(axis=0)
            end = others if name == "positive" else positive.mean(axis=0)
            placed[name].append(float((wells_here[i] - start) @ (end - start) / ((end - start) @ (end - start))))
    low, high = (np.array(placed[name]) for name in ("negative", "positive"))
    sd = low.std(ddof=1), high.std(ddof=1)
    mad = [1.4826 * np.median(np.abs(x - np.median(x))) for x in (low, high)]
    difference, middle = high.mean() - low.mean(), np.median(high) - np.median(low)
    expected = {
        "z_prime": 1 - 3 * (sd[0] + sd[1]) / abs(difference),
        "ssmd": difference / math.hypot(*sd),
        "z_prime_robust": 1 - 3 * (mad[0] + mad[1]) / abs(middle),
        "ssmd_robust": middle / math.hypot(*mad),
    }
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), **EXACT)


def test_controls_that_do_not_differ_are_not_told_apart_however_many_features() -> None:
    rng = np.random.default_rng(0)
    found = [separation(rng.normal(size=(16, 500)), np.arange(16) < 8, np.arange(16) >= 8)["ssmd"] for _ in range(30)]
    assert np.mean(found) < 0.2
    assert all(math.isnan(value) for value in separation(np.eye(4), [1, 1, 0, 0], [0, 0, 1, 1]).values())


def test_distance_from_controls_by_loops() -> None:
    rng = np.random.default_rng(0)
    profiles, plate = rng.normal(size=(9, 4)), np.array(list("aaaabbbbc"))
    control = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    found = control_distance(profiles, plate, control)
    for i in range(9):
        others = [profiles[j] for j in range(9) if control[j] and plate[j] == plate[i] and j != i]
        expected = math.sqrt(np.mean((profiles[i] - np.mean(others, axis=0)) ** 2)) if others else math.nan
        np.testing.assert_allclose(found[i], expected, **EXACT)


def test_dose_response_by_loops() -> None:
    compound = np.array([0] * 6 + [1] * 4 + [2] * 4 + [3] * 9)
    dose = np.array([1, 1, 3, 3, 10, 10, 1, 2, 1, 2, 1, 2, 4, math.nan, *[1, 2, 4] * 3], float)
    rng = np.random.default_rng(0)
    effect = rng.normal(size=23)
    effect[:6] = [1, 2, 2, 3, 4, 5]
    table = dose_response(compound, dose, effect, 1000)
    assert table["excluded"].tolist() == [None, "fewer than three doses", None, None]
    assert table["n_wells"].tolist() == [6, 4, 3, 9]
    for code in (0, 2):
        own = (compound == code) & ~np.isnan(dose)
        observed = stats.spearmanr(dose[own], effect[own]).statistic
        null = [stats.spearmanr(dose[own], order).statistic for order in itertools.permutations(effect[own])]
        p = np.mean([score >= observed - 1e-9 for score in null])
        np.testing.assert_allclose(numbers(table, code, "spearman", "p_value"), [observed, p], **EXACT)
    assert table.loc[3, "n_relabelings"] == 1000


def test_dose_response_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(8)
    compound, dose = np.repeat(np.arange(300), 12), np.tile(np.repeat([1.0, 3, 10, 30], 3), 300)
    p = dose_response(compound, dose, rng.normal(size=3600), 999)["p_value"].to_numpy(float)
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="1 of 2 profiles are not finite \\(the first is row 1\\)"):
        consistency(np.array([[0.0], [np.nan]]), [["a"], ["b"]])
    with pytest.raises(InputError, match="plate has 3 entries for 2 profiles"):
        activity(np.eye(2), np.zeros(2, np.int64), ["a", "a", "b"], [True, False])
    with pytest.raises(InputError, match="p-values lie between 0 and 1"):
        benjamini_hochberg([0.5, 1.5])


# --- of a screen -----------------------------------------------------------------------------


def write_screen(url: str, wells_here: pd.DataFrame, profiles: npt.NDArray[Any], compounds: pd.DataFrame) -> Screen:
    """A screen of profiles alone."""
    screen = Screen(url)
    screen.write_manifest(Manifest(software={}, config={}, inputs=""))
    write_table(screen.plate_map, wells_here, PLATE_MAP)
    write_table(screen.compounds, compounds.reindex(columns=COMPOUNDS.schema.names).astype("string"), COMPOUNDS)
    table = pa.Table.from_pandas(wells_here[["plate", "well"]].assign(n_cells=9), preserve_index=False)
    table = table.append_column("profile", vector_column(profiles.astype(np.float32)))
    write_table(screen.profiles("raw"), table, raw_profiles_form(profiles.shape[1]))
    write_profiles(screen, ProfilesConfig(recipe=Standardised(reference="plate")), "")
    return screen


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    """Two plates of a strong, a dosed, a still and a lone compound, and a third without controls."""
    rows: list[tuple[str, str, float | None, str]] = []
    for plate in ("p1", "p2"):
        rows += [(plate, "DMSO", None, "negative_control")] * 16 + [(plate, "kill", None, "positive_control")] * 4
        rows += [(plate, "dosed", dose, "treatment") for dose in (1.0, 3.0, 10.0, 30.0)]
        rows += [(plate, "strong", 1.0, "treatment")] * 2 + [(plate, "still", 1.0, "treatment")] * 2
    rows += [("p1", "lone", 1.0, "treatment"), ("p3", "strong", 1.0, "treatment"), ("p3", "far", 1.0, "treatment")]
    table = pd.DataFrame(rows, columns=["plate", "compound", "concentration", "role"])
    number = table.groupby("plate").cumcount()
    table = table.assign(
        well=[f"{chr(65 + i // 12)}{i % 12 + 1:02}" for i in number], unit="uM", replicate=table["plate"]
    )
    rng = np.random.default_rng(0)
    effect = table["compound"].map({"kill": 6.0, "strong": 4.0}).fillna(0.0) + (table["compound"] == "dosed") * (
        np.log1p(table["concentration"].fillna(0))
    )
    profiles = rng.normal(size=(len(table), 10)) + effect.to_numpy()[:, None] * rng.normal(size=10)
    compounds = pd.DataFrame({"compound": ["DMSO", "kill", "dosed", "strong", "still", "lone", "far"]})
    compounds["moa"] = [None, "x|y", "x", "x", "y", None, "z"]
    return write_screen(str(tmp_path / "screen"), table, profiles, compounds)


def test_statistics_of_a_screen(screen: Screen) -> None:
    compute(screen.url)
    activity_table = read_statistics(screen, "activity").set_index(["compound", "concentration"])
    assert activity_table["n_wells"].sum() == 8 + 8 + 5 + 4 + 1 + 1
    assert activity_table["active"].sum() >= 3
    assert numbers(activity_table, ("strong", 1.0), "n_wells", "n_replicates", "n_controls") == [5, 4, 32]
    assert activity_table.loc[("strong", 1.0), "active"]
    assert not activity_table.loc[("still", 1.0), "active"]
    assert activity_table.loc[("lone", 1.0), "excluded"] == "one replicate only"
    assert activity_table.loc[("far", 1.0), "excluded"] == "no negative control on its plates"
    controls = read_statistics(screen, "controls").set_index("plate")
    assert (controls.loc[["p1", "p2"], "z_prime"] > 0).all()
    assert controls.loc["p3", "excluded"] == "fewer than three positive or three negative controls"
    doses = read_statistics(screen, "doses").set_index("compound")
    assert bool(doses["dose_dependent"]["dosed"])
    assert doses["excluded"]["strong"] == "fewer than three doses"
    consistent = read_statistics(screen, "consistency")
    assert consistent[["kind", "label", "n_compounds"]].to_numpy().tolist() == [
        ["moa", "x", 3],
        ["moa", "y", 2],
        ["moa", "z", 1],
    ]
    record = screen.read_manifest().stages["statistics"]
    assert record.counts["treatments"] == len(activity_table)
    assert record.counts["not tested"] == activity_table["excluded"].notna().sum() == 2
    assert any("2 wells are on plates without negative controls (p3)" in note for note in record.notes)
    assert any("1 of 6 compounds have no moa" in note for note in record.notes)


def test_why_there_is_no_consistency_is_said(screen: Screen) -> None:
    def said(**changes: Any) -> str:
        compute(screen.url, changes)
        return " ".join(screen.read_manifest().stages["statistics"].notes)

    # A p-value of a hundred relabelings is never that small.
    nothing_active = {"active_only": True, "fdr": 1e-6, "n_permutations": 100}
    assert "no compound is active, and only active ones were to be compared" in said(**nothing_active)
    assert "known mechanism" not in said(**nothing_active)
    compounds = open_table(screen.compounds, COMPOUNDS).to_pandas()
    write_table(screen.compounds, compounds.assign(moa=None).astype("string"), COMPOUNDS)
    assert "no active compound has a known mechanism or target" in said(active_only=True)
    assert "no compound has a known mechanism or target" in said()


def test_statistics_are_done_again_when_profiles_or_settings_change(screen: Screen) -> None:
    def p_value_of_still() -> float:
        table = read_statistics(screen, "activity").set_index("compound")
        return float(table["p_value"]["still"])

    compute(screen.url)
    before = screen.read_manifest().stages["statistics"]
    first = p_value_of_still()
    compute(screen.url)
    assert screen.read_manifest().stages["statistics"] == before
    # A run that has done them under a mark of its own is not done again.
    screen.write_record("statistics", before.model_copy(update={"fingerprint": "of a run"}))
    compute(screen.url)
    assert screen.read_manifest().stages["statistics"].fingerprint == "of a run"
    compute(screen.url, {"n_permutations": 100})
    assert p_value_of_still() != first
    assert set(read_statistics(screen, "activity")["n_relabelings"].dropna()) == {100}
    compute(screen.url)
    assert p_value_of_still() == first
    write_profiles(screen, ProfilesConfig(recipe=Standardised(reference="plate"), consensus=Median()), "")
    compute(screen.url)
    assert screen.read_manifest().stages["statistics"].fingerprint != before.fingerprint
    with pytest.raises(ConfigError, match="fdr: Input should be less than 1"):
        compute(screen.url, {"fdr": 2})


@pytest.mark.parametrize("table", ["activity", "consistency", "controls", "doses"])
def test_formats_say_the_same(screen: Screen, command: Command, table: str) -> None:
    said = {
        form: command("statistics", screen.url, "--table", table, "--format", form) for form in ("json", "csv", "table")
    }
    assert {done.code for done in said.values()} == {0}
    expected = read_statistics(screen, table)
    assert len(json.loads(said["json"].out)) == len(expected)
    read = pd.read_csv(io.StringIO(said["csv"].out))
    assert list(read) == list(expected)
    for name in ("p_value", "z_prime"):
        if name in expected:
            np.testing.assert_allclose(read[name].astype(float), expected[name].astype(float), rtol=1e-6)
    assert len(said["table"].out.splitlines()) == len(expected) + 1


def test_long_tables_are_cut_for_readers_and_whole_for_programs(tmp_path: Path, command: Command) -> None:
    names = ["DMSO"] * 8 + [f"drug {i}" for i in range(43) for _ in range(2)]
    roles = ["negative_control" if name == "DMSO" else "treatment" for name in names]
    wells_here = pd.DataFrame({"plate": "p1", "compound": names, "concentration": np.nan, "unit": None, "role": roles})
    wells_here["well"] = [f"{chr(65 + i // 12)}{i % 12 + 1:02}" for i in range(len(names))]
    wells_here["replicate"] = "1"
    compounds = pd.DataFrame({"compound": sorted(set(names))})
    compounds["moa"] = [None if name == "DMSO" else f"moa {name[-1]}" for name in compounds["compound"]]
    profiles = np.random.default_rng(0).normal(size=(len(names), 5))
    screen = write_screen(str(tmp_path / "screen"), wells_here, profiles, compounds)
    for asked in (("statistics", screen.url), ("predict", screen.url)):
        lines = command(*asked).out.splitlines()
        assert sum("drug " in line for line in lines) == 40
        assert lines[41] == "… and 3 more rows: --format csv prints all"
        assert len(pd.read_csv(io.StringIO(command(*asked, "--format", "csv").out))) == 43
        assert len(json.loads(command(*asked, "--format", "json").out)) == 43


def test_a_screen_without_profiles_says_what_to_do(tmp_path: Path, command: Command) -> None:
    screen = Screen(str(tmp_path / "screen"))
    screen.write_manifest(Manifest(software={}, config={}, inputs=""))
    done = command("statistics", screen.url)
    assert (done.code, done.out) == (1, "")
    assert "has no profiles: run the stage `index` first, or import some" in done.err
    assert command("statistics", tmp_path).code == 1
