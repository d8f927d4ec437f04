"""A simulated time-lapse screen: plates of cells that respond to drugs, and the truth about them.

The screen imitates a mitochondrial phenotyping assay: nuclei (Hoechst), mitochondrial morphology
(MitoTracker) and membrane potential (TMRM). A cell is a nucleus, a star-shaped outline around it
and filaments between the two. The filaments are clouds of emitting points, so that a phenotype is
a deformation of the cloud (points contract into fragments, open into rings, move to the nucleus)
and grows smoothly in time. :data:`MECHANISMS` says which phenotypes of the literature are meant.

Everything here is a function of (configuration, plate, well, site): sites can be made in any
order, in any process, and come out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Literal, Self, get_args

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, model_validator

from storage_schemas.base import Config
from storage_schemas.errors import InputError

Float = NDArray[np.float64]
Image = NDArray[np.float32]
Labels = NDArray[np.int32]
Bool = NDArray[np.bool_]

CHANNELS: Final = ("nucleus", "mitochondria", "potential")
"""The channels of a simulated plate, in the order of the stack's second axis."""

NEGATIVE_CONTROL: Final = "DMSO"

Moa = Literal[
    "mitochondrial fission inducer",
    "protein synthesis inhibitor",
    "potassium ionophore",
    "kinesin inhibitor",
    "uncoupler",
    "respiratory chain inhibitor",
    "topoisomerase inhibitor",
    "apoptosis inducer",
]

KINETIC_PAIR: Final[tuple[Moa, Moa]] = ("uncoupler", "respiratory chain inhibitor")
"""Two mechanisms with one end state that only the time course tells apart."""


class Dial(IntEnum):
    """What a drug can turn in a cell; 0 is the untreated cell."""

    FISSION = 0
    """Filaments break into separate dots (1: completely)."""
    FUSION = 1
    """Filaments grow long and few (1: completely)."""
    SWELLING = 2
    """Pieces of filament open into rings (1: about 3 um wide)."""
    CLUSTERING = 3
    """Filaments withdraw from the cell's edge to the nucleus (1: to the inner quarter)."""
    POLARISATION = 4
    """ln of the membrane potential's brightness relative to an untreated cell."""
    NUCLEUS_SIZE = 5
    """ln of the nucleus' diameter relative to an untreated cell."""
    CELL_SIZE = 6
    """ln of the cell's diameter relative to an untreated cell."""
    CONDENSATION = 7
    """ln of the nucleus' brightness relative to an untreated cell."""


@dataclass(frozen=True)
class Mechanism:
    """A mechanism of action: where it takes a cell, and how fast.

    Attributes:
        target: what the drugs bind, for the table of compounds.
        end_state: dials at the last frame of a full response.
        midpoint: range of the time of half the response, as a share of the movie.
        width: the response's steepness: scale of the logistic, as a share of the movie.
        death: extra deaths per cell and hour at full response.
        arrests: whether a full response stops cell division.
    """

    target: str
    end_state: Mapping[Dial, float]
    midpoint: tuple[float, float] = (0.25, 0.4)
    width: float = 0.12
    death: float = 0.0
    arrests: bool = False


# The pair shares this object: whatever is tuned here, the two mechanisms cannot drift apart.
_DEPOLARISED: Final = MappingProxyType({Dial.POLARISATION: -1.2, Dial.FISSION: 0.35})

MECHANISMS: Final[Mapping[Moa, Mechanism]] = MappingProxyType(
    {
        # DRP1-driven fragmentation of the network into dots (Youle & van der Bliek, Science 2012).
        "mitochondrial fission inducer": Mechanism("DNM1L", {Dial.FISSION: 1.0}),
        # Stress-induced mitochondrial hyperfusion, as under cycloheximide (Tondera et al., EMBO J
        # 2009): an elongated, sparse network.
        "protein synthesis inhibitor": Mechanism(
            "RPL3", {Dial.FUSION: 1.0, Dial.POLARISATION: 0.15}, midpoint=(0.35, 0.5)
        ),
        # Osmotic swelling of the matrix by potassium influx, as under valinomycin (Kaasik et al.,
        # Pflugers Arch 2007): round, ring-like mitochondria, weakly depolarised.
        "potassium ionophore": Mechanism("inner mitochondrial membrane", {Dial.SWELLING: 1.0, Dial.POLARISATION: -0.3}),
        # Without kinesin-1 mitochondria are not carried outwards and collapse around the nucleus
        # (Tanaka et al., Cell 1998).
        "kinesin inhibitor": Mechanism("KIF5B", {Dial.CLUSTERING: 1.0}),
        # Protonophores (FCCP) dissipate the potential within minutes.
        "uncoupler": Mechanism("inner mitochondrial membrane", _DEPOLARISED, midpoint=(0.06, 0.14), width=0.04),
        # Without respiration the ATP synthase runs in reverse and holds the potential until the
        # cell's ATP is spent (Nicholls & Ward, Trends Neurosci 2000): late, but equally far.
        "respiratory chain inhibitor": Mechanism("MT-ND1", _DEPOLARISED, midpoint=(0.62, 0.74), width=0.07),
        # DNA damage arrests cells in G2 with enlarged, even nuclei; cells spread and do not divide.
        "topoisomerase inhibitor": Mechanism("TOP2A", {Dial.NUCLEUS_SIZE: 0.36, Dial.CELL_SIZE: 0.08}, arrests=True),
        # Apoptosis: shrinkage, condensed chromatin, fragmented mitochondria (Kroemer et al., Cell
        # Death Differ 2009), and cells that die.
        "apoptosis inducer": Mechanism(
            "BCL2",
            {
                Dial.CELL_SIZE: -0.3,
                Dial.NUCLEUS_SIZE: -0.2,
                Dial.CONDENSATION: 0.4,
                Dial.FISSION: 0.5,
                Dial.POLARISATION: -0.3,
            },
            death=0.03,
            arrests=True,
        ),
    }
)

_PLATE_FORMATS: Final = ((2, 3), (4, 6), (8, 12), (16, 24), (32, 48))

# Lengths of an untreated cell, in um.
_NUCLEUS_RADIUS: Final = 4.6
_CELL_RADIUS: Final = 17.0
_SPACING: Final = 40.0  # cells closer than this push each other away
_DAUGHTER_OFFSET: Final = 8.0
_PSF_SIGMA: Final = 0.62
_DEFOCUSED_SIGMA: Final = (2.6, 4.0)
_STAGE_STEP: Final = 0.35
_STAGE_RANGE: Final = 3.0
_SPEED: Final = 1.1  # sd of a cell's displacement per axis in an hour
_POINT_STEP: Final = 0.33

# The network: filaments of a cell, pieces of a filament, points of a piece.
_FILAMENTS: Final = 30
_PIECES: Final = 9
_POINTS: Final = 8
_VISIBLE: Final = 0.38  # share of a filament's full length that an unfused cell shows

# Emitted light in electrons per pixel (nucleus, cytoplasm) or per point (filaments).
_NUCLEUS_LIGHT: Final = 420.0
_FILAMENT_LIGHT: Final = (320.0, 300.0)
_CYTOPLASM_LIGHT: Final = (75.0, 60.0)
_DEBRIS_LIGHT: Final = 30_000.0
_COUNTS_PER_ELECTRON: Final = 8.0
_COUNTS_MAX: Final = 65_535.0

_SHIFT: Final = 4  # fractional bits of the coordinates that OpenCV draws with
_OUTLINE_ANGLES: Final = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_OUTLINE_DIRECTIONS: Final = np.stack([np.cos(_OUTLINE_ANGLES), np.sin(_OUTLINE_ANGLES)], axis=1)

# How far untreated cells vary (sd per dial), and compounds of one mechanism off their common road.
_CELL_SD: Final = np.array([0.13, 0.13, 0.06, 0.12, 0.18, 0.05, 0.06, 0.10])
_OFF_TARGET_SD: Final = np.array([0.05, 0.05, 0.03, 0.05, 0.04, 0.02, 0.02, 0.04])


class SimulationConfig(Config):
    """A simulated screen: what stands on its plates, how it is imaged and how its cells behave."""

    seed: int = Field(0, ge=0, description="seed of everything random in the screen")
    replicates: int = Field(3, ge=1, description="replicate plates, each holding every well once")
    moas: tuple[Moa, ...] = Field(get_args(Moa), min_length=1, description="mechanisms of action on the plates")
    compounds_per_moa: int = Field(4, ge=1, description="compounds per mechanism of action")
    unknown_per_moa: int = Field(
        0,
        ge=0,
        description="how many of these the table of compounds tells no MOA of, as of most compounds of a screen",
    )
    doses_um: tuple[float, ...] = Field((10.0,), min_length=1, description="concentrations of each compound [uM]")
    controls_per_plate: int = Field(6, ge=0, description="wells with DMSO alone on each plate")
    sites_per_well: int = Field(1, ge=1, description="fields of view per well")
    frames: int = Field(8, ge=2, description="time points; the drug is given just before the first")
    height: int = Field(384, ge=96, description="height of an image [px]")
    width: int = Field(384, ge=96, description="width of an image [px]")
    pixel_size_um: float = Field(0.65, gt=0, description="width of a pixel [um]")
    minutes_per_frame: float = Field(60.0, gt=0, description="time between frames [min]")
    cells_per_site: int = Field(18, ge=0, description="mean number of cells at the first frame")
    effect_size: float = Field(
        1.0, ge=0, le=1.5, description="strength of all drug effects; 0 leaves every well untreated"
    )
    division_rate: float = Field(0.008, ge=0, le=1, description="divisions per cell and hour")
    death_rate: float = Field(0.003, ge=0, le=1, description="deaths per untreated cell and hour")
    exposure: float = Field(1.0, gt=0, description="light collected, relative to the default; less is noisier")
    read_noise: float = Field(3.0, ge=0, description="camera's read noise, sd [electrons]")
    out_of_focus_rate: float = Field(0.02, ge=0, le=1, description="share of frames out of focus")
    debris_per_site: float = Field(0.4, ge=0, description="mean number of saturated specks")
    batch_effect: float = Field(1.0, ge=0, le=1.5, description="strength of the differences between plates; 0 is none")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.moas)) != len(self.moas) or len(set(self.doses_um)) != len(self.doses_um):
            raise ValueError("moas and doses_um must not repeat a value")
        if self.unknown_per_moa > self.compounds_per_moa:
            raise ValueError(
                f"unknown_per_moa is {self.unknown_per_moa} and there are {self.compounds_per_moa} compounds_per_moa"
            )
        if min(self.doses_um) <= 0:
            raise ValueError(
                f"doses_um must be positive, got {self.doses_um}; untreated wells come from controls_per_plate"
            )
        wells, largest = _wells_per_plate(self), _PLATE_FORMATS[-1][0] * _PLATE_FORMATS[-1][1]
        if wells > largest:
            raise ValueError(
                f"{wells} wells do not fit on a plate ({largest} at most): lower "
                "compounds_per_moa, the number of doses_um or controls_per_plate"
            )
        room = self.height * self.width * self.pixel_size_um**2 / (2 * _CELL_RADIUS) ** 2
        if self.cells_per_site > room:
            raise ValueError(
                f"{self.cells_per_site} cells do not fit in a field of {self.height} x "
                f"{self.width} px of {self.pixel_size_um} um ({int(room)} at most): lower "
                "cells_per_site or enlarge the field"
            )
        return self


@dataclass(frozen=True, eq=False)
class SimulatedSite:
    """The movie of one field of view and the truth about it.

    Attributes:
        stack: (T, C, H, W) uint16 camera counts, channels as in :data:`CHANNELS`.
        nuclei: (T, H, W) int32 labels, 0 background; a value is one cell (a track) in all frames.
        cells: (T, H, W) int32 labels with the ids of the nuclei; each nucleus lies in its cell.
        parents: a row per daughter cell: track, parent, frame (the daughter's first).
        bad_frames: frames that are out of focus.
    """

    stack: NDArray[np.uint16]
    nuclei: Labels
    cells: Labels
    parents: pd.DataFrame
    bad_frames: list[int]


@dataclass(frozen=True, eq=False)
class _Compound:
    """A compound's own way of acting: ``end_state`` is at saturating dose, (dials,)."""

    name: str
    moa: Moa
    end_state: Float
    ec50_um: float
    midpoint: float
    width: float


@dataclass(frozen=True, eq=False)
class _Plate:
    """A plate's batch effects: (C,) gain and background [electrons], (H, W) illumination."""

    gain: Float
    background: Float
    illumination: Image


@dataclass(frozen=True, eq=False)
class _Population:
    """Who is where: n cells over T frames, positions as (y, x) in um on the stage."""

    position: Float  # (n, T, 2)
    present: Bool  # (n, T)
    mitosis: Float  # (n, T) 0 interphase .. 1 metaphase
    dying: Float  # (n, T) 0 alive .. 1 dead, about to detach
    parent: NDArray[np.int64]  # (n,) position of the mother, -1 for none


@dataclass(frozen=True, eq=False)
class _Anatomy:
    """The cells' fixed features; angles in radians, ``radius`` relative to the cell's edge."""

    nucleus_axes: Float  # (n, 2) semi-axes in um
    nucleus_angle: Float  # (n, T)
    texture: Image  # (n, S, S) chromatin on the square around the unit disc
    radius: Float  # (n,) mean distance from nucleus to outline, um
    amplitude: Float  # (n, K) of the outline's harmonics 1..K
    phase: Float  # (n, T, K)
    point_angle: Float  # (n, F, P, Q)
    point_radius: Float  # (n, F, P, Q) 0 at the nucleus .. 1 at the outline
    wobble: Float  # (2, n, F, T) motion of the filaments: angle, radius
    ring: Float  # (n, F, P) orientation of a piece once it swells to a ring
    stain: Float  # (n, C) brightness relative to the mean cell


# --------------------------------------------------------------------------------------------------
# The screen's design
# --------------------------------------------------------------------------------------------------


def design(config: SimulationConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The plate map and the compounds of the screen.

    Treatments and controls are shuffled over the wells of each plate, so that no position betrays
    a treatment.

    Returns:
        plate_map: plate, well, compound, concentration, unit, role, replicate; a row a well.
        compounds: compound, name, moa (None for DMSO), cas, inchikey, smiles, target; the
            substances are invented, so the chemical identifiers are None. Of the last
            ``unknown_per_moa`` compounds of each mechanism nothing is told.
    """
    wells = [
        {
            "plate": plate,
            "well": well,
            "compound": compound,
            "concentration": dose,
            "unit": "%" if compound == NEGATIVE_CONTROL else "uM",
            "role": "negative_control" if compound == NEGATIVE_CONTROL else "treatment",
            "replicate": str(replicate),
        }
        for replicate, plate in enumerate(_plate_names(config), start=1)
        for well, (compound, dose) in _layout(config, plate).items()
    ]
    known = config.compounds_per_moa - config.unknown_per_moa
    substances: list[dict[str, str]] = []
    for compound, moa in _compound_names(config).items():
        number = compound.rsplit("-", 1)[1]
        told = {"name": f"simulated {moa} {number}", "moa": moa, "target": MECHANISMS[moa].target}
        substances.append({"compound": compound, **(told if int(number) <= known else {})})
    substances.append({"compound": NEGATIVE_CONTROL, "name": "dimethyl sulfoxide"})
    columns = ["compound", "name", "moa", "cas", "inchikey", "smiles", "target"]
    compounds = pd.DataFrame(substances, columns=columns, dtype=object)
    return pd.DataFrame(wells), compounds.where(compounds.notna(), None)


def compound_effects(config: SimulationConfig) -> pd.DataFrame:
    """The truth about each compound, a row a compound.

    Returns:
        compound, moa, ec50_um, midpoint and width of the response (shares of the movie), and the
        end state at saturating dose: a column for each :class:`Dial`, in lower case.
    """
    return pd.DataFrame(
        [
            {
                "compound": compound.name,
                "moa": compound.moa,
                "ec50_um": compound.ec50_um,
                "midpoint": compound.midpoint,
                "width": compound.width,
                **{dial.name.lower(): compound.end_state[dial] for dial in Dial},
            }
            for compound in (_compound(config, n, m) for n, m in _compound_names(config).items())
        ]
    )


def _random(config: SimulationConfig, *key: str | int) -> np.random.Generator:
    """A generator that depends on the seed and the key alone, not on what was drawn before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng([config.seed, int.from_bytes(digest)])


def _plate_names(config: SimulationConfig) -> list[str]:
    return [f"plate-{replicate}" for replicate in range(1, config.replicates + 1)]


def _compound_names(config: SimulationConfig) -> dict[str, Moa]:
    return {
        f"{moa.replace(' ', '-')}-{number}": moa
        for moa in config.moas
        for number in range(1, config.compounds_per_moa + 1)
    }


def _wells_per_plate(config: SimulationConfig) -> int:
    treatments = len(config.moas) * config.compounds_per_moa * len(config.doses_um)
    return treatments + config.controls_per_plate


def _row_name(row: int) -> str:
    """A, B, .. Z, AA, AB, ..: the rows of a plate of up to 1536 wells."""
    letter = chr(ord("A") + row % 26)
    return letter if row < 26 else "A" + letter


def _layout(config: SimulationConfig, plate: str) -> dict[str, tuple[str, float]]:
    """Well -> (compound, concentration) on the smallest plate format that holds all wells."""
    contents = [(name, dose) for name in _compound_names(config) for dose in config.doses_um]
    contents += [(NEGATIVE_CONTROL, 0.1)] * config.controls_per_plate
    columns = next(c for r, c in _PLATE_FORMATS if r * c >= len(contents))
    order = _random(config, "layout", plate).permutation(len(contents))
    return {
        f"{_row_name(place // columns)}{place % columns + 1:02d}": contents[content]
        for place, content in enumerate(order)
    }


def _compound(config: SimulationConfig, name: str, moa: Moa) -> _Compound:
    rng = _random(config, "compound", name)
    mechanism = MECHANISMS[moa]
    end_state = np.zeros(len(Dial))
    for dial, value in mechanism.end_state.items():
        end_state[dial] = value
    efficacy = rng.uniform(0.85, 1.1)
    end_state *= efficacy * np.exp(rng.normal(0, 0.06, len(Dial)))
    end_state += rng.normal(0, _OFF_TARGET_SD)
    return _Compound(
        name=name,
        moa=moa,
        end_state=end_state,
        ec50_um=float(np.exp(rng.normal(np.log(2.0), 0.3))),
        midpoint=float(rng.uniform(*mechanism.midpoint)),
        width=mechanism.width,
    )


def _plate(config: SimulationConfig, plate: str) -> _Plate:
    """Batch effects: gains of 0.8 to 1.25, an off-centre vignette, backgrounds of 30 to 60 e-."""
    rng = _random(config, "plate", plate)
    effect = config.batch_effect
    gain = np.exp(effect * rng.uniform(np.log(0.8), np.log(1.25), len(CHANNELS)))
    background = 45.0 + effect * rng.uniform(-15, 15, len(CHANNELS))
    centre = effect * rng.uniform(-0.3, 0.3, 2)
    strength = 0.18 + effect * rng.uniform(-0.08, 0.08)
    y = np.linspace(-1, 1, config.height)[:, None] - centre[0]
    x = np.linspace(-1, 1, config.width)[None, :] - centre[1]
    return _Plate(gain, background, (1 - strength * (y**2 + x**2) / 2).astype(np.float32))


# --------------------------------------------------------------------------------------------------
# One site
# --------------------------------------------------------------------------------------------------


def simulate_site(config: SimulationConfig, plate: str, well: str, site: int) -> SimulatedSite:
    """The movie of one site; the same for the same arguments, whatever was simulated before.

    A response rises from 0 at the first frame to its full size at the last along a logistic curve
    whose midpoint depends on mechanism, compound and cell. Its full size depends on compound
    (dose by the Hill equation) and cell.

    Args:
        config: the screen.
        plate: name of a plate, as in :func:`design`.
        well: name of a well on it, as in :func:`design`.
        site: number of the field of view, from 0.

    Raises:
        InputError: if the screen has no such plate, well or site.
    """
    compound, dose = _contents(config, plate, well, site)
    rng = _random(config, "site", plate, well, site)
    death, division = _rates(config, compound)
    population = _populate(config, death, division, rng)
    anatomy = _anatomy(population, rng)
    dials = _dials(config, compound, dose, population, rng)
    return _image(config, _plate(config, plate), population, anatomy, dials, rng)


def _contents(config: SimulationConfig, plate: str, well: str, site: int) -> tuple[_Compound | None, float]:
    """The compound (None for the control) and concentration in a well that the screen has."""
    if plate not in _plate_names(config):
        raise InputError(_unknown("plate", plate, _plate_names(config)))
    layout = _layout(config, plate)
    if well not in layout:
        raise InputError(_unknown(f"well on {plate}", well, list(layout)))
    if not 0 <= site < config.sites_per_well:
        raise InputError(
            f"site {site} of {plate}/{well} is not in the simulated screen: "
            f"sites are 0 to {config.sites_per_well - 1} (sites_per_well)"
        )
    name, dose = layout[well]
    if name == NEGATIVE_CONTROL:
        return None, dose
    return _compound(config, name, _compound_names(config)[name]), dose


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3) or [known[0], "..", known[-1]]
    return f"the simulated screen has no {what} named {name!r}: try {', '.join(near)}"


def _response(share_of_movie: Float, midpoint: Float | np.float64, width: float) -> Float:
    """A logistic in time, shifted and scaled to be 0 at the first frame and 1 at the last."""

    def logistic(time: Float | float) -> Float:
        return np.asarray(1 / (1 + np.exp((midpoint - time) / width)))

    first, last = logistic(0.0), logistic(1.0)
    return (logistic(share_of_movie) - first) / (last - first)


def _rates(config: SimulationConfig, compound: _Compound | None) -> tuple[Float, Float]:
    """Probabilities of dying and dividing within each frame, (T,)."""
    death = np.full(config.frames, config.death_rate)
    division = np.full(config.frames, config.division_rate)
    if compound is not None:
        mechanism = MECHANISMS[compound.moa]
        time = np.linspace(0, 1, config.frames)
        response = _response(time, np.float64(compound.midpoint), compound.width)
        death += config.effect_size * mechanism.death * response
        if mechanism.arrests:
            division *= 1 - min(config.effect_size, 1.0) * response
    hours = config.minutes_per_frame / 60
    return -np.expm1(-death * hours), -np.expm1(-division * hours)


def _dials(
    config: SimulationConfig,
    compound: _Compound | None,
    dose: float,
    population: _Population,
    rng: np.random.Generator,
) -> Float:
    """Where each cell stands in each frame, (n, T, dials): its own nature plus its response."""
    n = len(population.parent)
    nature = _inherited(rng.normal(0, _CELL_SD, (n, len(Dial))), population)
    dials = np.repeat(nature[:, None], config.frames, axis=1)
    if compound is not None:
        occupied = dose**2 / (dose**2 + compound.ec50_um**2)
        sensitivity = np.clip(rng.normal(1, 0.15, (n, 1)), 0.4, 1.6)
        midpoint = compound.midpoint * np.exp(rng.normal(0, 0.12, (n, 1)))
        response = _inherited(sensitivity, population) * _response(
            np.linspace(0, 1, config.frames), _inherited(midpoint, population), compound.width
        )
        dials += response[:, :, None] * (config.effect_size * occupied * compound.end_state)
    return dials


def _inherited(values: Float, population: _Population) -> Float:
    """The values (n, ..) with each daughter's replaced by its mother's (who has no mother)."""
    return values[np.where(population.parent >= 0, population.parent, np.arange(len(values)))]


# --------------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------------


def _populate(config: SimulationConfig, death: Float, division: Float, rng: np.random.Generator) -> _Population:
    """Cells that wander, keep their distance, divide (at most once) and die.

    A dividing cell's last frame shows it round with condensed chromatin; its daughters begin in the
    next. A dying cell rounds up for two frames and is gone in the third.
    """
    n_frames = config.frames
    field = np.array([config.height, config.width]) * config.pixel_size_um
    # Nuclei stay in view whatever the stage does, so that a true track has no gaps.
    wall = np.minimum(1.2 * _NUCLEUS_RADIUS + _STAGE_RANGE, field / 4)
    spread = int(0.15 * config.cells_per_site)
    n_first = config.cells_per_site + int(rng.integers(-spread, spread + 1))
    # Each first cell can leave two daughters; rows that stay empty are dropped at the end.
    n = 3 * n_first
    position = np.zeros((n, n_frames, 2))
    present = np.zeros((n, n_frames), bool)
    mitosis, dying = np.zeros((n, n_frames)), np.zeros((n, n_frames))
    parent = np.full(n, -1)
    velocity = np.zeros((n, 2))
    position[:n_first, 0] = _scatter(n_first, wall, field - wall, rng)
    present[:n_first, 0] = True
    born = n_first
    for t in range(1, n_frames):
        fate = rng.random(n)
        for cell in np.flatnonzero(present[:, t - 1]):
            position[cell, t] = position[cell, t - 1]
            if dying[cell, t - 1] > 0:
                present[cell, t] = dying[cell, t - 1] < 1
                dying[cell, t] = 1
            elif fate[cell] < death[t]:
                present[cell, t] = True
                dying[cell, t] = 0.5
            elif cell < n_first and fate[cell] < death[t] + division[t]:
                mitosis[cell, t - 1] = 1
                axis = rng.normal(size=2)
                axis *= _DAUGHTER_OFFSET / np.linalg.norm(axis)
                daughters = [born, born + 1]
                position[daughters, t] = position[cell, t - 1] + [axis, -axis]
                present[daughters, t], mitosis[daughters, t], parent[daughters] = True, 0.4, cell
                born += 2
            else:
                present[cell, t] = True
        here = np.flatnonzero(present[:, t])
        step = _SPEED * np.sqrt(config.minutes_per_frame / 60)
        velocity = 0.6 * velocity + 0.8 * step * rng.normal(size=(n, 2))
        moved = _keep_apart(position[here, t] + velocity[here])
        position[here, t] = np.clip(moved, wall, field - wall)
    return _Population(position[:born], present[:born], mitosis[:born], dying[:born], parent[:born])


def _scatter(n: int, low: Float, high: Float, rng: np.random.Generator) -> Float:
    """(n, 2) points spread evenly at random: the best of a few candidates each (Mitchell 1991)."""
    points = np.zeros((n, 2))
    for i in range(n):
        candidates = rng.uniform(low, high, (24, 2))
        gaps = np.linalg.norm(candidates[:, None] - points[None, :i], axis=2)
        points[i] = candidates[gaps.min(axis=1, initial=np.inf).argmax()]
    return points


def _keep_apart(position: Float) -> Float:
    """Neighbours nearer than a cell's width push each other a quarter of the lacking way."""
    offset = position[:, None] - position[None, :]
    distance = np.linalg.norm(offset, axis=2)
    np.fill_diagonal(distance, np.inf)
    lacking = np.clip(_SPACING - distance, 0, None) / np.maximum(distance, 1e-6)
    moved: Float = position + 0.25 * (lacking[:, :, None] * offset).sum(axis=1)
    return moved


def _anatomy(population: _Population, rng: np.random.Generator) -> _Anatomy:
    n, n_frames = population.present.shape
    aspect = np.exp(rng.normal(0.1, 0.06, n))
    size = _NUCLEUS_RADIUS * np.exp(rng.normal(0, 0.05, n))
    harmonics = np.array([0.07, 0.09, 0.05, 0.03])
    drift = rng.normal(0, 0.06, (n, n_frames, len(harmonics))).cumsum(axis=1)
    radius = _CELL_RADIUS * np.exp(rng.normal(0, 0.05, n))
    point_angle, point_radius = _filaments(radius, rng)
    wobble = rng.normal(0, 1, (2, n, _FILAMENTS, n_frames)).cumsum(axis=3)
    return _Anatomy(
        nucleus_axes=np.stack([size * np.sqrt(aspect), size / np.sqrt(aspect)], axis=1),
        nucleus_angle=rng.uniform(0, np.pi, (n, 1)) + rng.normal(0, 0.08, (n, n_frames)).cumsum(axis=1),
        texture=_chromatin(n, rng),
        radius=radius,
        amplitude=harmonics * np.abs(rng.normal(1, 0.5, (n, len(harmonics)))),
        phase=rng.uniform(0, 2 * np.pi, (n, 1, len(harmonics))) + drift,
        point_angle=point_angle,
        point_radius=point_radius,
        wobble=wobble * np.array([0.05, 0.03])[:, None, None, None],
        ring=rng.uniform(0, 2 * np.pi, (n, _FILAMENTS, _PIECES)),
        stain=_inherited(np.exp(rng.normal(0, 0.12, (n, len(CHANNELS)))), population),
    )


def _filaments(radius: Float, rng: np.random.Generator) -> tuple[Float, Float]:
    """Curvy random walks around the nucleus as (angle, radius) of points, each (n, F, P, Q).

    Angle and radius rather than (y, x), because then filaments stay between nucleus and outline
    whatever shape the cell takes.
    """
    shape = (len(radius), _FILAMENTS, _PIECES * _POINTS)
    start_angle = rng.uniform(0, 2 * np.pi, shape[:2])
    start_radius = rng.uniform(0.35, 0.88, shape[:2])
    turn = rng.normal(0, 0.16, shape).cumsum(axis=2)
    heading = (start_angle + rng.normal(0, 0.9, shape[:2]) + np.pi * rng.integers(0, 2, shape[:2]))[:, :, None] + turn
    step = (_POINT_STEP / radius)[:, None, None]
    # The walk's middle, the part an unfused cell shows, begins where the filament was placed.
    walk = [(step * f(heading)).cumsum(axis=2) for f in (np.cos, np.sin)]
    x, y = (w - w[:, :, [shape[2] // 2]] for w in walk)
    x = x + (start_radius * np.cos(start_angle))[:, :, None]
    y = y + (start_radius * np.sin(start_angle))[:, :, None]
    nucleus = _NUCLEUS_RADIUS / _CELL_RADIUS
    between = (np.hypot(x, y) - nucleus) / (1 - nucleus)
    folded = 0.92 - np.abs(np.abs(between - 0.04) % 1.76 - 0.88)
    shape_out = (*shape[:2], _PIECES, _POINTS)
    return np.arctan2(y, x).reshape(shape_out), folded.reshape(shape_out)


def _chromatin(n: int, rng: np.random.Generator, size: int = 40) -> Image:
    """(n, size, size) brightness of nuclei: grainy discs of diameter ``size`` / 1.4."""
    grain = rng.standard_normal((n, size, size), dtype=np.float32)
    axis = np.linspace(-1.4, 1.4, size, dtype=np.float32)
    distance = np.hypot(axis[:, None], axis[None, :])
    disc = np.clip((1.06 - distance) / 0.14, 0, 1)
    for i in range(n):
        smooth = cv2.GaussianBlur(grain[i], (0, 0), 2.2)
        grain[i] = disc * np.clip(1 + 0.22 * smooth / smooth.std(), 0.3, 1.8)
    return grain


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def _image(
    config: SimulationConfig,
    plate: _Plate,
    population: _Population,
    anatomy: _Anatomy,
    dials: Float,
    rng: np.random.Generator,
) -> SimulatedSite:
    """Renders the frames; ``dials`` is (n, T, dials)."""
    shape = (config.frames, config.height, config.width)
    stack = np.empty((shape[0], len(CHANNELS), *shape[1:]), np.uint16)
    nuclei, cells = np.empty(shape, np.int32), np.empty(shape, np.int32)
    stage = np.clip(rng.normal(0, _STAGE_STEP, (config.frames, 2)).cumsum(axis=0), -_STAGE_RANGE, _STAGE_RANGE)
    bad = rng.random(config.frames) < config.out_of_focus_rate
    sigma = np.where(bad, rng.uniform(*_DEFOCUSED_SIGMA, config.frames), _PSF_SIGMA)
    specks = rng.uniform([0, 0, 1.0], [*shape[1:], 2.2], (rng.poisson(config.debris_per_site), 3))
    for t in range(config.frames):
        scene = _scene(config, population, anatomy, dials, t, stage[t])
        for y, x, radius in specks:
            centre = np.array([y, x]) + stage[t] / config.pixel_size_um
            outline = _circle(centre, radius / config.pixel_size_um)
            for plane in scene.light:
                cv2.fillPoly(plane, [outline], _DEBRIS_LIGHT, cv2.LINE_8, _SHIFT)
        nuclei[t], cells[t] = scene.nuclei, scene.cells
        for c, plane in enumerate(scene.light):
            light = cv2.GaussianBlur(plane, (0, 0), sigma[t] / config.pixel_size_um)
            stack[t, c] = _expose(config, plate, c, light, rng)
    daughters = np.flatnonzero(population.parent >= 0)
    parents = pd.DataFrame(
        {
            "track": daughters + 1,
            "parent": population.parent[daughters] + 1,
            "frame": population.present[daughters].argmax(axis=1),
        },
        dtype=np.int64,
    )
    return SimulatedSite(stack, nuclei, cells, parents, np.flatnonzero(bad).tolist())


def _expose(
    config: SimulationConfig, plate: _Plate, channel: int, light: Image, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """What the camera counts; the background is bright enough to take Poisson noise as Gaussian."""
    electrons = plate.gain[channel] * light
    electrons += plate.background[channel]
    electrons *= plate.illumination * np.float32(config.exposure)
    noise = rng.standard_normal(light.shape, dtype=np.float32)
    noise *= np.sqrt(electrons + np.float32(config.read_noise**2))
    counts = np.rint((electrons + noise) * np.float32(_COUNTS_PER_ELECTRON / config.exposure))
    recorded: NDArray[np.uint16] = np.clip(counts, 0, _COUNTS_MAX).astype(np.uint16)
    return recorded


@dataclass(frozen=True, eq=False)
class _Scene:
    """One frame in front of the optics: (C, H, W) light [electrons] and (H, W) labels."""

    light: Image
    nuclei: Labels
    cells: Labels


@dataclass(frozen=True, eq=False)
class _Shape:
    """The n cells that are in one frame; lengths in pixels."""

    centre: Float  # (n, 2) of the nucleus, y and x
    nucleus_axes: Float  # (n, 2)
    nucleus_angle: Float  # (n,)
    radius: Float  # (n,)
    amplitude: Float  # (n, K)
    phase: Float  # (n, K)

    def nucleus(self, angle: Float) -> Float:
        """Distance from the centre to the nucleus' edge at angles (n, m)."""
        along, across = self.nucleus_axes.T[:, :, None]
        turned = angle - self.nucleus_angle[:, None]
        distance: Float = along * across / np.hypot(across * np.cos(turned), along * np.sin(turned))
        return distance

    def outline(self, angle: Float) -> Float:
        """Distance from the centre to the cell's edge at angles (n, m), outside the nucleus."""
        shape = np.ones_like(angle)
        for k in range(self.amplitude.shape[1]):
            shape += self.amplitude[:, k, None] * np.cos((k + 1) * angle + self.phase[:, k, None])
        return np.maximum(self.radius[:, None] * shape, 1.15 * self.nucleus(angle))

    def polygons(self, distance: Float) -> NDArray[np.int32]:
        """(n, m, 2) fixed-point corners (x, y) at the distances (n, m) to the outline angles."""
        return _fixed_point(self.centre[:, None, ::-1] + distance[:, :, None] * _OUTLINE_DIRECTIONS)


def _scene(
    config: SimulationConfig,
    population: _Population,
    anatomy: _Anatomy,
    dials: Float,
    t: int,
    stage: Float,
) -> _Scene:
    here = np.flatnonzero(population.present[:, t])
    dial = dials[here, t]
    mitosis, dying = population.mitosis[here, t], population.dying[here, t]
    stain = anatomy.stain[here]
    # A metaphase plate is narrow and long; a dying nucleus shrinks evenly. Both are bright.
    scale = np.exp(dial[:, Dial.NUCLEUS_SIZE]) * (1 - 0.35 * dying)
    squeeze = np.stack([np.ones(len(here)), 1 - 0.45 * mitosis], axis=1)
    shape = _Shape(
        centre=(population.position[here, t] + stage) / config.pixel_size_um,
        nucleus_axes=anatomy.nucleus_axes[here] * scale[:, None] * squeeze / config.pixel_size_um,
        nucleus_angle=anatomy.nucleus_angle[here, t],
        radius=anatomy.radius[here]
        * np.exp(dial[:, Dial.CELL_SIZE])
        * (1 - 0.25 * mitosis - 0.4 * dying)
        / config.pixel_size_um,
        amplitude=anatomy.amplitude[here] * (1 - np.maximum(mitosis, dying))[:, None],
        phase=anatomy.phase[here, t],
    )
    potential = np.exp(dial[:, Dial.POLARISATION]) * (1 - 0.8 * dying)

    nuclei, cells = _labels(config, shape, here + 1)
    light = np.zeros((len(CHANNELS), config.height, config.width), np.float32)
    brightness = np.exp(dial[:, Dial.CONDENSATION]) * (1 + 0.8 * mitosis + 1.2 * dying)
    for i, cell in enumerate(here):
        level = _NUCLEUS_LIGHT * stain[i, 0] * brightness[i]
        _add_nucleus(light[0], anatomy.texture[cell], shape, i, level)

    y, x, weight = _network(config, shape, anatomy, here, dial, t)
    n_labels = len(population.parent) + 1
    spread = 1.5 / config.pixel_size_um
    for c, level in ((1, np.ones(len(here))), (2, potential)):
        diffuse = np.zeros(n_labels, np.float32)
        diffuse[here + 1] = _CYTOPLASM_LIGHT[c - 1] * stain[:, c] * (0.6 + 0.4 * level)
        # Dyes of mitochondria are thin above the nucleus.
        cytoplasm = diffuse[cells] * np.where(nuclei > 0, np.float32(0.6), np.float32(1))
        light[c] = cv2.GaussianBlur(cytoplasm, (0, 0), spread)
        point_light = weight * (_FILAMENT_LIGHT[c - 1] * stain[:, c] * level)[:, None]
        light[c] += _splat(y, x, point_light, config.height, config.width)
    return _Scene(light, nuclei, cells)


def _labels(config: SimulationConfig, shape: _Shape, ids: NDArray[np.int64]) -> tuple[Labels, Labels]:
    """True labels of one frame; where cells overlap the later lies on top, nuclei above all."""
    nuclei = np.zeros((config.height, config.width), np.int32)
    cells = np.zeros_like(nuclei)
    angle = np.broadcast_to(_OUTLINE_ANGLES, (len(ids), len(_OUTLINE_ANGLES)))
    # fillPoly paints the pixels that the outline touches, half a pixel too many.
    for labels, distance in ((nuclei, shape.nucleus(angle)), (cells, shape.outline(angle))):
        for label, polygon in zip(ids, shape.polygons(distance - 0.5), strict=True):
            cv2.fillPoly(labels, [polygon], int(label), cv2.LINE_8, _SHIFT)
    np.copyto(cells, nuclei, where=nuclei > 0)
    return nuclei, cells


def _add_nucleus(plane: Image, texture: Image, shape: _Shape, i: int, level: float) -> None:
    """Adds the chromatin of cell ``i`` to the plane (H, W), in place."""
    reach = int(np.ceil(1.4 * shape.nucleus_axes[i].max())) + 1
    corner = np.floor(shape.centre[i]).astype(int) - reach
    turn = shape.nucleus_angle[i]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # Texture coordinates (x, y) run over [-1.4, 1.4] around the unit disc.
    to_field = rotation * shape.nucleus_axes[i] * (2.8 / (len(texture) - 1))
    centre = (shape.centre[i] - corner)[::-1]
    offset = centre - to_field @ np.full(2, (len(texture) - 1) / 2)
    size = 2 * reach + 1
    patch = cv2.warpAffine(texture, np.column_stack([to_field, offset]), (size, size))
    low = np.maximum(corner, 0)
    high = np.minimum(corner + size, plane.shape)
    (y0, x0), (y1, x1) = low - corner, high - corner
    plane[low[0] : high[0], low[1] : high[1]] += np.float32(level) * patch[y0:y1, x0:x1]


def _network(
    config: SimulationConfig,
    shape: _Shape,
    anatomy: _Anatomy,
    here: NDArray[np.int64],
    dial: Float,
    t: int,
) -> tuple[Float, Float, Float]:
    """The filaments' points in one frame: y, x [px] and weight, each (n, points of a cell)."""
    cloud = (len(here), _FILAMENTS, _PIECES, _POINTS)
    points = (len(here), _FILAMENTS * _PIECES * _POINTS)  # never -1: no cell may be left
    fission, fusion, swelling, clustering = (
        np.clip(dial[:, d], low, 1.1)[:, None, None, None]
        for d, low in (
            (Dial.FISSION, 0.0),
            (Dial.FUSION, 0.0),
            (Dial.SWELLING, 0.0),
            (Dial.CLUSTERING, -0.3),
        )
    )
    angle = anatomy.point_angle[here] + anatomy.wobble[0, here, :, t][:, :, None, None]
    radius = anatomy.point_radius[here] + anatomy.wobble[1, here, :, t][:, :, None, None]
    radius = np.clip(radius * (1 - 0.72 * clustering), 0.01, 0.96)
    flat = angle.reshape(points)
    inner = shape.nucleus(flat).reshape(cloud)
    distance = inner + radius * (shape.outline(flat).reshape(cloud) - inner)

    um = 1 / config.pixel_size_um
    phase = anatomy.ring[here][:, :, :, None]
    around = phase + 2 * np.pi * np.arange(_POINTS) / _POINTS
    scatter = (1.1 * fission + 1.3 * swelling) * um
    yx = []
    for i, wave in enumerate((np.sin, np.cos)):
        place = shape.centre[:, i, None, None, None] + distance * wave(angle)
        middle = place.mean(axis=3, keepdims=True)
        place = middle + (place - middle) * (1 - 0.8 * np.minimum(fission, 1))
        place += np.minimum(swelling, 1) * (middle + 1.5 * um * wave(around) - place)
        yx.append((place + scatter * wave(phase)).reshape(points))

    from_middle = np.abs(np.linspace(-1, 1, _PIECES * _POINTS)).reshape(_PIECES, _POINTS)
    visible = _VISIBLE + 0.58 * fusion
    weight = np.clip((visible - from_middle) * 12 + 0.5, 0, 1)
    kept = np.arange(_FILAMENTS)[:, None, None] < 0.4 * _FILAMENTS
    weight = weight * np.where(kept, 1, 1 - 0.9 * fusion)
    return yx[0], yx[1], np.broadcast_to(weight, cloud).reshape(points)


def _splat(y: Float, x: Float, light: Float, height: int, width: int) -> Image:
    """(H, W) image of points, each shared out among the four pixels around it."""
    inside = (light > 0) & (y >= 0) & (x >= 0) & (y < height - 1) & (x < width - 1)
    y, x, light = y[inside], x[inside], light[inside]
    row, column = y.astype(np.int64), x.astype(np.int64)
    down, right = y - row, x - column
    first = row * width + column
    pixels = np.concatenate([first, first + 1, first + width, first + width + 1])
    shares = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    image = np.bincount(pixels, np.concatenate([light * s for s in shares]), height * width)
    return image.reshape(height, width).astype(np.float32)


def _circle(centre: Float, radius: float) -> NDArray[np.int32]:
    """Fixed-point corners (x, y) of a circle around a centre (y, x), in pixels."""
    return _fixed_point(centre[::-1] + radius * _OUTLINE_DIRECTIONS)


def _fixed_point(corners: Float) -> NDArray[np.int32]:
    """Coordinates as OpenCV takes them for sub-pixel drawing."""
    fixed: NDArray[np.int32] = np.rint(corners * 2**_SHIFT).astype(np.int32)
    return fixed
