"""`screening ingest`: folders of TIFF images to an OME-Zarr plate, wells in parallel on Ray."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import pandas as pd
import ray

from pipelines import events
from pipelines.cluster import cpus_up
from pipelines.progress import progress
from pipelines.tiff import PlaneFile, SiteFiles, ZAxis, plane_info
from screening.layouts import Channel, Grid, ImageXpressLayout, Layout, Metadata, Planes, grid, missing_planes, natural
from screening.layouts import read as read_layout
from screening.layouts.imagexpress import ImageHeader, with_headers
from storage_schemas import plate as plates
from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.ingest import IngestRecord, WellRecord, read_record
from storage_schemas.keys import check_name
from storage_schemas.missing import MISSING, PLANE, ZEROS, read_missing, write_missing
from storage_schemas.screen import fingerprint

_SUFFIXES = (".tif", ".tiff")
_SHOWN = 5  # of what is listed in full elsewhere


@dataclass(frozen=True)
class IngestOptions:
    """How images become a plate.

    Attributes:
        layout: how their names are read.
        axes: of one file, a permutation of a subset of ``TCZYX`` ending in ``YX``.
        name: of the plate; by default the folder's.
        channels: names for the channels, in the natural order of what the file names call them (or of the axis C);
            by default those of the instrument's metadata.
        pixel_size: micrometres; by default the metadata's.
        time_step: seconds; by default the metadata's.
        overwrite: replace wells that the plate has already.
        z: how z is projected, or ``none`` to keep it.
        allow_missing: go on where planes of a pattern's plate are missing, as is done for instruments' layouts.
    """

    layout: Layout
    axes: str = "YX"
    name: str | None = None
    channels: tuple[str, ...] = ()
    pixel_size: float | None = None
    time_step: float | None = None
    overwrite: bool = False
    z: ZAxis = "max"
    allow_missing: bool = False


@dataclass(frozen=True)
class Ingested:
    """What an ingest came to.

    Attributes:
        plate_url: the plate.
        name: its name.
        files: image files that each well of the source that stands in the plate is made of.
        kept: wells that were there already, of the same files.
        failed: what went wrong with each well that could not be written.
        sites: how many sites were written of each (shape, channels).
        left_out: see :class:`screening.layouts.Planes`.
        missing: see :func:`screening.layouts.missing_planes`; but for wells that another source has written.
        plate_map: where a plate map was written, or None.
    """

    plate_url: str
    name: str
    files: dict[str, int]
    kept: tuple[str, ...]
    failed: dict[str, str]
    sites: Counter[tuple[tuple[int, ...], tuple[str, ...]]]
    left_out: pd.DataFrame
    missing: pd.DataFrame
    plate_map: str | None


def ingest(source: str, plate_url: str, options: IngestOptions) -> Ingested:
    """Write the images of a folder as wells of a plate, adding to a plate that is there.

    Wells are written side by side by Ray, which must be running. A well whose files cannot be read is recorded in the
    plate and the others go on; wells that are there already, of the same files, are kept. Nothing of a well is read
    before its turn, but for headers that say pixel size and time.

    Args:
        source: folder (searched through its sub-folders) or one file, local or a URL.
        plate_url: the plate, new or with other wells.
        options: how.

    Raises:
        InputError: before anything is written, if names, axes or channels do not fit, planes of a pattern's plate are
            missing, or a well is there already of other files; or if no well could be written.
    """
    options = _checked(options)
    source, plate_url = store.absolute(source), store.absolute(plate_url)
    if f"{source.rstrip('/')}/".startswith(f"{plate_url.rstrip('/')}/"):
        raise InputError(
            f"{plate_url}: holds the images of {source}, and a plate's wells are removed before they are written; "
            "choose another place for the plate"
        )
    files, planes = _read_source(source, options)
    missing = missing_planes(planes, keep_z=options.z == "none")
    if options.layout.method == "pattern" and not options.allow_missing:
        _refuse_missing(missing)
    jobs = _jobs(plate_url, files, planes, options)
    writer = _Writer.open(plate_url, options.name, jobs, overwrite=options.overwrite)
    wells = {*planes.table["well"], *planes.promised["well"]}
    # Metadata in a part of a plate promise the wells of its other parts too, which have been written before.
    wells -= writer.named - {job.well for job in jobs}
    missing = missing[missing["well"].isin(wells)]
    _write_missing(plate_url, wells, missing)
    sites = writer.write()
    if not writer.named:
        write_missing(plate_url, missing.head(0))
        well, why = next(iter(writer.failed.items()))
        raise InputError(f"none of {len(jobs)} well(s) could be written; {well}: {why}")
    return Ingested(
        plate_url,
        writer.name,
        {job.well: len(job.files) for job in jobs if job.well in writer.named},
        tuple(job.well for job in jobs if job.well in writer.kept),
        writer.failed,
        sites,
        planes.left_out,
        missing,
        _write_plate_map(plate_url, writer, planes.plate_map),
    )


def describe(done: Ingested) -> Iterator[str]:
    """Lines that say what an ingest came to."""
    counts = sorted({*done.files.values()} or {0})
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    kept = f", {len(done.kept)} of them there already" if done.kept else ""
    yield f"plate {done.name}: {len(done.files)} well(s){kept}, {each} image file(s) a well"
    for (shape, channels), count in done.sites.items():
        axes = "(T, C, H, W)" if len(shape) == 4 else "(T, C, Z, H, W)"
        yield f"  {count} site(s) written of {axes} = {shape}, channels {list(channels)}"
    for reason, count in done.left_out["reason"].value_counts().items():
        yield f"  {count} file(s) left out: {reason}"
    if not done.missing.empty:
        promised = int(done.missing["promised"].sum())
        zeros = int((done.missing["written"] == ZEROS).sum())
        yield (
            f"  {len(done.missing)} plane(s) are missing, {promised} of them promised by the metadata; {zeros} are "
            f"zeros in the plate: {_shown(done.missing)}; all in {store.join(done.plate_url, MISSING)}"
        )
    if done.plate_map is not None:
        yield f"  plate map: {done.plate_map}"
    for well, why in done.failed.items():
        yield f"  failed: {well}: {why}"


@dataclass(frozen=True)
class _How:
    """How the wells of a plate are written, alike for all."""

    grid: Grid
    axes: str
    z: ZAxis
    channels: tuple[str, ...]  # empty where files hold several and none are named
    colors: tuple[str | None, ...]
    pixel_size: float | None
    time_step: float | None
    z_step: float | None


@dataclass(frozen=True)
class _WellJob:
    """A well to be written: everything that a worker needs."""

    plate_url: str
    well: str
    files: tuple[tuple[str, PlaneFile], ...]  # (site, file)
    how: _How
    fingerprint: str

    def write(self) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """Write the well; (shape, channels) of each site."""
        by_site: dict[str, list[PlaneFile]] = {}
        for site, file in self.files:
            by_site.setdefault(site, []).append(file)
        how = self.how
        sites = {site: SiteFiles(files, how.grid, how.axes, how.z) for site, files in by_site.items()}
        count = next(iter(sites.values())).shape[1]
        channels = how.channels or tuple(str(number) for number in range(count))
        plates.create_well(
            self.plate_url,
            self.well,
            sites,
            channels,
            colors=how.colors or None,
            pixel_size=how.pixel_size,
            time_step=how.time_step,
            z_step=how.z_step,
        )
        return [(site.shape, channels) for site in sites.values()]


class _Writer:
    """Writes wells and names them in the plate as they finish, so that it never names half a well."""

    def __init__(self, plate_url: str, name: str, named: set[str], record: IngestRecord, jobs: list[_WellJob]) -> None:
        self._url, self.name, self.named, self._jobs = plate_url, name, named, jobs
        self._records = dict(record.wells)
        self._failed = dict(record.failed)
        self.kept: set[str] = set()

    @classmethod
    def open(cls, plate_url: str, name: str | None, jobs: list[_WellJob], *, overwrite: bool) -> _Writer:
        named, known, record = _existing(plate_url, name)
        writer = cls(plate_url, known, named, record, jobs)
        if overwrite:
            return writer
        of_others = []
        for job in jobs:
            if job.well not in named:
                continue
            written = record.wells.get(job.well)
            if written is not None and written.fingerprint == job.fingerprint:
                writer.kept.add(job.well)
            else:
                of_others.append(job.well)
        if of_others:
            raise InputError(
                f"{plate_url}: has the well(s) {of_others[:_SHOWN]} already, written from other files or in another "
                "way; give --overwrite to replace them"
            )
        return writer

    @property
    def failed(self) -> dict[str, str]:
        """Of these jobs."""
        return {job.well: self._failed[job.well] for job in self._jobs if job.well in self._failed}

    def write(self) -> Counter[tuple[tuple[int, ...], tuple[str, ...]]]:
        sites: Counter[tuple[tuple[int, ...], tuple[str, ...]]] = Counter()
        task = ray.remote(num_cpus=1, max_retries=0)(_attempt)
        waiting = iter([job for job in self._jobs if job.well not in self.kept])
        running: dict[ray.ObjectRef, _WellJob] = {}
        with progress("ingest", len(self._jobs), "wells") as advance:
            for _ in self.kept:
                advance()
            while True:
                # Enough that no CPU waits and that a cluster which can grow does; no more, since a well to be replaced
                # is missed from the moment it is handed out.
                at_once = 2 * max(1, int(cpus_up()))
                for job in islice(waiting, max(0, at_once - len(running))):
                    self._unname(job.well)
                    running[task.remote(job)] = job
                if not running:
                    return sites
                (finished,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(finished)
                try:
                    outcome = ray.get(finished)
                except ray.exceptions.RayError as error:
                    outcome = f"its worker was lost: {str(error).splitlines()[0]}"
                if isinstance(outcome, str):
                    self._failed[job.well] = outcome
                else:
                    self._failed.pop(job.well, None)
                    self._records[job.well] = WellRecord(fingerprint=job.fingerprint, planes=len(job.files))
                    self.named.add(job.well)
                    sites.update(outcome)
                self._commit()
                n_failed = len(self.failed)
                advance(job.well, failed=n_failed)

    def _unname(self, well: str) -> None:
        if well in self.named:
            self.named.remove(well)
            self._records.pop(well, None)
            self._commit()

    def _commit(self) -> None:
        record = IngestRecord(wells=self._records, failed=self._failed)
        plates.list_wells(self._url, self.name, sorted(self.named), record.model_dump())


def _attempt(job: _WellJob) -> list[tuple[tuple[int, ...], tuple[str, ...]]] | str:
    """Write a well; what it raises becomes a message, so that one bad well costs one well."""
    try:
        return job.write()
    except InputError as error:
        return str(error)
    except Exception as error:  # whatever it is, it is recorded with its well
        return f"{type(error).__name__}: {error}"


def _checked(options: IngestOptions) -> IngestOptions:
    axes = options.axes.upper()
    if not (axes.endswith("YX") and len(set(axes)) == len(axes) and set(axes) <= set("TCZYX")):
        raise InputError(f"--axes {options.axes!r}: expected a subset of T, C, Z and, last, YX")
    for name, value in (("--pixel-size", options.pixel_size), ("--time-step", options.time_step)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} {value}: expected a number above 0")
    if not all(options.channels):
        raise InputError(f"--channel-names {','.join(options.channels)!r}: a name is empty")
    return replace(options, axes=axes)


def _read_source(source: str, options: IngestOptions) -> tuple[dict[str, tuple[str, int]], Planes]:
    """Image files (path below the source -> URL, bytes), and the planes that their names and metadata say."""
    found = _files(source)
    images = {name: found[name] for name in found if name.lower().endswith(_SUFFIXES)}
    documents = {name: store.read_bytes(found[name][0]) for name in options.layout.documents(found)}
    if not images and not documents:
        raise InputError(f"{source}: holds no {' or '.join(_SUFFIXES)} files")
    try:
        planes = read_layout(options.layout, list(images), documents)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if planes.ignored:
        events.note(
            f"{len(planes.ignored)} file(s) are not named as --layout {options.layout.method} says and are left "
            f"out: {', '.join(planes.ignored[:_SHOWN])}{' …' if len(planes.ignored) > _SHOWN else ''}",
            left_out=len(planes.ignored),
        )
    return images, planes


def _files(source: str) -> dict[str, tuple[str, int]]:
    """Path below the source folder -> URL and bytes, of all files but hidden ones, in natural order; by one listing."""
    fs, path = store.filesystem(source)
    if not fs.exists(path):
        raise InputError(f"{source}: no such file or folder")
    if fs.isfile(path):
        return {os.path.basename(path): (source, fs.size(path))}
    found = {}
    for entry, info in fs.find(path, detail=True).items():
        below = entry[len(path) :].lstrip("/")
        # Such as the ._ files that macOS leaves beside images, or snapshots, under the images' own names.
        if any(part.startswith(".") for part in below.split("/")):
            continue
        found[below] = (store.join(source, below), int(info.get("size") or 0))
    return {below: found[below] for below in sorted(found, key=natural)}


def _refuse_missing(missing: pd.DataFrame) -> None:
    if not missing.empty:
        raise InputError(
            f"{len(missing)} plane(s) that a complete plate would have are not there: {_shown(missing)}; add the "
            "files, make the pattern match whole sites only, or go on with zeros in their place (--allow-missing)"
        )


def _shown(missing: pd.DataFrame) -> str:
    rows = missing[PLANE].head(_SHOWN).to_dict("records")
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return "; ".join(", ".join(f"{column} {value}" for column, value in row.items()) for row in rows) + more


def _jobs(plate_url: str, files: dict[str, tuple[str, int]], planes: Planes, options: IngestOptions) -> list[_WellJob]:
    metadata = planes.metadata
    if isinstance(options.layout, ImageXpressLayout):
        metadata = with_headers(metadata, _headers(files, planes.table))
    of_plate = grid(planes)
    channels, colors = _channels(of_plate, metadata, options)
    how = _How(
        of_plate,
        options.axes,
        options.z,
        channels,
        colors,
        options.pixel_size or metadata.pixel_size,
        options.time_step or metadata.time_step,
        metadata.z_step,
    )
    # Without the colours and steps that images say: one that could not be read may say others once it is mended, and
    # the wells that were written before are kept nonetheless.
    way = repr((of_plate, options.axes, options.z, channels, options.pixel_size, options.time_step))
    jobs = []
    for well, of_well in planes.table.groupby("well", sort=False):
        rows = list(of_well[["path", "site", "time", "channel", "z"]].itertuples(index=False, name=None))
        sizes = [files[path][1] for path, *_ in rows]
        jobs.append(
            _WellJob(
                plate_url=plate_url,
                well=str(well),
                files=tuple((site, PlaneFile(files[path][0], *plane)) for path, site, *plane in rows),
                how=how,
                fingerprint=fingerprint(way, rows, sizes),
            )
        )
    return jobs


def _channels(
    of_plate: Grid, metadata: Metadata, options: IngestOptions
) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Names and colours of the channels; no names where the number of channels is in the files and none are given."""
    known = [metadata.channels.get(channel, Channel(channel)) for channel in of_plate.channels]
    names = [channel.name for channel in known]
    if options.channels:
        if "C" not in options.axes and len(options.channels) != len(names):
            raise InputError(
                f"there are {len(names)} channels ({names}), {len(options.channels)} names were given: "
                f"{list(options.channels)}"
            )
        return options.channels, () if "C" in options.axes else tuple(channel.color for channel in known)
    if "C" in options.axes:
        return (), ()
    # Two channels may be called alike, as of two exposures of one dye.
    unique = tuple(
        name if names.count(name) == 1 else f"{name} ({channel})"
        for name, channel in zip(names, of_plate.channels, strict=True)
    )
    return unique, tuple(channel.color for channel in known)


def _headers(
    files: dict[str, tuple[str, int]], table: pd.DataFrame
) -> dict[tuple[str, str, int, str, int], ImageHeader]:
    """What a few images say of themselves: of one site, one of each channel, the next time and the next z plane.

    It is the first site of which all of them can be read.
    """
    for _, of_site in table.groupby(["well", "site"], sort=False):
        first = of_site.iloc[0]
        channels = of_site.drop_duplicates("channel")
        of_channel = of_site[of_site["channel"] == first["channel"]]
        later = of_channel[(of_channel["time"] > first["time"]) & (of_channel["z"] == first["z"])].head(1)
        above = of_channel[(of_channel["time"] == first["time"]) & (of_channel["z"] > first["z"])].head(1)
        chosen = pd.concat([channels, later, above])[["path", *PLANE]].itertuples(index=False, name=None)
        try:
            return {tuple(plane): ImageHeader.read(plane_info(files[path][0])) for path, *plane in chosen}
        except SchemaError:
            continue  # its well will fail and say why
    return {}


def _existing(plate_url: str, name: str | None) -> tuple[set[str], str, IngestRecord]:
    """Wells that a plate has, its name and its record."""
    names = store.list_names(plate_url)
    if ".zattrs" in names or ".zgroup" in names:
        raise InputError(f"{plate_url}: is OME-Zarr 0.4, which is read but not added to; ingest into a new plate")
    if all(entry == MISSING or re.fullmatch(r"[A-Z]{1,2}|\..*", entry) for entry in names):
        # New but for what systems hide in folders, or rows that an interrupted ingest left without naming a well: those
        # are written again.
        return set(), check_name(name or plates.default_name(plate_url), "plate"), IngestRecord()
    plate = plates.open_plate(plate_url)
    if name is not None and name != plate.name:
        raise InputError(f"{plate_url}: is called {plate.name!r}, not {name!r}")
    return set(plate.well_paths), plate.name, read_record(plate_url)


def _write_missing(plate_url: str, wells: set[str], missing: pd.DataFrame) -> None:
    """Replace what the plate lists of these wells, and leave other wells' rows."""
    known = read_missing(plate_url)
    kept = known[~known["well"].isin(wells)]
    listed = pd.concat([kept, missing], ignore_index=True)
    if not listed.equals(known):
        write_missing(plate_url, listed)


def _write_plate_map(plate_url: str, writer: _Writer, plate_map: pd.DataFrame | None) -> str | None:
    """Write which compound stands in which well beside the plate, of the wells that it has."""
    if plate_map is None:
        return None
    url = store.join(store.parent(plate_url), f"{plates.default_name(plate_url)}.plate_map.csv")
    rows = plate_map[plate_map["well"].isin(writer.named)]
    store.write_bytes(url, rows.assign(plate=writer.name)[["plate", *plate_map.columns]].to_csv(index=False).encode())
    return url
