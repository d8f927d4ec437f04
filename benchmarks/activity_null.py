"""How often is what does nothing called active? Control wells that are passed off as compounds, by recipe.

Of a table of wells (plate, role or class of control, features) only the negative controls are used: some of each plate
are held out and play compounds, the others stay controls. A p-value that means what it says is at most 0.05 for 5 % of
them. The table is the real `profiles_cell_injury`, or with --simulate wells of nothing but noise.

    python benchmarks/activity_null.py profiles.csv.gz
    python benchmarks/activity_null.py --simulate
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.evaluate_recipes import NAMES
from screening.profiles import process
from screening.statistics import activity

RECIPES = {name: NAMES[name]() for name in ("raw", "standardised", "robust", "sphered", "tvn")}
DESIGNS = {"4 on one plate": (1, 4), "1 on each of 4 plates": (4, 1)}
CONTROLS = (8, 16, 32, 64)  # that are left on a plate
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?")
    parser.add_argument("--simulate", action="store_true")
    arguments = parser.parse_args()
    if arguments.simulate == (arguments.table is not None):
        parser.error("give a table or --simulate")
    plate, values = simulated() if arguments.simulate else controls_of(arguments.table)
    print("share of p-values up to 0.05 | 0.01 of control wells that play compounds")
    print(f"{'recipe':13} {'design':22}" + "".join(f"{f'{n} controls a plate':>23}" for n in CONTROLS))
    for recipe in RECIPES:
        for design in DESIGNS:
            shares = [f"{share(plate, values, recipe, design, n):>23}" for n in CONTROLS]
            print(f"{recipe:13} {design:22}" + "".join(shares), flush=True)


def share(plate: npt.NDArray[np.int64], values: npt.NDArray[np.float32], recipe: str, design: str, n: int) -> str:
    """Among the p-values of some rounds of holding wells out."""
    p = []
    for seed in range(ROUNDS):
        rng = np.random.default_rng([seed, n])
        n_plates, each = DESIGNS[design]
        wells, perturbation = [], []
        code = 0
        shuffled = {name: rng.permutation(np.flatnonzero(plate == name)) for name in np.unique(plate)}
        names = list(shuffled)
        for name in names:
            wells += shuffled[name][:n].tolist()
            perturbation += [-1] * n
        left = {name: shuffled[name][n:].tolist() for name in names}
        for start in range(0, len(names) - n_plates + 1, n_plates):
            group = names[start : start + n_plates]
            while min(len(left[name]) for name in group) >= each:
                for name in group:
                    wells += [left[name].pop() for _ in range(each)]
                    perturbation += [code] * each
                code += 1
        codes = np.array(perturbation)
        table = pd.DataFrame({"plate": plate[wells].astype(str)})
        table["role"] = np.where(codes < 0, "negative_control", "treatment")
        done = process(values[wells], table, RECIPES[recipe]).values
        found = activity(done, codes, table["plate"], codes < 0, 999, seed)["p_value"].to_numpy(float)
        p += found[~np.isnan(found)].tolist()
    return f"{np.mean(np.array(p) <= 0.05):.3f} | {np.mean(np.array(p) <= 0.01):.3f}"


def controls_of(path: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The negative controls of `profiles_cell_injury`."""
    table = pd.read_csv(path)
    table = table[table["injury_type"] == "Control"]
    features = [name for name in table if str(name).startswith(("Cells_", "Cytoplasm_", "Nuclei_"))]
    return pd.factorize(table["Plate"])[0].astype(np.int64), table[features].to_numpy(np.float32)


def simulated(
    plates: int = 8, wells: int = 110, features: int = 200
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Correlated noise, and an offset and a scale of each plate."""
    rng = np.random.default_rng(0)
    plate = np.repeat(np.arange(plates), wells)
    noise = rng.normal(size=(len(plate), 20)) @ rng.normal(size=(20, features)) + rng.normal(
        size=(len(plate), features)
    )
    values = noise * rng.uniform(0.7, 1.4, plates)[plate, None] + 3 * rng.normal(size=(plates, features))[plate]
    return plate, values.astype(np.float32)


if __name__ == "__main__":
    main()
