"""What a run starts from: plates, plate map and compounds, opened and checked against each other."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.plate import Plate, open_plate
from storage_schemas.tables import COMPOUNDS, read_compounds, read_plate_map

if TYPE_CHECKING:  # the configuration pulls in torch, which segmentation workers do without
    from pipelines.config import InputsConfig


@dataclass(frozen=True)
class Inputs:
    """Checked inputs.

    Attributes:
        plates: plate name -> opened plate.
        plate_map: a row a well that will be run (see :data:`storage_schemas.tables.PLATE_MAP`).
        compounds: a row a compound of the plate map.
        notes: what was skipped, as the configuration allows.
    """

    plates: dict[str, Plate]
    plate_map: pd.DataFrame
    compounds: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def wells(self) -> list[WellKey]:
        """The units of work, in order."""
        return well_keys(self.plate_map)


def well_keys(table: pd.DataFrame) -> list[WellKey]:
    """The keys of a table's rows, from its columns plate and well."""
    return [WellKey(plate, well) for plate, well in zip(table["plate"], table["well"], strict=True)]


def open_inputs(config: InputsConfig) -> Inputs:
    """Open plates and tables and check that they belong together.

    Raises:
        InputError: saying what does not fit, where, and which setting or edit mends it.
    """
    plate_map = read_plate_map(config.plate_map)
    plates = _open_plates(config.plates)
    notes: list[str] = []

    mapped = set(well_keys(plate_map))
    imaged = {WellKey(plate.name, well) for plate in plates.values() for well in plate.well_paths}
    _settle(
        sorted(map(str, imaged - mapped)),
        f"well(s) with images are not in the plate map {config.plate_map}",
        "unmapped_wells",
        config.unmapped_wells,
        notes,
    )
    _settle(
        sorted(map(str, mapped - imaged)),
        f"well(s) of the plate map {config.plate_map} are on none of the plates {sorted(plates)}",
        "missing_wells",
        config.missing_wells,
        notes,
    )
    here = [key in imaged for key in well_keys(plate_map)]
    plate_map = plate_map[here].reset_index(drop=True)
    if plate_map.empty:
        raise InputError(
            f"no well of {config.plate_map} has images: its plates are called "
            f"{sorted({key.plate for key in mapped})}, the images' {sorted(plates)}"
        )
    plates = {name: plate for name, plate in plates.items() if name in set(plate_map["plate"])}
    used = set(plate_map["compound"])
    if config.compounds is None:
        compounds = pd.DataFrame({name: None for name in COMPOUNDS.schema.names}, index=range(len(used)))
        compounds["compound"] = compounds["name"] = sorted(used)
    else:
        compounds = read_compounds(config.compounds)
        unknown = sorted(used - set(compounds["compound"]))
        if unknown:
            raise InputError(
                f"{config.compounds}: compound(s) {unknown[:5]} of the plate map are not in it; add a row for each "
                "(its MOA may stay empty)"
            )
        _settle(
            sorted(set(compounds["compound"]) - used),
            f"compound(s) of {config.compounds} are on no plate",
            "unused_compounds",
            config.unused_compounds,
            notes,
        )
        compounds = compounds[compounds["compound"].isin(used)].reset_index(drop=True)
    return Inputs(plates, plate_map, compounds, tuple(notes))


def _open_plates(patterns: tuple[str, ...]) -> dict[str, Plate]:
    plates: dict[str, Plate] = {}
    for pattern in patterns:
        for url in _matches(pattern):
            plate = open_plate(url)
            if plate.name in plates:
                raise InputError(
                    f"two plates are called {plate.name!r}: {plates[plate.name].url} and {url}; rename one"
                )
            plates[plate.name] = plate
    return plates


def _matches(pattern: str) -> list[str]:
    folder, _, last = pattern.rstrip("/").rpartition("/")
    if not set(last) & set("*?["):
        return [pattern]
    names = fnmatch.filter(store.list_names(folder), last)
    if not names:
        raise SchemaError(pattern, "no plate matches")
    return [store.join(folder, name) for name in names]


def _settle(found: list[str], what: str, setting: str, choice: str, notes: list[str]) -> None:
    """What does not fit is an error, or a note where the configuration says to skip it."""
    if not found:
        return
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    message = f"{len(found)} {what}: {shown}"
    if choice == "error":
        raise InputError(f"{message}; mend the table, or leave them out with --set inputs.{setting}=skip")
    notes.append(f"{message}; skipped")
