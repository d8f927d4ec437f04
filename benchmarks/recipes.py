"""Are recipes tuned to the table they are shown on? Their settings, chosen on some compounds and scored on others.

Run: ``python benchmarks/recipes.py SCREEN``, a screen whose profiles were imported and have classes (moa). Each recipe
is followed with each setting of a grid. Then, many times over, compounds are divided at random in two halves: of each
recipe, the setting that is best on one half is scored on the other. That stands beside the setting that the recipe has
by default, on the same halves, and beside the best setting of all compounds, which is what tuning would pretend to.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.vectors import read_profiles
from screening import retrieval
from screening.profiles import (
    Contrasted,
    Recentred,
    Recipe,
    Robust,
    Sphered,
    Standardised,
    Tvn,
    consensus_profiles,
    process,
)
from storage_schemas.screen import Screen

HALVES = 500
KEYS = ["compound", "concentration", "unit", "time", "cell_line"]

# The first setting of each is the default.
GRID: dict[str, list[Recipe]] = {
    "standardised": [Standardised(), Standardised(reference="plate")],
    "robust": [Robust(), *(Robust(limit=n) for n in (3, 10, 30)), *(Robust(max_correlation=c) for c in (0.8, 0.9))],
    "sphered": [Sphered(), *(Sphered(regularisation=n, limit=m) for n in (0.03, 0.1, 0.3, 1, 3) for m in (3, 6, 20))],
    "tvn": [Tvn(), *(Tvn(regularisation=n, prior=m) for n in (0.03, 0.3, 3) for m in (0.1, 0.3, 1))],
    "recentred": [Recentred(), *(Recentred(regularisation=n) for n in (0.1, 0.3, 3))],
    "contrasted": [Contrasted(), *(Contrasted(regularisation=n, limit=m) for n in (0.03, 0.3, 3) for m in (3, 6, 20))],
}


def hits(
    profiles: npt.NDArray[Any], label: list[Any], group: list[Any], compound: pd.Series[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """By compound: how many queries have a match nearest, and how many queries there are."""
    ranking = retrieval.rank(profiles, label, group, profiles, label, group, max_rank=1)
    codes = pd.factorize(compound, sort=True)[0]
    counted = ranking.n_matches > 0
    hit = (ranking.first_match == 1)[counted]
    return np.bincount(codes[counted], hit, codes.max() + 1), np.bincount(codes[counted], minlength=codes.max() + 1)


def replicates(values: npt.NDArray[Any], wells: pd.DataFrame, keys: list[str]) -> Any:
    """Treated wells that find their treatment on another plate."""
    treated = (wells["role"] != "negative_control").to_numpy()
    own = wells[treated]
    label = own.groupby(keys, dropna=False).ngroup().tolist()
    return hits(values[treated], label, own["plate"].tolist(), own["compound"])


def classes(values: npt.NDArray[Any], wells: pd.DataFrame, keys: list[str]) -> Any:
    """Treatments whose nearest treatment of another compound is of their class."""
    treated = ((wells["role"] != "negative_control") & wells["moa"].notna()).to_numpy()
    table, profiles = consensus_profiles(values[treated], wells.loc[treated, keys])
    moa = table["compound"].map(wells.drop_duplicates("compound").set_index("compound")["moa"])
    return hits(profiles, moa.tolist(), table["compound"].tolist(), table["compound"])


def main() -> None:
    wells, raw = read_profiles(Screen.open(sys.argv[1]), processed=False)
    keys = [key for key in KEYS if key in wells]
    rng = np.random.default_rng(0)
    print("| test | recipe | default | chosen on other compounds | best of all |\n|---|---|---:|---:|---:|")
    found: dict[str, dict[str, list[Any]]] = {"replicate top-1": {}, "class nearest": {}}
    for name, recipes in GRID.items():
        done = [process(raw, wells, recipe).values for recipe in recipes]
        found["replicate top-1"][name] = [replicates(values, wells, keys) for values in done]
        found["class nearest"][name] = [classes(values, wells, keys) for values in done]
    for test, of_recipe in found.items():
        for name, settings in of_recipe.items():
            right, asked = (np.stack(part) for part in zip(*settings, strict=True))
            default, chosen = [], []
            for _ in range(HALVES):
                half = rng.permutation(right.shape[1]) < right.shape[1] // 2
                best = (right[:, half].sum(axis=1) / asked[:, half].sum(axis=1)).argmax()
                share = right[:, ~half].sum(axis=1) / asked[:, ~half].sum(axis=1)
                default.append(share[0])
                chosen.append(share[best])
            best_of_all = (right.sum(axis=1) / asked.sum(axis=1)).max()
            print(f"| {test} | {name} | {np.mean(default):.3f} | {np.mean(chosen):.3f} | {best_of_all:.3f} |")


if __name__ == "__main__":
    main()
