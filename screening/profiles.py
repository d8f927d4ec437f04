"""Profiles: the embeddings of many cells as one vector a well, and of many wells as one a treatment or compound.

Aggregation, normalisation to a plate's negative controls and the choice of features follow the usual practice of
image-based profiling (Caicedo et al. 2017, "Data-analysis strategies for image-based cell profiling"). A recipe is a
list of steps that the profiles of wells go through; the names of the usual ones stand for their steps.

Shapes: n cells, w wells, r reference wells, D dimensions.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from screening.cosines import Floats
from screening.retrieval import Members
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Profiles = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

Reference = Literal["controls", "plate"]

# The median absolute deviation of a normal distribution is its standard deviation over this.
_MAD_TO_SD = 1.4826

# Rows and columns that are worked on at once in float64: the memory that is needed beyond the profiles themselves.
_ROWS, _COLUMNS = 4096, 64

# Measurements of where a cell lies and what it was numbered as, by their CellProfiler names: not of how it looks.
_POSITIONS = (
    "*_Location_*",
    "*_AreaShape_Center_*",
    "*BoundingBox*",
    "*_Number_Object_Number*",
    "*_ObjectNumber*",
    "*_Parent_*",
    "*_Children_*",
    "Image_ExecutionTime_*",
    "Image_Group_*",
    "Image_Height_*",
    "Image_Width_*",
    "Image_ModuleError_*",
    "Image_Scaling_*",
    "Image_ProcessingStatus*",
)


# --- what can be chosen --------------------------------------------------------------------------


class Mean(Config):
    """The mean."""

    method: Literal["mean"] = Field("mean", description="the mean")


class Median(Config):
    """The median of each dimension."""

    method: Literal["median"] = Field("median", description="the median of each dimension")


class TrimmedMean(Config):
    """The mean without the extremes of each dimension."""

    method: Literal["trimmed_mean"] = Field("trimmed_mean", description="the mean without the extremes")
    share: float = Field(0.1, ge=0, lt=0.5, description="share of the values left out at either end")


class Modz(Config):
    """The mean of replicates weighted by how well each agrees with the others (Subramanian et al. 2017, L1000)."""

    method: Literal["modz"] = Field("modz", description="the mean of replicates, weighted by their agreement")
    min_weight: float = Field(
        0.01, gt=0, description="least weight: a replicate's is its mean Spearman correlation with the others"
    )


Aggregate = Annotated[Mean | Median | TrimmedMean, Field(discriminator="method")]
Consensus = Annotated[Mean | Median | TrimmedMean | Modz, Field(discriminator="method")]


class Filter(Config):
    """Leave features out that say nothing, or that another says already."""

    method: Literal["filter"] = Field("filter", description="features that say nothing are left out")
    exclude: tuple[str, ...] = Field(
        _POSITIONS, description="features with these names, * for anything: where cells lie and how they are numbered"
    )
    max_missing: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of wells in which a feature may be NaN or infinite; where it is, the median of its plate",
    )
    max_repeated: float = Field(
        0.95, gt=0, le=1, description="share of wells that may have the same value; a constant one always goes"
    )
    max_correlation: float | None = Field(
        None,
        gt=0,
        le=1,
        description="a feature that correlates more than this with one before it goes; null: none does",
    )
    max_value: float | None = Field(
        None, gt=0, description="a feature that is larger than this in a well goes; useful after scaling; null: none"
    )


class Scale(Config):
    """Subtract, plate by plate, the centre of the reference wells and divide by their spread."""

    method: Literal["scale"] = Field("scale", description="plate by plate, to reference wells")
    reference: Literal["controls", "plate", "treatments"] = Field(
        "controls", description="the plate's negative controls, all its wells, or all but the negative controls"
    )
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


class Clip(Config):
    """Bring values beyond a limit back to it, so that no well lives by one feature."""

    method: Literal["clip"] = Field("clip", description="values beyond a limit are brought back to it")
    limit: float = Field(6.0, gt=0, description="largest absolute value, in units of the scale before")


class Sphere(Config):
    """Turn the covariance of the reference wells into the identity (ZCA)."""

    method: Literal["sphere"] = Field("sphere", description="whitening on reference wells")
    reference: Reference = Field("controls", description="the negative controls of all plates, or all wells")
    regularisation: float = Field(
        0.3,
        ge=0,
        description="added to the variance along each axis, in units of their mean; 0: the covariance becomes exactly "
        "the identity, which needs more reference wells than dimensions",
    )


class Align(Config):
    """Give the reference wells of each batch the covariance that they have over all (CORAL, Sun et al. 2016)."""

    method: Literal["align"] = Field("align", description="covariances of batches are made alike")
    reference: Reference = Field("controls", description="the negative controls, or all wells")
    batch: str = Field("plate", description="column of the metadata that names the batches")
    prior: float = Field(
        0.3,
        ge=0,
        description="wells that the covariance over all batches counts for in that of each batch, which few wells "
        "estimate badly, as a share of the number of features; 0: the batch's own alone",
    )
    regularisation: float = Field(
        0.1, ge=0, description="added to all variances, in units of the mean one, so that they can be inverted"
    )


Step = Annotated[Filter | Scale | Clip | Sphere | Align, Field(discriminator="method")]


class Raw(Config):
    """Profiles as they are, without features that cannot be compared."""

    method: Literal["raw"] = Field("raw", description="as they are, without features that are not finite")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return (Filter(exclude=(), max_repeated=1),)


class _Referred(Config):
    reference: Reference = Field("controls", description="the plate's negative controls, or all its wells")


class Standardised(_Referred):
    """Mean and standard deviation of each plate's controls."""

    method: Literal["standardised"] = Field("standardised", description="z-scores by each plate's controls")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return (Filter(), Scale(reference=self.reference))


class Robust(_Referred):
    """Median and MAD of each plate's controls, clipped, without features that repeat others."""

    method: Literal["robust"] = Field("robust", description="robust z-scores by each plate's controls")
    max_correlation: float | None = Field(0.95, gt=0, le=1, description="as that of the step filter")
    limit: float = Field(6.0, gt=0, description="largest absolute z-score")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return (
            Filter(max_correlation=self.max_correlation),
            Scale(reference=self.reference, scale="robust"),
            Clip(limit=self.limit),
        )


class Sphered(_Referred):
    """z-scores by each plate's controls, clipped and whitened on the controls of all plates."""

    method: Literal["sphered"] = Field("sphered", description="z-scores, whitened on the controls of all plates")
    limit: float = Field(6.0, gt=0, description="largest absolute z-score")
    regularisation: float = Field(0.3, ge=0, description="as that of the step sphere")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return (
            Filter(),
            Scale(reference=self.reference),
            Clip(limit=self.limit),
            Sphere(reference=self.reference, regularisation=self.regularisation),
        )


class Tvn(_Referred):
    """Typical variation normalisation (Ando, McLean & Berndl 2017): whitening, then each batch aligned to all."""

    method: Literal["tvn"] = Field("tvn", description="typical variation normalisation")
    limit: float = Field(6.0, gt=0, description="largest absolute z-score")
    regularisation: float = Field(0.3, ge=0, description="as that of the step sphere")
    batch: str = Field("plate", description="column of the metadata that names the batches")
    prior: float = Field(0.3, ge=0, description="as that of the step align")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        sphered = Sphered(reference=self.reference, limit=self.limit, regularisation=self.regularisation)
        align = Align(reference=self.reference, batch=self.batch, prior=self.prior)
        return (*sphered.plan(), align)


class Contrasted(_Referred):
    """Whitened, then each plate centred on its treatments: what tells them apart, without what all have in common."""

    method: Literal["contrasted"] = Field("contrasted", description="whitened, and centred on each plate's treatments")
    limit: float = Field(6.0, gt=0, description="largest absolute z-score")
    regularisation: float = Field(0.3, ge=0, description="as that of the step sphere")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        sphered = Sphered(reference=self.reference, limit=self.limit, regularisation=self.regularisation)
        return (*sphered.plan(), Scale(reference="treatments", scale="none"))


class Recentred(_Referred):
    """For features of one scale: centred by each plate's controls, whitened on all wells, centred on treatments."""

    method: Literal["recentred"] = Field(
        "recentred", description="for features that are scaled already: whitened on all wells, and centred"
    )
    regularisation: float = Field(1.0, ge=0, description="as that of the step sphere")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return (
            Filter(),
            Scale(reference=self.reference, scale="none"),
            Sphere(reference="plate", regularisation=self.regularisation),
            Scale(reference="treatments", scale="none"),
        )


class Custom(Config):
    """Any steps in any order."""

    method: Literal["custom"] = Field("custom", description="the steps that are listed")
    steps: tuple[Step, ...] = Field((), description="of filter, scale, clip, sphere and align, in order")

    def plan(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return self.steps


Recipe = Annotated[
    Raw | Standardised | Robust | Sphered | Tvn | Contrasted | Recentred | Custom,
    Field(discriminator="method"),
]
NAMED_RECIPES = (Raw, Standardised, Robust, Sphered, Tvn, Contrasted, Recentred)


class ProfilesConfig(Config):
    """How cells become profiles."""

    aggregate: Aggregate = Field(Mean(), description="how cells are summed up a well")
    recipe: Recipe = Field(Sphered(), description="what the profiles of wells go through; docs/profiles.md compares")
    consensus: Consensus = Field(Mean(), description="how wells are summed up a treatment and a compound")
    treatment: tuple[str, ...] = Field(
        ("compound", "concentration", "unit", "time", "cell_line"),
        description="columns of the metadata, of those that there are, that wells of one treatment share",
    )

    @property
    def needs_controls(self) -> bool:
        """Whether a plate without negative controls cannot be processed."""
        return any(isinstance(step, Scale) and step.reference == "controls" for step in self.recipe.plan())


# --- summing up ----------------------------------------------------------------------------------


def sum_up(rows: npt.NDArray[Any], how: Consensus | None = None) -> Profiles:
    """One profile of many: of a well's cells, or of a treatment's wells.

    Args:
        rows: (n, D) finite, at least one.
        how: the mean when None.

    Returns:
        (D,) float32.

    Raises:
        InputError: values that are not finite, or no rows.
    """
    _check(rows)
    if not len(rows):
        raise InputError("nothing to sum up: a profile needs one row at least")
    values = rows.astype(np.float64)
    if isinstance(how, Median):
        found = np.median(values, axis=0)
    elif isinstance(how, TrimmedMean):
        cut = int(how.share * len(values))
        found = np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)
    elif isinstance(how, Modz) and len(values) > 2:
        found = agreement_weights(values, how.min_weight) @ values
    else:
        found = values.mean(axis=0)
    return np.asarray(found, np.float32)


def consensus_profiles(
    profiles: npt.NDArray[Any], keys: pd.DataFrame, how: Consensus | None = None
) -> tuple[pd.DataFrame, Profiles]:
    """Aggregate wells to what their keys name: compounds, or treatments.

    Args:
        profiles: (w, D) finite, normalised.
        keys: (w,) rows; what is missing is a value like any other.
        how: the mean when None.

    Returns:
        The distinct keys, sorted, with ``n_wells``, and their profiles, float32.

    Raises:
        InputError: columns of different lengths, or a profile that is not finite.
    """
    _check(profiles, **{str(name): keys[name] for name in keys})
    groups = keys.reset_index(drop=True).groupby(list(keys.columns), sort=True, dropna=False)
    of_key = Members(np.asarray(groups.ngroup(), np.int64))
    table = groups.size().rename("n_wells").reset_index()
    found = [sum_up(profiles[of_key.of(i)], how) for i in range(len(table))]
    return table, np.stack(found) if found else np.empty((0, profiles.shape[1]), np.float32)


def agreement_weights(rows: Floats, min_weight: float) -> Floats:
    """Weights of replicates by their mean Spearman correlation with the others (Subramanian et al. 2017).

    Args:
        rows: (n, D) replicates, at least two.
        min_weight: what a smaller mean correlation is raised to.

    Returns:
        (n,) float64 that add up to 1.
    """
    from scipy.stats import rankdata

    ranks = rankdata(rows, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    ranks = np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)
    correlation = ranks @ ranks.T
    np.fill_diagonal(correlation, 0)
    weights = np.maximum(correlation.sum(axis=1) / (len(rows) - 1), min_weight)
    return np.asarray(weights / weights.sum())


# --- the steps of a recipe -----------------------------------------------------------------------


class Basis(NamedTuple):
    """What a plate's wells were normalised by: (D,) float32 centre and scale; 0 and 1 where nothing was done."""

    step: int
    plate: str
    n_reference: int
    center: Profiles
    scale: Profiles


@dataclass(frozen=True)
class Processed:
    """Profiles that have gone through a recipe.

    Attributes:
        values: (w, d) float32, finite; the d features that were kept, or as many mixtures of them after whitening.
        kept: (d,) position of each among the D that went in.
        excluded: (D,) why a feature is left out; empty where it is kept.
        basis: what scaling subtracted and divided by, a row a plate and step.
        notes: what a reader should know: what was left out, and what could not be done.
        scaled: false where a plate had too few reference wells to be scaled by: values have no common unit then.
    """

    values: Profiles
    kept: npt.NDArray[np.int64]
    excluded: npt.NDArray[Any]
    basis: tuple[Basis, ...] = ()
    notes: tuple[str, ...] = ()
    scaled: bool = True


def process(
    profiles: npt.NDArray[Any],
    wells: pd.DataFrame,
    recipe: Recipe,
    features: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
) -> Processed:
    """Take the profiles of wells through a recipe.

    Args:
        profiles: (w, D); NaN and infinities where a feature is missing.
        wells: plate and role of each, and the column that a step ``align`` names.
        recipe: the steps.
        features: (D,) names; numbers by default.
        overwrite: work on ``profiles`` itself where it is float32, rather than on a copy.

    Raises:
        InputError: if shapes do not fit, a plate has none of the reference wells, no feature is left, or there are too
            few controls for what is asked of them.
    """
    _check_shape(profiles, **{str(name): wells[name] for name in ("plate", "role")})
    names = np.array([f"{i}" for i in range(profiles.shape[1])] if features is None else list(features), object)
    if len(names) != profiles.shape[1]:
        raise InputError(f"{len(names)} names for profiles of {profiles.shape[1]} features")
    wells = wells.reset_index(drop=True)
    state = Processed(
        values=np.asarray(profiles, np.float32) if overwrite else np.array(profiles, np.float32),
        kept=np.arange(len(names)),
        excluded=np.full(len(names), "", object),
    )
    for number, step in enumerate(recipe.plan(), 1):
        if isinstance(step, Filter):
            state = _filter(state, wells, step, names)
            continue
        _check_finite(state.values)
        if isinstance(step, Scale):
            state = _scale(state, wells, step, number)
        elif isinstance(step, Clip):
            state = _clip(state, step)
        elif isinstance(step, Sphere):
            state = _sphere(state, wells, step)
        else:
            state = _align(state, wells, step)
    _check_finite(state.values)
    return state


def _is_control(wells: pd.DataFrame) -> Mask:
    return (wells["role"] == "negative_control").to_numpy()


def _reference(wells: pd.DataFrame, reference: Literal["controls", "plate", "treatments"]) -> Mask:
    control = _is_control(wells)
    if reference == "plate":
        return np.ones(len(wells), bool)
    return control if reference == "controls" else ~control


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


# --- filter --------------------------------------------------------------------------------------


def _filter(state: Processed, wells: pd.DataFrame, step: Filter, names: npt.NDArray[Any]) -> Processed:
    values = state.values
    reason = np.full(values.shape[1], "", object)
    for pattern in step.exclude:
        for i in np.flatnonzero(reason == ""):
            if fnmatch.fnmatchcase(str(names[state.kept[i]]), pattern):
                reason[i] = "by its name"
    filled = 0
    codes = pd.factorize(wells["plate"])[0]
    for block in _blocks(values.shape[1], _COLUMNS):
        part = values[:, block]
        missing = ~np.isfinite(part)
        share = missing.mean(axis=0)
        reason[block] = np.where((reason[block] == "") & (share > step.max_missing), "not finite", reason[block])
        gaps = np.flatnonzero((reason[block] == "") & (share > 0))
        for column in gaps:
            filled += int(missing[:, column].sum())
            values[:, block.start + column] = _filled(part[:, column], missing[:, column], codes)
        open_ = np.flatnonzero(reason[block] == "")
        reason[block][open_] = _why_still(values[:, block][:, open_], step)
    candidates = np.flatnonzero(reason == "")
    if step.max_correlation is not None and len(candidates):
        repeats = _repeats(values, candidates, step.max_correlation)
        reason[list(repeats)] = [f"correlates with {names[state.kept[i]]}" for i in repeats.values()]
    return _without(state, reason, filled)


def _filled(column: npt.NDArray[Any], missing: Mask, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A feature's missing values replaced by the median of their plate; of all plates where that has none."""
    known = pd.Series(np.where(missing, np.nan, column))
    of_plate = known.groupby(codes).transform("median").fillna(known.median())
    return np.where(missing, of_plate.to_numpy(), column)


def _why_still(values: Profiles, step: Filter) -> npt.NDArray[Any]:
    """Why features do not vary, or vary too much; empty where they do neither."""
    ordered = np.sort(values, axis=0)
    low, high = ordered[0], ordered[-1]
    most = np.maximum(abs(low), abs(high))
    # Equal values may differ by rounding.
    constant = high - low <= np.finfo(np.float32).eps * most
    window = int(step.max_repeated * len(values)) + 1
    repeated = np.zeros(len(low), bool)
    if window <= len(values):
        repeated = (ordered[window - 1 :] == ordered[: len(values) - window + 1]).any(axis=0)
    large = np.zeros(len(low), bool) if step.max_value is None else most > step.max_value
    choices = ["no variance", "nearly always the same", "too large"]
    return np.select([constant, repeated, large], choices, "").astype(object)


def _repeats(values: Profiles, candidates: npt.NDArray[np.int64], limit: float) -> dict[int, int]:
    """Features that correlate with one that is kept, before them in order, and with which."""
    mean = np.concatenate([values[:, b].mean(axis=0, dtype=np.float64) for b in _blocks(values.shape[1], _COLUMNS)])
    mean = mean[candidates]
    products = np.zeros((len(candidates), len(candidates)))
    for rows in _blocks(len(values), _ROWS):
        part = values[rows][:, candidates] - mean
        products += part.T @ part
    length = np.sqrt(products.diagonal())
    correlation = np.abs(products / length / length[:, None])
    kept: list[int] = []
    found = {}
    for i in range(len(candidates)):
        with_kept = correlation[i, kept]
        if with_kept.size and with_kept.max() > limit:
            found[int(candidates[i])] = int(candidates[kept[int(with_kept.argmax())]])
        else:
            kept.append(i)
    return found


def _without(state: Processed, reason: npt.NDArray[Any], filled: int) -> Processed:
    """The features without a reason; what was done, in notes."""
    kept = reason == ""
    excluded = state.excluded.copy()
    excluded[state.kept[~kept]] = reason[~kept]
    notes = list(state.notes)
    if not kept.all():
        sorts = pd.Series(reason[~kept]).str.replace(r"^correlates with .*", "correlated", regex=True).value_counts()
        listed = ", ".join(f"{count} {sort}" for sort, count in sorts.sort_index().items())
        notes.append(f"{(~kept).sum()} of {len(kept)} features are left out: {listed}")
    if filled:
        notes.append(f"{filled} missing value(s) are the median of their plate")
    if not kept.any():
        raise InputError(f"no feature is left: {notes[-1]}; look at the table, or choose another recipe")
    values = state.values if kept.all() else np.ascontiguousarray(state.values[:, kept])
    return replace(state, values=values, kept=state.kept[kept], excluded=excluded, notes=tuple(notes))


# --- scale ---------------------------------------------------------------------------------------


def _scale(state: Processed, wells: pd.DataFrame, step: Scale, number: int) -> Processed:
    values = state.values
    codes, plates = pd.factorize(wells["plate"], sort=True)
    of_plate = Members(codes.astype(np.int64))
    is_reference = _reference(wells, step.reference)
    references = [own[is_reference[own]] for own in map(of_plate.of, range(len(plates)))]
    _require_reference(plates, references, step.reference)
    n_reference = [len(rows) for rows in references]
    notes = list(state.notes)
    how = step.scale
    if how != "none" and min(n_reference) < step.min_wells:
        how = "none"
        notes.append(
            f"profiles are centred but not scaled: plate {plates[int(np.argmin(n_reference))]} has "
            f"{min(n_reference)} reference well(s), fewer than min_wells={step.min_wells}"
        )
    center = np.empty((len(plates), values.shape[1]), np.float32)
    scale = np.ones_like(center)
    for block in _blocks(values.shape[1], _COLUMNS):
        part = values[:, block].astype(np.float64)
        spreads = np.zeros((len(plates), part.shape[1]))
        for code, rows in enumerate(references):
            middle, spreads[code] = _center_and_spread(part[rows], how)
            center[code, block] = middle
            part[of_plate.of(code)] -= middle
        if how != "none":
            units = _units(spreads, part)
            scale[:, block] = units
            part /= units[codes]
        values[:, block] = part
    basis = [
        Basis(number, str(plate), n, center[code], scale[code])
        for code, (plate, n) in enumerate(zip(plates, n_reference, strict=True))
    ]
    return replace(state, basis=(*state.basis, *basis), notes=tuple(notes), scaled=how == step.scale)


def _clip(state: Processed, step: Clip) -> Processed:
    # A limit in units of the scale would flatten features that are still in units of their own.
    if not state.scaled:
        return replace(state, notes=(*state.notes, "profiles are not clipped, since they could not be scaled"))
    np.clip(state.values, -step.limit, step.limit, out=state.values)
    return state


def _require_reference(
    groups: Iterable[Any], references: Sequence[npt.NDArray[Any]], reference: str, what: str = "plate"
) -> None:
    without = [str(name) for name, rows in zip(groups, references, strict=True) if not len(rows)]
    if not without:
        return
    shown = f"{what} {', '.join(without[:5])}" + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    if reference == "controls":
        raise InputError(
            f"no negative control with cells on {shown}; give the plate's controls the role negative_control in the "
            "plate map, or choose a recipe whose reference is 'plate', or the recipe 'raw'"
        )
    raise InputError(f"no well that is not a negative control on {shown}; choose another reference")


def _center_and_spread(rows: Floats, how: Literal["none", "standard", "robust"]) -> tuple[Floats, Floats]:
    """(D,) centre and (D,) spread of (r, D) reference wells; spread 0 where they do not vary, or none is asked for."""
    center = np.median(rows, axis=0) if how == "robust" else rows.mean(axis=0)
    if how == "none":
        return center, np.zeros_like(center)
    deviation = np.abs(rows - center)
    if how == "robust":
        spread = _MAD_TO_SD * np.median(deviation, axis=0)
    else:
        spread = np.sqrt(np.square(deviation).sum(axis=0) / max(len(rows) - 1, 1))
    # Equal float32 values differ from their mean by rounding, which must not become the unit.
    rounding = np.finfo(np.float32).eps * np.abs(rows).max(axis=0)
    return center, np.where(spread > rounding, spread, 0.0)


def _units(spreads: Floats, centred: Floats) -> Floats:
    """(plates, D) what to divide by, of (plates, D) spreads and (w, D) centred values.

    Where the reference wells of a plate do not vary, that is the median of the other plates' spreads; where those of
    no plate do, the standard deviation over all wells, and 1 where none differs.
    """
    known = np.where(spreads > 0, spreads, np.nan)
    none_known = np.isnan(known).all(axis=0)
    overall = np.sqrt(np.square(centred).mean(axis=0))
    rounding = np.finfo(np.float32).eps * np.maximum(np.abs(centred).max(axis=0, initial=0), 1e-30)
    known[:, none_known] = np.where(overall > rounding, overall, 1.0)[none_known]
    return np.asarray(np.where(np.isnan(known), np.nanmedian(known, axis=0), known))


# --- covariances ---------------------------------------------------------------------------------


def _sphere(state: Processed, wells: pd.DataFrame, step: Sphere) -> Processed:
    rows = np.flatnonzero(_reference(wells, step.reference))
    if len(rows) < 2:
        kinds = {"controls": "negative controls", "plate": "wells", "treatments": "treated wells"}
        raise InputError(
            f"whitening needs two {kinds[step.reference]} at least, found {len(rows)}: if there are more, give them "
            "their role in the plate map (of an import: --control); else take a recipe that whitens on all wells "
            "('{method: sphered, reference: plate}') or one that does not whiten (--recipe raw)"
        )
    center, covariance = _moments(state.values, rows)
    matrix = whitening(covariance, step.regularisation, len(rows))
    _transform(state.values, np.arange(len(state.values)), center, matrix, 0.0)
    notes = state.notes
    if len(rows) <= len(covariance):
        note = (
            f"{len(rows)} reference wells cannot show how {len(covariance)} features vary together: along the axes "
            f"that they do not span, whitening multiplies by what regularisation={step.regularisation} leaves"
        )
        notes = (*notes, note)
    return replace(state, notes=notes)


def whitening(covariance: Floats, regularisation: float, n_wells: int) -> Floats:
    """The symmetric matrix W with ``W (C + λ m I) W = I``: for λ = 0 whitened wells have the identity for covariance.

    With C = V diag(v) V', the matrix is ``V diag((v + λ m)^-½) V'`` (ZCA: of all whitenings the one that moves
    profiles least; Kessy, Lewin & Strimmer 2018), m the mean of v. An axis along which the controls vary by v therefore
    keeps the variance v / (v + λ m): nearly 1 where v is large, and little where it is small, so that axes that the
    controls do not vary along are magnified by (λ m)^-½ at most, rather than without limit.

    Args:
        covariance: (D, D) of reference wells.
        regularisation: λ.
        n_wells: that it was measured on.

    Raises:
        InputError: if it cannot be inverted and λ is 0.
    """
    values, axes = np.linalg.eigh(covariance)
    mean = values.mean()
    if mean <= 0:
        raise InputError("the reference wells are all alike: there is nothing to whiten by")
    raised = np.maximum(values, 0) + regularisation * mean
    # Rounding of float32 values shows in variances by its square.
    least = len(values) * float(np.finfo(np.float32).eps) ** 2 * raised[-1]
    if raised[0] <= least or (n_wells <= len(values) and not regularisation):
        raise InputError(
            f"the covariance of {n_wells} reference wells in {len(values)} dimensions cannot be inverted: whitening it "
            "wholly needs more wells than dimensions, and no feature that others make up; set a regularisation above "
            "0, such as 0.3"
        )
    return np.asarray((axes / np.sqrt(raised)) @ axes.T)


def _align(state: Processed, wells: pd.DataFrame, step: Align) -> Processed:
    if step.batch not in wells:
        raise InputError(f"the metadata has no column {step.batch!r} to align batches by; it has {list(wells)}")
    codes, batches = pd.factorize(wells[step.batch], sort=True, use_na_sentinel=False)
    of_batch = Members(codes.astype(np.int64))
    is_reference = _reference(wells, step.reference)
    references = [own[is_reference[own]] for own in map(of_batch.of, range(len(batches)))]
    _require_reference(batches, references, step.reference, f"{step.batch} (batch)")
    values = state.values
    overall, target = _moments(values, np.flatnonzero(is_reference))
    ridge = step.regularisation * target.diagonal().mean() * np.eye(len(target))
    root = _power(target + ridge, 0.5)
    # The moments of all batches first: transforming one changes the wells of no other.
    for code, rows in enumerate(references):
        own_center, own = _moments(values, rows) if len(rows) > 1 else (values[rows[0]].astype(np.float64), target)
        freedom, prior = len(rows) - 1, step.prior * len(target)
        mixed = (freedom * own + prior * target) / (freedom + prior) if prior else own
        try:
            matrix = _power(mixed + ridge, -0.5) @ root
        except InputError as error:
            raise InputError(f"{step.batch} {batches[code]}: {error}") from error
        _transform(values, of_batch.of(code), own_center, matrix, overall)
    return state


def _moments(values: Profiles, rows: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(D,) mean and (D, D) covariance (over n - 1) of some rows, at least two."""
    center = np.zeros(values.shape[1])
    for part in _blocks(len(rows), _ROWS):
        center += values[rows[part]].sum(axis=0, dtype=np.float64)
    center /= len(rows)
    products = np.zeros((len(center), len(center)))
    for part in _blocks(len(rows), _ROWS):
        about = values[rows[part]] - center
        products += about.T @ about
    return center, products / (len(rows) - 1)


def _power(matrix: Floats, exponent: float) -> Floats:
    """A power of a symmetric matrix.

    Raises:
        InputError: for a negative power of one that cannot be inverted.
    """
    values, axes = np.linalg.eigh(matrix)
    least = len(values) * float(np.finfo(np.float32).eps) ** 2 * values[-1]
    if exponent < 0 and values[0] <= least:
        raise InputError(
            "the covariance of its reference wells cannot be inverted: set prior or regularisation above 0"
        )
    return np.asarray((axes * np.maximum(values, 0) ** exponent) @ axes.T)


def _transform(
    values: Profiles, rows: npt.NDArray[np.int64], center: Floats, matrix: Floats, offset: Floats | float
) -> None:
    """Replace rows by ``(row - center) @ matrix + offset``, some at a time."""
    for part in _blocks(len(rows), _ROWS):
        values[rows[part]] = (values[rows[part]] - center) @ matrix + offset


# --- checks --------------------------------------------------------------------------------------


def _check_shape(values: npt.NDArray[Any], **columns: npt.ArrayLike) -> None:
    if values.ndim != 2:
        raise InputError(f"profiles have shape {values.shape}; expected (rows, dimensions)")
    for name, column in columns.items():
        if np.shape(column) != (len(values),):
            raise InputError(f"{name} has shape {np.shape(column)} for {len(values)} rows")


def _check_finite(values: npt.NDArray[Any]) -> None:
    bad = np.zeros(len(values), bool)
    for rows in _blocks(len(values), _ROWS):
        bad[rows] = ~np.isfinite(values[rows]).all(axis=1)
    if bad.any():
        raise InputError(
            f"{bad.sum()} of {len(values)} rows are not finite (the first is row {np.flatnonzero(bad)[0]}); "
            "leave them out before profiling, or begin the recipe with the step filter"
        )


def _check(values: npt.NDArray[Any], **columns: npt.ArrayLike) -> None:
    _check_shape(values, **columns)
    _check_finite(values)
