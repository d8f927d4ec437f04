"""The held-out tests: numbers beside chance, curves and confusions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from screening.report.curves import cmc_curve, roc_curve
from screening.report.groups import Group, natural
from screening.report.tables import number, percent

TESTS = {
    "compound": (
        "Compounds never trained on",
        "Cells of compounds that the model never saw are matched to cells of known compounds.",
    ),
    "replicate": (
        "A replicate never trained on",
        "Cells of a held-out replicate are matched to cells of the other replicates.",
    ),
    "well": ("Wells never trained on", "Cells of held-out wells are matched to cells of trained ones."),
    "cell": (
        "Cells never trained on",
        "Held-out cells are matched to trained ones, others of their own wells among them, which flatters the network.",
    ),
    "query": ("Queries of the split's table", "Cells that the table names as queries are matched to its gallery."),
}
USUAL_TESTS = ("compound", "replicate")


@dataclass(frozen=True)
class Metric:
    """A measured share in [0, 1] with its 95 % interval and what guessing reaches, where known."""

    label: str
    value: float
    low: float | None
    high: float | None
    chance: float | None

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        low, high = percent(self.low), percent(self.high)
        return f"{low} to {high}"

    @property
    def times_chance(self) -> float | None:
        return self.value / self.chance if self.chance else None

    @property
    def verdict(self) -> str:
        """What interval and chance say together, in words."""
        if self.chance is None or self.low is None or self.high is None:
            return "How this compares with chance was not measured."
        times = self.times_chance
        if self.low > self.chance and times is not None:
            return f"That is {times:.1f} times chance, and the interval lies above chance."
        if self.high < self.chance:
            return "That is below chance."
        return "The interval includes chance: this test shows no effect."


@dataclass(frozen=True)
class Contrast:
    """The same metrics among the compounds of a few mechanisms."""

    label: str
    metrics: list[Metric]


class ConfusionRow(NamedTuple):
    """Number of a mechanism, and the share of its cells by answer."""

    moa: int
    shares: list[float]


@dataclass(frozen=True)
class Confusion:
    """Mechanisms as (number, name), and of each queried one the shares of its cells by answer."""

    labels: list[tuple[str, str]]
    rows: list[ConfusionRow]


@dataclass(frozen=True)
class Test:
    """One held-out test as the template shows it; without metrics it could not be held."""

    key: str
    title: str
    explanation: str
    size: str
    note: str
    headline: Metric | None
    metrics: list[Metric]
    contrasts: list[Contrast]
    cmc: Markup | None
    roc: Markup | None
    confusion: Confusion | None


def held_out_test(key: str, result: Mapping[str, Any] | None, mechanisms: Mapping[str, Group]) -> Test:
    """A test by its name in :data:`TESTS` and what `evaluation.evaluate` returned of it."""
    title, explanation = TESTS[key]
    result = result or {}
    metrics = _metrics(result)
    counted = (
        ("n_queries", "query cells"),
        ("n_compounds", "compounds"),
        ("n_gallery", "reference cells"),
    )
    return Test(
        key=key,
        title=title,
        explanation=explanation,
        size=", ".join(f"{int(result[k]):,} {what}" for k, what in counted if result.get(k)),
        note=str(result.get("note") or ""),
        headline=metrics.get("rank1"),
        metrics=list(metrics.values()),
        contrasts=[
            Contrast(str(label), list(_metrics(contrast).values()))
            for label, contrast in (result.get("contrasts") or {}).items()
        ],
        cmc=cmc_curve(key, result),
        roc=roc_curve(key, result),
        confusion=_confusion(result.get("confusion") or {}, mechanisms),
    )


def _metrics(result: Mapping[str, Any]) -> dict[str, Metric]:
    """The measured ones of rank1, rank5…, map, accuracy and auc, in this order."""
    ranks = sorted((key for key in result if re.fullmatch(r"rank\d+", key)), key=natural)
    labels = {key: f"Rank-{key[4:]}" for key in ranks} | {
        "map": "mAP",
        "accuracy": "accuracy",
        "auc": "AUC",
    }
    found = {}
    for key, label in labels.items():
        measured = result.get(key) or {}
        value = number(measured.get("value"))
        if value is not None:
            low, high, chance = (number(measured.get(k)) for k in ("low", "high", "chance"))
            found[key] = Metric(label, value, low, high, chance)
    return found


def _confusion(confusion: Mapping[str, Any], mechanisms: Mapping[str, Group]) -> Confusion | None:
    names = [str(name) for name in confusion.get("moas") or []]
    labels = [(mechanisms[n].code if n in mechanisms else "", n) for n in names]
    rows = [
        ConfusionRow(i, [round(float(share), 3) for share in shares])
        for i, shares in enumerate(confusion.get("neighbours") or [])
        if shares is not None
    ]
    return Confusion(labels, rows) if rows else None
