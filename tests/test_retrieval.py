"""Retrieval metrics against loops over single queries, and chance against every possible order."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening import cosines, retrieval
from storage_schemas.errors import InputError


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    lengths = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(x) ** 2 for x in b))
    if lengths == 0:
        return 0.0
    # Equal cosines must tie whatever the order of summation was.
    return round(sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / lengths, 10)


def order_of(vector: npt.NDArray[Any], group: Any, gallery: npt.NDArray[Any], gallery_group: Any) -> list[int]:
    """Candidates by distance, ties by position."""
    kept = [j for j in range(len(gallery)) if gallery_group[j] != group]
    return sorted(kept, key=lambda j: (-cosine(vector, gallery[j]), j))


def rank_by_loops(
    query: Any, label: Any, group: Any, gallery: Any, g_label: Any, g_group: Any, max_rank: int
) -> tuple[list[float], list[float], list[int], list[int]]:
    """CMC, average precision, first match and nearest, the way they are defined."""
    cmc, precisions, firsts, closest, counted = [0] * max_rank, [], [], [], 0
    for i in range(len(query)):
        order = order_of(query[i], group[i], gallery, g_group)
        closest.append(order[0] if order else -1)
        found, precision, first = 0, 0.0, 0
        for place, j in enumerate(order, 1):
            if g_label[j] == label[i]:
                found += 1
                precision += found / place
                first = first or place
        firsts.append(first)
        precisions.append(precision / found if found else math.nan)
        if found:
            counted += 1
            for k in range(max_rank):
                cmc[k] += first <= k + 1
    curve = [hits / counted if counted else math.nan for hits in cmc]
    return curve, precisions, firsts, closest


@st.composite
def screens(draw: st.DrawFn) -> dict[str, Any]:
    """Small screens with many ties (few distinct integer vectors), few labels and groups."""
    n, n_gallery = draw(st.integers(0, 6)), draw(st.integers(0, 9))
    dims = draw(st.integers(1, 3))

    def vectors(count: int) -> npt.NDArray[Any]:
        numbers = st.lists(st.integers(-2, 2), min_size=count * dims, max_size=count * dims)
        return np.array(draw(numbers), float).reshape(count, dims)

    def names(count: int, pool: list[Any]) -> list[Any]:
        return draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count))

    labels, groups = ["a", ("b", 1), 3], ["g", None, ("p1", "aspirin")]
    return {
        "query": vectors(n),
        "query_label": names(n, labels),
        "query_group": names(n, groups),
        "gallery": vectors(n_gallery),
        "gallery_label": names(n_gallery, labels),
        "gallery_group": names(n_gallery, groups),
    }


@settings(max_examples=150, deadline=None)
@given(screens(), st.integers(1, 12))
def test_rank_is_what_the_loop_says_ties_included(screen: dict[str, Any], max_rank: int) -> None:
    ranking = retrieval.rank(**screen, max_rank=max_rank)
    cmc, precisions, firsts, closest = rank_by_loops(*screen.values(), max_rank)
    np.testing.assert_allclose(ranking.cmc, cmc, rtol=1e-12)
    np.testing.assert_allclose(ranking.average_precision, precisions, rtol=1e-12)
    assert ranking.first_match.tolist() == firsts
    assert ranking.nearest.tolist() == closest
    counted = [p for p in precisions if not math.isnan(p)]
    expected = sum(counted) / len(counted) if counted else math.nan
    np.testing.assert_allclose(ranking.mean_average_precision, expected, rtol=1e-12)
    only_groups = (screen[k] for k in ("query", "query_group", "gallery", "gallery_group"))
    assert retrieval.nearest(*only_groups).tolist() == closest


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rank_of_embeddings_is_what_the_loop_says(dtype: type) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 32))
    label, g_label = rng.integers(0, 5, 40), rng.integers(0, 5, 150)
    query = (centres[label] + 2 * rng.normal(size=(40, 32))).astype(dtype)
    gallery = (centres[g_label] + 2 * rng.normal(size=(150, 32))).astype(dtype)
    group, g_group = rng.integers(0, 12, 40), rng.integers(0, 12, 150)
    ranking = retrieval.rank(query, label, group, gallery, g_label, g_group)
    cmc, precisions, firsts, _ = rank_by_loops(query, label, group, gallery, g_label, g_group, 50)
    np.testing.assert_allclose(ranking.cmc, cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ranking.average_precision, precisions, rtol=0, atol=1e-12)
    assert ranking.first_match.tolist() == firsts
    for i in range(40):
        outside = g_group != group[i]
        assert ranking.n_candidates[i] == outside.sum()
        assert ranking.n_matches[i] == (outside & (g_label == label[i])).sum()


def test_result_does_not_depend_on_the_chunk_or_on_vector_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    query, gallery = rng.normal(size=(33, 8)), np.repeat(rng.normal(size=(30, 8)), 2, axis=0)
    columns = [rng.integers(0, 3, n).astype(str) for n in (33, 33, 60, 60)]
    label, group, g_label, g_group = columns
    whole = retrieval.rank(query, label, group, gallery, g_label, g_group)
    monkeypatch.setattr(retrieval, "_CHUNK_BYTES", 60 * 4 * 4)
    monkeypatch.setattr(cosines, "TILE", 7)
    scaled = gallery * rng.uniform(0.1, 10, size=(60, 1))
    for other in (gallery, scaled):
        cut = retrieval.rank(3 * query, label, group, other, g_label, g_group)
        np.testing.assert_array_equal(cut.average_precision, whole.average_precision)
        np.testing.assert_array_equal(cut.first_match, whole.first_match)
        np.testing.assert_array_equal(cut.nearest, whole.nearest)


def test_memory_does_not_grow_with_the_queries() -> None:
    """The similarities of all queries at once would be twice the chunk."""
    import tracemalloc

    rng = np.random.default_rng(2)
    gallery = rng.normal(size=(1000, 4))
    query = rng.normal(size=(retrieval._CHUNK_BYTES * 2 // 4000, 4))
    nobody, n = np.zeros(1000), len(query)
    tracemalloc.start()
    retrieval.nearest(query, np.ones(n), gallery, nobody)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * retrieval._CHUNK_BYTES


@pytest.mark.parametrize("offset", [0, 3], ids=["all around", "all alike"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_float32_cannot_tell_apart_is_in_the_order_of_float64(dtype: type, offset: float) -> None:
    """Triples that differ by less than float32 rounds, in every order of position and cosine, and some that tie."""
    rng = np.random.default_rng(5)
    base = offset + rng.normal(size=(60, 24))
    gallery = np.repeat(base, 3, axis=0).astype(dtype)
    gallery[1::3] *= 1 + dtype(2e-7) * rng.normal(size=(60, 24)).astype(dtype)
    query = (offset + rng.normal(size=(25, 24))).astype(dtype)
    label, g_label = rng.integers(0, 2, 25), rng.integers(0, 2, 180)
    group, g_group = rng.integers(0, 9, 25), rng.integers(0, 9, 180)
    ranking = retrieval.rank(query, label, group, gallery, g_label, g_group)
    cosines = np.array([[exact_cosine(a, b) for b in gallery] for a in query])
    assert np.any(np.diff(np.sort(cosines), axis=1) < 2**-26)
    for i in range(25):
        order = [j for j in np.argsort(-cosines[i], kind="stable") if g_group[j] != group[i]]
        ranks = 1 + np.flatnonzero(g_label[order] == label[i])
        assert ranking.first_match[i] == ranks[0]
        assert ranking.nearest[i] == order[0]
        assert ranking.average_precision[i] == pytest.approx(np.mean(np.arange(1, len(ranks) + 1) / ranks), abs=1e-12)


def exact_cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    a, b = a.astype(np.longdouble), b.astype(np.longdouble)
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("kind", ["equal", "sparse", "wrong"])
def test_rows_that_float32_says_little_of_are_sorted_in_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many near ties that comparing them one by one costs more, or a product that is worse than it should be."""
    rng = np.random.default_rng(6)
    query, gallery = rng.integers(-3, 4, size=(20, 16)).astype(float), rng.integers(-3, 4, size=(90, 16)).astype(float)
    if kind == "equal":
        gallery[:] = gallery[0]
    elif kind == "sparse":
        gallery[:, 2:] = 0
    label, g_label, group, g_group = (rng.integers(0, 3, n) for n in (20, 90, 20, 90))
    sorted_rows = 0

    def counted(*args: Any) -> Any:
        nonlocal sorted_rows
        sorted_rows += 1
        return by_sorting(*args)

    by_sorting = retrieval._sorted
    monkeypatch.setattr(retrieval, "_sorted", counted)
    if kind == "wrong":
        product = np.matmul
        monkeypatch.setattr(np, "matmul", lambda *a, out: np.multiply(product(*a), 1 + 1e-5, out=out, casting="unsafe"))
    ranking = retrieval.rank(query, label, group, gallery, g_label, g_group)
    assert sorted_rows > 0
    _, precisions, firsts, closest = rank_by_loops(query, label, group, gallery, g_label, g_group, 50)
    np.testing.assert_allclose(ranking.average_precision, precisions, rtol=1e-12)
    assert ranking.first_match.tolist() == firsts
    assert ranking.nearest.tolist() == closest
    assert retrieval.nearest(query, group, gallery, g_group).tolist() == closest


def test_equal_embeddings_are_ranked_by_position() -> None:
    ranking = retrieval.rank(np.ones((1, 3)), ["b"], [0], np.ones((4, 3)), ["a", "b", "a", "b"], [1, 1, 1, 1], 5)
    assert ranking.first_match.tolist() == [2]
    assert ranking.mean_average_precision == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert ranking.cmc.tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.full((2, 3), np.nan)}, "query: 2 of 2 rows are not finite"),
        ({"gallery": np.ones((4, 5))}, "same model"),
        ({"gallery": np.ones(4)}, "expected \\(vectors, dimensions\\)"),
        ({"query_label": ["a"]}, "query_label has 1 entries for 2 vectors"),
        ({"gallery_group": [[1], [2], [3], [4]]}, "gallery_group must be one hashable"),
        ({"max_rank": 0}, "max_rank is 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good = {
        "query": np.ones((2, 3)),
        "query_label": ["a", "b"],
        "query_group": [0, 0],
        "gallery": np.ones((4, 3)),
        "gallery_label": ["a", "b", "a", "b"],
        "gallery_group": [1, 1, 1, 1],
    }
    retrieval.rank(**good)
    with pytest.raises(InputError, match=message):
        retrieval.rank(**(good | change))


@pytest.mark.parametrize(("n_candidates", "n_matches"), [(n, m) for n in range(1, 8) for m in range(1, n + 1)])
def test_chance_is_the_mean_over_every_order(n_candidates: int, n_matches: int) -> None:
    curve, precision, orders = np.zeros(9), 0.0, 0
    for places in itertools.combinations(range(1, n_candidates + 1), n_matches):
        precision += sum(i / place for i, place in enumerate(places, 1)) / n_matches
        curve += np.arange(1, 10) >= places[0]
        orders += 1
    n, m = np.array([n_candidates]), np.array([n_matches])
    np.testing.assert_allclose(retrieval.chance_cmc(n, m, 9), curve / orders, atol=1e-12)
    np.testing.assert_allclose(retrieval.chance_average_precision(n, m), precision / orders, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=5))
def test_chance_of_large_galleries_is_the_binomial_formula(pairs: list[tuple[int, int]]) -> None:
    n = np.array([max(pair) for pair in pairs])
    m = np.array([min(pair) for pair in pairs])
    for k in (1, 5, 50):
        expected = [
            1 - math.comb(a - b, min(k, a)) / math.comb(a, min(k, a))
            for a, b in zip(n.tolist(), m.tolist(), strict=True)
        ]
        actual = retrieval.chance_cmc(n, m, 50)[k - 1]
        assert actual == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_random_embeddings_score_at_chance() -> None:
    rng = np.random.default_rng(3)
    label, g_label = rng.integers(0, 4, 2000), rng.integers(0, 4, 60)
    ranking = retrieval.rank(
        rng.normal(size=(2000, 64)),
        label,
        np.zeros(2000),
        rng.normal(size=(60, 64)),
        g_label,
        np.ones(60),
    )
    chance = retrieval.chance_average_precision(ranking.n_candidates, ranking.n_matches).mean()
    assert ranking.mean_average_precision == pytest.approx(chance, abs=0.01)
    curve = retrieval.chance_cmc(ranking.n_candidates, ranking.n_matches)
    np.testing.assert_allclose(ranking.cmc, curve, atol=0.04)
