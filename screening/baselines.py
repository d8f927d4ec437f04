"""Hand-made features over time and a classifier: what MitoReID compares itself with under the name IPP.

MitoReID (Nature Computational Science 2024) describes its own as shape and intensity features over the frames,
z-scored, then a classifier. Here each feature's course over time is summed up in a few statistics, so that movies may
differ in length and frames may be missing.

Shapes: n cells, F features, T frames, S statistics, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from screening.cosines import Floats
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Statistic = Literal["mean", "sd", "slope", "first", "last"]

# Probabilities below this are as good as none; their logarithms would outweigh all others.
_LEAST_PROBABILITY = 1e-6


class Discriminant(Config):
    """Linear discriminant analysis with a shrunk covariance: quick with many features and classes."""

    method: Literal["discriminant"] = Field("discriminant", description="linear discriminant analysis")
    shrinkage: float | None = Field(
        None, ge=0, le=1, description="of the covariance towards a sphere; null: Ledoit and Wolf's"
    )


class Logistic(Config):
    """Multinomial logistic regression with an L2 penalty, each class of equal weight."""

    method: Literal["logistic"] = Field("logistic", description="multinomial logistic regression")
    c: float = Field(1.0, gt=0, description="inverse of the penalty's strength")


class BaselineConfig(Config):
    """Hand-made features as the network's rival in `screening compare`."""

    statistics: tuple[Statistic, ...] = Field(
        ("mean", "sd", "slope", "first", "last"),
        description="what each feature's course over a clip's frames is summed up in: of mean, sd, slope, first, last",
    )
    classifier: Annotated[Discriminant | Logistic, Field(discriminator="method")] = Field(
        Discriminant(), description="what tells classes apart by the z-scored statistics"
    )

    @field_validator("statistics")
    @classmethod
    def _statistics_differ(cls, statistics: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
        if not statistics or len(set(statistics)) < len(statistics):
            raise ValueError("name at least one statistic, each once")
        return statistics


# --- over time -----------------------------------------------------------------------------------


def summarise(features: npt.NDArray[Any], time: npt.ArrayLike, statistics: tuple[Statistic, ...]) -> Floats:
    """Sum up each feature's course over time, from the frames in which it is defined.

    Args:
        features: (n, F, T); NaN (or infinite) where a cell is not seen or a feature not defined.
        time: (T,) of each frame, ascending, in any unit.
        statistics: ``mean`` and ``sd`` (population) over the frames, the ``slope`` of the line of least squares (per
            unit of time), and the ``first`` and the ``last`` defined value.

    Returns:
        (n, S F) float64, statistic by statistic. NaN where a feature is defined in no frame, of a slope in fewer than
        two.
    """
    values = np.asarray(features, np.float64)
    defined = np.isfinite(values)
    course = _Course(np.where(defined, values, 0.0), defined, np.asarray(time, np.float64))
    seen = defined.any(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(seen, _STATISTICS[name](course), np.nan) for name in statistics]
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class _Course:
    """(n, F, T) values, 0 where not defined, and (T,) times."""

    values: Floats
    defined: npt.NDArray[np.bool_]
    time: Floats

    def mean(self, values: Floats) -> Floats:
        """(n, F) means over the defined frames."""
        return np.asarray((values * self.defined).sum(axis=2) / self.defined.sum(axis=2))

    def centred(self, values: Floats) -> Floats:
        """(n, F, T) differences from the mean, 0 where not defined."""
        return np.where(self.defined, values - self.mean(values)[..., None], 0.0)

    def at(self, frame: npt.NDArray[np.int64]) -> Floats:
        """(n, F) values at (n, F) frames."""
        return np.take_along_axis(self.values, frame[..., None], axis=2)[..., 0]


def _slope(course: _Course) -> Floats:
    time = course.centred(np.broadcast_to(course.time, course.values.shape))
    slope: Floats = (time * course.centred(course.values)).sum(axis=2) / np.square(time).sum(axis=2)
    return slope


_STATISTICS: Mapping[str, Callable[[_Course], Floats]] = {
    "mean": lambda course: course.mean(course.values),
    "sd": lambda course: np.sqrt(course.mean(np.square(course.centred(course.values)))),
    "slope": _slope,
    "first": lambda course: course.at(course.defined.argmax(axis=2)),
    "last": lambda course: course.at(len(course.time) - 1 - course.defined[..., ::-1].argmax(axis=2)),
}


# --- z-scores and classes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaler:
    """What statistics are centred and scaled by: mean and standard deviation over the training cells.

    Attributes:
        center: (D,) float64.
        scale: (D,) float64; 0 where the training cells do not vary, or none has the statistic: it is left out.
    """

    center: Floats
    scale: Floats

    @classmethod
    def fit(cls, summary: Floats) -> Scaler:
        """Measure (n, D) statistics of the training cells, NaN where there is none.

        Raises:
            InputError: if no statistic varies among them.
        """
        defined = np.isfinite(summary)
        count = np.maximum(defined.sum(axis=0), 1)
        center = np.where(defined, summary, 0.0).sum(axis=0) / count
        scale = np.sqrt(np.square(np.where(defined, summary - center, 0.0)).sum(axis=0) / count)
        # Equal values differ from their mean by rounding, which must not become the unit.
        scale = np.where(scale > np.finfo(np.float32).eps * np.abs(center), scale, 0.0)
        if not scale.any():
            raise InputError(
                f"none of {len(scale)} statistics of features varies among {len(summary)} training cells: "
                "name others in baseline.statistics, or look at the cells' features"
            )
        return cls(center, scale)

    def apply(self, summary: Floats) -> npt.NDArray[np.float32]:
        """z-scores (n, d) of (n, D) statistics that varied in training; 0, the training mean, where there is none."""
        kept = self.scale > 0
        scores = (summary[:, kept] - self.center[kept]) / self.scale[kept]
        return np.where(np.isfinite(scores), scores, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Classifier:
    """A classifier of z-scores.

    Attributes:
        class_names: the K classes, sorted, in the order of the probabilities.
        model: of scikit-learn.
    """

    class_names: tuple[str, ...]
    model: Any

    @classmethod
    def fit(cls, scores: npt.NDArray[Any], label: npt.NDArray[Any], config: BaselineConfig) -> Classifier:
        """Learn the classes of training cells.

        Args:
            scores: (n, d) z-scores.
            label: (n,) class of each.
            config: which classifier.

        Raises:
            InputError: if there are fewer than two classes, or as many as cells.
        """
        # Loaded here, as the configuration is read by processes that never fit anything.
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        from sklearn.linear_model import LogisticRegression

        names, codes = np.unique(label.astype(str), return_inverse=True)
        if len(names) < 2:
            raise InputError(f"the training cells are of {len(names)} class(es) {names.tolist()}; two are needed")
        if len(names) == len(label):
            raise InputError(f"each of {len(label)} training cells is of a class of its own; more cells are needed")
        choice = config.classifier
        if isinstance(choice, Discriminant):
            shrinkage = "auto" if choice.shrinkage is None else choice.shrinkage
            # As in the P×K batches of the network, all classes are equally frequent.
            even = np.full(len(names), 1 / len(names))
            model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=even)
        else:
            model = LogisticRegression(C=choice.c, class_weight="balanced", max_iter=1000)
        return cls(tuple(names.tolist()), model.fit(scores.astype(np.float64), codes))

    def probabilities(self, scores: npt.NDArray[Any]) -> Floats:
        """(n, K) class probabilities of (n, d) z-scores; rows add up to 1."""
        return np.asarray(self.model.predict_proba(scores.astype(np.float64)))


def log_ratios(probabilities: Floats) -> npt.NDArray[np.float32]:
    """Probabilities as vectors to compare by cosine: logarithms, less their mean (Aitchison's centred log-ratio).

    Args:
        probabilities: (n, K); those below 1e-6 count as 1e-6.

    Returns:
        (n, K) float32.
    """
    logs = np.log(np.maximum(probabilities, _LEAST_PROBABILITY))
    ratios: npt.NDArray[np.float32] = (logs - logs.mean(axis=1, keepdims=True)).astype(np.float32)
    return ratios
