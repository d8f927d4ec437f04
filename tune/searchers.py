"""What proposes the samples of a search to Ray Tune: a list first, and then, if asked for, Optuna."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.search import Searcher

from pipelines.config import ConfigError
from tune.space import Choice, LogUniform, RandInt, Settings, Uniform

METRIC = "best"  # validation mAP of the best epoch so far

_Space = Mapping[str, Choice | Uniform | LogUniform | RandInt]


class Listed(Searcher):
    """Proposes listed settings, and then, under the next numbers, what another searcher does.

    Args:
        listed: number of a sample -> its settings.
        then: asked when the list is at its end; None ends the search.
        first: the number of its first sample.
        started: told of every sample before it begins.
    """

    def __init__(
        self,
        listed: Mapping[int, Settings],
        then: FromOptuna | None,
        first: int,
        started: Callable[[int, Settings], None],
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._listed = list(listed.items())
        self._then = then
        self._next = first
        self._started = started
        self._asked: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next sample."""
        if self._listed:
            number, settings = self._listed.pop(0)
        elif self._then is None:
            return str(Searcher.FINISHED)
        else:
            number, settings = self._next, self._then.suggest(trial_id)
            self._next += 1
            self._asked.add(trial_id)
        self._started(number, settings)
        return {"number": number, "settings": settings}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the other searcher of a sample of its own."""
        if self._then is not None and trial_id in self._asked:
            self._then.on_trial_complete(trial_id, (result or {}).get(METRIC))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what was tried is known from the samples' records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


class FromOptuna:
    """Optuna's TPE (Bergstra et al., NeurIPS 2011) over a space.

    Args:
        space: what to draw from.
        seed: of its random numbers.
        seen: settings that were tried, and their validation mAP.

    Raises:
        ConfigError: if Optuna is not installed.
    """

    def __init__(self, space: _Space, seed: int, seen: Iterable[tuple[Settings, float]]) -> None:
        check_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._distributions = {key: _distribution(domain) for key, domain in space.items()}
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self._asked: dict[str, Any] = {}
        for settings, value in seen:
            if settings.keys() == space.keys():
                params = {key: _place(domain, settings[key]) for key, domain in space.items()}
                self._study.add_trial(
                    optuna.trial.create_trial(params=params, distributions=self._distributions, value=value)
                )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """New settings."""
        asked = self._asked[trial_id] = self._study.ask(self._distributions)
        return {key: _value(domain, asked.params[key]) for key, domain in self._space.items()}

    def on_trial_complete(self, trial_id: str, value: float | None) -> None:
        """Learn what came of settings; None: they failed."""
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else None
        self._study.tell(self._asked.pop(trial_id), value, state=state)


def check_optuna() -> None:
    """Find before anything is run that Optuna is missing.

    Raises:
        ConfigError: naming the extra to install.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("searcher: optuna is not installed: pip install 'screening[optuna]', or choose random")


def _distribution(domain: Choice | Uniform | LogUniform | RandInt) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        # By position, so that values may be anything.
        return CategoricalDistribution(range(len(domain.choice)))
    if isinstance(domain, RandInt):
        return IntDistribution(*domain.randint)
    return FloatDistribution(*domain.bounds, log=isinstance(domain, LogUniform))


def _value(domain: Choice | Uniform | LogUniform | RandInt, place: Any) -> Any:
    if isinstance(domain, Choice):
        return domain.choice[place]
    return place if isinstance(domain, RandInt) else domain.rounded(place)


def _place(domain: Choice | Uniform | LogUniform | RandInt, value: Any) -> Any:
    return domain.choice.index(value) if isinstance(domain, Choice) else value
