"""MitoReID's released single cells: what their folders are named for, what their annotation says, and their images.

The data of "Deep learning large-scale drug discovery and repurposing" (Nature Computational Science 2024) are
``{experiment}/{part}/{drug}/{field}_{number}/{1..16}.jpg``, a folder a cell, beside ``annotation.xlsx``. The
experiments ``l1``, ``l2`` and ``l3`` are replicates; the part is what its makers used a cell for. A field is the raw
folder that a cell was cut from: the drug, or for a drug imaged again ``{drug}-2``.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from screening.layouts import natural, row_letters
from storage_schemas.errors import InputError
from storage_schemas.keys import check_name

Part = Literal["train", "query", "gallery", "nc", "novel"]
NOVEL = "novel"  # the part that lies beside the experiments, a plate of its own

CONTROL = "dmso"  # the control's drug, and our compound
NOVEL_COMPOUND = "novel-"  # before the ids of Novel-list, which may be those of FDA-list too

# Red, green and blue of the images.
CHANNELS = ("TMRM", "MitoTracker", "Hoechst")

FDA_COLUMNS = ("index", "name", "cas", "common_moa", "moa_id", "moa_choose")
NOVEL_COLUMNS = ("index", "name", "cas")

# Why a sequence has no clip.
MISSING = "missing frames"
UNREADABLE = "unreadable frames"
MISSHAPEN = "frames not RGB squares of one size"

_EXAMPLE = "l1/train/5/5_0/1.jpg"
_CELL = r"(?P<drug>[^/]+)/(?P<field>[^/]+)_(?P<number>0|[1-9][0-9]{0,7})/(?P<frame>[1-9][0-9]{0,3})\.jpg"
_IMAGE = re.compile(rf"(?:(?P<plate>l[1-9][0-9]?)/(?P<part>train|query|gallery|nc)|(?P<novel>{NOVEL}))/{_CELL}")
_BELOW = re.compile(rf"(?:(?:train|query|gallery|nc)/)?{_CELL}")

_COLUMNS = 48  # of the virtual plates, those of 1536 wells


class Sequences(NamedTuple):
    """What a folder's names say.

    Attributes:
        table: a row a sequence, in natural order: ``plate`` (the experiment), ``part``, ``drug``, ``field``, ``number``
            (int), ``folder`` (below the data's), ``frames`` (list of the image files' numbers, ascending).
        ignored: the names that are of no sequence, in the order given.
    """

    table: pd.DataFrame
    ignored: list[str]


class UnusableSequenceError(InputError):
    """A sequence that no clip can be made of.

    Args:
        reason: why, for counting.
        problem: what was found and what was expected.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


def parse(names: Iterable[str]) -> Sequences:
    """Read experiment, part, drug, field, cell and frame from file names.

    Args:
        names: file paths below the folder of the data, parts joined by ``/``.

    Raises:
        InputError: if no name is of a single-cell image, saying which folder to give instead where one is near; if a
            field's name is not usable.
    """
    frames: dict[str, list[int]] = {}
    keys: dict[str, tuple[str, str, str, str, int]] = {}
    ignored: list[str] = []
    for name in names:
        match = _IMAGE.fullmatch(name)
        if match is None:
            ignored.append(name)
            continue
        folder = name.rpartition("/")[0]
        frames.setdefault(folder, []).append(int(match["frame"]))
        # A drug's folder may be named like a field, for a repeat: it is the drug's nonetheless.
        drug = match["drug"].partition("-")[0]
        plate, part = (NOVEL, NOVEL) if match["novel"] else (match["plate"], match["part"])
        keys[folder] = plate, part, drug, check_name(match["field"], "field"), int(match["number"])
    if not keys:
        raise InputError(f"holds no single-cell images such as {_EXAMPLE}; {_hint(ignored)}")
    table = pd.DataFrame(list(keys.values()), columns=["plate", "part", "drug", "field", "number"])
    table["folder"] = list(frames)
    table["frames"] = [sorted(numbers) for numbers in frames.values()]
    table = table.sort_values("folder", key=lambda column: column.map(natural), ignore_index=True)
    return Sequences(table, ignored)


def _hint(names: Sequence[str]) -> str:
    for name in names:
        if (match := _IMAGE.search(name)) and name[: match.start()].endswith("/"):
            return f"give its folder {name[: match.start()]!r}, which does"
        if _BELOW.fullmatch(name):
            return "give the folder that holds the experiments l1, l2 and l3"
    return f"its {len(names)} file(s) are named like {names[0]!r}" if names else "it is empty"


def compounds(
    fda: pd.DataFrame, novel: pd.DataFrame | None, moas: Literal["chosen", "all"] = "chosen"
) -> tuple[pd.DataFrame, list[str]]:
    """A table of compounds from the annotation.

    The released code tells drugs apart by ``moa_id`` and takes those whose ``moa_choose`` is 1, as here; ``moa_id``
    empty, ``unknown`` or ``nan`` is no MOA. An MOA is called by the first ``common_moa`` of its id, and by the id where
    that does not tell it from others. The control has none: it is a class of its own wherever MOAs are.

    Args:
        fda: the sheet FDA-list, cells as text or None, with the columns :data:`FDA_COLUMNS` and any others; its index
            counts lines of the sheet from 0.
        novel: the sheet Novel-list likewise, with :data:`NOVEL_COLUMNS`; None if there is none.
        moas: of ``chosen`` drugs only, or of ``all`` whose MOA is known.

    Returns:
        ``compound`` (the index; that of Novel-list after :data:`NOVEL_COMPOUND`), ``name``, ``cas`` and ``moa``, a row
        a drug and one for the control; and notes for the reader.

    Raises:
        InputError: if a column is missing, a drug has no index or stands there twice, or no drug is chosen.
    """
    _check_sheet(fda, "FDA-list", FDA_COLUMNS)
    tables = [fda.assign(compound=fda["index"])]
    if novel is not None:
        _check_sheet(novel, "Novel-list", NOVEL_COLUMNS)
        tables.append(novel.assign(compound=NOVEL_COMPOUND + novel["index"], moa_id=None, common_moa=None))
    if CONTROL not in set(fda["index"]):
        tables.append(pd.DataFrame({"compound": [CONTROL], "name": ["DMSO"]}))
    table = pd.concat(tables, ignore_index=True)

    known = table["moa_id"].notna() & ~table["moa_id"].str.lower().isin(["unknown", "nan"])
    known &= table["compound"] != CONTROL
    chosen = pd.to_numeric(table["moa_choose"], errors="coerce") == 1
    taken = known if moas == "all" else known & chosen
    if not taken.any():
        raise InputError("sheet FDA-list: no drug has the moa_choose 1 and a moa_id, so no MOA would be known")
    names, notes = _moa_names(table[taken])
    table["moa"] = table["moa_id"].where(taken, None).map(names)
    count = f"annotation: {len(names)} MOAs of {int(taken.sum())} drugs; {int((~taken).sum())} others have none here"
    return table[["compound", "name", "cas", "moa"]], [count, *notes]


def _check_sheet(sheet: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in sheet]
    if missing:
        raise InputError(f"sheet {name} has no column {missing}; it has {list(sheet.columns)}")
    empty = sheet.index[sheet["index"].isna()]
    if len(empty):
        raise InputError(f"sheet {name}: the index is empty in line(s) {[int(row) + 1 for row in empty[:5]]}")
    again = sorted(set(sheet["index"][sheet["index"].duplicated()]))
    if again:
        raise InputError(f"sheet {name}: the index {again[:5]} stands there more than once")


def _moa_names(table: pd.DataFrame) -> tuple[dict[str, str], list[str]]:
    """What each moa_id is called, and notes on names that do not tell one from another."""
    names: dict[str, str] = {}
    notes: list[str] = []
    for moa_id, of_id in table.groupby("moa_id", sort=False):
        said = list(dict.fromkeys(" ".join(name.split()) for name in of_id["common_moa"].dropna()))
        names[str(moa_id)] = said[0] if said else f"moa_id {moa_id}"
        if len(said) > 1:
            notes.append(f"annotation: moa_id {moa_id} has the names {said}; it is called by the first")
    for name, count in Counter(names.values()).items():
        if count > 1:
            alike = [moa_id for moa_id in names if names[moa_id] == name]
            notes.append(f"annotation: moa_id {alike} are all called {name!r}; their ids are put after it")
            names |= {moa_id: f"{name} (moa_id {moa_id})" for moa_id in alike}
    return names, notes


def identify(sequences: pd.DataFrame, known: Collection[str]) -> pd.Series[str]:
    """The compound that each sequence is of.

    Cells of ``nc`` and ``novel`` are looked up in Novel-list first, all others in FDA-list only.

    Args:
        sequences: ``part`` and ``drug``, as :func:`parse` gives them.
        known: ids of compounds, as :func:`compounds` gives them.

    Raises:
        InputError: if a drug is not in the annotation.
    """
    new = NOVEL_COMPOUND + sequences["drug"]
    compound = sequences["drug"].mask(sequences["part"].isin(["nc", NOVEL]) & new.isin(set(known)), new)
    unknown = sequences[~compound.isin(set(known))].drop_duplicates("drug")
    if len(unknown):
        raise InputError(
            f"{len(unknown)} drug(s) are not in the annotation: {', '.join(unknown['drug'][:5])} (such as "
            f"{unknown['folder'].iloc[0]}); add a row for each, to FDA-list or, of nc and novel, to Novel-list"
        )
    return compound


def check(sequences: pd.DataFrame) -> None:
    """Refuse a cell that is there twice, and an experiment without control, which all cells are compared with.

    Args:
        sequences: ``plate``, ``compound``, ``field``, ``number`` and ``folder``.

    Raises:
        InputError: naming folders or experiments.
    """
    key = ["plate", "compound", "field", "number"]
    again = sequences[sequences.duplicated(key)]
    if len(again):
        same = sequences.merge(again.iloc[:1][key])["folder"]
        raise InputError(
            f"{' and '.join(same)} are one cell by name, and {len(again)} in all are there twice; remove one of each"
        )
    plates = set(sequences["plate"]) - {NOVEL}
    without = sorted(plates - set(sequences["plate"][sequences["compound"] == CONTROL]), key=natural)
    if without:
        raise InputError(
            f"experiment(s) {', '.join(without)} have no cell of the control {CONTROL!r}, which every drug is compared "
            f"with; put its folder back, such as {without[0]}/train/{CONTROL}"
        )


def virtual_wells(compound: pd.Series[str], field: pd.Series[str]) -> pd.Series[str]:
    """A well for each compound and field, which is what a well was: the released data do not say which.

    The control's come first, then those of FDA-list and of Novel-list in natural order, along the rows of a plate of 48
    columns; a compound's field has the same well on every plate that it is on.
    """

    def order(pair: tuple[str, str]) -> tuple[object, ...]:
        compound, field = pair
        return compound != CONTROL, compound.startswith(NOVEL_COMPOUND), natural(compound), natural(field)

    pairs = sorted(set(zip(compound, field, strict=True)), key=order)
    wells = {
        pair: f"{row_letters(place // _COLUMNS + 1)}{place % _COLUMNS + 1:02d}" for place, pair in enumerate(pairs)
    }
    return pd.Series([wells[pair] for pair in zip(compound, field, strict=True)], compound.index, dtype=object)


def check_frames(frames: Collection[int], n_frames: int) -> None:
    """Refuse a sequence that lacks frames of the first ``n_frames``.

    Args:
        frames: that are there, counted from 1.
        n_frames: that a clip has.

    Raises:
        UnusableSequenceError: naming the missing ones.
    """
    missing = sorted(set(range(1, n_frames + 1)) - set(frames))
    if missing:
        named = ", ".join(f"{frame}.jpg" for frame in missing)
        raise UnusableSequenceError(MISSING, f"has {n_frames - len(missing)} of {n_frames} frames; missing: {named}")


def clip_of(images: Sequence[bytes], size: int) -> npt.NDArray[np.uint8]:
    """A clip from a sequence's JPEG files, resized as MitoReID's reader does it (Pillow's bilinear filter).

    Args:
        images: T files, the frames 1 to T.
        size: side of the clip, px.

    Returns:
        (3, T, size, size) uint8, channels as :data:`CHANNELS`.

    Raises:
        UnusableSequenceError: if an image is truncated or no JPEG, or they are not RGB squares of one size.
    """
    frames: list[npt.NDArray[np.uint8]] = []
    side = 0
    for number, data in enumerate(images, 1):
        try:
            image = Image.open(io.BytesIO(data), formats=["JPEG"])
            resized = image.resize((size, size), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow's readers have errors of their own
            raise UnusableSequenceError(UNREADABLE, f"{number}.jpg is not a readable JPEG ({error})") from error
        side = side or image.width
        if image.mode != "RGB" or image.size != (side, side):
            found = f"{number}.jpg is {image.mode} of {image.width} × {image.height} px"
            raise UnusableSequenceError(MISSHAPEN, f"{found}; expected RGB of {side} × {side}, as the first is wide")
        frames.append(np.asarray(resized))
    return np.stack(frames).transpose(3, 0, 1, 2)
