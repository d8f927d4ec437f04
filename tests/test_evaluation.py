"""Evaluation: values against loops, intervals and chance against what they mean, always JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score, roc_curve

from screening import evaluation, retrieval
from screening.evaluation import Cells, EvaluationConfig, evaluate
from screening.prediction import vote
from storage_schemas.errors import InputError

MOAS = {"c0": "x", "c1": "x", "c2": "y", "c3": "y", "c4": "z", "c5": "z", "DMSO": None}
METRICS = ("rank1", "rank5", "rank10", "map", "accuracy", "auc")


def cells(rng: np.random.Generator, n: int, compounds: list[str], noise: float = 1.0) -> Cells:
    centres = {moa: np.eye(3, 8)[i] * 3 for i, moa in enumerate("xyz")} | {None: np.zeros(8)}
    compound = rng.choice(compounds, n)
    moa = np.array([MOAS[c] for c in compound] + [None], object)[:-1]
    embedding = np.array([centres[m] for m in moa]).reshape(n, 8) + noise * rng.normal(size=(n, 8))
    plate = rng.choice(["p1", "p2"], n)
    return Cells(embedding, moa, compound, plate, rng.choice(["A1", "B2"], n), plate)


def check_json(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_values_are_those_of_retrieval_and_vote() -> None:
    rng = np.random.default_rng(0)
    query, gallery = cells(rng, 40, ["c0", "c2", "c4"]), cells(rng, 90, ["c1", "c3", "c5", "DMSO"])
    result = evaluate(query, gallery, EvaluationConfig(n_bootstrap=50), np.random.default_rng(1))
    known = gallery.take(np.array([m is not None for m in gallery.moa]))
    ranking = retrieval.rank(query.embedding, query.moa, np.zeros(40), known.embedding, known.moa, np.ones(len(known)))
    assert result["rank1"]["value"] == pytest.approx(ranking.cmc[0])
    assert result["rank5"]["value"] == pytest.approx(ranking.cmc[4])
    assert result["map"]["value"] == pytest.approx(ranking.mean_average_precision)
    assert result["cmc"] == pytest.approx(ranking.cmc.tolist())
    assert len(result["cmc"]) == 50
    table = vote(query.embedding, query.compound, known.embedding, known.moa, known.compound)
    right = [rows["moa"].iloc[0] == MOAS[name] for name, rows in table.groupby("compound", sort=False)]
    assert result["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert result["n_queries"] == 40
    assert result["n_compounds"] == 3
    assert result["n_gallery"] == len(known)
    assert result["n_left_out"]["gallery_without_moa"] == 90 - len(known)
    check_json(result)


def test_chance_is_the_score_of_random_embeddings_and_good_ones_exclude_it() -> None:
    rng = np.random.default_rng(2)
    compounds = list(MOAS)[:-1]
    config = EvaluationConfig(n_bootstrap=200)
    random = evaluate(cells(rng, 2000, compounds, 1e6), cells(rng, 200, compounds, 1e6), config, rng)
    good = evaluate(cells(rng, 300, compounds), cells(rng, 120, compounds), config, rng)
    for name in ("rank1", "rank5", "rank10", "map"):
        assert random[name]["value"] == pytest.approx(random[name]["chance"], abs=0.05)
    for name in METRICS:
        assert good[name]["low"] <= good[name]["value"] <= good[name]["high"]
        assert good[name]["value"] > good[name]["chance"]
    assert good["map"]["low"] > good["map"]["chance"]


@pytest.mark.parametrize("compounds", [["c0", "c1", "c2", "c3", "c4", "c5"], ["c0", "c2", "c3"]])
def test_auc_is_that_of_scikit_learn_on_the_order_of_the_votes(compounds: list[str]) -> None:
    rng = np.random.default_rng(11)
    query, gallery = cells(rng, 70, compounds, 4), cells(rng, 90, list(MOAS)[:-1], 4)
    config = EvaluationConfig(n_bootstrap=60)
    result = evaluate(query, gallery, config, np.random.default_rng(1))
    auc = result["auc"]
    left = np.array([(c, p) for c, p in zip(query.compound, query.replicate, strict=True)])
    votes = []
    for name in compounds:
        shares, distances = {}, {}
        own = query.compound == name
        for moa in "xyz":
            pairs = [
                1 - np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                for a, where in zip(query.embedding[own], left[own], strict=True)
                for b, other, at in zip(gallery.embedding, gallery.compound, gallery.replicate, strict=True)
                if (other, at) != tuple(where) and MOAS[other] == moa
            ]
            distances[moa] = np.mean(pairs)
        groups = [list(zip(side.replicate, side.compound, strict=True)) for side in (query, gallery)]
        nearest = retrieval.nearest(query.embedding, groups[0], gallery.embedding, groups[1])
        shares = {moa: np.mean(gallery.moa[nearest[own]] == moa) for moa in "xyz"}
        votes.append({moa: shares[moa] - 1e-9 * distances[moa] for moa in "xyz"})
    true = [MOAS[name] for name in compounds]
    expected = [roc_auc_score([moa == m for m in true], [vote[moa] for vote in votes]) for moa in sorted(set(true))]
    assert auc["value"] == pytest.approx(np.mean(expected))
    assert auc["low"] <= auc["value"] <= auc["high"]
    assert auc["chance"] == 0.5
    curves = [roc_curve([moa == m for m in true], [vote[moa] for vote in votes]) for moa in sorted(set(true))]
    assert result["roc"]["fpr"] == pytest.approx(np.linspace(0, 1, 101))
    for at, found in zip(*result["roc"].values(), strict=True):
        assert found == pytest.approx(np.mean([height(at, fpr, tpr) for fpr, tpr, _ in curves]))


def height(at: float, fpr: np.ndarray, tpr: np.ndarray) -> float:
    """A ROC curve above a share of false positives, at the top where it is steep."""
    before = max(i for i, share in enumerate(fpr) if share <= at + 1e-9)
    if before == len(fpr) - 1 or abs(fpr[before] - at) < 1e-9:
        return float(tpr[before])
    share = (at - fpr[before]) / (fpr[before + 1] - fpr[before])
    return float(tpr[before] + share * (tpr[before + 1] - tpr[before]))


def test_one_mechanism_has_no_auc() -> None:
    rng = np.random.default_rng(12)
    result = evaluate(cells(rng, 20, ["c0", "c1"]), cells(rng, 30, ["c1", "c3"]), EvaluationConfig(), rng)
    assert result["auc"] == {"value": None, "low": None, "high": None, "chance": 0.5}
    assert result["roc"] is None
    assert "one MOA only" in result["note"]
    assert result["rank1"]["low"] is not None
    check_json(result)


def test_interval_resamples_compounds_with_all_their_cells() -> None:
    """One compound all right, one all wrong: draws of (2, 0), (1, 1), (0, 2), not of cells."""
    gallery = Cells(np.eye(2), *(np.array(list(v), object) for v in ("xy", "gh", "pp", "ab", "pp")))
    query = Cells(
        np.eye(2)[[0] * 300 + [0] * 100],
        *(np.array(list(v), object) for v in ("x" * 300 + "y" * 100, "c" * 300 + "d" * 100)),
        np.array(["p"] * 400, object),
        np.array(["w"] * 400, object),
        np.array(["p"] * 400, object),
    )
    rank1 = evaluate(query, gallery, EvaluationConfig(n_bootstrap=400), np.random.default_rng(3))["rank1"]
    assert (rank1["low"], rank1["value"], rank1["high"]) == (0.0, 0.75, 1.0)
    assert rank1["chance"] == pytest.approx(0.5)


def test_same_seed_same_result() -> None:
    rng = np.random.default_rng(4)
    query, gallery = cells(rng, 30, ["c0", "c2"]), cells(rng, 30, ["c1", "c3"])
    config = EvaluationConfig(n_bootstrap=30)
    results = [evaluate(query, gallery, config, np.random.default_rng(s)) for s in (5, 5)]
    assert results[0] == results[1]


@pytest.mark.parametrize(("exclude", "expected"), [("replicate_and_compound", 1), ("well", 3), ("compound", 0)])
def test_exclusion_leaves_out_what_it_says(exclude: str, expected: int) -> None:
    """One query; gallery cells of its compound on its plate, on another of its replicate, and in another replicate."""
    columns = (["x"] * 3, ["c"] * 3, ["p1", "p2", "p3"], ["B", "A", "A"], ["1", "1", "2"])
    gallery = Cells(np.ones((3, 3)), *(np.array(c, object) for c in columns))
    query = Cells(np.ones((1, 3)), *(np.array([v], object) for v in ("x", "c", "p1", "A", "1")))
    groups = [evaluation._groups(side, exclude) for side in (query, gallery)]
    assert sum(g != groups[0][0] for g in groups[1]) == expected
    result = evaluate(query, gallery, EvaluationConfig(exclude=exclude, n_bootstrap=5), np.random.default_rng(0))
    assert result["n_queries"] == (expected > 0)
    check_json(result)


def test_confusion_counts_compounds_and_shares_cells() -> None:
    rng = np.random.default_rng(6)
    query, gallery = cells(rng, 50, ["c0", "c1", "c2"]), cells(rng, 60, ["c1", "c3", "c5"], 0.1)
    confusion = evaluate(query, gallery, EvaluationConfig(n_bootstrap=5), rng)["confusion"]
    assert confusion["moas"] == ["x", "y", "z"]
    assert [sum(row) for row in confusion["compounds"]] == [2, 1, 0]
    assert [None if row is None else sum(row) for row in confusion["neighbours"]] == [
        pytest.approx(1),
        pytest.approx(1),
        None,
    ]


def test_contrasts_see_their_moas_only() -> None:
    rng = np.random.default_rng(7)
    query, gallery = cells(rng, 50, ["c0", "c2", "c4"]), cells(rng, 60, ["c1", "c3", "c5"])
    config = EvaluationConfig(n_bootstrap=20, contrasts=(("x", "z"), ("y", "unknown")))
    result = evaluate(query, gallery, config, rng)
    assert set(result["contrasts"]) == {"x vs z", "y vs unknown"}
    contrast = result["contrasts"]["x vs z"]
    kept = [np.isin(side.moa.astype(str), ["x", "z"]) for side in (query, gallery)]
    alone = evaluate(query.take(kept[0]), gallery.take(kept[1]), EvaluationConfig(n_bootstrap=20), rng)
    assert contrast["n_gallery"] == kept[1].sum()
    assert contrast["rank1"]["value"] == alone["rank1"]["value"]
    assert contrast["rank1"]["chance"] == alone["rank1"]["chance"]
    assert contrast["confusion"] == alone["confusion"]
    assert result["contrasts"]["y vs unknown"]["rank1"]["chance"] == pytest.approx(1)
    check_json(result)


@pytest.mark.parametrize(
    ("compounds", "gallery_compounds", "note"),
    [
        ([], ["c0"], "no query cell"),
        (["DMSO"], ["c0"], "no query cell"),
        (["c0"], [], "no gallery cell"),
        (["c0"], ["c2", "c3"], "no query has a gallery cell of its MOA"),
    ],
)
def test_nothing_to_score_is_said_not_raised(compounds: list[str], gallery_compounds: list[str], note: str) -> None:
    rng = np.random.default_rng(8)
    query, gallery = (cells(rng, 5 * bool(names), names or ["c0"]) for names in (compounds, gallery_compounds))
    config = EvaluationConfig(contrasts=(("x", "y"),))
    result = evaluate(query, gallery, config, rng)
    assert note in result["note"]
    for name in METRICS:
        assert result[name] == {"value": None, "low": None, "high": None, "chance": None}
    counts = result["n_left_out"]
    assert counts["queries_without_moa"] + counts["queries_without_match"] == len(query)
    check_json(result)


def test_one_compound_has_values_without_interval() -> None:
    rng = np.random.default_rng(9)
    result = evaluate(cells(rng, 9, ["c0"]), cells(rng, 30, ["c1", "c3"]), EvaluationConfig(), rng)
    assert result["rank1"]["value"] is not None
    assert result["rank1"]["low"] is result["rank1"]["high"] is None
    assert "one compound" in result["note"]
    check_json(result)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="different lengths"):
        Cells(np.ones((2, 3)), *(np.array(["x"], object) for _ in range(5)))
    for bad in ({"ranks": (0,)}, {"ranks": ()}, {"contrasts": (("x",),)}, {"rank": (1,)}):
        with pytest.raises(ValidationError):
            EvaluationConfig(**bad)
