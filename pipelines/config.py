"""The configuration of a run: the choices of every stage in one model, read from YAML, overridden by dotted keys."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipelines.loggers import LoggerConfig
from screening.augmentation import AugmentConfig
from screening.baselines import BaselineConfig
from screening.embedding import EmbedConfig
from screening.evaluation import EvaluationConfig
from screening.i3d import ModelConfig
from screening.initialisation import InitialWeights, RandomWeights
from screening.profiles import ProfilesConfig
from screening.similarity import AutoIndex, IndexConfig
from screening.site import ChannelsConfig, SegmentConfig
from screening.splits import ByCompound, SplitConfig
from screening.statistics import StatisticsConfig
from screening.training import TrainConfig
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError, StoreError
from storage_schemas.screen import Screen


class ConfigError(InputError):
    """The configuration is not usable: exit code 2, as for any other wrong usage."""


class InputsConfig(Config):
    """Plates and tables, or the cells of another screen; relative paths are relative to the configuration's folder."""

    plates: tuple[str, ...] | None = Field(
        None,
        description="OME-Zarr plates: paths or URLs; a last part with * or ? stands for all that match",
        examples=[["plates/*.zarr"]],
        min_length=1,
    )
    cells: str | None = Field(
        None,
        description="instead of plates: a screen whose cells are taken as they are, imported or segmented by a run "
        "before; its tables too, where none are named here",
    )
    plate_map: str | None = Field(
        None,
        description="table with plate, well, compound, role and, if known, concentration, unit, replicate",
        examples=["plate_map.csv"],
    )
    compounds: str | None = Field(
        None, description="table with compound and, if known, name, moa, cas, inchikey, smiles, target"
    )
    split: str | None = Field(
        None,
        description="with split.method table: table with plate, well, for single cells site and track, and split: what "
        "each is for; `screening split` writes one to edit",
    )
    unmapped_wells: Literal["error", "skip"] = Field(
        "error", description="wells with images that the plate map does not name"
    )
    missing_wells: Literal["error", "skip"] = Field(
        "error", description="wells of the plate map that no plate has images of"
    )
    unused_compounds: Literal["error", "skip"] = Field(
        "error", description="compounds of the table of compounds that are on no plate"
    )

    @field_validator("plates", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, plates: object) -> object:
        return (plates,) if isinstance(plates, str) else plates

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.plates is None) == (self.cells is None):
            raise ValueError("give either plates or cells (a screen whose cells are taken), the other left out or null")
        if self.plates is not None and self.plate_map is None:
            raise ValueError("plates need a plate_map, which says what is in their wells")
        return self


class ResourcesConfig(Config):
    """What the run may use; a run may go on with other resources.

    Cells and clips do not depend on them. Training does by its rounding, which the numbers of threads and of workers
    change.
    """

    cpus: int | None = Field(
        None, ge=1, description="CPUs that the run uses: a Ray started on this machine has as many; null: all"
    )
    object_store_mb: int = Field(512, ge=80, description="MiB of Ray's object store on this machine")
    attempts: int = Field(
        4, ge=1, description="how often a well is tried whose worker dies or whose store does not answer"
    )
    segment_cpus: float = Field(1.0, gt=0, description="CPUs that one well's segmentation asks for")
    segment_gpus: float = Field(
        0.0, ge=0, description="GPUs that one well's segmentation asks for; only the method cellpose uses one"
    )
    segment_memory_mb: int = Field(0, ge=0, description="MiB of memory that one well's segmentation asks for; 0: any")
    embed_actors: int | None = Field(
        None,
        ge=1,
        description="actors that hold the network and embed; null: on a cluster as many as there is work and room for, "
        "on one machine one, or as many as have room on its GPUs; where clips are embedded as they are cut out as many "
        "as have room on the GPUs that are up, or one for two CPUs",
    )
    embed_cpus: float = Field(
        1.0, gt=0, description="CPUs that one embedding actor asks for; where there are fewer an actor, fewer"
    )
    embed_gpus: float = Field(0.0, ge=0, description="GPUs that one embedding actor asks for")
    embed_memory_mb: int = Field(0, ge=0, description="MiB of memory that one embedding actor asks for; 0: any")
    train_workers: int = Field(1, ge=1, description="workers that train together")
    train_readers: int = Field(1, ge=1, description="actors that read and augment for one training worker")
    train_cache_mb: int = Field(
        512, ge=0, description="MiB of clips that each of them keeps in memory, to read them once"
    )
    train_cpus: float = Field(
        0.5,
        gt=0,
        description="CPUs that one training worker asks for, to leave its readers room; where CPUs are few, fewer",
    )
    train_gpus: float = Field(0.0, ge=0, description="GPUs that one training worker asks for")
    train_memory_mb: int = Field(0, ge=0, description="MiB of memory that one training worker asks for; 0: any")
    train_max_failures: int = Field(2, ge=0, description="lost workers or nodes after which training gives up")


class PretrainConfig(Config):
    """What comes before the training on `train.label`, as with MitoReID: each training compound is an identity.

    Those whose MOA is not known are learnt from too. What is not said here is as in the group train.
    """

    epochs: int = Field(0, ge=0, description="epochs of pretraining on compounds; 0: none")
    p: int | None = Field(None, ge=2, description="identities a batch; null: train.p")
    k: int | None = Field(None, ge=2, description="clips an identity in a batch; null: train.k")
    lr: float | None = Field(None, gt=0, description="learning rate; null: train.optimizer.lr")


class RunConfig(Config):
    """Everything that a run depends on."""

    title: str = Field("Phenotypic screen", description="what the report is headed with")
    seed: int = Field(0, ge=0, description="seed of everything that is random")
    inputs: InputsConfig = Field(description="plates and tables, or the cells of another screen")
    segment: SegmentConfig | None = Field(
        None,
        description="from plates to single-cell clips; null with inputs.cells",
        examples=[SegmentConfig(channels=ChannelsConfig(nucleus="nucleus"))],
    )
    split: SplitConfig = Field(ByCompound(), description="training, validation and held-out tests")
    model: ModelConfig = Field(ModelConfig(), description="the network")
    augment: AugmentConfig = Field(AugmentConfig(), description="augmentation of training clips")
    initial: InitialWeights = Field(RandomWeights(), description="what the network's weights start from")
    pretrain: PretrainConfig = Field(PretrainConfig(), description="training on compounds before that on train.label")
    train: TrainConfig = Field(TrainConfig(), description="training")
    network: str | None = Field(
        None,
        description="a trained network to embed with, in place of training one: a checkpoint's folder, such as "
        "SCREEN/checkpoint; model, augment, initial, pretrain and train are then not used",
    )
    embed: EmbedConfig = Field(EmbedConfig(), description="embedding of all clips")
    profiles: ProfilesConfig = Field(ProfilesConfig(), description="well and compound profiles")
    index: IndexConfig = Field(AutoIndex(), description="how `screening query` searches")
    statistics: StatisticsConfig = Field(StatisticsConfig(), description="activity, consistency and their p-values")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="held-out tests")
    baseline: BaselineConfig = Field(BaselineConfig(), description="hand-made features, for `screening compare`")
    max_failed_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of wells that may fail before the run stops; a well counts by the share of its sites",
    )
    logging: tuple[LoggerConfig, ...] = Field(
        (), description="where the training is logged beside the screen, such as [{method: tensorboard}]"
    )
    resources: ResourcesConfig = Field(ResourcesConfig(), description="what the run may use")

    @model_validator(mode="after")
    def _plates_are_segmented(self) -> Self:
        if self.inputs.cells is None and self.segment is None:
            raise ValueError("inputs.plates need the group segment, at least segment.channels.nucleus")
        if self.inputs.cells is not None and self.segment is not None:
            raise ValueError("inputs.cells have been cut out already: leave the group segment away")
        return self

    @model_validator(mode="after")
    def _a_table_says_the_split(self) -> Self:
        if (self.split.method == "table") != (self.inputs.split is not None):
            raise ValueError("split.method table and the table inputs.split go together: give both, or none")
        return self

    @model_validator(mode="after")
    def _clips_are_kept_to_train_on(self) -> Self:
        if self.one_pass and self.network is None:
            raise ValueError(
                f"segment.clips.store={self.segment and self.segment.clips.store} keeps no clips to train on: name a "
                "trained network (network=SCREEN/checkpoint), or set segment.clips.store=all"
            )
        return self

    @model_validator(mode="after")
    def _identities_can_be_shared(self) -> Self:
        workers = self.resources.train_workers
        for name, p in (("train.p", self.train.p), ("pretrain.p", self.pretrain.p or self.train.p)):
            share, rest = divmod(p, workers)
            if rest or share < 2:
                # With one identity alone a worker would have nothing to tell it from.
                raise ValueError(
                    f"{name}={p} identities cannot be shared by {workers} workers: each takes as many, and two at "
                    f"least; change {name} or resources.train_workers"
                )
        return self

    @model_validator(mode="after")
    def _pretraining_comes_before_another_training(self) -> Self:
        if self.pretrain.epochs and self.train.label == "compound":
            raise ValueError("pretrain.epochs goes before train.label=moa; with compound the training is on compounds")
        return self

    @property
    def one_pass(self) -> bool:
        """Whether cells are embedded as they are cut out, so that not all clips need be kept."""
        return self.segment is not None and self.segment.clips.store != "all"

    @property
    def broadest_label(self) -> Literal["moa", "compound"]:
        """What the wells trained on must have: with compounds as identities, those without an MOA are trained on."""
        return "compound" if self.pretrain.epochs else self.train.label


def load(url: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply overrides to it; its relative paths become absolute.

    Args:
        url: a YAML file.
        overrides: ``dotted.key=value``, the value in YAML.

    Raises:
        ConfigError: if the file is missing or not YAML, or a key or value is wrong.
        StoreError: if its store does not answer.
    """
    try:
        document = yaml.safe_load(store.read_bytes(url))
    except StoreError:
        raise
    except InputError as error:
        raise ConfigError(str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{url}: is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{url}: expected a YAML mapping; `screening config` prints one to edit")
    for override in overrides:
        _override(document, override)
    config = parse(document, url)
    base = store.parent(store.absolute(url))
    inputs = config.inputs.model_copy(
        update={
            "plates": config.inputs.plates and tuple(store.absolute(plate, base) for plate in config.inputs.plates),
            "cells": config.inputs.cells and store.absolute(config.inputs.cells, base),
            "plate_map": config.inputs.plate_map and store.absolute(config.inputs.plate_map, base),
            "compounds": config.inputs.compounds and store.absolute(config.inputs.compounds, base),
            "split": config.inputs.split and store.absolute(config.inputs.split, base),
        }
    )
    initial = config.initial
    if not isinstance(initial, RandomWeights):
        initial = initial.model_copy(update={"path": store.absolute(initial.path, base)})
    network = config.network and store.absolute(config.network, base)
    return config.model_copy(update={"inputs": inputs, "initial": initial, "network": network})


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A configuration with other settings.

    Args:
        config: what the settings are changed in.
        overrides: as for :func:`load`.

    Raises:
        ConfigError: if a key or value is wrong.
    """
    document = config.model_dump(mode="json")
    for change in overrides:
        _override(document, change)
    return parse(document, " ".join(overrides))


def with_cells_of(config: RunConfig, url: str) -> RunConfig:
    """The configuration of a run on the cells of a screen of the same plates.

    Args:
        config: of a run on plates, or on cells.
        url: of the screen, which is absolute.
    """
    inputs = config.inputs.model_copy(update={"plates": None, "cells": url, "plate_map": None, "compounds": None})
    return config.model_copy(update={"inputs": inputs, "segment": None})


def parse(document: Mapping[str, Any], source: str) -> RunConfig:
    """Validate a configuration.

    Args:
        document: the configuration as plain values.
        source: what to call it in errors.

    Raises:
        ConfigError: naming every wrong key, with the nearest right one, and every wrong value.
    """
    try:
        return RunConfig.model_validate(_with_methods(document, RunConfig))
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(entry)}" for entry in error.errors())
        raise ConfigError(f"{source}: the configuration is not usable:\n{problems}") from error


def configuration_of(screen: Screen) -> RunConfig:
    """The configuration that a screen was run with.

    Raises:
        InputError: if it was imported, which this is not for, or run by another version.
    """
    config = screen.read_manifest().config
    if "inputs" not in config:
        raise InputError(f"{screen.url}: was imported and not run, so that it has no network and no clips of its own")
    return parse(config, screen.manifest_url)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys, with old and new value, in which two configurations differ."""
    a, b = dict(_leaves(old)), dict(_leaves(new))
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)} → {b.get(key)}" for key in changed]


def commented_default() -> str:
    """The whole default configuration as YAML, each key with what it means."""
    return "\n".join(
        [
            "# The whole configuration with its defaults. Only inputs and segment.channels.nucleus must be given.",
            *_commented(RunConfig, {}, 0),
            "",
        ]
    )


def split_override(override: str) -> tuple[str, Any]:
    """The key and the value of ``key=value``, the value in YAML.

    Raises:
        ConfigError: if it is not of that form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def _override(document: dict[str, Any], override: str) -> None:
    key, value = split_override(override)
    *path, last = key.split(".")
    node = document
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a group of keys")
        node = child
    if last == "method" and node.get("method") != value:
        # Another choice of a union has other keys: what was set for the old one goes with it.
        node.clear()
    node[last] = value


def _with_methods(node: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Name the default's method in each union that names none, so that its keys can be set alone."""
    filled = dict(node)
    for name, field in model.model_fields.items():
        value = filled.get(name)
        if not isinstance(value, Mapping):
            continue
        members = _members(field.annotation)
        if len(members) == 1:
            filled[name] = _with_methods(value, members[0])
        elif members:
            filled[name] = {"method": _method(type(field.default)), **value}
    return filled


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(entry: Any) -> str:
    location = [str(part) for part in entry["loc"]]
    where = ".".join(location)
    if entry["type"] != "extra_forbidden":
        return f"{where}: {entry['msg']} (found {entry['input']!r})"
    known = list(_fields_at(location[:-1]))
    deeper = {field: f"{name}.{field}" for name in RunConfig.model_fields for field in _fields_at([name])}
    if len(location) == 1 and where in deeper and where not in known:
        return f"{where}: unknown key; did you mean {deeper[where]!r}?"
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys there: {known}"
    return f"{where}: unknown key; {hint}"


def _fields_at(location: Sequence[str]) -> Mapping[str, Any]:
    """Fields of the model at a location of a validation error, which also names choices of unions."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        chosen = [m for m in models if _method(m) == part]
        children = [m for model in models for m in _models(model, part)]
        models = chosen or children or models
    return {name: field for model in models for name, field in model.model_fields.items()}


def _models(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    field = model.model_fields.get(name)
    return _members(field.annotation) if field else []


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation allows."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for member in typing.get_args(annotation) for m in _members(member)]
    if origin is tuple:
        return _members(typing.get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def _method(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("method")
    return str(typing.get_args(field.annotation)[0]) if field else None


def _commented(model: type[BaseModel], values: Mapping[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in model.model_fields.items():
        default = values.get(name)
        if default is None and field.examples:
            default = field.examples[0]
        elif default is None and not field.is_required():
            default = field.get_default(call_default_factory=True)
        members = _members(field.annotation)
        choices = [method for method in map(_method, members) if method]
        comment = field.description or ""
        if len(choices) > 1:
            comment += f"; choices of method: {', '.join(choices)}"
        elif name != "method" and typing.get_origin(field.annotation) is Literal:
            comment += f"; one of {', '.join(map(str, typing.get_args(field.annotation)))}"
        yield f"{indent}# {comment}"
        if members and (isinstance(default, BaseModel) or field.is_required()):
            yield f"{indent}{name}:"
            chosen = type(default) if isinstance(default, BaseModel) else members[0]
            inner = {k: getattr(default, k) for k in chosen.model_fields} if default else {}
            yield from _commented(chosen, inner, depth + 1)
        else:
            yield f"{indent}{name}: {_scalar(default)}"


def _scalar(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
