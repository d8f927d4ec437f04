"""What a run starts from: plates or cells, plate map and compounds, opened and checked against each other."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.plate import Plate, open_plate
from storage_schemas.screen import Screen, fingerprint
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, open_table, read_compounds, read_plate_map, read_split

if TYPE_CHECKING:  # the configuration pulls in torch, which segmentation workers do without
    from pipelines.config import InputsConfig


@dataclass(frozen=True)
class Inputs:
    """Checked inputs.

    Attributes:
        plates: plate name -> opened plate; none where cells are taken.
        cells: the screen that the cells lie in which are taken instead, or None.
        plate_map: a row a well that will be run (see :data:`storage_schemas.tables.PLATE_MAP`).
        plate_map_url: where it was read from.
        compounds: a row a compound of the plate map.
        notes: what was skipped, as the configuration allows.
        split: what each well or cell is for, where a table says it (see :func:`storage_schemas.tables.read_split`).
    """

    plates: dict[str, Plate]
    cells: Screen | None
    plate_map: pd.DataFrame
    plate_map_url: str
    compounds: pd.DataFrame
    notes: tuple[str, ...]
    split: pd.DataFrame | None = None

    @cached_property
    def wells(self) -> list[WellKey]:
        """The units of work, in order."""
        return well_keys(self.plate_map)

    @cached_property
    def identity(self) -> str:
        """Which images a run sees and what the tables say of them.

        Plates are known by name and wells: pixels that change under the same names go unnoticed.
        """
        plates = {name: sorted(plate.well_paths.items()) for name, plate in self.plates.items()}
        tables = [self.plate_map, self.compounds, *([] if self.split is None else [self.split])]
        return fingerprint(plates, annotation_identity(*tables))


def well_keys(table: pd.DataFrame) -> list[WellKey]:
    """The keys of a table's rows, from its columns plate and well."""
    return [WellKey(plate, well) for plate, well in zip(table["plate"], table["well"], strict=True)]


def annotation_identity(*tables: pd.DataFrame) -> list[list[dict[Any, Any]]]:
    """What the tables say, as values that a fingerprint can be made of."""
    return [frame.astype(object).where(frame.notna(), None).to_dict("records") for frame in tables]


def open_inputs(config: InputsConfig) -> Inputs:
    """Open plates or cells, and their tables, and check that they belong together.

    Raises:
        InputError: saying what does not fit, where, and which setting or edit mends it.
    """
    lender = None if config.cells is None else _open_lender(config.cells)
    plate_map, map_url = _read_plate_map(config, lender)
    plates = _open_plates(config.plates or ())
    notes: list[str] = []

    mapped = set(well_keys(plate_map))
    if lender is None:
        has, imaged = "images", {WellKey(plate.name, well) for plate in plates.values() for well in plate.well_paths}
    else:
        has, imaged = "cells", set(well_keys(open_table(lender.plate_map, PLATE_MAP).to_pandas()))
    names = sorted({key.plate for key in imaged})
    _settle(
        sorted(map(str, imaged - mapped)),
        f"well(s) with {has} are not in the plate map {map_url}",
        "unmapped_wells",
        config.unmapped_wells,
        notes,
    )
    _settle(
        sorted(map(str, mapped - imaged)),
        f"well(s) of the plate map {map_url} are on none of the plates {names}",
        "missing_wells",
        config.missing_wells,
        notes,
    )
    here = [key in imaged for key in well_keys(plate_map)]
    plate_map = plate_map[here].reset_index(drop=True)
    if plate_map.empty:
        raise InputError(
            f"no well of {map_url} has {has}: its plates are called {sorted({key.plate for key in mapped})}, the "
            f"{has}' {names}"
        )
    plates = {name: plate for name, plate in plates.items() if name in set(plate_map["plate"])}
    compounds = _read_compounds(config, lender, set(plate_map["compound"]), notes)
    cells = lender and (lender.segmented or lender)
    split = None if config.split is None else read_split(config.split)
    return Inputs(plates, cells, plate_map, map_url, compounds, tuple(notes), split)


def _open_lender(url: str) -> Screen:
    """The screen whose cells are taken; it may itself have taken them from another."""
    screen = Screen.open(url)
    # What a taker's own manifest says of them may be of yesterday.
    owner = screen.segmented or screen
    record = owner.read_manifest().stages.get("segment")
    if record is None or not record.done:
        raise InputError(
            f"inputs.cells: {owner.url}: its stage 'segment' (or the import of its cells) is not done: finish it"
        )
    return screen


def _read_plate_map(config: InputsConfig, lender: Screen | None) -> tuple[pd.DataFrame, str]:
    """The plate map, and where it was."""
    if config.plate_map is not None:
        return read_plate_map(config.plate_map), config.plate_map
    assert lender is not None, "plates come with a plate map"
    return open_table(lender.plate_map, PLATE_MAP).to_pandas(), lender.plate_map


def _read_compounds(config: InputsConfig, lender: Screen | None, used: set[str], notes: list[str]) -> pd.DataFrame:
    """A row for each compound of the plate map."""
    if config.compounds is not None:
        compounds, url = read_compounds(config.compounds), config.compounds
    elif lender is not None:
        compounds, url = open_table(lender.compounds, COMPOUNDS).to_pandas(), lender.compounds
    else:
        compounds = pd.DataFrame({name: None for name in COMPOUNDS.schema.names}, index=range(len(used)))
        compounds["compound"] = compounds["name"] = sorted(used)
        return compounds
    unknown = sorted(used - set(compounds["compound"]))
    if unknown:
        raise InputError(
            f"{url}: compound(s) {unknown[:5]} of the plate map are not in it; add a row for each "
            "(its MOA may stay empty)"
        )
    _settle(
        sorted(set(compounds["compound"]) - used),
        f"compound(s) of {url} are on no plate",
        "unused_compounds",
        config.unused_compounds,
        notes,
    )
    return compounds[compounds["compound"].isin(used)].reset_index(drop=True)


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
