"""A small screen in which every part of a report is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from screening.report import Example, ReportData, channel_colours, moa_similarity

HOSTILE = '</script><script>alert("x")</script>&\'"<img src=http://evil.example/x>$\\frac{'


def evaluation() -> dict[str, Any]:
    def metric(value: float, chance: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.125, "high": value + 0.125, "chance": chance}

    return {
        "rank1": metric(0.625, 0.125),
        "rank5": metric(0.75, 0.25),
        "map": metric(0.5, 0.125),
        "accuracy": metric(0.5, 0.125),
        "n_queries": 1234,
        "n_compounds": 4,
        "n_gallery": 900,
        "n_left_out": {"queries_without_moa": 3},
        "cmc": [0.625, 0.75, 0.8],
        "cmc_chance": [0.125, 0.2, 0.3],
        "roc": {"fpr": [0.0, 0.5, 1.0], "tpr": [0.25, 0.75, 1.0]},
        "confusion": {
            "moas": ["fission", "fusion", "unasked"],
            "compounds": [[1, 1, 0], [0, 2, 0], [0, 0, 0]],
            "neighbours": [[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], None],
        },
        "note": None,
        "contrasts": {"fission vs fusion": {"rank1": metric(0.75, 0.5)}},
    }


def screen(compound: str = "drug A", n_rows: int = 2, n_columns: int = 3) -> ReportData:
    """A small screen in which every part is there."""
    rng = np.random.default_rng(0)
    wells = pd.DataFrame(
        [
            {
                "plate": plate,
                "well": f"{'ABCDEFGHIJKLMNOP'[row]}{column + 1:02d}",
                "role": "negative_control" if column == 0 else "treatment",
                "compound": "DMSO" if column == 0 else compound,
                "concentration": None if column == 0 else 0.5,
                "unit": "uM",
                "moa": None if column == 0 else ("fission", "fusion")[row % 2],
                "n_cells": float(10 * row + column),
            }
            for plate in ("p1", "p2")
            for row in range(n_rows)
            for column in range(n_columns)
        ]
    )
    cells = wells[["compound", "moa", "plate", "well"]].sample(50, replace=True, random_state=0)
    return ReportData(
        title="A small screen",
        provenance={"version": "1.0", "config": {"seed": 1}},
        counts=pd.DataFrame({"stage": ["segment"], "in": [1200], "out": [1000], "reasons": [{"border": 200}]}),
        plate_maps=wells,
        quality=pd.DataFrame({"plate": ["p1", "p2"], "sites": [4, 4], "frames": [32, 32], "bad": [0.0, 0.125]}),
        quality_limits=pd.DataFrame({"plate": ["p1"], "channel": ["nucleus"], "soft_below": [0.0123]}),
        bad_sites=pd.DataFrame({"site": ["p2/A01/0"], "outcome": ["failed"], "reason": ["unreadable"], "what": ["x"]}),
        training=pd.DataFrame(
            {"phase": ["train"] * 3, "epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.5], "lr": [0.1, 0.1, 0]}
        ),
        embedding_map=cells.assign(x=rng.normal(size=50), y=rng.normal(size=50)),
        evaluation={"compound": evaluation(), "replicate": evaluation()},
        similarity=moa_similarity(rng.normal(size=(4, 5)), pd.Series(["fission", "fission", "fusion", None])),
        activity=pd.DataFrame({"compound": [compound], "map": [0.75], "p": [0.0123], "active": [True]}),
        consistency=pd.DataFrame({"moa": ["fission"], "map": [0.5]}),
        doses=pd.DataFrame({"compound": [compound], "spearman": [0.9]}),
        controls=pd.DataFrame({"plate": ["p1"], "z_prime": [0.4]}),
        predictions=pd.DataFrame({"compound": [compound], "moa": ["fusion"], "share": [0.8]}),
        prediction_notes=["One of ten may be called unknown"],
        retrieval=pd.DataFrame(
            {
                "compound": [compound, compound],
                "moa": ["fission", "fission"],
                "rank": [1, 2],
                "neighbour": ["drug B", "drug C"],
                "neighbour_moa": ["fission", None],
                "similarity": [0.91234567, -0.2],
            }
        ),
        examples=[example(compound), example("DMSO"), example(compound)],
        notes=["Only two compounds were screened."],
    )


def example(compound: str = "drug A", channels: tuple[str, ...] = ("nucleus", "mito")) -> Example:
    clip = np.random.default_rng(1).integers(0, 255, (len(channels), 4, 16, 16), dtype=np.uint8)
    return Example(compound, "in well A02", clip, channel_colours(channels))
