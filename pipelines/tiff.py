"""TIFF files of a site as frames of an image, read one time point at a time."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from screening.layouts import Grid
from storage_schemas import store
from storage_schemas.errors import InputError, SchemaError, StoreError
from storage_schemas.limits import check_size

ZAxis = Literal["max", "mean", "none"]

_Block = NDArray[Any]  # (T, C, Z, H, W)


@dataclass(frozen=True)
class PlaneFile:
    """One image file, and what it shows."""

    url: str
    time: int
    channel: str
    z: int


class SiteFiles:
    """The image files of one site: frames (C, H, W), or (C, Z, H, W) where z is kept; zeros where there is no file.

    Args:
        files: of the site; at least one.
        grid: the times, channels and z planes to make of them.
        axes: of one file, a permutation of a subset of ``TCZYX`` ending in ``YX``.
        z: how z is projected, or ``none`` to keep it.

    Raises:
        SchemaError: if the first file is not a readable TIFF of these axes.
    """

    def __init__(self, files: Sequence[PlaneFile], grid: Grid, axes: str, z: ZAxis) -> None:
        self._grid, self._axes, self._z = grid, axes, z
        self._first = files[0].url
        self._by_frame: dict[tuple[int, str], dict[int, str]] = {}
        for file in files:
            self._by_frame.setdefault((file.time, file.channel), {})[file.z] = file.url
        self._block, self._stored = read_header(self._first, axes)
        times, channels, zs, height, width = self._block
        n_zs = zs * len(grid.zs)
        self._keep_z = z == "none" and n_zs > 1
        self.shape: tuple[int, ...] = (
            times * len(grid.times),
            channels * len(grid.channels),
            *((n_zs,) if self._keep_z else ()),
            height,
            width,
        )
        # By its name, since C's long long equals NumPy's int64 and is unknown to Zarr.
        self.dtype: np.dtype[Any] = np.dtype("f4" if z == "mean" else self._stored.name)
        self._held: dict[str, _Block] = {}
        self._held_time: int | None = None

    def __getitem__(self, frame: int, /) -> NDArray[Any]:
        """One time point.

        Raises:
            SchemaError: if a file is not readable.
            InputError: if files of the site differ in size or type.
        """
        per_file, n_channels, n_zs, *_ = self._block
        row, within = divmod(frame, per_file)
        time = self._grid.times[row]
        if time != self._held_time:
            self._held, self._held_time = {}, time
        image = np.zeros(self.shape[1:], self.dtype)
        for number, channel in enumerate(self._grid.channels):
            place = image[number * n_channels : (number + 1) * n_channels]
            urls = self._by_frame.get((time, channel), {})
            if self._keep_z:
                for position, z in enumerate(self._grid.zs):
                    if z in urls:
                        place[:, position * n_zs : (position + 1) * n_zs] = self._read(urls[z])[within]
            elif urls:
                place[...] = self._projected((self._read(url)[within] for url in urls.values()), len(urls) * n_zs)
        if frame == self.shape[0] - 1:
            self._held = {}  # or every site of a well would keep its last files until the well is written
        return image

    def _projected(self, blocks: Iterator[NDArray[Any]], n_zs: int) -> NDArray[Any]:
        """(C, Z, H, W) each to (C, H, W), one block in memory at a time."""
        result: NDArray[Any] | None = None
        for block in blocks:
            if self._z == "mean":
                part = block.sum(axis=1, dtype="f4") / np.float32(n_zs)
                result = part if result is None else result + part
            else:
                part = block.max(axis=1)
                result = part if result is None else np.maximum(result, part)
        assert result is not None, "a channel is projected where it has files"
        return result

    def _read(self, url: str) -> _Block:
        if url in self._held:
            return self._held[url]
        block = read_image(url, self._axes)
        if block.shape != self._block or block.dtype != self._stored:
            raise InputError(
                f"{url} and {self._first}, files of the same site, differ in size or type: "
                f"{_form(block.shape, block.dtype)} and {_form(self._block, self._stored)}"
            )
        if len(block) > 1:
            self._held[url] = block  # its other frames are wanted next
        return block


def read_header(url: str, axes: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(T, C, Z, H, W) and dtype of a TIFF file, without its pixels.

    Raises:
        SchemaError: if it is not a TIFF image of these axes.
    """
    with _readable(url, axes), store.open_file(url) as file, tifffile.TiffFile(file) as tif:
        series = _series(url, tif, axes)
        # Takes no memory: every pixel is the same byte.
        block = _arranged(url, np.broadcast_to(np.zeros((), series.dtype), series.shape), axes)
        return block.shape, block.dtype


def read_image(url: str, axes: str) -> _Block:
    """A TIFF file as (T, C, Z, H, W).

    Raises:
        SchemaError: if it is not a TIFF image of these axes, or damaged.
    """
    data = store.read_bytes(url)
    with _readable(url, axes), tifffile.TiffFile(io.BytesIO(data)) as tif:
        image = np.asarray(_series(url, tif, axes).asarray())
    return _arranged(url, image, axes)


def plane_info(url: str) -> Mapping[str, Any]:
    """What a MetaMorph TIFF says of its plane; empty for others.

    Raises:
        SchemaError: if it is not a TIFF image.
    """
    with _readable(url, "YX"), store.open_file(url) as file, tifffile.TiffFile(file) as tif:
        _series(url, tif, "YX")
        said = tif.metaseries_metadata or {}
        return dict(said.get("PlaneInfo", {}))


def _series(url: str, tif: tifffile.TiffFile, axes: str) -> tifffile.TiffPageSeries:
    if not tif.series:
        raise SchemaError(url, "holds no image: was it copied whole?")
    if len(tif.series) > 1:
        raise SchemaError(url, f"holds {len(tif.series)} images of different forms; expected one")
    series = tif.series[0]
    if "S" in series.axes:
        raise SchemaError(
            url, f"is a colour image of shape {series.shape}; expected one value a pixel: save its channels as files"
        )
    if series.dtype is None or series.dtype.kind not in "uif":
        raise SchemaError(url, f"has pixels of type {series.dtype}; expected whole or real numbers")
    check_size(url, f"an image of {_form(series.shape, series.dtype)}", math.prod(series.shape) * series.dtype.itemsize)
    # What the file calls Z may well be time; but the same axes in another order are a mistake.
    if series.axes != axes and sorted(series.axes) == sorted(axes):
        raise SchemaError(url, f"says that its axes are {series.axes}, --axes says {axes}")
    return series


def _arranged(url: str, image: NDArray[Any], axes: str) -> _Block:
    found = image.shape
    if image.ndim != len(axes):
        # Writers differ in whether they keep axes of length 1.
        image = image.squeeze()
        if image.ndim == 2:
            image = image.reshape((1,) * (len(axes) - 2) + image.shape)
    if image.ndim != len(axes):
        raise SchemaError(url, f"has the shape {found}, --axes {axes} says {len(axes)} dimensions")
    image = image.transpose([axes.index(axis) for axis in "TCZYX" if axis in axes])
    for position, axis in enumerate("TCZ"):
        if axis not in axes:
            image = np.expand_dims(image, position)
    return image.astype(image.dtype.newbyteorder("="), copy=False)


@contextmanager
def _readable(url: str, axes: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into an error that names it."""
    try:
        with _logged_errors() as errors:
            yield
    except (SchemaError, StoreError):
        raise
    except Exception as error:  # tifffile and its codecs have errors of their own
        raise SchemaError(url, f"is not a readable TIFF image ({error})") from error
    if errors and axes != "YX":
        raise SchemaError(url, f"is a damaged stack, pages may be missing ({errors[0]})")


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


def _form(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"{' × '.join(map(str, shape))} {dtype}"
