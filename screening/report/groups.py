"""Groups of cells and wells, by mechanism, plate or replicate, and how each is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from screening.report.tables import missing

# Searched for so that any two differ, to a reader with normal vision and to those without one of
# the three cones (Machado et al. 2009), and stand out from white and from the dark page; the first
# ones differ most. The markers go round in another number: no two groups need telling by hue alone.
PALETTE = (
    "#4b2ded",
    "#c9b416",
    "#5f5900",
    "#6dc4a2",
    "#b8aed4",
    "#c9245f",
    "#8a75ad",
    "#2a6148",
    "#8a3483",
    "#e86e66",
    "#299209",
    "#de6eff",
)
MARKERS = (
    "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1-5 0Z",
    "M0-5.5L5.5 5H-5.5Z",
    "M-4.5-4.5H4.5V4.5H-4.5Z",
    "M0-6L6 0L0 6L-6 0Z",
    "M0 5.5L5.5-5H-5.5Z",
    "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
    "M-5.5-3L-3-5.5L0-2.5L3-5.5L5.5-3L2.5 0L5.5 3L3 5.5L0 2.5L-3 5.5L-5.5 3L-2.5 0Z",
)
STYLES = 84
"""Pairs of a colour and a marker before one returns: the least common multiple of their numbers."""

NEUTRAL = "#8a919c"
CONTROL, UNKNOWN, OTHER = "negative control", "mechanism unknown", "other groups"


@dataclass(frozen=True)
class Group:
    """How the cells and wells of one mechanism (or plate) are drawn; `marker` is an SVG path about the origin."""

    label: str
    code: str
    colour: str
    marker: str

    @property
    def ink(self) -> str:
        """The text colour that reads best on the group's colour."""
        return ink_on(self.colour)


def groups(labels: Iterable[str]) -> dict[str, Group]:
    """A drawing style a label, in alphabetical order; the neutral groups are grey and come last."""
    names = set(labels)
    neutral = [
        Group(label, code, NEUTRAL, marker)
        for label, code, marker in ((CONTROL, "C", MARKERS[0]), (UNKNOWN, "?", MARKERS[4]))
        if label in names
    ]
    known = sorted(names - {CONTROL, UNKNOWN}, key=natural)
    styled = {
        name: Group(name, str(i + 1), PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(known[:STYLES])
    }
    rest = Group(OTHER, "+", NEUTRAL, MARKERS[2])
    return styled | dict.fromkeys(known[STYLES:], rest) | {group.label: group for group in neutral}


def used(styles: Mapping[str, Group], labels: Iterable[str]) -> list[Group]:
    """The legend of some labels, without repeats, in the order of the groups."""
    present = set(labels)
    return list(dict.fromkeys(group for name, group in styles.items() if name in present))


def control_compounds(plate_maps: pd.DataFrame) -> set[str]:
    """The compounds of wells whose role is that of a negative control."""
    if plate_maps.empty or not {"role", "compound"} <= set(plate_maps.columns):
        return set()
    return set(plate_maps.loc[plate_maps["role"] == "negative_control", "compound"].astype(str))


def mechanisms(frame: pd.DataFrame, controls: set[str]) -> list[str]:
    """The group of every row: its mechanism, or that it is a control, or that none is known."""
    if frame.empty or "moa" not in frame:
        return [UNKNOWN] * len(frame)
    compounds = frame["compound"] if "compound" in frame else [""] * len(frame)
    return [
        CONTROL if str(compound) in controls else UNKNOWN if missing(moa) else str(moa)
        for compound, moa in zip(compounds, frame["moa"], strict=True)
    ]


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sorting key under which plate 2 comes before plate 10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part.casefold())
        for part in re.split(r"(\d+)", text)
        if part
    ]


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more with a colour (relative luminance of WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#000000" if luminance > 0.179 else "#ffffff"
