from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import ConfigError, RunConfig, commented_default, differences, load, parse, with_cells_of
from screening.clips import FixedScaling, FixedWindow, TrackWindow
from screening.illumination import FlatField, NoIllumination
from screening.site import SegmentConfig
from screening.training import SGD, PlateauSchedule, TrainConfig
from storage_schemas import store
from storage_schemas.errors import StoreError

MINIMAL: dict[str, Any] = {
    "inputs": {"plates": ["plates/*.zarr"], "plate_map": "plate_map.csv"},
    "segment": {"channels": {"nucleus": "dna"}},
}


def with_value(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    *path, last = key.split(".")
    node = changed
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return changed


def segment_of(config: RunConfig) -> SegmentConfig:
    assert config.segment is not None
    return config.segment


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


DEFAULT_KEYS = sorted(leaves(parse(MINIMAL, "test").model_dump(mode="json")))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


# --- defaults --------------------------------------------------------------------------------


def test_only_inputs_and_the_nucleus_channel_must_be_given() -> None:
    assert segment_of(parse(MINIMAL, "test")).channels.nucleus == "dna"
    with pytest.raises(ConfigError, match="inputs: Field required"):
        parse({}, "test")
    with pytest.raises(
        ConfigError, match=r"inputs\.plates need the group segment, at least segment\.channels\.nucleus"
    ):
        parse({"inputs": MINIMAL["inputs"]}, "test")


def test_cells_of_a_screen_stand_in_for_plates_and_all_that_is_done_to_them() -> None:
    config = parse({"inputs": {"cells": "imported"}}, "test")
    assert (config.inputs.cells, config.inputs.plates, config.segment) == ("imported", None, None)
    for wrong, said in (
        ({**MINIMAL["inputs"], "cells": "imported"}, "give either plates or cells"),
        ({"plate_map": "plate_map.csv"}, "give either plates or cells"),
        ({"plates": ["a.zarr"]}, "plates need a plate_map"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse({"inputs": wrong, "segment": MINIMAL["segment"]}, "test")
    with pytest.raises(ConfigError, match=r"inputs\.cells have been cut out already: leave the group segment away"):
        parse({"inputs": {"cells": "imported"}, "segment": MINIMAL["segment"]}, "test")


def test_a_run_on_plates_becomes_one_on_the_cells_of_another_screen() -> None:
    settings = with_value(with_value(MINIMAL, "inputs.compounds", "compounds.csv"), "train.epochs", 3)
    config = with_cells_of(parse(settings, "test"), "/data/screen")
    assert config == parse({"inputs": {"cells": "/data/screen"}, "train": {"epochs": 3}}, "test")


def test_printed_default_is_a_valid_configuration_of_defaults() -> None:
    config = parse(yaml.safe_load(commented_default()), "default")
    expected = parse(with_value(MINIMAL, "segment.channels.nucleus", "nucleus"), "test")
    assert config == expected


def test_printed_default_holds_every_key_and_a_comment_above_each() -> None:
    text = commented_default()
    assert sorted(leaves(yaml.safe_load(text))) == DEFAULT_KEYS
    lines = text.splitlines()
    for above, line in pairwise(lines):
        if not line.lstrip().startswith("#"):
            assert re.fullmatch(r" *# \S.*", above), f"no comment above {line!r}"
            assert len(above) - len(above.lstrip()) == len(line) - len(line.lstrip())


def test_printed_default_names_the_choices_of_each_union() -> None:
    text = commented_default()
    for choices in ("none, flat_field", "fixed, track", "plate, site, fixed, cell", "sgd, adamw", "cosine, plateau"):
        assert f"choices of method: {choices}\n" in text


# --- wrong keys and values -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("titel", "title"),
        ("inputs.platemap", "plate_map"),
        ("segment.channels.nuclei", "nucleus"),
        ("segment.clips.frame", "frames"),
        ("segment.nuclei.diametre", "diameter"),
        ("segment.tracking.max_gaps", "max_gap"),
        ("model.deph", "depth"),
        ("train.epoch", "epochs"),
        ("train.optimizer.weight_dekay", "weight_decay"),
        ("train.optimizer.zzz", None),
        ("profiles.recip", "recipe"),
        ("evaluation.bootstraps", "n_bootstrap"),
        ("resources.gpus", "cpus"),
    ],
)
def test_misspelt_key_is_answered_with_the_nearest_right_one(key: str, meant: str | None) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        parse(with_value(MINIMAL, key, 1), "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert key.rpartition(".")[2] in message
    assert (f"did you mean {meant!r}?" if meant else "known keys there") in message


@pytest.mark.parametrize(
    ("union", "method", "key", "meant"),
    [
        ("segment.illumination", "flat_field", "min_site", "min_sites"),
        ("segment.clips.window", "track", "maxsize", "max_size"),
        ("segment.clips.scaling", "site", "lo", "low"),
        ("train.optimizer", "sgd", "momentun", "momentum"),
        ("train.schedule", "plateau", "patients", "patience"),
        ("profiles.recipe", "sphered", "regularization", "regularisation"),
    ],
)
def test_misspelt_key_inside_a_union_names_the_chosen_members_key(
    union: str, method: str, key: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(with_value(MINIMAL, union, {"method": method, key: 1}), "test")
    assert f"{union}.{method}.{key}: unknown key; did you mean {meant!r}?" in str(caught.value)


@given(st.data())
def test_any_key_with_a_letter_too_many_is_found(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([key for key in DEFAULT_KEYS if not key.endswith(".method")]))
    wrong = f"{key}x"
    # Unions are told by their method, which must be there for the rest to be read.
    document = parse(MINIMAL, "test").model_dump(mode="json")
    with pytest.raises(ConfigError) as caught:
        parse(with_value(document, wrong, 1), "test")
    assert f"did you mean {key.rpartition('.')[2]!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", "one"),
        ("segment.clips.frames", 0),
        ("segment.projection", "sum"),
        ("model.depth", 11),
        ("train.epochs", 0),
        ("max_failed_share", 1.5),
        ("inputs.plates", []),
        ("inputs.missing_wells", "ignore"),
        ("segment.illumination", {"method": "magic"}),
    ],
)
def test_wrong_value_names_its_key_and_itself(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(with_value(MINIMAL, key, value), "test")
    assert f"  {key}: " in str(caught.value)
    assert repr(value) in str(caught.value)


def test_every_problem_is_named_at_once() -> None:
    document = with_value(with_value(MINIMAL, "train.epoch", 3), "seed", -1)
    with pytest.raises(ConfigError) as caught:
        parse(document, "test")
    assert "epochs" in str(caught.value)
    assert "seed" in str(caught.value)


# --- files and overrides ---------------------------------------------------------------------


def test_relative_paths_are_relative_to_the_configuration(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    inputs = load(str(config_file)).inputs
    assert inputs.plates == (f"{config_file.parent}/plates/*.zarr",)
    assert inputs.plate_map == f"{config_file.parent}/plate_map.csv"
    assert inputs.compounds is None
    config_file.write_text(yaml.safe_dump({"inputs": {"cells": "screens/one"}}))
    assert load(str(config_file)).inputs.cells == f"{config_file.parent}/screens/one"


def test_a_configuration_given_relatively_finds_the_same_files(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config_file.parent)
    assert load("run.yaml") == load(str(config_file))


def test_a_store_that_does_not_answer_is_no_wrong_configuration(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str) -> bytes:
        raise StoreError(url, "does not answer")

    monkeypatch.setattr(store, "read_bytes", refuse)
    with pytest.raises(StoreError, match=r"run\.yaml: does not answer"):
        load(str(config_file))


def test_absolute_paths_and_urls_stay(config_file: Path) -> None:
    assert load(str(config_file), ["inputs.plates=/data/*.zarr"]).inputs.plates == ("/data/*.zarr",)
    settings = ["inputs.plates=[/data/a.zarr, memory://b.zarr]", "inputs.compounds=/data/c.csv"]
    inputs = load(str(config_file), settings).inputs
    assert inputs.plates == ("/data/a.zarr", "memory://b.zarr")
    assert inputs.compounds == "/data/c.csv"


def test_overrides_are_yaml_and_the_last_one_counts(config_file: Path) -> None:
    config = load(
        str(config_file),
        ["seed=1", "seed=7", "title=a=b", "segment.labels=false", "segment.clips.step=null"],
    )
    assert (config.seed, config.title, segment_of(config).labels, segment_of(config).clips.step) == (
        7,
        "a=b",
        False,
        None,
    )


def test_setting_a_method_drops_the_keys_of_the_old_one(config_file: Path) -> None:
    document = with_value(MINIMAL, "train.optimizer", {"method": "adamw", "lr": 0.5})
    document = with_value(document, "segment.illumination", {"method": "flat_field", "min_sites": 3})
    config_file.write_text(yaml.safe_dump(document))
    config = load(
        str(config_file),
        [
            "train.optimizer.method=sgd",
            "train.optimizer.momentum=0.5",
            "segment.illumination.method=none",
            "segment.clips.window.method=track",
            "segment.clips.scaling.method=fixed",
            "segment.clips.scaling.high=[255]",
            "train.schedule.method=plateau",
        ],
    )
    assert config.train.optimizer == SGD(momentum=0.5)
    assert isinstance(segment_of(config).illumination, NoIllumination)
    assert isinstance(segment_of(config).clips.window, TrackWindow)
    assert segment_of(config).clips.scaling == FixedScaling(high=(255,))
    assert isinstance(config.train.schedule, PlateauSchedule)


def test_setting_the_same_method_keeps_its_keys(config_file: Path) -> None:
    document = with_value(MINIMAL, "segment.illumination", {"method": "flat_field", "min_sites": 3})
    config_file.write_text(yaml.safe_dump(document))
    config = load(str(config_file), ["segment.illumination.method=flat_field", "segment.illumination.grid=16"])
    assert segment_of(config).illumination == FlatField(min_sites=3, grid=16)


def test_keys_of_a_union_can_be_set_without_naming_the_default_method(config_file: Path) -> None:
    config = load(str(config_file), ["train.optimizer.lr=0.5", "segment.clips.window.size=32"])
    assert config.train.optimizer == TrainConfig().optimizer.model_copy(update={"lr": 0.5})
    assert segment_of(config).clips.window == FixedWindow(size=32)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed=[1", "the value is not YAML"),
        ("title.size=3", "'title' is a value, not a group of keys"),
        ("train.epoch=3", "did you mean 'epochs'?"),
    ],
)
def test_unusable_overrides(config_file: Path, override: str, problem: str) -> None:
    config_file.write_text(yaml.safe_dump({**MINIMAL, "title": "T"}))
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load(str(config_file), [override])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", "expected a YAML mapping"),
        ("", "expected a YAML mapping"),
        ("1: 2", "the configuration is not usable"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path}: {problem}"):
        load(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: no such file"):
        load(str(tmp_path / "absent.yaml"))


# --- differences -----------------------------------------------------------------------------


def test_a_configuration_does_not_differ_from_itself() -> None:
    document = parse(MINIMAL, "test").model_dump(mode="json")
    assert differences(document, copy.deepcopy(document)) == []


def test_differences_name_keys_with_both_values() -> None:
    old = parse(MINIMAL, "test").model_dump(mode="json")
    new = with_value(with_value(old, "train.epochs", 3), "segment.channels.nucleus", "h2b")
    epochs = RunConfig.model_validate(old).train.epochs
    assert sorted(differences(old, new)) == ["segment.channels.nucleus: dna → h2b", f"train.epochs: {epochs} → 3"]


def test_differences_see_keys_that_only_one_has() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b: 1 → None", "a.c: None → 2"]
