"""Similarity search against a sort of all cosines, compressed or not, and parts of an index that cannot be trusted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.similarity import (
    AutoIndex,
    CompressedIndex,
    Effort,
    ExactIndex,
    Index,
    IvfIndex,
    Quantiser,
    Tuning,
    choose,
    suggest,
    to_unit,
    train,
    training_size,
    tune,
)
from storage_schemas.errors import InputError


def vectors(n: int = 50, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, dim)).astype(np.float32)


def clustered(n: int, dim: int) -> np.ndarray:
    """As embeddings are: in groups, and most of their variance along few directions."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(40, dim))
    spread = (1 + np.arange(dim)) ** -0.5
    return to_unit((centres[rng.integers(0, 40, n)] + 0.7 * rng.normal(size=(n, dim))) * spread)


def nearest(gallery: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    cosines = (gallery.astype(float) @ query.astype(float) / np.linalg.norm(gallery, axis=1)).tolist()
    return sorted(range(len(gallery)), key=lambda j: -cosines[j])[:k]


def compressed(unit: np.ndarray, config: CompressedIndex | IvfIndex) -> tuple[Index, Tuning]:
    quantiser = train(unit[: training_size(config, len(unit))], config, len(unit))
    codes = quantiser.encode(unit)
    tuning = tune(Index(unit, quantiser, codes), config)
    return Index(unit, quantiser, codes, tuning.effort), tuning


def test_search_is_exact() -> None:
    gallery, query = vectors(200), 5 * vectors(20)
    scores, positions = Index(to_unit(gallery)).search(query, 7)
    for i, vector in enumerate(query):
        expected = nearest(gallery, vector, 7)
        assert positions[i].tolist() == expected
        cosines = gallery[expected] @ vector / np.linalg.norm(gallery[expected], axis=1) / np.linalg.norm(vector)
        np.testing.assert_allclose(scores[i], cosines, atol=1e-6)


def test_blocks_of_an_exact_search_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, query = to_unit(vectors(300)), vectors(9)
    keep = np.random.default_rng(0).random(300) < 0.3
    whole = Index(gallery).search(query, 20, keep)
    monkeypatch.setattr("screening.similarity._BLOCK_BYTES", 7 * 4 * 8)
    monkeypatch.setattr("screening.similarity._QUERIES", 4)
    for a, b in zip(whole, Index(gallery).search(query, 20, keep), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 30))
def test_every_size_is_searched(n: int, dim: int, k: int) -> None:
    gallery = vectors(n, dim)
    scores, positions = Index(to_unit(gallery)).search(gallery, k)
    assert scores.shape == positions.shape == (n, min(k, n))
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (np.abs(scores) <= 1).all()
    np.testing.assert_allclose(scores[:, :1], 1, atol=1e-6)
    if dim > 2:  # in a plane some are too nearly parallel for float32 to tell apart
        assert positions[:, :1].ravel().tolist() == list(range(n))


def test_a_zero_vector_is_similar_to_nothing() -> None:
    scores, _ = Index(to_unit(vectors(4))).search(np.zeros((1, 8)), 4)
    assert scores.tolist() == [[0, 0, 0, 0]]
    assert Index(np.zeros((3, 8), np.float32)).search(vectors(1), 2)[0].tolist() == [[0, 0]]


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e20, 1e38])
def test_vectors_of_any_length_become_unit_vectors(scale: float) -> None:
    unit = to_unit(np.asarray([[3 * scale, 0, 3 * scale, 3 * scale]], np.float32))
    np.testing.assert_allclose(unit, np.asarray([[1, 0, 1, 1]]) / np.sqrt(3), rtol=1e-4)


# --- compressed ------------------------------------------------------------------------------

KINDS: list[CompressedIndex | IvfIndex] = [CompressedIndex(), IvfIndex(lists=60)]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.method)
@pytest.mark.parametrize("dim", [32, 37])
def test_a_compressed_search_finds_what_an_exact_one_finds(config: CompressedIndex | IvfIndex, dim: int) -> None:
    unit = clustered(4000, dim)
    index, tuning = compressed(unit, config)
    assert tuning.low >= 0.99
    query = unit[:100] + 0.01 * vectors(100, dim)
    expected = [set(nearest(unit, vector, 10)) for vector in query]
    scores, positions = index.search(query, 10)
    assert np.mean([len(set(row) & near) / 10 for row, near in zip(positions.tolist(), expected, strict=True)]) > 0.98
    cosines = np.einsum("qkd,qd->qk", unit[positions].astype(float), to_unit(query).astype(float))
    np.testing.assert_allclose(scores, cosines, atol=1e-6)
    # One by one as together.
    for i in range(5):
        assert index.search(query[i : i + 1], 10)[1].tolist() == [positions[i].tolist()]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.method)
@pytest.mark.parametrize("share", [0.5, 0.05, 0.001])
def test_a_filter_leaves_as_many_answers_as_there_are(config: CompressedIndex | IvfIndex, share: float) -> None:
    unit = clustered(6000, 32)
    index, _ = compressed(unit, config)
    keep = np.random.default_rng(1).random(len(unit)) < share
    _, positions = index.search(unit[:40], 10, keep)
    assert positions.shape == (40, min(10, keep.sum()))
    assert keep[positions].all()
    expected = Index(unit).search(unit[:40], 10, keep)[1]
    assert np.mean([np.isin(row, other).mean() for row, other in zip(positions, expected, strict=True)]) > 0.98


def test_a_filter_that_leaves_out_all_that_is_near_looks_on() -> None:
    unit = clustered(6000, 32)
    index, _ = compressed(unit, CompressedIndex())
    near = nearest(unit, unit[0], 3000)
    keep = np.ones(len(unit), bool)
    keep[near] = False
    _, positions = index.search(unit[:1], 10, keep)
    assert set(positions[0].tolist()) == set(Index(unit).search(unit[:1], 10, keep)[1][0].tolist())


def test_the_depth_follows_what_is_measured() -> None:
    hard = to_unit(vectors(6000, 32))
    _, low = compressed(hard, CompressedIndex(recall=0.5))
    _, high = compressed(hard, CompressedIndex(recall=0.99))
    _, limited = compressed(hard, CompressedIndex(recall=0.99, max_depth=100))
    assert low.effort.depth < high.effort.depth
    assert high.low >= 0.99
    assert limited.effort == Effort(100)
    assert limited.low <= limited.recall < 0.99


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.method)
def test_recall_is_what_a_search_finds(config: CompressedIndex | IvfIndex) -> None:
    """Measured once more by searches, vector by vector."""
    unit = clustered(2000, 16)
    easy = config.model_copy(update={"recall": 0.5})
    quantiser = train(unit, easy, len(unit))
    index = Index(unit, quantiser, quantiser.encode(unit))
    tuning = tune(index, easy)
    asked = np.sort(np.random.default_rng(0).choice(2000, 256, replace=False))
    shares = []
    for i in asked:
        exact = [j for j in nearest(unit, unit[i], 11) if j != i][:10]
        candidates = index._scanner.scan(unit[i : i + 1], tuning.effort.depth, tuning.effort.probes)[0]
        shares.append(np.isin(exact, candidates).mean())
    assert tuning.queries == 256
    assert tuning.recall == pytest.approx(np.mean(shares), abs=0.003)
    assert tuning.low == pytest.approx(np.mean(shares) - 2 * np.std(shares, ddof=1) / 16, abs=0.003)


def test_recall_is_of_neighbours_in_other_groups() -> None:
    """Cells of a well find each other; what is counted is whether they find cells of other wells."""
    rng = np.random.default_rng(3)
    wells = clustered(100, 32)
    unit = to_unit(np.repeat(wells, 20, axis=0) + 0.02 * rng.normal(size=(2000, 32)))
    group = np.repeat(np.arange(100), 20)
    config = CompressedIndex(recall=0.5)
    quantiser = train(unit, config, 2000)
    index = Index(unit, quantiser, quantiser.encode(unit))
    shares = []
    asked = np.sort(np.random.default_rng(0).choice(2000, 256, replace=False))
    tuning = tune(index, config, group)
    for i in asked:
        others = np.flatnonzero(group != group[i])
        exact = others[nearest(unit[others], unit[i], 10)]
        candidates = index._scanner.scan(unit[i : i + 1], 2000, 0)[0]
        candidates = candidates[group[candidates] != group[i]][: tuning.effort.depth]
        shares.append(np.isin(exact, candidates).mean())
    assert tuning.recall == pytest.approx(np.mean(shares), abs=0.003)
    one_well = tune(index, config, np.zeros(2000, np.int64))
    assert one_well == tune(index, config)
    assert one_well.recall > tuning.recall


def test_the_same_vectors_give_the_same_index() -> None:
    unit = clustered(3000, 24)
    for config in KINDS:
        first, second = (train(unit, config, 3000) for _ in range(2))
        np.testing.assert_array_equal(first.codebook, second.codebook)
        a, b = first.encode(unit), second.encode(unit[:1000])
        for name in a:
            np.testing.assert_array_equal(a[name][:1000], b[name])


def test_no_global_setting_of_faiss_is_changed() -> None:
    import faiss

    def state() -> tuple[object, ...]:
        return faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()

    before = state()
    for config in KINDS:
        compressed(clustered(1000, 16), config)[0].search(vectors(3, 16), 5)
    assert state() == before


# --- choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "config", "method", "why"),
    [
        (1000, AutoIndex(), "exact", "at most index.exact_mb=64"),
        (32_768, AutoIndex(), "exact", "32,768 vectors of 512 dimensions are 64 MiB, at most"),
        (32_769, AutoIndex(), "compressed", "more than index.exact_mb=64"),
        (10_324_440, AutoIndex(), "compressed", "more than index.exact_mb"),
        (10_324_441, AutoIndex(), "ivf", "more than index.scan_mb=512"),
        (10, CompressedIndex(), "exact", "too few"),
        (100, CompressedIndex(), "compressed", "index.method is compressed"),
        (10**7, ExactIndex(), "exact", "index.method is exact"),
        (100, IvfIndex(lists=3), "ivf", "index.method is ivf"),
    ],
)
def test_the_choice_is_by_size_and_says_why(n: int, config: AutoIndex, method: str, why: str) -> None:
    chosen, reason = choose(config, n, 512)
    assert chosen.method == method
    assert why in reason


def test_a_choice_keeps_the_settings() -> None:
    chosen, _ = choose(AutoIndex(recall=0.9, max_depth=500), 100_000, 512)
    assert chosen == CompressedIndex(recall=0.9, max_depth=500)


# --- what cannot be trusted ------------------------------------------------------------------


def parts() -> tuple[np.ndarray, Quantiser, dict[str, np.ndarray]]:
    unit = clustered(500, 16)
    quantiser = train(unit, IvfIndex(lists=5), 500)
    return unit, quantiser, quantiser.encode(unit)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, c: (Quantiser(q.codebook[:-1], q.centroids), c),
        lambda q, c: (Quantiser(q.codebook[:, :8], q.centroids), c),
        lambda q, c: (Quantiser(np.full_like(q.codebook, np.nan), q.centroids), c),
        lambda q, c: (Quantiser(q.codebook, q.centroids[:, :-1]), c),
        lambda q, c: (Quantiser(q.codebook, q.centroids[:3]), c),
        lambda q, c: (Quantiser(q.codebook, np.full_like(q.centroids, np.inf)), c),
        lambda q, c: (q, {**c, "lists": c["lists"] - 1}),
        lambda q, c: (q, {**c, "lists": np.full_like(c["lists"], 2**31 - 1)}),
        lambda q, c: (q, {**c, "lists": c["lists"][:-1]}),
        lambda q, c: (q, {**c, "codes": c["codes"][:-1]}),
        lambda q, c: (q, {**c, "codes": c["codes"][:, :-1]}),
        lambda q, c: (q, {"codes": c["codes"]}),
        lambda q, c: (q, {}),
    ],
)
def test_parts_that_do_not_fit_are_refused(spoil: Callable[..., tuple[Quantiser, dict[str, np.ndarray]]]) -> None:
    unit, quantiser, codes = parts()
    with pytest.raises(InputError, match="not those of 500 vectors of 16 dimensions"):
        Index(unit, *spoil(quantiser, codes))


@pytest.mark.parametrize("lists", [True, False])
def test_any_bytes_are_codes(lists: bool) -> None:
    """Whatever stands in them, a search ends, and its cosines are true."""
    unit, quantiser, codes = parts()
    rng = np.random.default_rng(0)
    noise = {"codes": rng.integers(0, 256, codes["codes"].shape).astype(np.uint8)}
    if lists:
        noise["lists"] = np.zeros(500, np.int32)
    else:
        quantiser = Quantiser(1e30 * quantiser.codebook)
    scores, positions = Index(unit, quantiser, noise, Effort(20, 10**9)).search(unit[:5], 3)
    np.testing.assert_allclose(scores, np.einsum("qkd,qd->qk", unit[positions], unit[:5]), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0, 1e30])
def test_a_vector_that_is_not_of_unit_length_is_found_out(value: float) -> None:
    unit = to_unit(vectors(40, 16)).copy()
    unit[17] = value * unit[0]
    with pytest.raises(InputError, match="not of length 1"):
        Index(unit).search(unit[:1], 3)


def test_bad_input_is_named() -> None:
    index = Index(to_unit(vectors(5, 3)))
    with pytest.raises(InputError, match="4 dimensions and the index 3"):
        index.search(vectors(2, 4), 1)
    with pytest.raises(InputError, match="k is 0"):
        index.search(vectors(2, 3), 0)
    for bad in (np.ones(3), np.ones((2, 0))):
        with pytest.raises(InputError, match="expected \\(vectors, dimensions\\)"):
            index.search(bad, 1)
    with pytest.raises(InputError, match="not finite"):
        to_unit(np.full((2, 3), np.nan))


def test_suggest_names_what_was_probably_meant() -> None:
    known = ["Rotenone", "Antimycin A", "DMSO", "FCCP", "Oligomycin A"]
    assert suggest("rotenone", known) == ["Rotenone"]
    assert suggest("Rotenon", known)[0] == "Rotenone"
    assert suggest("Oligomicin A", known)[0] == "Oligomycin A"
    assert suggest("mycin", known) == ["Antimycin A", "Oligomycin A"]
    assert suggest("zzzzzzzz", known) == []
    assert suggest("", known) == []
    assert len(suggest("a", known, n=1)) == 1


def test_a_query_loads_neither_torch_nor_ray_and_faiss_only_when_called() -> None:
    code = (
        "import sys; from screening import evaluation, prediction, profiles, retrieval, similarity;"
        "print(sorted({'torch', 'ray', 'faiss', 'scipy', 'sklearn', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
