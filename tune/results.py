"""What a sweep found: the table of MitoReID's form, and a plot of it."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from screening.evaluation import ALL_MOAS
from screening.markdown import table

_SHOWN = {"rank1": "Rank-1", "map": "mAP"}
_COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#6a4c93")


def markdown(results: pd.DataFrame, sentences: Mapping[str, str]) -> str:
    """The table of MitoReID's form: a row an ablation, mean ± standard deviation over seeds in percent.

    Args:
        results: columns of :data:`storage_schemas.tables.SWEEP_RESULTS`; of several tests the first is shown.
        sentences: what each ablation's row is called.
    """
    held_out = _first_test(results)
    networks = list(held_out["network"].unique())
    contrasts = [name for name in held_out["contrast"].unique() if name != ALL_MOAS]
    scores = {(ALL_MOAS, metric): name for metric, name in _SHOWN.items()}
    scores |= {(name, "rank1"): f"Rank-1, {name}" for name in contrasts}
    columns = [(network, key) for network in networks for key in scores]
    values = dict(list(held_out.groupby(["ablation", "network", "contrast", "metric"])["value"]))
    by_chance = dict(list(held_out.groupby(["network", "contrast", "metric"])["chance"]))
    heads = [f"{network} {scores[key]}" for network, key in columns]
    header = ["", *heads, *(f"{network} training, s" for network in networks), "epochs", "seeds", "queries"]
    rows = []
    trials = held_out[held_out["contrast"] == ALL_MOAS].drop_duplicates(["ablation", "network", "seed"])
    for name, own in trials.groupby("ablation", sort=False):
        cost = [_mean_sd(own.loc[own["network"] == network, "train_seconds"], digits=0) for network in networks]
        seeds = own.groupby("network")["seed"].nunique()
        spans = [_span(own["epochs"]), _span(seeds), _span(own["n_queries"])]
        shares = [_mean_sd(_percent(values.get((name, network, *key)))) for network, key in columns]
        rows.append([sentences[str(name)], *shares, *cost, *spans])
    chance = [_mean_sd(_percent(by_chance.get((network, *key))), sd=False) for network, key in columns]
    rows.append(["chance", *chance, *[""] * (len(header) - 1 - len(chance))])
    test = str(held_out["test"].iloc[0]) if len(held_out) else "compound"
    title = (
        f"Test {test}: held-out cells looked up among trained ones; mean ± sd over seeds, in %. Training is the "
        "wall-clock time of one trial, beside those that ran at the same time."
    )
    return f"{title}\n\n{table(header, rows)}\n"


def figure(results: pd.DataFrame, sentences: Mapping[str, str]) -> bytes:
    """Rank-1 and mAP of every ablation as SVG: a dot a seed, mean ± standard deviation, chance dashed.

    Args:
        results: as for :func:`markdown`.
        sentences: likewise.
    """
    held_out = _first_test(results)
    held_out = held_out[held_out["contrast"] == ALL_MOAS]
    names = list(held_out["ablation"].unique())
    networks = list(held_out["network"].unique())
    drawing = Figure(figsize=(9.0, 1.6 + 0.45 * len(names)), layout="constrained")
    panels = drawing.subplots(1, len(_SHOWN), sharey=True)
    for axes, (metric, title) in zip(panels, _SHOWN.items(), strict=True):
        shown = held_out[held_out["metric"] == metric]
        for i, network in enumerate(networks):
            of_network = shown[shown["network"] == network]
            colour = _COLOURS[i % len(_COLOURS)]
            offset = (i - (len(networks) - 1) / 2) * 0.6 / max(len(networks), 1)
            for row, name in enumerate(names):
                percent = _percent(of_network.loc[of_network["ablation"] == name, "value"])
                if percent.empty:
                    continue
                place = row + offset
                sd = percent.std() if len(percent) > 1 else 0.0
                axes.errorbar(percent.mean(), place, xerr=sd, fmt="o", color=colour, capsize=3)
                axes.plot(percent, np.full(len(percent), place), ".", color=colour, alpha=0.4, markersize=4)
            axes.plot([], [], "o", color=colour, label=network)
        if len(shown):
            axes.axvline(_percent(shown["chance"]).mean(), color="#808080", linestyle="--", linewidth=1, label="chance")
        axes.set(xlabel=f"{title}, %", xlim=(0, 102), ylim=(max(len(names), 1) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), [sentences[name] for name in names])
        axes.spines[["top", "right"]].set_visible(False)
    if networks:
        drawing.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(networks) + 1, frameon=False
        )
    return svg(drawing)


def svg(drawing: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep", "text.parse_math": False}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _first_test(results: pd.DataFrame) -> pd.DataFrame:
    return results[results["test"] == results["test"].iloc[0]] if len(results) else results


def _percent(shares: pd.Series[float] | None) -> pd.Series[float]:
    return pd.Series(dtype=float) if shares is None else 100 * shares.astype(float).dropna()


def _mean_sd(values: pd.Series[float], *, sd: bool = True, digits: int = 1) -> str:
    if values.empty:
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean + (f" ± {values.std():.{digits}f}" if sd and len(values) > 1 else "")


def _span(counts: pd.Series[int]) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
