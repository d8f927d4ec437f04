"""Questions from a file: vectors of this screen, of another, or of nobody knows where."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from indexed_screens import DIMENSION, write_screen

from pipelines.indexing import build_index
from pipelines.query import Searcher
from pipelines.vector_files import vectors_of
from pipelines.vectors import EmbeddedCells
from screening.similarity import CompressedIndex, ExactIndex, to_unit
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    return write_screen(tmp_path_factory.mktemp("files") / "screen")


@pytest.fixture(scope="module")
def searcher(screen: Screen) -> Searcher:
    return Searcher(screen)


def test_a_file_is_asked_about_by_the_mean_of_its_vectors(searcher: Searcher, command: Command) -> None:
    well = WellKey("plate-2", "A03")
    url = searcher.screen.embeddings(well)
    _, values = EmbeddedCells(searcher.screen, [well]).read()
    rows, names = vectors_of(searcher, url, None)
    assert names == ["A03.parquet"]
    np.testing.assert_allclose(rows, to_unit(values).mean(axis=0)[None], atol=1e-6)
    done = command("query", searcher.screen.url, "--vectors", url, "-k", 3, "--moa", "uncoupler", "--format", "json")
    assert done.code == 0, done.err
    expected = searcher.query(vectors=rows, names=names, k=3, moa=["uncoupler"])
    assert [row["id"] for row in json.loads(done.out)] == expected["id"].tolist()


def test_every_vector_of_a_file_is_asked_about(searcher: Searcher, tmp_path: Path, command: Command) -> None:
    _, values = EmbeddedCells(searcher.screen, [WellKey("plate-1", "B02")]).read()
    np.save(tmp_path / "mine.npy", 3 * values[:4])
    done = command(
        "query", searcher.screen.url, "--vectors", tmp_path / "mine.npy", "--each", "-k", 2, "--format", "json"
    )
    assert done.code == 0, done.err
    found = pd.DataFrame(json.loads(done.out))
    assert found["query"].tolist() == [*"00112233"]
    assert found["id"][::2].tolist() == [f"plate-1/B02/0/{i}" for i in range(1, 5)]


def test_profiles_are_compared_with_profiles(searcher: Searcher, command: Command) -> None:
    assert command("query", searcher.screen.url, "--vectors", searcher.screen.profiles("well")).code == 1
    with pytest.raises(
        SchemaError, match="holds well_profiles, which cannot be compared with vectors of the level 'cell'"
    ):
        vectors_of(searcher, searcher.screen.profiles("well"), "cell")
    with pytest.raises(
        SchemaError, match="holds embeddings, which cannot be compared with vectors of the level 'well'"
    ):
        vectors_of(searcher, searcher.screen.embeddings(WellKey("plate-1", "B02")), "well")


def test_vectors_of_another_network_are_refused(searcher: Searcher, tmp_path: Path, command: Command) -> None:
    other = write_screen(tmp_path / "other", plates=("x",))
    manifest = searcher.screen.read_manifest()
    url = other.embeddings(WellKey("x", "A01"))
    other_run = {"embed": manifest.stages["embed"].model_copy(update={"fingerprint": "another run"})}
    mine = Screen(str(tmp_path / "other"))
    mine.write_manifest(mine.read_manifest().model_copy(update={"stages": other_run}))
    with pytest.raises(SchemaError, match="written by another screen or another run"):
        vectors_of(Searcher(mine), url, "cell")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "neither Parquet nor NumPy"),
        (b"PAR1 and no more", "cannot be read"),
        (b"\x93NUMPY\x01\x00", "cannot be read"),
        (np.lib.format.magic(1, 0) + b"\x10\x00" + b"{'descr': '<f4'}", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    searcher: Searcher, tmp_path: Path, command: Command, content: bytes, problem: str
) -> None:
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    done = command("query", searcher.screen.url, "--vectors", path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {path}: ")
    assert problem in done.err.replace("\n", " ")


def test_another_dimension_is_refused(searcher: Searcher, tmp_path: Path, command: Command) -> None:
    np.save(tmp_path / "short.npy", np.ones((2, DIMENSION - 1), np.float32))
    done = command("query", searcher.screen.url, "--vectors", tmp_path / "short.npy")
    assert done.code == 1
    assert f"{DIMENSION - 1} dimensions and the index {DIMENSION}" in done.err
    assert command("query", searcher.screen.url, "--compound", "DMSO", "--each").code == 2


def test_profiles_alone_make_an_index_without_cells(tmp_path: Path) -> None:
    screen = write_screen(tmp_path / "screen")
    counts, notes = build_index(screen, ExactIndex(), [])
    assert (counts, notes) == ({"compounds": 7, "wells": 16}, [])
    searcher = Searcher(screen)
    assert searcher.levels == ("compound", "well")
    assert searcher.query(vectors=searcher.index("well").vectors[:1], k=1)["id"].tolist() == ["plate-1/A01"]
    with pytest.raises(InputError, match="no level 'cell', only compound, well"):
        searcher.query(cell="plate-1/A01/0/1")


def test_a_compressed_index_of_a_screen_answers_as_an_exact_one(tmp_path: Path) -> None:
    exact = write_screen(tmp_path / "screen", cells=150)
    before = Searcher(exact)
    before.index("cell")
    before.ids("cell")
    wells = [WellKey(plate, well) for plate, well in before.ids("well")[["plate", "well"]].drop_duplicates().to_numpy()]
    _, notes = build_index(exact, CompressedIndex(), wells)
    assert any(note.startswith("cell: 2,400 vectors, compressed") and "recall@10" in note for note in notes)
    after = Searcher(exact)
    held = after.manifest.levels["cell"]
    assert held.recall is not None
    assert held.recall.low >= 0.99
    for question in ({"cell": "plate-1/A02/0/7"}, {"compound": "uncoupler-2"}, {"well": "plate-2/B01"}):
        for filters in ({}, {"exclude_same_compound": True}, {"moa": "uncoupler", "plate": "plate-2"}):
            asked = {**question, **filters, "level": "cell", "k": 10}
            same = set(after.query(**asked)["id"]) & set(before.query(**asked)["id"])  # type: ignore[arg-type]
            assert len(same) >= 9


def test_enrichment_is_of_the_nearest_compounds(searcher: Searcher, command: Command) -> None:
    found = searcher.enrichment(compound="uncoupler-1", k=2)
    nearest = searcher.query(compound="uncoupler-1", k=2)
    assert nearest["moa"].tolist() == ["uncoupler", "uncoupler"]
    (row,) = found.to_dict("records")
    # Both of two, where two of six others have it: one of fifteen pairs.
    assert (row["moa"], row["n_found"], row["n_drawn"], row["n_label"], row["n_total"]) == ("uncoupler", 2, 2, 2, 6)
    assert row["p_value"] == pytest.approx(1 / 15)
    done = command(
        "query", searcher.screen.url, "--compound", "uncoupler-1", "-k", 2, "--enrichment", "--format", "json"
    )
    assert json.loads(done.out)[0]["p_value"] == pytest.approx(1 / 15, abs=1e-6)
    assert command("query", searcher.screen.url, "--cell", "plate-1/A02/0/7", "--enrichment").code == 2
