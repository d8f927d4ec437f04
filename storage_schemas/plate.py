"""Plates: OME-Zarr HCS. NGFF 0.5 on Zarr v3 is written, sharded; 0.4 on Zarr v2 is read too.

Layout: ``PLATE.zarr/<row>/<column>/<site>/<level>``, axes ``tcyx`` or ``tczyx`` when written; any subset is read.
One chunk is one plane; one shard is all of a time point, so that files are few and a frame is one read.
Specification: https://ngff.openmicroscopy.org/0.5/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

from storage_schemas import arrays, store
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import canonical_well, check_name, split_well

VERSION = "0.5"
SMALLEST_LEVEL = 256  # px: the pyramid stops at the first level no larger than this

Projection = Literal["max", "mean"]

_SECONDS = {"second": 1.0, "millisecond": 1e-3, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_MICROMETRES = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "angstrom": 1e-4}
_COLORS = ("0000FF", "00FF00", "FF0000", "FFFF00", "FF00FF", "00FFFF", "FFFFFF")
_NOTES = "screening"  # beside NGFF's own key
# Of each plane's shorter side, for the display range; all are held until the site is written.
_SAMPLED = 128  # px


class Frames(Protocol):
    """A site's images, (T, C, H, W) or (T, C, Z, H, W), read a time point at a time: a NumPy array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, C, H, W) or (T, C, Z, H, W)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""

    def __getitem__(self, frame: int, /) -> NDArray[Any]:
        """One time point, (C, H, W) or (C, Z, H, W)."""


@dataclass(frozen=True)
class Plate:
    """An opened plate.

    Attributes:
        url: where it lies.
        name: from its metadata, or its folder's name.
        well_paths: canonical well name -> path inside the plate, in the plate's order.
    """

    url: str
    name: str
    well_paths: dict[str, str]

    def sites(self, well: str) -> dict[str, str]:
        """Site name -> URL of its image, in the well's order.

        Raises:
            SchemaError: if there is no such well, or its metadata is missing or lists no usable images.
        """
        if well not in self.well_paths:
            raise SchemaError(self.url, f"has no well {well!r}; its wells are {list(self.well_paths)}")
        url = store.join(self.url, self.well_paths[well])
        document = _ome(url, "well")
        names = [str(entry.get("path", "")) for entry in _entries(url, document, "images")]
        if not names:
            raise SchemaError(url, "is a well without images")
        for name in names:
            _named_in(url, check_name, name, "site")
        return {name: store.join(url, name) for name in names}


@dataclass(frozen=True)
class SiteImage:
    """An opened site: an image over time.

    Attributes:
        url: where it lies.
        axes: names of the stored array's axes, a subset of ``tczyx`` in that order.
        channels: channel names, one a channel.
        pixel_size: micrometres, or None where unknown.
        time_step: seconds, or None where unknown.
        n_levels: levels of its pyramid.
    """

    url: str
    axes: str
    channels: tuple[str, ...]
    pixel_size: float | None
    time_step: float | None
    n_levels: int
    _level_url: str
    _array: zarr.Array[Any]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W), after projection of z."""
        size = dict(zip(self.axes, self._array.shape, strict=True))
        return size.get("t", 1), size.get("c", 1), size["y"], size["x"]

    def read(
        self,
        channels: Sequence[str] | None = None,
        frames: Sequence[int] | None = None,
        projection: Projection = "max",
    ) -> NDArray[Any]:
        """Read pixels as a (T, C, H, W) array of the stored dtype (float32 for a mean over z).

        Args:
            channels: names, in the order wanted; all by default.
            frames: time points; all by default.
            projection: how z is projected, where there is a z.

        Raises:
            SchemaError: if a channel or frame does not exist or a chunk cannot be read.
        """
        n_frames, n_channels = self.shape[:2]
        if frames is not None and not all(0 <= frame < n_frames for frame in frames):
            raise SchemaError(self.url, f"has {n_frames} frames, asked for {list(frames)}")
        times = range(n_frames) if frames is None else frames
        places = range(n_channels) if channels is None else [self._channel(name) for name in channels]
        rows = [
            _joined([self._read(t, c, projection) for c in arrays.stretches(places)], axis=1)
            for t in arrays.stretches(times)
        ]
        return _joined(rows, axis=0)

    def _read(self, frames: slice, channels: slice, projection: Projection) -> NDArray[Any]:
        picks = {"t": frames, "c": channels}
        selection = tuple(picks.get(axis, slice(None)) for axis in self.axes)
        block = arrays.read(self._level_url, self._array, selection)
        if "z" in self.axes:
            z = self.axes.index("z")
            block = block.max(axis=z) if projection == "max" else block.mean(axis=z, dtype="f4")
        for position, axis in enumerate("tc"):
            if axis not in self.axes:
                block = np.expand_dims(block, position)
        return block

    def _channel(self, name: str) -> int:
        if name not in self.channels:
            raise SchemaError(self.url, f"has no channel {name!r}; its channels are {list(self.channels)}")
        return self.channels.index(name)


def _joined(blocks: list[NDArray[Any]], axis: int) -> NDArray[Any]:
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis)


def default_name(url: str) -> str:
    """What a plate is called that has no other name: its folder's, without ``.ome.zarr``."""
    return re.sub(r"(\.ome)?\.zarr$", "", url.rstrip("/").rpartition("/")[2])


def open_plate(url: str) -> Plate:
    """Open a plate and list its wells.

    Raises:
        SchemaError: if it is not an OME-Zarr plate, or a well in it is named in no usable way.
    """
    document = _ome(url, "plate")
    name = str(document.get("name") or default_name(url))
    _named_in(url, check_name, name, "plate")
    wells: dict[str, str] = {}
    for entry in _entries(url, document, "wells"):
        path = str(entry.get("path", ""))
        row, _, column = path.partition("/")
        if not row.isalnum() or not column.isalnum():
            raise SchemaError(url, f"well path {path!r} is not of the form row/column")
        well = _named_in(url, canonical_well, row + column)
        if well in wells:
            raise SchemaError(url, f"well {well} is listed twice: {wells[well]!r} and {path!r}")
        wells[well] = path
    if not wells:
        raise SchemaError(url, "lists no wells")
    return Plate(url, name, wells)


def open_site(url: str) -> SiteImage:
    """Open one site's image at full resolution.

    Raises:
        SchemaError: if it is not an OME-Zarr image with axes out of ``tczyx``.
    """
    document = _ome(url, None)
    scales = document.get("multiscales")
    if not isinstance(scales, list) or not scales:
        raise SchemaError(url, "is not an OME-Zarr image: it has no 'multiscales'")
    try:
        axis_entries = [a if isinstance(a, dict) else {"name": a} for a in scales[0]["axes"]]
        axes = "".join(str(entry["name"]) for entry in axis_entries)
        dataset = scales[0]["datasets"][0]
        path = str(dataset["path"])
        scale = _scale(dataset, len(axes))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise SchemaError(url, f"its 'multiscales' metadata is incomplete: {error!r}") from error
    # A path out of the image, or a URL in its place, would read what the plate's metadata choose.
    level_url = store.join(url, *(_named_in(url, check_name, part, "dataset") for part in path.split("/")))
    if not re.fullmatch("t?c?z?yx", axes):
        raise SchemaError(url, f"has axes {axes!r}; expected t, c, z, y, x in this order")
    array = arrays.open_array(level_url)
    if array.ndim != len(axes):
        raise SchemaError(level_url, f"has {array.ndim} dimensions for the axes {axes!r}")
    if len(scale) != len(axes):
        raise SchemaError(url, f"has a scale of {len(scale)} numbers for the axes {axes!r}")
    steps = dict(zip(axes, scale, strict=True))
    n_channels = array.shape[axes.index("c")] if "c" in axes else 1
    units = {str(entry["name"]): str(entry.get("unit", "")) for entry in axis_entries}
    return SiteImage(
        url,
        axes,
        _channel_names(url, document, n_channels),
        _physical(steps.get("x"), units.get("x", ""), _MICROMETRES),
        _physical(steps.get("t"), units.get("t", ""), _SECONDS),
        len(scales[0]["datasets"]),
        level_url,
        array,
    )


def create_well(
    plate_url: str,
    well: str,
    sites: Mapping[str, Frames],
    channels: Sequence[str],
    *,
    colors: Sequence[str | None] | None = None,
    pixel_size: float | None = None,
    time_step: float | None = None,
    z_step: float | None = None,
) -> None:
    """Write one well's images beneath a plate folder, holding one time point in memory.

    The well is part of the plate only once :func:`list_wells` has named it in the plate's metadata, so that an
    interrupted writer leaves no half a well in sight. A writer that fails leaves nothing of it.

    Args:
        plate_url: the plate's folder.
        well: canonical well name.
        sites: site name -> (T, C, H, W) or (T, C, Z, H, W); sites may differ in shape and dtype.
        channels: a name a channel.
        colors: RRGGBB a channel, or None where unknown.
        pixel_size: micrometres.
        time_step: seconds.
        z_step: micrometres.

    Raises:
        InputError: if a name is not usable or a site's shape does not fit the channels; nothing is written then.
        StoreError: if the store or disk does not take them.
    """
    row, column = split_well(well)
    if len(set(channels)) != len(channels):
        raise InputError(f"channels {list(channels)} must differ in name")
    for site, stack in sites.items():
        if not (site.isascii() and site.isalnum()):
            raise InputError(f"site {well}/{site}: NGFF names sites by letters and digits alone")
        if len(stack.shape) not in (4, 5) or stack.shape[1] != len(channels):
            raise InputError(
                f"site {well}/{site}: expected (T, C, H, W) or (T, C, Z, H, W) with the channels {list(channels)}, got "
                f"shape {stack.shape}"
            )
    shown = [color or _COLORS[i % len(_COLORS)] for i, color in enumerate(colors or [None] * len(channels))]
    steps = _Steps(pixel_size, time_step, z_step)
    well_url = store.join(plate_url, row, column)
    store.remove(well_url)
    with arrays.writing(well_url):
        for site, stack in sites.items():
            _write_image(store.join(well_url, site), stack, channels, shown, steps)
        images = [{"path": site, "acquisition": 0} for site in sites]
        _write_ome(well_url, {"well": {"images": images}})
        # A row is a group too; writers of its other wells put the same there.
        store.write_json(store.join(plate_url, row, "zarr.json"), _group({}))


def list_wells(plate_url: str, name: str, wells: Sequence[str], notes: dict[str, Any] | None = None) -> None:
    """Write the plate's metadata, which makes the named wells part of it.

    Args:
        plate_url: the plate's folder.
        name: the plate's name, as plate maps spell it.
        wells: canonical names of all wells that are there; without any it is no plate, and its metadata goes.
        notes: kept beside the metadata, for :func:`read_notes`; written with it, so that the two always agree.
    """
    check_name(name, "plate")
    if not wells:
        store.remove(store.join(plate_url, "zarr.json"))
        return
    split = [split_well(well) for well in sorted(set(wells))]
    rows = sorted({row for row, _ in split}, key=lambda row: (len(row), row))
    columns = sorted({column for _, column in split}, key=int)
    _write_ome(
        plate_url,
        {
            "plate": {
                "version": VERSION,
                "name": name,
                "rows": [{"name": row} for row in rows],
                "columns": [{"name": column} for column in columns],
                "wells": [
                    {
                        "path": f"{row}/{column}",
                        "rowIndex": rows.index(row),
                        "columnIndex": columns.index(column),
                    }
                    for row, column in split
                ],
                "acquisitions": [{"id": 0}],
            }
        },
        notes,
    )


def read_notes(plate_url: str) -> dict[str, Any]:
    """What :func:`list_wells` was given to keep; empty for plates of others.

    Raises:
        SchemaError: if there is no plate.
    """
    notes = arrays.open_group(plate_url).attrs.asdict().get(_NOTES, {})
    return notes if isinstance(notes, dict) else {}


def write_labels(image_url: str, labels: dict[str, NDArray[np.int32]]) -> None:
    """Write label movies beside an image as NGFF image-labels, so that napari and vizarr overlay them.

    Args:
        image_url: the site's image.
        labels: name -> (T, H, W) int32, 0 background; an older one of the same name is replaced.
    """
    image = open_site(image_url)
    zarr_format = image._array.metadata.zarr_format
    root = arrays.zarr_store(image_url)
    # Made before the labels in it, so that an interrupted writer leaves a group that can be gone on with.
    labels_url = store.join(image_url, "labels")
    try:
        group = zarr.open_group(root, path="labels", mode="a", zarr_format=zarr_format)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise SchemaError(labels_url, f"is there and not a readable Zarr group ({error}): remove it") from error
    listed = _metadata(group).get("labels", [])
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise SchemaError(labels_url, "its list of labels is not usable: remove it")
    names = sorted({*listed, *labels})
    version = "0.5" if zarr_format == 3 else "0.4"
    for name, movie in labels.items():
        document = {
            "multiscales": _multiscales("tyx", image.n_levels, _Steps(image.pixel_size, image.time_step)),
            "image-label": {"version": version, "source": {"image": "../../"}},
        }
        with arrays.writing(store.join(image_url, "labels", name)):
            zarr.create_group(
                root,
                path=f"labels/{name}",
                zarr_format=zarr_format,
                overwrite=True,
                attributes=_wrapped(document, zarr_format),
            )
            kwargs: dict[str, Any] = (
                {"dimension_names": list("tyx"), "compressors": arrays.COMPRESSORS}
                if zarr_format == 3
                else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
            )
            for level in range(image.n_levels):
                coarse = movie[:, :: 2**level, :: 2**level]
                array = zarr.create_array(
                    root,
                    name=f"labels/{name}/{level}",
                    shape=coarse.shape,
                    chunks=(1, *coarse.shape[1:]),
                    dtype="int32",
                    zarr_format=zarr_format,
                    **kwargs,
                )
                array[...] = coarse
    # Only adding a name changes this file, so that a repeated run leaves it alone.
    if names != listed:
        group.update_attributes(_wrapped({"labels": names}, zarr_format))


def open_labels(image_url: str, name: str) -> NDArray[np.int32]:
    """A label movie beside an image, (T, H, W) int32.

    Raises:
        SchemaError: if there is none of that name.
    """
    url = store.join(image_url, "labels", name, "0")
    labels: NDArray[np.int32] = arrays.read(url, arrays.open_array(url), slice(None)).astype("int32")
    return labels


@dataclass(frozen=True)
class _Steps:
    """Physical size of a step along each axis, or None where unknown: micrometres, seconds, micrometres."""

    pixel: float | None
    time: float | None
    z: float | None = None


def _write_image(url: str, stack: Frames, channels: Sequence[str], colors: Sequence[str], steps: _Steps) -> None:
    axes = "tczyx" if len(stack.shape) == 5 else "tcyx"
    shapes = [stack.shape]
    while max(shapes[-1][-2:]) > SMALLEST_LEVEL and min(shapes[-1][-2:]) >= 2:
        *others, height, width = shapes[-1]
        shapes.append((*others, height // 2, width // 2))
    root = arrays.zarr_store(url)
    zarr.create_group(root, overwrite=True)
    levels = [
        zarr.create_array(
            root,
            name=str(number),
            shape=shape,
            chunks=(*(1 for _ in shape[:-2]), *shape[-2:]),
            shards=(1, *shape[1:]),
            dtype=stack.dtype,
            compressors=arrays.COMPRESSORS,
            dimension_names=list(axes),
        )
        for number, shape in enumerate(shapes)
    ]
    sampled = slice(None, None, max(1, min(stack.shape[-2:]) // _SAMPLED))
    samples = []
    for frame in range(stack.shape[0]):
        block = np.asarray(stack[frame])
        samples.append(block[..., sampled, sampled].copy())
        for number, level in enumerate(levels):
            block = _halved(block) if number else block
            level[frame] = block
    document = {
        "multiscales": _multiscales(axes, len(levels), steps),
        "omero": {
            "channels": [
                {"label": name, "color": color, "active": True, "window": _window([of[i] for of in samples])}
                for i, (name, color) in enumerate(zip(channels, colors, strict=True))
            ]
        },
    }
    _write_ome(url, document)


def _halved(block: NDArray[Any]) -> NDArray[Any]:
    """Mean of 2 × 2 pixels; an odd last row or column is left out, as viewers expect."""
    height, width = (size // 2 * 2 for size in block.shape[-2:])
    whole = block.dtype.kind in "iu"
    # Four strided sums take a third of the time of a mean over axes of length 2.
    total = block[..., 0:height:2, 0:width:2].astype(np.result_type(block.dtype, np.uint32 if whole else np.float32))
    for y, x in ((0, 1), (1, 0), (1, 1)):
        total += block[..., y:height:2, x:width:2]
    halved: NDArray[Any] = (total // 4 if whole else total / 4).astype(block.dtype)
    return halved


def _window(samples: list[NDArray[Any]]) -> dict[str, float]:
    """Display range of a channel: what viewers stretch to."""
    values = np.concatenate([sample.ravel() for sample in samples])
    values = values[np.isfinite(values)]
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.8))) if values.size else (0.0, 1.0)
    return {"min": low, "start": low, "end": max(high, low + 1), "max": max(high, low + 1)}


def _multiscales(axes: str, n_levels: int, steps: _Steps) -> list[dict[str, Any]]:
    kinds = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
    units = {"t": "second", "z": "micrometer", "y": "micrometer", "x": "micrometer"}
    known = {"t": steps.time, "z": steps.z, "y": steps.pixel, "x": steps.pixel}
    entries: list[dict[str, str]] = [{"name": axis, "type": kinds[axis]} for axis in axes]
    for entry in entries:
        if known.get(entry["name"]) is not None:
            entry["unit"] = units[entry["name"]]
    datasets = []
    for level in range(n_levels):
        scale = [(known.get(axis) or 1.0) * (2.0**level if axis in "yx" else 1.0) for axis in axes]
        transformations = [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    return [{"name": "image", "axes": entries, "datasets": datasets}]


def _wrapped(document: dict[str, Any], zarr_format: int) -> dict[str, Any]:
    """NGFF 0.5 keeps its metadata under ``ome`` with one version; 0.4 at the top, a version each."""
    if zarr_format == 3:
        return {"ome": {"version": VERSION, **document}}
    for entry in document.get("multiscales", []):
        entry["version"] = "0.4"
    return document


def _write_ome(url: str, document: dict[str, Any], notes: dict[str, Any] | None = None) -> None:
    """Write a group's metadata in one put."""
    kept = {} if notes is None else {_NOTES: notes}
    store.write_json(store.join(url, "zarr.json"), _group({**_wrapped(document, 3), **kept}))


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _ome(url: str, key: str | None) -> dict[str, Any]:
    """A group's NGFF metadata, or one part of it."""
    document = _metadata(arrays.open_group(url))
    if key is None:
        return document
    part = document.get(key)
    if not isinstance(part, dict):
        raise SchemaError(url, f"is not an OME-Zarr {key}: its metadata has no {key!r} (was its ingest interrupted?)")
    return part


def _metadata(group: zarr.Group) -> dict[str, Any]:
    attributes: dict[str, Any] = group.attrs.asdict()
    document = attributes.get("ome", attributes)
    return document if isinstance(document, dict) else {}


def _entries(url: str, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of what a part of the metadata tells, each by names."""
    entries = document.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SchemaError(url, f"its metadata are not usable: {key!r} is not a list of entries")
    return entries


def _named_in(url: str, check: Callable[..., str], *name: str) -> str:
    """Check a name that stands in a file, and say in which if it is not usable."""
    try:
        return check(*name)
    except InputError as error:
        raise SchemaError(url, str(error)) from error


def _scale(dataset: dict[str, Any], n_axes: int) -> list[float]:
    for entry in dataset.get("coordinateTransformations", []):
        if entry.get("type") == "scale":
            return [float(value) for value in entry["scale"]]
    return [1.0] * n_axes


def _physical(step: float | None, unit: str, factors: dict[str, float]) -> float | None:
    """A step in our unit, or None where the axis has no unit: a scale alone means nothing."""
    return step * factors[unit] if step is not None and unit in factors else None


def _channel_names(url: str, document: dict[str, Any], count: int) -> tuple[str, ...]:
    omero = document.get("omero", {})
    entries = _entries(url, omero if isinstance(omero, dict) else {}, "channels")
    names = tuple(str(e.get("label", i)) for i, e in enumerate(entries)) or tuple(str(i) for i in range(count))
    if len(names) != count:
        raise SchemaError(url, f"has {count} channels but {len(names)} channel names {list(names)}")
    if len(set(names)) != count:
        raise SchemaError(url, f"has channels of the same name: {list(names)}")
    return names
