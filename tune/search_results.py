"""What a search found: a table of the samples and of the best one's test, and a plot of the epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from screening.markdown import table
from tune.results import markdown as tests_markdown
from tune.results import svg

_CHOSEN, _CONFIGURED, _OTHER = "#1f6f8b", "#1a1a1a", "#b8b8b8"


class Ranked(NamedTuple):
    """A sample and what it reached.

    Attributes:
        sample: its number.
        settings: dotted key -> value.
        stopped: whether it was stopped early.
        epochs: that it was trained for.
        scores: validation mAP of the best epoch of each seed.
    """

    sample: int
    settings: Mapping[str, Any]
    stopped: bool
    epochs: int
    scores: tuple[float, ...]


def ranking(results: pd.DataFrame, best: int) -> list[Ranked]:
    """The chosen sample, then those tried with most seeds, then those that ended, each by their mean score.

    Args:
        results: columns of :data:`storage_schemas.tables.SEARCH_RESULTS`.
        best: number of the sample that was chosen.
    """
    samples = []
    for number, own in results.groupby("sample"):
        first = own.iloc[0]
        scores = own.groupby("seed")["validation_map"].max()
        samples.append(
            Ranked(
                sample=int(str(number)),
                settings=json.loads(str(first["settings"])),
                stopped=first["state"] == "stopped",
                epochs=int(own["epoch"].max()),
                scores=tuple(scores.astype(float)),
            )
        )
    return sorted(samples, key=lambda s: (s.sample != best, -len(s.scores), s.stopped, -float(np.mean(s.scores))))


def markdown(results: pd.DataFrame, best: int, tests: pd.DataFrame) -> str:
    """A row a sample, the best first; below, what the best one's held-out test found.

    Args:
        results: as for :func:`ranking`.
        best: likewise.
        tests: of that sample, columns of :data:`storage_schemas.tables.SWEEP_RESULTS`.
    """
    ranked = ranking(results, best)
    keys = list(dict.fromkeys(key for sample in ranked for key in sample.settings))
    header = ["sample", *keys, "epochs", "seeds", "validation mAP"]
    rows = []
    for sample in ranked:
        values = [_text(sample.settings[key]) if key in sample.settings else "as configured" for key in keys]
        epochs = f"{sample.epochs}, stopped" if sample.stopped else str(sample.epochs)
        rows.append([str(sample.sample), *values, epochs, str(len(sample.scores)), _mean_sd(sample.scores)])
    title = (
        f"{len(ranked)} samples, {sum(sample.stopped for sample in ranked)} stopped early; sample {best} was chosen by "
        "its validation mAP (best epoch; mean ± sd over seeds, in %). Sample 0 is the configuration as it is."
    )
    tested = tests_markdown(tests, {f"sample-{best:03d}": f"sample {best}"})
    return f"{title}\n\n{table(header, rows, names=0)}\n\n{tested}"


def figure(results: pd.DataFrame, best: int) -> bytes:
    """Validation mAP by epoch as SVG: a line a training, a cross where it was stopped, the chosen sample in colour.

    Args:
        results: as for :func:`ranking`.
        best: likewise.
    """
    drawing = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = drawing.subplots()
    for (sample, _), own in results.sort_values("epoch").groupby(["sample", "seed"], sort=False):
        chosen = sample == best
        colour = _CHOSEN if chosen else _CONFIGURED if sample == 0 else _OTHER
        percent = 100 * own["validation_map"]
        axes.plot(own["epoch"], percent, color=colour, linewidth=2 if chosen else 1, zorder=3 if chosen else 2)
        mark = "x" if own["state"].iloc[0] == "stopped" else "o"
        axes.plot(own["epoch"].iloc[-1:], percent.iloc[-1:], mark, color=colour, markersize=5, zorder=3)
    labels = {f"sample {best}, chosen": _CHOSEN, "others": _OTHER} | ({"as configured": _CONFIGURED} if best else {})
    for label, colour in labels.items():
        axes.plot([], [], color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="validation mAP, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return svg(drawing)


def _mean_sd(scores: tuple[float, ...]) -> str:
    percent = 100 * np.array(scores)
    return f"{percent.mean():.1f}" + (f" ± {percent.std(ddof=1):.1f}" if len(percent) > 1 else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
