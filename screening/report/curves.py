"""Curves as SVG that stands inside the page: its text is text, and its colours are the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_SERIES = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--accent)"}
_INK, _MUTED, _ACCENT = _SERIES


@dataclass(frozen=True)
class Curve:
    """A drawn curve, and in words what it shows."""

    title: str
    alt: str
    svg: Markup


def training_curves(training: pd.DataFrame) -> list[Curve]:
    """A small curve for every number that was logged by epoch, one a phase; its scale is its own."""
    if training.empty or "epoch" not in training:
        return []
    phases = {str(phase): rows for phase, rows in training.groupby("phase")}
    return [
        curve
        for phase, rows in phases.items()
        for curve in _phase_curves(rows, phase, f" ({phase})" if len(phases) > 1 else "")
    ]


def _phase_curves(training: pd.DataFrame, phase: str, suffix: str) -> list[Curve]:
    numbers = training.select_dtypes("number").drop(columns="epoch")
    curves = []
    for i, name in enumerate(numbers.columns):
        shown = np.isfinite(numbers[name].to_numpy(dtype=float))
        if not shown.any():
            continue
        epochs = training["epoch"].to_numpy()[shown]
        values = numbers[name].to_numpy(dtype=float)[shown]
        axes = _axes(3.2, 2.1)
        axes.plot(epochs, values, color=_ACCENT, marker="o", markersize=2.5, linewidth=1.6)
        axes.set(xlabel="epoch", xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
        title = str(name).replace("_", " ") + suffix
        alt = (
            f"{title} by epoch: {values[0]:.3g} at epoch {epochs[0]}, {values[-1]:.3g} at epoch "
            f"{epochs[-1]}; lowest {values.min():.3g}, highest {values.max():.3g}."
        )
        curves.append(Curve(title, alt, _svg(axes, f"{phase}-{i}")))
    return curves


def cmc_curve(key: str, result: Mapping[str, Any]) -> Markup | None:
    """Share of queries with a match among the first k, by k, beside a random order's."""
    cmc = np.asarray(result.get("cmc") or [], dtype=float)
    if not cmc.size or not np.isfinite(cmc).all():
        return None
    axes = _axes(4.2, 2.9)
    axes.plot(range(1, len(cmc) + 1), cmc, color=_ACCENT, linewidth=2, label="this screen")
    chance = np.asarray(result.get("cmc_chance") or [], dtype=float)
    if chance.shape == cmc.shape:
        axes.plot(range(1, len(cmc) + 1), chance, "--", color=_MUTED, label="chance")
    axes.set(xlabel="rank k", xlim=(0.5, len(cmc) + 0.5))
    axes.set(ylabel="queries with a match", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right")
    return _svg(axes, f"cmc-{key}")


def roc_curve(key: str, result: Mapping[str, Any]) -> Markup | None:
    """Share of a mechanism's compounds found by the share of others let in, averaged over mechanisms."""
    roc = result.get("roc") or {}
    false, true = (np.asarray(roc.get(name) or [], dtype=float) for name in ("fpr", "tpr"))
    if not true.size or not np.isfinite(true).all():
        return None
    axes = _axes(4.2, 2.9)
    axes.plot(false, true, color=_ACCENT, linewidth=2, label="this screen")
    axes.plot([0, 1], [0, 1], "--", color=_MUTED, label="chance")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="other compounds let in", xlim=(0, 1), ylabel="own compounds found", ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right")
    return _svg(axes, f"roc-{key}")


def _axes(width: float, height: float) -> Axes:
    """Empty axes of a figure (inches) in the page's colours, without a global pyplot state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelcolor=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return axes


def _svg(axes: Axes, prefix: str) -> Markup:
    """The figure as SVG to stand inside the page: its text is text, its colours are the page's and
    its ids begin with `prefix`, since several figures share the page's one name space."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace('id="', f'id="{prefix}-').replace("url(#", f"url(#{prefix}-")
    text = text.replace('xlink:href="#', f'href="#{prefix}-')
    for placeholder, colour in _SERIES.items():
        text = text.replace(placeholder, colour)
    return Markup(text)
