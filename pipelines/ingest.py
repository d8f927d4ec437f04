"""`screening ingest`: folders of TIFF images to an OME-Zarr plate."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray

from pipelines.progress import console, progress
from screening.layouts import PatternLayout, missing_planes, natural, parse
from storage_schemas import plate as plates
from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError

_SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class IngestOptions:
    """How images become a plate.

    Attributes:
        layout: how their names are read.
        axes: of one file, a permutation of a subset of ``TCZYX`` ending in ``YX``.
        name: of the plate; by default the folder's.
        channels: names for the channels, in the natural order of what the file names call them (or of the axis C).
        pixel_size: micrometres.
        time_step: seconds.
        overwrite: replace wells that the plate has already.
        projection: of z.
    """

    layout: PatternLayout
    axes: str = "YX"
    name: str | None = None
    channels: tuple[str, ...] = ()
    pixel_size: float | None = None
    time_step: float | None = None
    overwrite: bool = False
    projection: plates.Projection = "max"


def ingest(source: str, plate_url: str, options: IngestOptions) -> list[str]:
    """Write the images of a folder as wells of a plate, adding to a plate that is there.

    Args:
        source: folder (searched through its sub-folders) or one file, local or a URL.
        plate_url: the plate, new or with other wells.
        options: how.

    Returns:
        The wells written.

    Raises:
        InputError: if names, axes, shapes or channels do not fit, planes are missing, or a well is there already.
    """
    if not _usable(options.axes.upper()):
        raise InputError(f"--axes {options.axes!r}: expected a subset of T, C, Z and, last, YX")
    source, plate_url = store.absolute(source), store.absolute(plate_url)
    files = _files(source)
    planes = parse(files, options.layout)
    if planes.ignored:
        shown = ", ".join(planes.ignored[:3])
        console.print(
            f"note: {len(planes.ignored)} file(s) do not match the pattern and are left out: {shown}",
            soft_wrap=True,
        )
    _refuse_missing(planes.table)
    existing, name = _existing(plate_url, options.name)
    wells = list(dict.fromkeys(planes.table["well"]))
    again = sorted(set(wells) & set(existing))
    if again and not options.overwrite:
        raise InputError(f"{plate_url}: has the well(s) {again[:5]} already; give --overwrite to replace them")
    with progress("ingest", len(wells), "wells") as advance:
        for well, of_well in planes.table.groupby("well", sort=False):
            sites = {
                str(site): _read_site(files, of_site, options) for site, of_site in of_well.groupby("site", sort=False)
            }
            names = _channel_names(of_well, next(iter(sites.values())), options)
            if well in existing:
                # No longer named while it is written, so that a plate never has half a well.
                existing.remove(str(well))
                plates.list_wells(plate_url, name, existing)
            plates.create_well(
                plate_url,
                str(well),
                sites,
                names,
                pixel_size=options.pixel_size,
                time_step=options.time_step,
            )
            # Named at once, so that what is written is in the plate even if the next file is unreadable.
            existing = sorted({*existing, str(well)})
            plates.list_wells(plate_url, name, existing)
            advance(str(well))
    return wells


def _files(source: str) -> dict[str, str]:
    """Path below the source folder -> URL, of all TIFF files, in natural order."""
    fs, path = store.filesystem(source)
    if not fs.exists(path):
        raise InputError(f"{source}: no such file or folder")
    if fs.isfile(path):
        return {os.path.basename(path): source}
    found = {}
    for entry in fs.find(path):
        below = entry[len(path) :].lstrip("/")
        if below.lower().endswith(_SUFFIXES):
            found[below] = store.join(source, below)
    if not found:
        raise InputError(f"{source}: holds no {' or '.join(_SUFFIXES)} files")
    return {below: found[below] for below in sorted(found, key=natural)}


def _refuse_missing(table: pd.DataFrame) -> None:
    missing = missing_planes(table)
    if missing.empty:
        return
    shown = "; ".join(
        ", ".join(f"{column} {value}" for column, value in row.items()) for row in missing.head(5).to_dict("records")
    )
    raise InputError(
        f"{len(missing)} plane(s) that a complete plate would have are not there: {shown}; add the files, or make the "
        "pattern match whole sites only"
    )


def _existing(plate_url: str, name: str | None) -> tuple[list[str], str]:
    default = store.parent(plate_url + "/x").rpartition("/")[2].removesuffix(".zarr")
    names = store.list_names(plate_url)
    if ".zattrs" in names or ".zgroup" in names:
        raise InputError(f"{plate_url}: is OME-Zarr 0.4, which is read but not added to; ingest into a new plate")
    if all(re.fullmatch("[A-Z]{1,2}", entry) for entry in names):
        # New, or rows that an interrupted ingest left without naming a well: those are written again.
        return [], name or default.removesuffix(".ome")
    plate = plates.open_plate(plate_url)
    if name is not None and name != plate.name:
        raise InputError(f"{plate_url}: is called {plate.name!r}, not {name!r}")
    return list(plate.well_paths), plate.name


def _read_site(files: dict[str, str], table: pd.DataFrame, options: IngestOptions) -> NDArray[Any]:
    """All planes of a site as (T, C, H, W)."""
    frames = []
    for _, of_time in table.groupby("time", sort=True):
        channels = []
        for channel in sorted(of_time["channel"].unique(), key=natural):
            of_channel = of_time[of_time["channel"] == channel].sort_values("z")
            stack = [_read_file(files[path], options) for path in of_channel["path"]]
            channels.append(_join(stack, of_channel["path"], axis=2))
        frames.append(_join(channels, of_time["path"], axis=1))
    site = _join(frames, table["path"], axis=0)
    return site.max(axis=2) if options.projection == "max" else site.mean(axis=2, dtype="f4")


def _join(blocks: list[NDArray[Any]], paths: pd.Series[str], axis: int) -> NDArray[Any]:
    shapes = {(block.shape[3:], block.dtype.name) for block in blocks}
    if len(shapes) > 1:
        raise InputError(f"{paths.iloc[0]} and the files of the same site differ in size or type: {sorted(shapes)}")
    return np.concatenate(blocks, axis=axis)


def _read_file(url: str, options: IngestOptions) -> NDArray[Any]:
    """One TIFF file as (T, C, Z, H, W)."""
    axes = options.axes.upper()
    data = store.read_bytes(url)
    try:
        with _logged_errors() as errors:
            image = tifffile.imread(io.BytesIO(data))
    except Exception as error:  # tifffile and its codecs have errors of their own
        raise SchemaError(url, f"is not a readable TIFF image ({error})") from error
    if errors and axes != "YX":
        raise SchemaError(url, f"is a damaged stack, pages may be missing ({errors[0]})")
    if image.ndim != len(axes):
        # Writers differ in whether they keep axes of length 1.
        image = np.squeeze(image)
        if image.ndim == 2:
            image = image.reshape((1,) * (len(axes) - 2) + image.shape)
    if image.ndim != len(axes):
        raise SchemaError(url, f"has the shape {image.shape}, --axes {axes} says {len(axes)} dimensions")
    order = [axis for axis in "TCZYX" if axis in axes]
    image = image.transpose([axes.index(axis) for axis in order])
    for position, axis in enumerate("TCZ"):
        if axis not in axes:
            image = np.expand_dims(image, position)
    return image


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collect the errors that tifffile logs: of pages that it cannot read and leaves out it says nothing else."""
    errors: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            errors.append(record.getMessage())
        return False

    logger = logging.getLogger("tifffile")
    logger.addFilter(collect)
    try:
        yield errors
    finally:
        logger.removeFilter(collect)


def _usable(axes: str) -> bool:
    return axes.endswith("YX") and len(set(axes)) == len(axes) and set(axes) <= set("TCZYX")


def _channel_names(table: pd.DataFrame, site: NDArray[Any], options: IngestOptions) -> tuple[str, ...]:
    found = sorted(table["channel"].unique(), key=natural)
    names = options.channels or tuple(found)
    count = site.shape[1]
    if not options.channels and count != len(found):
        names = tuple(str(number) for number in range(count))
    if len(names) != count:
        raise InputError(f"there are {count} channels ({found}), {len(names)} names were given: {names}")
    return names


def describe(plate_url: str) -> Iterator[str]:
    """Lines that say what a plate holds."""
    plate = plates.open_plate(store.absolute(plate_url))
    yield f"plate {plate.name}: {len(plate.well_paths)} well(s)"
    for well in plate.well_paths:
        for name, url in plate.sites(well).items():
            image = plates.open_site(url)
            yield f"  {well} site {name}: (T, C, H, W) = {image.shape}, channels {list(image.channels)}"
