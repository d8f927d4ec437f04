"""How often is an unseen mechanism called "none of the known"? Each mechanism of a screen is left out in turn.

The limit of what is near is calibrated on the compounds of all other mechanisms, as `screening predict` does, and then
compounds of the mechanism that was left out are asked. Vectors must not come from a network that was trained on the
mechanism: give a screen of hand-made features, such as `screening compare SCREEN` leaves in SCREEN/compare/features, or
with --simulate vectors of which all is known.

    python benchmarks/novelty.py SCREEN/compare/features SCREEN
    python benchmarks/novelty.py --simulate
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.evaluate_recipes import NAMES
from pipelines.inputs import well_keys
from pipelines.vectors import EmbeddedCells
from screening.prediction import novelty
from screening.profiles import Recipe, consensus_profiles, process
from storage_schemas.screen import Screen
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, open_table

FALSE_ALARMS = 0.1
RECIPES = {name: NAMES[name]() for name in ("raw", "standardised", "robust", "sphered", "tvn")}


class Table(NamedTuple):
    """Profiles of compounds and of groups of control wells."""

    profiles: npt.NDArray[np.float32]
    moa: npt.NDArray[np.object_]
    controls: npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", nargs="?", help="screen whose embeddings are taken")
    parser.add_argument("screen", nargs="?", help="screen with the plate map and the compounds")
    parser.add_argument("--simulate", action="store_true")
    arguments = parser.parse_args()
    if arguments.simulate == (arguments.screen is not None):
        parser.error("give two screens or --simulate")
    if arguments.simulate:
        tables = {f"spread {spread}": simulated(spread) for spread in (0.4, 0.6, 0.8, 1.0)}
    else:
        tables = {name: from_screen(arguments.vectors, arguments.screen, recipe) for name, recipe in RECIPES.items()}
    print(f"{'profiles':14} compounds  unseen found  known called unknown  controls far from all")
    for name, table in tables.items():
        found, alarms, controls = left_out_in_turn(table)
        print(f"{name:14} {len(table.moa):9}  {found:12.3f}  {alarms:20.3f}  {controls:21.3f}")


def left_out_in_turn(table: Table) -> tuple[float, float, float]:
    """Shares below the limit of the compounds left out, of the others each without itself, and of controls."""
    found, alarms, controls = [], [], []
    for moa in sorted(set(table.moa)):
        hidden = table.moa == moa
        known = [None if each == moa else str(each) for each in table.moa]
        names = [str(i) for i in range(len(known))]
        result = novelty(table.profiles, names, known, table.controls, FALSE_ALARMS)
        far = result.similarity < result.threshold
        found += far[hidden].tolist()
        alarms += far[~hidden].tolist()
        controls.append(1 - result.controls)
    return float(np.mean(found)), float(np.mean(alarms)), float(np.mean(controls))


def from_screen(vectors: str, url: str, recipe: Recipe) -> Table:
    """Compounds whose mechanism is known, from embeddings of cells."""
    screen = Screen(url)
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    moa = open_table(screen.compounds, COMPOUNDS).to_pandas().set_index("compound")["moa"]
    keys, cells = EmbeddedCells(Screen(vectors), well_keys(plate_map)).read()
    of_well, profiles = consensus_profiles(cells, keys[["plate", "well"]])
    wells = of_well.merge(plate_map, on=["plate", "well"], how="left")
    values = process(profiles, wells, recipe).values
    control = (wells["role"] == "negative_control").to_numpy()
    compounds, merged = consensus_profiles(values[~control], wells.loc[~control, ["compound"]])
    labels = compounds["compound"].map(moa)
    number = pd.DataFrame({"number": wells[control].groupby("plate").cumcount()})
    known = labels.notna().to_numpy()
    return Table(merged[known], labels[known].to_numpy(object), consensus_profiles(values[control], number)[1])


def simulated(spread: float, moas: int = 20, each: int = 6, features: int = 40) -> Table:
    """Mechanisms as normal vectors, compounds about them at a share of that distance."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(moas, features)), each, axis=0)
    profiles = centres + spread * rng.normal(size=centres.shape)
    moa = np.repeat(np.array([f"m{i}" for i in range(moas)], object), each)
    return Table(profiles.astype(np.float32), moa, rng.normal(size=(50, features)).astype(np.float32))


if __name__ == "__main__":
    main()
