"""Profiles: the embeddings of many cells as one vector a well, and of many wells as one a compound.

Aggregation and normalisation to a plate's negative controls follow the usual practice of
image-based profiling (Caicedo et al. 2017, "Data-analysis strategies for image-based cell
profiling").

Shapes: n cells, w wells, c compounds, D dimensions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from screening.retrieval import Members
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Profiles = npt.NDArray[np.float32]

# The median absolute deviation of a normal distribution is its standard deviation over this.
_MAD_TO_SD = 1.4826


class NoNormalisation(Config):
    """Leave the profiles as they are."""

    method: Literal["none"] = Field("none", description="no normalisation")


class _ToReference(Config):
    scale: Literal["none", "standard", "robust"] = Field(
        "standard",
        description=(
            "what is subtracted and divided: mean and standard deviation (standard), median and "
            "MAD (robust), or the mean is subtracted only (none)"
        ),
    )
    min_wells: int = Field(
        3,
        ge=2,
        description=(
            "reference wells every plate needs for their spread to be used; if one has fewer, all "
            "plates are centred only, which keeps them comparable"
        ),
    )


class ToControls(_ToReference):
    """Normalise each plate to its negative controls."""

    method: Literal["controls"] = Field("controls", description="to the plate's negative controls")


class ToPlate(_ToReference):
    """Normalise each plate to all of its wells."""

    method: Literal["plate"] = Field("plate", description="to all wells of the plate")


Normalise = Annotated[NoNormalisation | ToControls | ToPlate, Field(discriminator="method")]


class ProfilesConfig(Config):
    """How cells become profiles."""

    aggregate: Literal["mean", "median"] = Field(
        "mean", description="how cells are summed up a well, and wells a compound"
    )
    normalise: Normalise = Field(ToControls(), description="what the wells of a plate are compared with")


def well_profiles(
    embeddings: npt.NDArray[Any],
    plate: npt.ArrayLike,
    well: npt.ArrayLike,
    config: ProfilesConfig | None = None,
) -> tuple[pd.DataFrame, Profiles]:
    """Aggregate cells to wells.

    Args:
        embeddings: (n, D) finite.
        plate: (n,) plate of each cell.
        well: (n,) well of each cell on its plate.
        config: ``aggregate`` is used; the defaults when None.

    Returns:
        keys[plate, well, n_cells] sorted by plate and well, and (w, D) float32.

    Raises:
        InputError: columns of different lengths, or an embedding that is not finite.
    """
    config = config or ProfilesConfig()
    _check(embeddings, plate=plate, well=well)
    cells = pd.DataFrame({"plate": np.asarray(plate), "well": np.asarray(well)})
    return _aggregate(embeddings, cells, "n_cells", config.aggregate)


def compound_profiles(
    profiles: npt.NDArray[Any], compound: npt.ArrayLike, config: ProfilesConfig | None = None
) -> tuple[pd.DataFrame, Profiles]:
    """Aggregate wells to compounds.

    Args:
        profiles: (w, D) finite, normalised.
        compound: (w,) compound of each well.
        config: ``aggregate`` is used; the defaults when None.

    Returns:
        keys[compound, n_wells] sorted by compound, and (c, D) float32.

    Raises:
        InputError: columns of different lengths, or a profile that is not finite.
    """
    config = config or ProfilesConfig()
    _check(profiles, compound=compound)
    wells = pd.DataFrame({"compound": np.asarray(compound)})
    return _aggregate(profiles, wells, "n_wells", config.aggregate)


def normalise(
    profiles: npt.NDArray[Any],
    plate: npt.ArrayLike,
    is_control: npt.ArrayLike,
    config: ProfilesConfig | None = None,
) -> tuple[Profiles, pd.DataFrame]:
    """Subtract, plate by plate, the centre of the reference wells and divide by their spread.

    A dimension in which the reference wells of a plate do not vary is centred only.

    Args:
        profiles: (w, D) finite.
        plate: (w,) plate of each well.
        is_control: (w,) bool, the negative controls.
        config: ``normalise`` is used; the defaults when None.

    Returns:
        (w, D) float32, and a table with a row a plate: ``plate``, ``n_reference`` wells, ``center``
        and ``scale`` ((D,) float32 each; 0 and 1 where nothing was done).

    Raises:
        InputError: a plate without negative controls when they are the reference, columns of
            different lengths, or a profile that is not finite.
    """
    choice = (config or ProfilesConfig()).normalise
    _check(profiles, plate=plate, is_control=is_control)
    values = np.asarray(profiles, np.float64)
    control = np.asarray(is_control, bool)
    codes, plates = pd.factorize(np.asarray(plate), sort=True)
    of_plate = Members(codes.astype(np.int64))
    references = [
        wells[control[wells]] if choice.method == "controls" else wells
        for wells in map(of_plate.of, range(len(plates)))
    ]
    without = [str(name) for name, wells in zip(plates, references, strict=True) if not wells.size]
    if without:
        raise InputError(
            f"no negative control with cells on plate {', '.join(without)}; give the plate's "
            "controls the role negative_control in the plate map, or normalise to 'plate' or 'none'"
        )

    normalised = np.empty(values.shape, np.float32)
    rows = []
    for code, (name, wells) in enumerate(zip(plates, references, strict=True)):
        center, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
        if choice.method != "none":
            center, scale = _center_and_scale(values[wells], choice.scale)
            if min(map(len, references)) < choice.min_wells:
                scale = np.ones_like(scale)
        own = of_plate.of(code)
        normalised[own] = (values[own] - center) / scale
        rows.append((name, len(wells), center.astype(np.float32), scale.astype(np.float32)))
    return normalised, pd.DataFrame(rows, columns=["plate", "n_reference", "center", "scale"])


def _center_and_scale(
    reference: npt.NDArray[np.float64], scale: Literal["none", "standard", "robust"]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(D,) centre and (D,) spread of (r, D) reference wells; spread 1 where they do not vary."""
    center = np.median(reference, axis=0) if scale == "robust" else reference.mean(axis=0)
    if scale == "none":
        return center, np.ones_like(center)
    deviation = np.abs(reference - center)
    if scale == "robust":
        spread = _MAD_TO_SD * np.median(deviation, axis=0)
    else:
        spread = np.sqrt(np.square(deviation).sum(axis=0) / max(len(reference) - 1, 1))
    # Equal float32 values differ from their mean by rounding, which must not become the unit.
    rounding = np.finfo(np.float32).eps * np.abs(reference).max(axis=0)
    return center, np.where(spread > rounding, spread, 1.0)


def _aggregate(
    values: npt.NDArray[Any], keys: pd.DataFrame, count: str, how: Literal["mean", "median"]
) -> tuple[pd.DataFrame, Profiles]:
    """One row a distinct key, sorted, with how many rows it stands for in column ``count``."""
    groups = keys.groupby(list(keys.columns), sort=True, dropna=False)
    codes = np.asarray(groups.ngroup(), np.int64)
    table = groups.size().rename(count).reset_index()
    of_key = Members(codes)
    profiles = np.empty((len(table), values.shape[1]), np.float32)
    for i in range(len(table)):
        rows = values[of_key.of(i)].astype(np.float64)
        profiles[i] = np.median(rows, axis=0) if how == "median" else rows.mean(axis=0)
    return table, profiles


def _check(values: npt.NDArray[Any], **columns: npt.ArrayLike) -> None:
    if values.ndim != 2:
        raise InputError(f"profiles have shape {values.shape}; expected (rows, dimensions)")
    for name, column in columns.items():
        if np.shape(column) != (len(values),):
            raise InputError(f"{name} has shape {np.shape(column)} for {len(values)} rows")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise InputError(
            f"{bad.size} of {len(values)} rows are not finite (the first is row {bad[0]}); "
            "leave them out before profiling"
        )
