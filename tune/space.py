"""What a search draws settings from: a typed space over the dotted keys of a configuration."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from pipelines.config import ConfigError, RunConfig, override
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Settings: TypeAlias = Mapping[str, Any]
"""Dotted key -> value."""

GROUPS = ("model", "augment", "pretrain", "train")  # of the configuration, that a search may change
_FIXED = {
    "train.validation_clips": "it says what trials are compared by",
    "train.label": "it changes what is told apart",
}


class Choice(Config):
    """One of some values."""

    choice: tuple[Any, ...] = Field(min_length=1, description="the values, all as likely")

    def draw(self, rng: np.random.Generator) -> Any:
        """One of them."""
        return self.choice[int(rng.integers(len(self.choice)))]

    def edges(self) -> tuple[Any, ...]:
        """Values to try the space with."""
        return self.choice


class _Range(Config):
    """Numbers from one to another."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest."""
        low, high = next(iter(vars(self).values()))
        return low, high

    def edges(self) -> tuple[Any, ...]:
        """Values to try the space with."""
        return self.bounds

    def rounded(self, value: float) -> float:
        """The value in three digits, so that a table says it in full, and within the bounds."""
        low, high = self.bounds
        return min(max(float(f"{value:.3g}"), low), high)

    @model_validator(mode="after")
    def _in_order(self) -> _Range:
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"from {low} to {high}: the first has to be smaller than the second")
        if isinstance(self, LogUniform) and low <= 0:
            raise ValueError(f"from {low}: a logarithm needs bounds above 0")
        return self


class Uniform(_Range):
    """A number, evenly drawn."""

    uniform: tuple[float, float] = Field(description="from and to")

    def draw(self, rng: np.random.Generator) -> float:
        """A number in three digits."""
        return self.rounded(rng.uniform(*self.bounds))


class LogUniform(_Range):
    """A number whose logarithm is evenly drawn."""

    loguniform: tuple[float, float] = Field(description="from and to, above 0")

    def draw(self, rng: np.random.Generator) -> float:
        """A number in three digits."""
        return self.rounded(float(np.exp(rng.uniform(*np.log(self.bounds)))))


class RandInt(_Range):
    """A whole number, evenly drawn."""

    randint: tuple[int, int] = Field(description="from and to, both among them")

    def draw(self, rng: np.random.Generator) -> int:
        """A whole number."""
        low, high = self.randint
        return int(rng.integers(low, high, endpoint=True))


_KINDS = ("choice", "uniform", "loguniform", "randint")


def _kind(domain: Any) -> str | None:
    """The one key that says what kind of domain it is."""
    keys = list(domain) if isinstance(domain, Mapping) else list(getattr(type(domain), "model_fields", ()))
    return keys[0] if len(keys) == 1 and keys[0] in _KINDS else None


Domain: TypeAlias = Annotated[
    Annotated[Choice, Tag("choice")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("loguniform")]
    | Annotated[RandInt, Tag("randint")],
    Discriminator(
        _kind,
        custom_error_type="domain",
        custom_error_message="expected one of {choice: [a, b]}, {uniform: [from, to]}, {loguniform: [from, to]}, "
        "{randint: [from, to]}",
    ),
]

DEFAULT_SPACE: Mapping[str, Choice | Uniform | LogUniform | RandInt] = {
    "train.optimizer.lr": LogUniform(loguniform=(1e-4, 1e-2)),
    "train.margin": Uniform(uniform=(0.1, 0.6)),
    "train.p": Choice(choice=(8, 16, 32)),
    "train.k": Choice(choice=(2, 4)),
    "augment.rotation": Choice(choice=(0, 90, 180)),
    "augment.shift": Uniform(uniform=(0.0, 0.15)),
    "augment.brightness": Uniform(uniform=(0.0, 0.3)),
    "augment.blur_probability": Uniform(uniform=(0.0, 0.5)),
}


class SearchConfig(Config):
    """How settings are searched."""

    samples: int = Field(16, ge=1, description="settings that are drawn, beside the configuration as it is")
    searcher: Literal["random", "optuna"] = Field(
        "random", description="what draws: chance, or Optuna's TPE from what was seen (pip install 'screening[optuna]')"
    )
    grace: int | None = Field(
        None, ge=1, description="epochs before a sample may be stopped; null: a ninth of train.epochs"
    )
    reduction: float = Field(3.0, gt=1, description="one in so many samples goes on from a rung to the next")
    finalists: int = Field(
        3,
        ge=1,
        description="best samples that are trained again with every further seed; the best mean is chosen",
    )
    space: dict[str, Domain] = Field(
        default_factory=lambda: dict(DEFAULT_SPACE), min_length=1, description="dotted key -> what it is drawn from"
    )


def load_search(url: str) -> SearchConfig:
    """Read a search from YAML; the word ``default`` stands for the built-in one.

    Raises:
        ConfigError: if the file is missing or not YAML, or says something that is not known.
    """
    if url == "default":
        return SearchConfig()
    try:
        document = yaml.safe_load(store.read_bytes(url))
    except InputError as error:
        raise ConfigError(f"--search: {error}; `--search default` needs no file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{url}: is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{url}: expected a YAML mapping with some of {', '.join(SearchConfig.model_fields)}")
    try:
        return SearchConfig.model_validate(document)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(entry)}" for entry in error.errors())
        raise ConfigError(f"{url}: the search is not usable:\n{problems}") from error


def check_space(space: Mapping[str, Choice | Uniform | LogUniform | RandInt], config: RunConfig) -> None:
    """Try the ends of every range and every choice on the configuration.

    Raises:
        ConfigError: naming every key that cannot be searched, with the nearest right one, and every wrong value.
    """
    problems = []
    for key, domain in space.items():
        group = key.partition(".")[0]
        reason = _FIXED.get(key)
        if reason or (group in RunConfig.model_fields and group not in GROUPS):
            why = reason or f"only settings of {', '.join(GROUPS)} are, which training alone depends on"
            problems.append(f"{key}: cannot be searched: {why}")
            continue
        for value in domain.edges():
            try:
                apply(config, {key: value})
            except ConfigError as error:
                problems += str(error).splitlines()[1:] or [str(error)]
    if problems:
        raise ConfigError(
            "the search's space does not fit the configuration:\n  "
            + "\n  ".join(dict.fromkeys(problem.strip() for problem in problems))
        )


def draw(space: Mapping[str, Choice | Uniform | LogUniform | RandInt], seed: int, number: int) -> dict[str, Any]:
    """The settings of one sample, a function of the space, a seed and the sample's number."""
    rng = np.random.default_rng([seed, 6, number])
    return {key: domain.draw(rng) for key, domain in space.items()}


def apply(config: RunConfig, settings: Settings) -> RunConfig:
    """The configuration with other settings.

    Raises:
        ConfigError: if they do not fit it, alone or together.
    """
    # The choice of a union goes before what is set in it.
    keys: Sequence[str] = sorted(settings, key=lambda key: not key.endswith(".method"))
    return override(config, [f"{key}={json.dumps(settings[key])}" for key in keys])


def _explain(entry: Any) -> str:
    # The location of a domain ends with its kind, which the user has written as a key.
    where = ".".join(str(part) for part in dict.fromkeys(entry["loc"]))
    if entry["type"] != "extra_forbidden":
        return f"{where}: {entry['msg']} (found {entry['input']!r})"
    known = list(SearchConfig.model_fields)
    near = difflib.get_close_matches(str(entry["loc"][-1]), known, n=1, cutoff=0.5)
    return f"{where}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known keys there: {known}")
