"""Similarity search against a sort of all cosines, and an index file that cannot be trusted."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.similarity import build, deserialise, search, serialise, suggest
from storage_schemas.errors import InputError


def vectors(n: int = 50, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, dim)).astype(np.float32)


def test_search_is_exact() -> None:
    gallery, query = vectors(200), 5 * vectors(20)
    scores, positions = search(build(gallery), query, 7)
    for i, vector in enumerate(query):
        cosines = [float(vector @ row) / float(np.linalg.norm(vector) * np.linalg.norm(row)) for row in gallery]
        expected = sorted(range(200), key=lambda j: -cosines[j])[:7]
        assert positions[i].tolist() == expected
        np.testing.assert_allclose(scores[i], [cosines[j] for j in expected], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 30))
def test_what_is_written_is_what_is_read(n: int, dim: int, k: int) -> None:
    gallery = vectors(n, dim)
    index = build(gallery)
    again = deserialise(serialise(index), n, dim)
    assert serialise(again) == serialise(index)
    scores, positions = search(again, gallery, k)
    assert scores.shape == positions.shape == (n, min(k, n))
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores[:, :1], 1, atol=1e-6)
    assert (np.abs(scores) <= 1).all()
    if dim > 2:  # in a plane some are too nearly parallel for float32 to tell apart
        assert positions[:, :1].ravel().tolist() == list(range(n))


def test_a_zero_vector_is_similar_to_nothing() -> None:
    scores, _ = search(build(vectors(4)), np.zeros((1, 8)), 4)
    assert scores.tolist() == [[0, 0, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_altered_bytes_are_taken_for_an_index(data: st.DataObject) -> None:
    """Truncated, lengthened or with any byte of its header changed: refused, never a crash."""
    good = serialise(build(vectors(5, 3)))
    header = len(good) - 5 * 3 * 4
    kind = data.draw(st.sampled_from(["cut", "longer", "header"]))
    if kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "longer":
        bad = good + data.draw(st.binary(min_size=1, max_size=40))
    else:
        at, flip = data.draw(st.integers(0, header - 1)), data.draw(st.integers(1, 255))
        bad = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
    with pytest.raises(InputError, match="not an exact index of 5 vectors"):
        deserialise(bad, 5, 3)


def test_bad_input_is_named() -> None:
    index = build(vectors(5, 3))
    for n, dim in ((6, 3), (5, 4), (3, 5)):
        with pytest.raises(InputError, match="another screen"):
            deserialise(serialise(index), n, dim)
    with pytest.raises(InputError, match="cannot be"):
        deserialise(b"", -1, 3)
    nan = serialise(index)[:-4] + np.float32("nan").tobytes()
    with pytest.raises(InputError, match="not finite"):
        deserialise(nan, 5, 3)
    with pytest.raises(InputError, match="4 dimensions and the index 3"):
        search(index, vectors(2, 4), 1)
    with pytest.raises(InputError, match="k is 0"):
        search(index, vectors(2, 3), 0)
    with pytest.raises(InputError, match="expected \\(vectors, dimensions\\)"):
        build(np.ones(3))
    with pytest.raises(InputError, match="not finite"):
        build(np.full((2, 3), np.nan))


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
