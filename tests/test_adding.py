"""Plates of another screen, embedded by a screen's network: found by queries, and looked up without being added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cell_screens import write_cells
from conftest import Command

from pipelines.adding import add, ask_clips, rebuild
from pipelines.embed import EmbedContext, EmbedWells
from pipelines.indexing import build_index, read_cells
from pipelines.inputs import well_keys
from pipelines.profiles import write_profiles, write_raw
from pipelines.query import Searcher
from pipelines.units import StageError
from screening.embedding import EmbedConfig
from screening.i3d import I3DResNet, ModelConfig
from screening.profiles import ProfilesConfig, Standardised
from screening.similarity import CompressedIndex, to_unit
from storage_schemas.checkpoint import CheckpointManifest, write_checkpoint
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.index import LEVELS, read_manifest
from storage_schemas.screen import Screen, StageRecord
from storage_schemas.tables import PLATE_MAP, open_table

MODEL = ModelConfig(depth=10, width=4, stem_frames=1)


def give_network(screen: Screen, seed: int) -> None:
    torch.manual_seed(seed)
    network = I3DResNet(MODEL, in_channels=2, n_classes=2)
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    manifest = CheckpointManifest(
        MODEL.model_dump(mode="json"),
        ("a", "b"),
        ("one", "two"),
        2,
        (0.1, 0.1),
        (0.1, 0.1),
        network.embedding_dim,
        1,
        (),
        "",
    )
    write_checkpoint(screen.checkpoint, manifest, weights)


def embedder_of(screen: Screen, checkpoint: str) -> EmbedWells:
    return EmbedWells(EmbedContext(screen, EmbedConfig(), "", 1, checkpoint))


def index_own(screen: Screen) -> None:
    wells = well_keys(open_table(screen.plate_map, PLATE_MAP).to_pandas())
    embed = embedder_of(screen, screen.checkpoint)
    for well in wells:
        embed(well)
    config = ProfilesConfig(recipe=Standardised())  # a plate has one control, too few to whiten by
    write_raw(screen, read_cells(screen, wells), config.aggregate, "")
    write_profiles(screen, config, "")
    compressed = CompressedIndex()
    manifest = screen.read_manifest()
    document = {"profiles": config.model_dump(mode="json"), "index": compressed.model_dump(mode="json")}
    screen.write_manifest(manifest.model_copy(update={"config": document}))
    build_index(screen, compressed, wells)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A screen with a network and an index, and one that has been segmented only."""
    folder = tmp_path_factory.mktemp("adding")
    screen, other = write_cells(folder / "screen"), write_cells(folder / "other", prefix="n", seed=1)
    give_network(Screen(str(screen)), 0)
    index_own(Screen(str(screen)))
    return screen, other


@pytest.fixture(scope="module")
def grown(folders: tuple[Path, Path], local_ray: None) -> Path:
    """The screen with the other's plates added."""
    target = folders[0].with_name("grown")
    shutil.copytree(folders[0], target)
    add(str(target), str(folders[1]))
    return target


def answers(screen: str) -> dict[str, pd.DataFrame]:
    searcher = Searcher(screen)
    found = {level: searcher.query(compound="inhibitor-0", level=level, k=1000) for level in LEVELS}
    return {level: table.sort_values("id", ignore_index=True).drop(columns="rank") for level, table in found.items()}


def test_added_plates_are_in_the_index(folders: tuple[Path, Path], grown: Path) -> None:
    manifest = read_manifest(str(grown / "index"))
    before = read_manifest(str(folders[0] / "index"))
    assert {level: held.count for level, held in manifest.levels.items()} == {"compound": 8, "well": 32, "cell": 192}
    assert before.levels["cell"].count == 96
    (entry,) = manifest.added
    assert entry.plates == ("n1", "n2")
    # The cells of before stand in front, as they were.
    old, new = Searcher(str(folders[0])), Searcher(str(grown))
    np.testing.assert_array_equal(new.index("cell").vectors[:96], old.index("cell").vectors)
    assert new.ids("cell")["id"][:96].tolist() == old.ids("cell")["id"].tolist()
    assert set(new.ids("cell")["plate"][96:]) == {"n1", "n2"}
    # The new ones are as the screen's network embeds them.
    other, screen = Screen(str(folders[1])), Screen(str(folders[0]))
    key = well_keys(open_table(other.plate_map, PLATE_MAP).to_pandas())[3]
    expected = to_unit(embedder_of(other, screen.checkpoint).vectors(other.clips(key)))
    here = new.ids("cell")["id"].str.startswith(f"{key}/").to_numpy()
    np.testing.assert_allclose(new.index("cell").vectors[here], expected, atol=1e-6)
    assert store_is_untouched(folders[1])


def store_is_untouched(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "plate_map.parquet",
        "compounds.parquet",
        "cells",
        "clips",
    }


def test_adding_equals_building_anew(grown: Path, tmp_path: Path) -> None:
    copy = tmp_path / "grown"
    shutil.copytree(grown, copy)
    rebuild(str(copy))
    assert read_manifest(str(copy / "index")).build != read_manifest(str(grown / "index")).build
    added, anew = answers(str(grown)), answers(str(copy))
    for level in LEVELS:
        pd.testing.assert_frame_equal(added[level], anew[level], atol=1e-6)


def test_adding_again_changes_nothing(folders: tuple[Path, Path], grown: Path) -> None:
    before = answers(str(grown))
    counts, _ = add(str(grown), str(folders[1]))
    assert counts == {"compounds": 8, "wells": 32, "cells": 192}
    for level, table in answers(str(grown)).items():
        pd.testing.assert_frame_equal(table, before[level], atol=1e-6)


def test_what_another_network_embedded_is_dropped_and_said(grown: Path, tmp_path: Path) -> None:
    copy = Screen(str(tmp_path / "grown"))
    shutil.copytree(grown, copy.url)
    give_network(copy, 1)
    index_own(copy)
    counts, notes = rebuild(copy.url)
    assert counts["cells"] == 96
    assert any("by another network; add it again" in note for note in notes)


def test_what_cannot_be_added_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    screen, other = folders
    with pytest.raises(InputError, match=r"plate\(s\) \['p1', 'p2'\] are in the index of"):
        add(str(screen), str(write_cells(tmp_path / "same")))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(other, unfinished)
    document = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**document, "stages": {}}))
    with pytest.raises(InputError, match="'segment' is not done"):
        add(str(screen), str(unfinished))
    with pytest.raises(SchemaError, match="has no index to add to"):
        add(str(other), str(screen))
    with pytest.raises(SchemaError, match="is not a screen"):
        add(str(screen), str(tmp_path / "nowhere"))
    assert not (screen / "added" / "same" / "manifest.json").exists()


def test_plates_are_embedded_as_those_of_the_screen_were(
    folders: tuple[Path, Path], tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, other = Screen(str(tmp_path / "screen")), Screen(str(tmp_path / "other"))
    shutil.copytree(folders[0], screen.url)
    shutil.copytree(folders[1], other.url)
    manifest = screen.read_manifest()
    settings = {"embed": {"precision": "bf16", "batch_size": 3}, "max_failed_share": 0.01}
    screen.write_manifest(manifest.model_copy(update={"config": {**manifest.config, **settings}}))
    shutil.rmtree(other.clips(min(other.done_units("segment"))))
    seen = []

    class Watched(EmbedWells):
        def __init__(self, context: EmbedContext) -> None:
            seen.append(context.config)
            super().__init__(context)

    monkeypatch.setattr("pipelines.adding.EmbedWells", Watched)
    ask_clips(Searcher(screen), other.clips(max(other.done_units("segment"))), k=1)
    assert seen == [EmbedConfig(precision="bf16", batch_size=3)]
    monkeypatch.undo()

    def context(screen: Screen, config: EmbedConfig, *further: Any) -> EmbedContext:
        seen.append(config)
        return EmbedContext(screen, config, *further)

    monkeypatch.setattr("pipelines.adding.EmbedContext", context)
    with pytest.raises(StageError, match=r"1 of 16 wells failed.* max_failed_share=0.01 allows"):
        add(screen.url, other.url)
    assert seen[1:] == seen[:1]


@pytest.mark.parametrize("kept", ["all", "none"])
def test_wells_that_are_not_embedded_are_embedded_or_named(
    folders: tuple[Path, Path], tmp_path: Path, local_ray: None, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other screen was embedded by the same network, and one of its wells could not be."""
    screen, other = Screen(str(tmp_path / "screen")), Screen(str(tmp_path / "other"))
    shutil.copytree(folders[0], screen.url)
    shutil.copytree(folders[1], other.url)
    shutil.copytree(Path(screen.checkpoint), other.checkpoint)
    *rest, _ = sorted(other.done_units("segment"))
    embed = embedder_of(other, other.checkpoint)
    for well in rest:
        embed(well)
    record = StageRecord(fingerprint="embedded", done=True, counts={"wells": 16})
    config = {"segment": {"clips": {"store": kept}}}
    manifest = other.read_manifest()
    stages = {**manifest.stages, "embed": record}
    other.write_manifest(manifest.model_copy(update={"config": config, "stages": stages}))
    assert ask_clips(Searcher(screen), other.url, k=1)["query"].nunique() == (16 if kept == "all" else 15)
    assert ("1 well(s) of" in capsys.readouterr().err) == (kept == "none")
    counts, notes = add(screen.url, other.url)
    assert counts["wells"] == (32 if kept == "all" else 31)
    assert any("1 well(s) of" in note and "not embedded" in note for note in notes) == (kept == "none")


def test_clips_are_looked_up(folders: tuple[Path, Path]) -> None:
    screen, other = Screen(str(folders[0])), Screen(str(folders[1]))
    searcher = Searcher(screen)
    key = well_keys(open_table(other.plate_map, PLATE_MAP).to_pandas())[2]
    vectors = to_unit(embedder_of(other, screen.checkpoint).vectors(other.clips(key)))
    found = ask_clips(searcher, other.clips(key), k=5, plate=["p2"])
    expected = searcher.query(vectors=vectors.mean(axis=0)[None], names=[f"{key.well}.zarr"], k=5, plate=["p2"])
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="with cells only"):
        ask_clips(searcher, other.clips(key), "well")


@pytest.mark.parametrize("level", LEVELS)
def test_wells_of_another_screen_are_looked_up(folders: tuple[Path, Path], level: str) -> None:
    found = ask_clips(Searcher(str(folders[0])), str(folders[1]), level, k=3)  # type: ignore[arg-type]
    wells = open_table(Screen(str(folders[1])).plate_map, PLATE_MAP).to_pandas()
    assert found["query"].unique().tolist() == [str(key) for key in well_keys(wells)]
    assert len(found) == 3 * len(wells)
    # Cells of a mechanism are bright in one channel, which any network sees.
    nearest = found[found["rank"] == 1].set_index("query")["moa"]
    for key, compound in zip(well_keys(wells), wells["compound"], strict=True):
        if compound.startswith(("inhibitor", "uncoupler")):
            assert nearest[str(key)] == compound[:-2]


def test_profiles_asked_about_lie_in_one_space_with_those_added(folders: tuple[Path, Path], grown: Path) -> None:
    """What is looked up is nearest to itself where it was added."""
    found = ask_clips(Searcher(str(grown)), str(folders[1]), "well", k=1)
    assert (found["similarity"] > 0.999).sum() == 14  # of controls nothing is left: they are what is subtracted


def test_plates_of_one_name_are_told_apart(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is compared with its own controls, so that what a plate is called changes no answer."""
    namesake = write_cells(tmp_path / "namesake", seed=1)
    found, expected = (
        ask_clips(Searcher(str(folders[0])), str(other), "well", k=3).drop(columns="query")
        for other in (namesake, folders[1])
    )
    pd.testing.assert_frame_equal(found, expected)


def test_the_commands(folders: tuple[Path, Path], grown: Path, command: Command) -> None:
    done = command(
        "query",
        grown,
        "--clips",
        Screen(str(folders[1])).clips(
            well_keys(open_table(Screen(str(folders[1])).plate_map, PLATE_MAP).to_pandas())[1]
        ),
        "-k",
        2,
        "--format",
        "json",
    )
    assert done.code == 0, done.err
    assert [row["rank"] for row in json.loads(done.out)] == [1, 2]
    done = command("index", grown)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"{grown}: 8 compounds, 32 wells, 192 cells"
    assert "note: cell: 192 vectors, compressed" in done.out
    assert command("index", grown, "--set", "index.method=exact").code == 2
    assert command("index", "run.yaml", "--out", grown, "--add", folders[1]).code == 2
