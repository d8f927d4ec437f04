"""What the columns of other people's tables of profiles mean: guessed by their names, and put into our forms.

The names are those of CellProfiler and pycytominer (``Metadata_Plate``, ``Cells_AreaShape_Area``), of the JUMP Cell
Painting Consortium, the LINCS Cell Painting data and the Image Data Resource.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from screening.similarity import suggest
from storage_schemas.errors import InputError
from storage_schemas.keys import canonical_well, check_name

# Names of each thing, without case, prefixes and signs; the best first. Each must match as a whole.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "plate": (
        "plate",
        "assayplate",
        "(assay)?plate(name|id|barcode|number)",
        "assayplatebarcode",
        "barcode",
    ),
    "well": ("well", "well(name|id|position|label)", "platewell", "assaywell"),
    "compound": (
        "pertiname",
        "(compound|drug|treatment|perturbation|pert|molecule|chemical)name",
        "compound",
        "(compound|drug|treatment|perturbation|perturbagen|molecule|chemical)(id)?",
        "jcp2022",
        "broadsample",
        "brd(id)?",
        "pert(id)?",
        "compoundbrd(short)?",
        "(compound)?inchikey",
        "(compound)?smiles",
    ),
    "concentration": (
        "(compound|pert|drug)?(concentration|conc|dose)(um|nm|mm|micromolar|nanomolar|millimolar|mol)?",
        "mmolesperliter2?",
        "micromolar",
        "(um|nm)",
        "mgperml",
        "doserecode",
        "doselevel",
    ),
    "unit": ("(concentration|conc|dose|pertdose)?units?",),
    "replicate": ("(biological|technical|bio|tech)?rep(licate)?(id|number|no)?",),
    "moa": ("moa(list|class|name|broad)?", "mechanism(s?ofaction)?", "(compound|drug)(moa|mechanism)", "pertmoa"),
    "target": ("targets?(list|name|gene)?", "(compound|drug|gene)targets?", "genesymbol", "gene"),
    "time": (
        "(treatment|incubation|exposure|pert)?time(point)?(h|hr|hrs|hours)?",
        "(treatment|incubation)?hours",
    ),
    "cell_line": ("cell(line|type)(name)?", "cell(id)?"),
    "batch": ("batch(id|name|number)?", "(experimental|experiment|plate)batch"),
    "smiles": ("(compound|canonical|isomeric)?smiles",),
    "inchikey": ("(compound)?inchikey",),
    "cas": ("(compound)?cas(number|no|rn)?",),
    "name": (),
}
KEYS = tuple(_NAMES)
REQUIRED = ("plate", "well", "compound")
OF_COMPOUND = ("name", "moa", "cas", "inchikey", "smiles", "target")
FURTHER = ("time", "cell_line", "batch")

_PREFIX = re.compile(r"^(image_)?metadata_|^(experimental condition|characteristics|factor value|comment)\b", re.I)
_UNITS = (
    (re.compile(r"micromolar|\bum\b|_um$|\(um\)|[µμ]m", re.I), "uM"),
    (re.compile(r"nanomolar|\bnm\b|_nm$|\(nm\)", re.I), "nM"),
    (re.compile(r"millimolar|mmoles_per_liter|\bmm\b|_mm$", re.I), "mM"),
    (re.compile(r"mg_per_ml", re.I), "mg/ml"),
)
_DOSE = re.compile(r"\s*([-+0-9.eE]+)\s*([a-zA-Zµμ%/]*)\s*")

# CellProfiler's objects; what they are measured on comes first in a feature's name.
_OBJECTS = ("Cells_", "Nuclei_", "Cytoplasm_", "Image_")
_METADATA = ("Metadata_", "Image_Metadata_")

_ROLE_COLUMNS = ("controltype", "(pert|perturbation|well|sample|compound)type", "role", "control")
_NEGATIVE = re.compile(r"neg(con|ative)?(ctrl|control)?s?|vehicle|solvent(control)?|dmso|untreated|mock", re.I)
_POSITIVE = re.compile(r"pos(con|itive)?(ctrl|control)?s?(cp|diverse|orf|crispr)?", re.I)
# JCP2022_033924 is the DMSO of the JUMP consortium.
_INERT = re.compile(
    r"(dmso|vehicle|solvent|mock|untreated|nocompound|neg(ative)?(con|control)|jcp2022033924)(control)?"
)

NO_COMPOUND = "negative control"


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are.

    Attributes:
        keys: what each key is read from: one column, or several that are joined.
        guessed: the keys that the user has not named.
        features: the measurements.
        not_numbers: columns with the name of a measurement that do not hold numbers.
        further: columns that are neither; they are kept as metadata.
    """

    keys: dict[str, tuple[str, ...]]
    guessed: frozenset[str]
    features: tuple[str, ...]
    not_numbers: tuple[str, ...]
    further: tuple[str, ...]


def interpret(
    columns: Sequence[str],
    numbers: frozenset[str],
    given: Mapping[str, str],
    patterns: Sequence[str] = (),
    variables: Sequence[str] = (),
) -> Columns:
    """Tell keys, measurements and further metadata apart by their names.

    Args:
        columns: of the table.
        numbers: those that hold numbers.
        given: key -> column, or columns joined by ``+``, as the user says.
        patterns: names of measurements, with ``*`` for anything; by default what looks like them.
        variables: measurements, where the file itself says so.

    Raises:
        InputError: for unknown keys or columns, with near names; if plate, well or compound is not found; or if there
            are no measurements.
    """
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        likely = suggest(unknown[0], KEYS)
        hint = f"did you mean {likely[0]}? There" if likely else "there"
        raise InputError(f"--map {unknown[0]}=…: unknown; {hint} are {', '.join(KEYS)}")
    keys = {key: _named(text, columns) for key, text in given.items()}
    measured, not_numbers = _measurements(columns, numbers, patterns, variables)
    used = {name for names in keys.values() for name in names}
    free = [name for name in columns if name not in used and name not in measured]
    # What follows no convention at all may be called as a key is and hold numbers.
    conventional = bool(patterns or variables) or any(name.startswith((*_OBJECTS, *_METADATA)) for name in columns)
    candidates = free if conventional else [name for name in columns if name not in used]
    for key in KEYS:
        found = None if key in keys else _guess(key, candidates)
        if found is not None:
            keys[key] = (found,)
            # An identifier of the compound may also be its name in chemistry; a column has one meaning otherwise.
            if key not in ("compound",):
                candidates = [name for name in candidates if name != found]
    missing = [key for key in REQUIRED if key not in keys]
    if missing:
        near = {key: suggest(key, columns) or list(columns)[:8] for key in missing}
        hints = "; ".join(f"{key}: perhaps {', '.join(names)}" for key, names in near.items())
        raise InputError(
            f"no column for {' and '.join(missing)} found; name it with --map {missing[0]}=COLUMN ({hints})"
        )
    used = {name for names in keys.values() for name in names}
    features = tuple(name for name in columns if name in measured and name not in used)
    if not features:
        raise InputError(
            f"no measurements found among {len(columns)} columns: expected numbers in columns such as Cells_…, "
            "Nuclei_… or Cytoplasm_…; name them with --features 'PATTERN'"
        )
    further = tuple(name for name in columns if name not in used and name not in measured)
    return Columns(keys, frozenset(set(keys) - set(given)), features, tuple(not_numbers), further)


def _named(text: str, columns: Sequence[str]) -> tuple[str, ...]:
    if text in columns:
        return (text,)
    parts = tuple(part.strip() for part in text.split("+"))
    for part in parts:
        if part not in columns:
            near = suggest(part, columns) or list(columns)[:8]
            raise InputError(f"there is no column {part!r}; did you mean {', '.join(map(repr, near))}?")
    return parts


def _measurements(
    columns: Sequence[str], numbers: frozenset[str], patterns: Sequence[str], variables: Sequence[str]
) -> tuple[set[str], list[str]]:
    """Columns that are measurements, and those that have the name of one but hold something else."""
    if patterns:
        named = [name for name in columns if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not named:
            raise InputError(
                f"--features {' '.join(patterns)}: no column has such a name; there are {list(columns)[:8]}"
            )
        wrong = [name for name in named if name not in numbers]
        if wrong:
            raise InputError(f"--features: {len(wrong)} column(s) do not hold numbers: {', '.join(wrong[:5])}")
        return set(named), []
    if variables:
        return set(variables), []
    plain = [name for name in columns if not name.startswith(_METADATA)]
    of_objects = [name for name in plain if name.startswith(_OBJECTS)]
    # Whatever else segmentation was of, its features are called Object_Category_Feature.
    if any(not name.startswith("Image_") for name in of_objects):
        named = of_objects
    else:
        named = [name for name in plain if name in numbers]
    return {name for name in named if name in numbers}, [name for name in named if name not in numbers]


def _guess(key: str, columns: Sequence[str]) -> str | None:
    plain = {name: _plain(name) for name in columns}
    for pattern in _NAMES[key]:
        for name, text in plain.items():
            if re.fullmatch(pattern, text):
                return name
    return None


def _plain(name: str) -> str:
    """A name without its prefix, signs and case: ``Experimental Condition [Treatment time (h)]`` -> treatmenttimeh."""
    return re.sub(r"[^a-z0-9]", "", _PREFIX.sub("", name).lower())


# --- what the rows are ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Wells:
    """The rows of tables of profiles in our forms.

    Attributes:
        kept: (rows,) whether a row is a well that is taken.
        plate_map: a row a well, with the columns of a plate map.
        further: (wells,) metadata that the plate map has no column for.
        compounds: a row a compound: compound and what is known of it.
        notes: what was left out or made up, with counts.
    """

    kept: npt.NDArray[np.bool_]
    plate_map: pd.DataFrame
    further: pd.DataFrame
    compounds: pd.DataFrame
    notes: tuple[str, ...]


def settle(
    metadata: pd.DataFrame,
    keys: Mapping[str, tuple[str, ...]],
    controls: Sequence[str] = (),
    positive: Sequence[str] = (),
) -> Wells:
    """Bring the metadata of wells into the forms of a plate map and a table of compounds.

    Args:
        metadata: a row a row of the tables; columns by their own names. Errors name a row by its index: the number of
            the row, or the name of its table and that.
        keys: as of :class:`Columns`.
        controls: negative controls: names of compounds, or ``COLUMN=VALUE``; guessed where none is given.
        positive: positive controls likewise.

    Raises:
        InputError: for wells without plate or name, wells that stand there twice, doses that are no numbers, or
            controls that are nowhere.
    """
    notes: list[str] = []
    compound = _joined(metadata, keys["compound"])
    role = _roles(metadata, compound, keys, controls, positive, notes)
    nameless = compound.isna()
    compound = compound.mask(nameless & (role == "negative_control"), NO_COMPOUND)
    kept = compound.notna()
    if (~kept).any():
        notes.append(f"{(~kept).sum():,} of {len(kept):,} rows name no compound and are left out")
    if not kept.any():
        raise InputError(f"no row names a compound in {'+'.join(keys['compound'])}: choose another column with --map")
    # Rows keep their numbers, by which errors name them.
    metadata, compound, role = metadata[kept], compound[kept], role[kept]

    plate = _names_of_plates(_required(metadata, keys, "plate"), notes)
    well = _names_of_wells(_required(metadata, keys, "well"))
    _refuse_doubles(plate, well)
    concentration, unit = _doses(metadata, keys)
    replicate = plate
    if "replicate" in keys:
        replicate = _joined(metadata, keys["replicate"]).fillna(plate)
    plate_map = pd.DataFrame(
        {
            "plate": plate,
            "well": well,
            "compound": compound,
            "concentration": concentration,
            "unit": unit,
            "role": role,
            "replicate": replicate,
        }
    )
    taken = {name for key, names in keys.items() for name in names if key not in FURTHER}
    further = {key: _plain_values(_joined(metadata, keys[key])) for key in FURTHER if key in keys}
    doubled = {name for key in FURTHER for name in keys.get(key, ())}
    for name in metadata:
        if name not in taken and name not in doubled:
            own = str(name)
            label = own if own not in (*KEYS, "role", "n_cells", "n_wells") else f"{own} (of the table)"
            further[label] = _plain_values(metadata[name])
    compounds = without_effect_of_controls(_compounds(metadata, compound, keys, notes), plate_map)
    _note_replicates(plate_map, notes)
    numbered = pd.DataFrame(further, index=plate_map.index).reset_index(drop=True)
    return Wells(kept.to_numpy(), plate_map.reset_index(drop=True), numbered, compounds, tuple(notes))


def _joined(metadata: pd.DataFrame, names: Sequence[str]) -> pd.Series[Any]:
    """The text of a column, or of several joined by an underscore; None where there is nothing."""
    parts = [_text(metadata[name]) for name in names]
    found = parts[0]
    for part in parts[1:]:
        found = (found + "_" + part).where(found.notna() & part.notna(), None)
    return found


def _text(column: pd.Series[Any]) -> pd.Series[Any]:
    """Values as text, whole numbers without a point; None where there is nothing."""

    def as_text(value: Any) -> str | None:
        if value is None or value is pd.NA or value != value:
            return None
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return str(value).strip() or None

    return pd.Series([as_text(value) for value in column.tolist()], index=column.index, dtype=object)


def _plain_values(column: pd.Series[Any]) -> pd.Series[Any]:
    """Numbers where all that is there are numbers and none would lose a leading zero, else text."""
    text = _text(column)
    known = text.dropna()
    numbers = pd.to_numeric(known, errors="coerce")
    if len(known) and numbers.notna().all() and not known.str.match(r"[+-]?0\d").any():
        return pd.Series(pd.to_numeric(text, errors="coerce").astype(float))
    return text


def _row(index: Any) -> str:
    """What errors call a row, counted from one."""
    if isinstance(index, tuple):
        table, number = index
        return f"row {number + 1} of {table}"
    return f"row {index + 1}"


def _required(metadata: pd.DataFrame, keys: Mapping[str, tuple[str, ...]], key: str) -> pd.Series[Any]:
    values = _joined(metadata, keys[key])
    empty = values.index[values.isna()]
    if len(empty):
        raise InputError(
            f"{len(empty):,} of {len(values):,} wells have no {key} in {'+'.join(keys[key])} (the first is "
            f"{_row(empty[0])}): fill it in, or name another column with --map {key}=COLUMN"
        )
    return values


def _names_of_plates(plates: pd.Series[Any], notes: list[str]) -> pd.Series[Any]:
    names = {}
    for plate in plates.unique():
        try:
            names[plate] = check_name(plate, "plate")
        except InputError:
            name = re.sub(r"[^A-Za-z0-9 ._+=@()-]|\.\.", "_", plate)[:128].strip(". ")
            names[plate] = check_name(name if re.match(r"[A-Za-z0-9]", name) else f"P{name}", "plate")
            notes.append(f"plate {plate!r} is called {names[plate]!r} here")
    if len(set(names.values())) < len(names):
        raise InputError(f"plates {sorted(names)[:5]} cannot be told apart by letters and digits; rename them")
    return plates.map(names)


def _names_of_wells(wells: pd.Series[Any]) -> pd.Series[Any]:
    names = {}
    for well in wells.unique():
        numbered = re.fullmatch(r"r(?:ow)?0*(\d+)[ _-]*c(?:ol(?:umn)?)?0*(\d+)", well, re.I)
        text = well
        if numbered:
            row = int(numbered[1]) - 1
            text = (chr(64 + row // 26) if row >= 26 else "") + chr(65 + row % 26) + numbered[2]
        try:
            names[well] = canonical_well(text)
        except InputError as error:
            where = _row(wells.index[wells == well][0])
            raise InputError(f"{where}: {error}; is it the right column? name it with --map well=COLUMN") from error
    return wells.map(names)


def _refuse_doubles(plate: pd.Series[Any], well: pd.Series[Any]) -> None:
    keys = plate + "/" + well
    double = keys[keys.duplicated(keep=False)]
    if len(double):
        shown = ", ".join(sorted(set(double))[:5])
        raise InputError(
            f"{double.nunique():,} well(s) stand there more than once: {shown}; a profile is of one well. If plates of "
            "different batches have one name, join columns: --map plate=BATCH+PLATE; rows of sites or cells must be "
            "summed up to wells first"
        )


def _doses(metadata: pd.DataFrame, keys: Mapping[str, tuple[str, ...]]) -> tuple[pd.Series[Any], pd.Series[Any]]:
    nothing = pd.Series([None] * len(metadata), index=metadata.index, dtype=object)
    unit = _joined(metadata, keys["unit"]) if "unit" in keys else nothing
    if "concentration" not in keys:
        return nothing.astype(float), unit
    text = _joined(metadata, keys["concentration"])
    known = text.dropna()
    matched = known.map(lambda value: _DOSE.fullmatch(value))
    numbers = pd.to_numeric(matched.map(lambda m: m[1] if m else None), errors="coerce")
    wrong = known[~np.isfinite(numbers.astype(float))]
    if len(wrong):
        raise InputError(
            f"column {'+'.join(keys['concentration'])}: {len(wrong):,} values are no concentrations, such as "
            f"{wrong.iloc[0]!r} in {_row(wrong.index[0])}; expected numbers, or name another column with "
            "--map concentration=COLUMN"
        )
    concentration = numbers.astype(float).reindex(text.index)
    if "unit" not in keys:
        stated = matched.map(lambda m: m[2] or None).reindex(text.index)
        title = next((unit for pattern, unit in _UNITS if pattern.search(keys["concentration"][0])), None)
        unit = stated.astype(object).where(stated.notna(), title).where(text.notna(), None)
    return concentration, unit


def _roles(
    metadata: pd.DataFrame,
    compound: pd.Series[Any],
    keys: Mapping[str, tuple[str, ...]],
    controls: Sequence[str],
    positive: Sequence[str],
    notes: list[str],
) -> pd.Series[Any]:
    negative = _stated(metadata, compound, controls, "--control")
    above = _stated(metadata, compound, positive, "--positive-control")
    column = None
    if not controls or not positive:
        column = _role_column([str(name) for name in metadata if (name,) not in keys.values()], metadata)
    if column is not None:
        plain = _text(metadata[column]).fillna("").map(_plain)
        if not positive:
            above = plain.map(lambda text: bool(_POSITIVE.fullmatch(text))).astype(bool)
        if not controls:
            negative = plain.map(lambda text: bool(_NEGATIVE.fullmatch(text))).astype(bool)
            if not negative.any():
                # Where nothing is called negative, what is called control and is not positive is.
                negative = (plain == "control") & ~above
    if not controls and not negative.any():
        column = keys["compound"][0]
        negative = compound.fillna("").map(lambda text: bool(_INERT.fullmatch(_plain(text)))).astype(bool)
    if not controls:
        where = f"{negative.sum():,} wells, by column {column!r}" if negative.any() else "none found"
        notes.append(f"negative controls: {where}; --control says otherwise")
    return pd.Series(
        np.select([negative, above & ~negative], ["negative_control", "positive_control"], "treatment"),
        index=metadata.index,
        dtype=object,
    )


def _role_column(names: Sequence[str], metadata: pd.DataFrame) -> str | None:
    """The first column that says which wells are controls, in words that are known."""
    for pattern in _ROLE_COLUMNS:
        for name in names:
            if not re.fullmatch(pattern, _plain(name)):
                continue
            words = {_plain(value) for value in _text(metadata[name]).dropna().unique()}
            if any(_NEGATIVE.fullmatch(word) or word == "control" for word in words):
                return name
    return None


def _stated(metadata: pd.DataFrame, compound: pd.Series[Any], values: Sequence[str], option: str) -> pd.Series[Any]:
    found = pd.Series(False, index=metadata.index)
    for text in values:
        name, equals, value = text.partition("=")
        if equals and name in metadata:
            here = _text(metadata[name]) == value
            known = _text(metadata[name])
        else:
            value, known = text, compound
            here = compound == text
        if not here.any():
            near = suggest(value, [str(each) for each in known.dropna().unique()])
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "give COMPOUND or COLUMN=VALUE"
            raise InputError(f"{option} {text!r}: no such well; {hint}")
        found |= here
    return found


def _compounds(
    metadata: pd.DataFrame, compound: pd.Series[Any], keys: Mapping[str, tuple[str, ...]], notes: list[str]
) -> pd.DataFrame:
    """A row a compound; of each column its commonest value, since a table of wells may contradict itself."""
    table = pd.DataFrame({"compound": sorted(compound.unique())})
    for key in OF_COMPOUND:
        if key not in keys:
            table[key] = None
            continue
        known = pd.DataFrame({"compound": compound, "value": _joined(metadata, keys[key])}).dropna()
        counted = known.groupby(["compound", "value"]).size().rename("n").reset_index()
        counted = counted.sort_values(["n", "value"], ascending=[False, True], kind="stable")
        several = int(counted["compound"].duplicated().sum())
        if several:
            notes.append(f"{key}: {several} further value(s) of compounds that have several; the commonest is taken")
        first = counted.drop_duplicates("compound").set_index("compound")["value"]
        found = table["compound"].map(first)
        table[key] = found.astype(object).where(found.notna(), None)
    return table


def without_effect_of_controls(compounds: pd.DataFrame, plate_map: pd.DataFrame) -> pd.DataFrame:
    """A table of compounds in which negative controls have neither MOA nor target, whatever they are called there."""
    controls = plate_map.loc[plate_map["role"] == "negative_control", "compound"]
    known = compounds.copy()
    known.loc[known["compound"].isin(controls), ["moa", "target"]] = None
    return known


def _note_replicates(plate_map: pd.DataFrame, notes: list[str]) -> None:
    treated = plate_map[plate_map["role"] != "negative_control"]
    wells = treated.groupby("compound").size()
    alone = int((wells == 1).sum())
    if alone:
        notes.append(f"{alone:,} of {len(wells):,} compounds have one well: nothing says how well they reproduce")
    if plate_map["plate"].nunique() == 1:
        notes.append("there is one plate: nothing can be looked up on another")


def add_compounds(
    compounds: pd.DataFrame, table: pd.DataFrame, given: Mapping[str, str]
) -> tuple[pd.DataFrame, list[str]]:
    """Add what a table of compounds says to what the wells do; where both speak, the table of compounds is right.

    Args:
        compounds: a row a compound of the wells.
        table: any table with a column for the compound.
        given: key -> column of the table, as the user says; the rest is guessed.

    Returns:
        The compounds, and notes.

    Raises:
        InputError: if there is no column for the compound, or none of its compounds is on a plate.
    """
    names = [str(name) for name in table]
    keys = {key: _named(text, names) for key, text in given.items() if text in names}
    on_plates = set(compounds["compound"])
    if "compound" not in keys:
        # The column whose values are the wells' compounds, whatever it is called.
        shared = {name: _text(table[name]).isin(on_plates).sum() for name in names}
        best = max(names, key=lambda name: shared[name])
        if not shared[best]:
            raise InputError(f"none of its columns {names[:8]} has a compound of the wells, such as {min(on_plates)!r}")
        keys["compound"] = (best,)
    free = [name for name in names if name != keys["compound"][0]]
    for key in OF_COMPOUND:
        found = _guess(key, free)
        if key not in keys and found is not None:
            keys[key] = (found,)
    notes: list[str] = []
    compound = _joined(table, keys["compound"])
    here = compound.isin(on_plates)
    known = _compounds(table[here], compound[here], keys, notes).set_index("compound")
    joined = compounds.set_index("compound")
    for key in OF_COMPOUND:
        if key in keys:
            joined[key] = known[key].reindex(joined.index).combine_first(joined[key])
    read = ", ".join(f"{key} from {names[0]!r}" for key, names in keys.items() if key != "compound")
    notes.append(
        f"the table of compounds names {len(known):,} of {len(joined):,} compounds by {keys['compound'][0]!r}: "
        f"{read or 'nothing else'}; {int((~here).sum()):,} of its rows are of others"
    )
    result = joined.reset_index()
    return result.astype(object).where(result.notna(), None), notes
