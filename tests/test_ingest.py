from __future__ import annotations

import os
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ome_zarr_models.v05.hcs
import ome_zarr_models.v05.image
import pandas as pd
import pytest
import tifffile
import zarr
from conftest import Command
from numpy.typing import NDArray

from pipelines import ingest as stage
from pipelines.ingest import Ingested, IngestOptions, describe, ingest
from pipelines.tiff import PlaneFile, SiteFiles, read_image
from screening.layouts import Cv8000Layout, Grid, ImageXpressLayout, MitoReidLayout, PatternLayout, PhenixLayout
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.ingest import read_record
from storage_schemas.missing import PLANE, read_missing
from storage_schemas.plate import open_plate, open_site
from storage_schemas.tables import read_plate_map

pytestmark = pytest.mark.usefixtures("local_ray")

NAMES = r"(?P<row>[A-H])(?P<column>\d+)_s(?P<site>\d+)_t(?P<time>\d+)_(?P<channel>\w+)_z(?P<z>\d+)"
WELLS = r"(?P<well>[A-H]\d+)\.tif"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def image(rng: np.random.Generator, *shape: int) -> NDArray[np.uint16]:
    return rng.integers(0, 60_000, shape).astype(np.uint16)


def write(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", **options)
    return path


def options(pattern: str, **settings: Any) -> IngestOptions:
    layout = {key: settings.pop(key) for key in ("well", "site", "channel") if key in settings}
    return IngestOptions(layout=PatternLayout(pattern=pattern, **layout), **settings)


def stored(plate: Path, well: str, site: str = "0") -> NDArray[Any]:
    return open_site(open_plate(str(plate)).sites(well)[site]).read()


def write_plate_files(folder: Path, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Two wells × two sites × three times × two channels × two z planes, a file each: (2, 2, 3, 2, 2, 6, 8)."""
    pixels = image(rng, 2, 2, 3, 2, 2, 6, 8)
    for w, s, t, c, z in np.ndindex(pixels.shape[:5]):
        name = f"{('B2', 'C3')[w]}_s{s + 1}_t{t:03d}_{('tmrm', 'dna')[c]}_z{z}.tif"
        write(folder / f"week {w}" / name, pixels[w, s, t, c, z])
    return pixels


# --- a file a plane --------------------------------------------------------------------------


def test_folder_of_planes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = write_plate_files(tmp_path / "tiffs", rng)
    plate = tmp_path / "p1.zarr"
    wells = list(ingest(str(tmp_path / "tiffs"), str(plate), options(NAMES, pixel_size=0.5, time_step=60.0)).files)
    assert wells == ["B02", "C03"]
    opened = open_plate(str(plate))
    assert (opened.name, list(opened.well_paths)) == ("p1", ["B02", "C03"])
    for w, well in enumerate(wells):
        assert list(opened.sites(well)) == ["1", "2"]
        for s, site in enumerate(("1", "2")):
            # Channels in their natural order, and z as its brightest.
            expected = pixels[w, s][:, ::-1].max(axis=2)
            np.testing.assert_array_equal(stored(plate, well, site), expected)
    site_image = open_site(opened.sites("B02")["1"])
    assert site_image.channels == ("dna", "tmrm")
    assert (site_image.pixel_size, site_image.time_step) == (0.5, 60.0)


def test_z_can_be_averaged(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = write_plate_files(tmp_path / "tiffs", rng)
    plate = tmp_path / "p1.zarr"
    ingest(str(tmp_path / "tiffs"), str(plate), options(NAMES, z="mean"))
    expected = pixels[0, 0][:, ::-1].astype(np.float64).mean(axis=2)
    np.testing.assert_allclose(stored(plate, "B02", "1"), expected, rtol=1e-6)


def test_channels_and_plate_can_be_named(tmp_path: Path, rng: np.random.Generator) -> None:
    write_plate_files(tmp_path / "tiffs", rng)
    plate = tmp_path / "x.ome.zarr"
    ingest(str(tmp_path / "tiffs"), str(plate), options(NAMES, name="Week 7", channels=("nucleus", "potential")))
    opened = open_plate(str(plate))
    assert opened.name == "Week 7"
    assert open_site(opened.sites("B02")["1"]).channels == ("nucleus", "potential")
    with pytest.raises(InputError, match="there are 2 channels"):
        ingest(str(tmp_path / "tiffs"), str(tmp_path / "y.zarr"), options(NAMES, channels=("nucleus",)))


def test_a_plate_is_called_like_its_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "dmso" / "dmso_1_w1.tif", image(rng, 5, 6))
    # In memory, where workers' wells are not seen from here, but URLs may end in a slash.
    for name, folder in (("l1", "l1.ome.zarr"), ("l2", "l2.zarr/"), ("l3", "l3")):
        done = ingest(str(tmp_path), f"memory://{tmp_path.name}/{folder}", IngestOptions(layout=MitoReidLayout()))
        assert (done.name, done.plate_map) == (name, f"memory://{tmp_path.name}/{name}.plate_map.csv")


def test_times_in_natural_order(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = image(rng, 12, 5, 6)
    for t in range(12):
        write(tmp_path / "tiffs" / f"A1_t{t}.tif", pixels[t])
    ingest(str(tmp_path / "tiffs"), str(tmp_path / "p.zarr"), options(r"(?P<well>A1)_t(?P<time>\d+)"))
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01")[:, 0], pixels)


def test_one_file_is_a_source_too(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = image(rng, 5, 6)
    file = write(tmp_path / "only.tif", pixels)
    ingest(str(file), str(tmp_path / "p.zarr"), options(".*", well="d4", site="7", channel="h2b"))
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "D04", "7")[0, 0], pixels)


def test_files_beside_the_pattern_are_noted(tmp_path: Path, rng: np.random.Generator, command: Command) -> None:
    pixels = image(rng, 5, 6)
    write(tmp_path / "tiffs" / "A1.tif", pixels)
    write(tmp_path / "tiffs" / "thumbnail.TIF", pixels)
    (tmp_path / "tiffs" / "notes.txt").write_text("not an image")
    done = command("ingest", tmp_path / "tiffs", tmp_path / "p.zarr", "--pattern", WELLS)
    assert done.code == 0
    assert "note: 1 file(s) are not named as --layout pattern says and are left out: thumbnail.TIF" in done.err
    assert done.out.splitlines() == [
        "plate p: 1 well(s), 1 image file(s) a well",
        "  1 site(s) written of (T, C, H, W) = (1, 1, 5, 6), channels ['0']",
    ]


# --- stacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "form"),
    [
        ("YX", (5, 6), "plain"),
        ("TYX", (4, 5, 6), "plain"),
        ("CYX", (3, 5, 6), "plain"),
        ("ZYX", (3, 5, 6), "plain"),
        ("TCYX", (4, 3, 5, 6), "plain"),
        ("CTYX", (3, 4, 5, 6), "plain"),
        ("tzcyx", (4, 2, 3, 5, 6), "plain"),
        ("TYX", (1, 5, 6), "plain"),
        ("TCYX", (1, 3, 5, 6), "plain"),
        ("TCYX", (4, 1, 5, 6), "plain"),
        ("TYX", (4, 5, 6), "ome"),
        # A reader of OME-TIFF leaves out axes of length 1.
        ("TYX", (1, 5, 6), "ome"),
        ("TCZYX", (4, 3, 2, 5, 6), "ome"),
    ],
)
def test_stacks_with_declared_axes(
    tmp_path: Path, rng: np.random.Generator, axes: str, shape: tuple[int, ...], form: str
) -> None:
    pixels = image(rng, *shape)
    ome = {"ome": True, "metadata": {"axes": axes}} if form == "ome" else {}
    write(tmp_path / "A1.tif", pixels, **ome)
    ingest(str(tmp_path), str(tmp_path / "p.zarr"), options(WELLS, axes=axes))
    expected = np.einsum(f"{axes.lower()}->{''.join(a for a in 'tczyx' if a in axes.lower())}", pixels)
    for position, axis in enumerate("tcz"):
        if axis not in axes.lower():
            expected = np.expand_dims(expected, position)
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01"), expected.max(axis=2))


def test_stacks_of_channels_get_numbers_or_the_names_given(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "A1.tif", image(rng, 2, 5, 6))
    ingest(str(tmp_path), str(tmp_path / "p.zarr"), options(WELLS, axes="CYX"))
    assert open_site(open_plate(str(tmp_path / "p.zarr")).sites("A01")["0"]).channels == ("0", "1")
    ingest(str(tmp_path), str(tmp_path / "q.zarr"), options(WELLS, axes="CYX", channels=("a", "b")))
    assert open_site(open_plate(str(tmp_path / "q.zarr")).sites("A01")["0"]).channels == ("a", "b")


def test_stacks_a_time_point_are_joined(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = image(rng, 3, 2, 5, 6)
    for t in range(3):
        write(tmp_path / f"A1_t{t}.tif", pixels[t])
    ingest(str(tmp_path), str(tmp_path / "p.zarr"), options(r"(?P<well>A1)_t(?P<time>\d)", axes="CYX"))
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01"), pixels)


# --- plates that are there -------------------------------------------------------------------


def test_wells_are_added_to_a_plate(tmp_path: Path, rng: np.random.Generator) -> None:
    first, second = image(rng, 5, 6), image(rng, 7, 8)
    plate = tmp_path / "p.zarr"
    ingest(str(write(tmp_path / "a" / "B2.tif", first)), str(plate), options(WELLS, name="week 1"))
    ingest(str(write(tmp_path / "b" / "A1.tif", second)), str(plate), options(WELLS))
    assert (open_plate(str(plate)).name, set(open_plate(str(plate)).well_paths)) == ("week 1", {"A01", "B02"})
    np.testing.assert_array_equal(stored(plate, "B02")[0, 0], first)
    np.testing.assert_array_equal(stored(plate, "A01")[0, 0], second)
    with pytest.raises(InputError, match="is called 'week 1', not 'week 2'"):
        ingest(str(tmp_path / "b"), str(plate), options(WELLS, name="week 2"))


def test_wells_are_replaced_only_when_told(tmp_path: Path, rng: np.random.Generator) -> None:
    first, second = image(rng, 5, 6), image(rng, 3, 7, 8)
    plate = tmp_path / "p.zarr"
    ingest(str(write(tmp_path / "a" / "A1.tif", first)), str(plate), options(WELLS))
    write(tmp_path / "b" / "A1.tif", second)
    with pytest.raises(InputError, match=r"has the well\(s\) \['A01'\] already, written from other .*--overwrite"):
        ingest(str(tmp_path / "b"), str(plate), options(WELLS, axes="TYX"))
    np.testing.assert_array_equal(stored(plate, "A01")[0, 0], first)
    ingest(str(tmp_path / "b"), str(plate), options(WELLS, axes="TYX", overwrite=True))
    np.testing.assert_array_equal(stored(plate, "A01")[:, 0], second)


# --- what does not fit -----------------------------------------------------------------------


def refused(source: Path, plate: Path, how: IngestOptions) -> str:
    with pytest.raises(InputError) as caught:
        ingest(str(source), str(plate), how)
    return str(caught.value)


def test_missing_planes_are_refused_before_anything_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    write_plate_files(tmp_path / "tiffs", rng)
    (victim,) = (tmp_path / "tiffs").rglob("C3_s2_t001_dna_z1.tif")
    victim.unlink()
    said = refused(tmp_path / "tiffs", tmp_path / "p.zarr", options(NAMES))
    assert "1 plane(s) that a complete plate would have are not there" in said
    assert "well C03, site 2, time 1, channel dna, z 1" in said
    assert not (tmp_path / "p.zarr").exists()


def test_mixed_sizes_and_types_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    for number, other in enumerate((image(rng, 5, 7), image(rng, 5, 6).astype(np.uint8))):
        folder = tmp_path / str(number)
        write(folder / "A1_t0.tif", image(rng, 5, 6))
        write(folder / "A1_t1.tif", other)
        said = refused(folder, tmp_path / f"{number}.zarr", options(r"(?P<well>A1)_t(?P<time>\d)"))
        assert "A1_t0.tif, files of the same site, differ in size or type" in said


def test_shape_that_does_not_fit_the_axes(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "A1.tif", image(rng, 4, 5, 6))
    said = refused(tmp_path, tmp_path / "p.zarr", options(WELLS))
    assert said.endswith(f"; A01: {tmp_path}/A1.tif: has the shape (4, 5, 6), --axes YX says 2 dimensions")
    assert "--axes TCYX says 4 dimensions" in refused(tmp_path, tmp_path / "p.zarr", options(WELLS, axes="TCYX"))


def test_axes_in_another_order_than_the_file_says(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = image(rng, 2, 3, 5, 6)
    for name in ("A1.tif", "A1.ome.tif"):
        file = tmp_path / name
        tifffile.imwrite(file, pixels, imagej=name == "A1.tif", metadata={"axes": "ZCYX"})
        plate = tmp_path / f"{name}.zarr"
        said = refused(file, plate, options("(?P<well>A1)", axes="CZYX"))
        assert said.endswith(f"{file}: says that its axes are ZCYX, --axes says CZYX")
        ingest(str(file), str(plate), options("(?P<well>A1)", axes="ZCYX"))
        np.testing.assert_array_equal(stored(plate, "A01")[0], pixels.max(axis=0))
        # Z may mean time, as where ImageJ was not told.
        ingest(str(file), str(plate), options("(?P<well>A1)", axes="TCYX", overwrite=True))
        np.testing.assert_array_equal(stored(plate, "A01"), pixels)


@pytest.mark.parametrize("axes", ["XY", "TXY", "SYX", "TTYX", "", "Y"])
def test_unknown_axes(tmp_path: Path, rng: np.random.Generator, axes: str) -> None:
    write(tmp_path / "A1.tif", image(rng, 4, 5, 6))
    said = refused(tmp_path, tmp_path / "p.zarr", options(WELLS, axes=axes))
    assert said == f"--axes {axes!r}: expected a subset of T, C, Z and, last, YX"


@pytest.mark.parametrize("size", [0.0, -0.5, float("nan"), float("inf")])
def test_sizes_that_are_none(tmp_path: Path, rng: np.random.Generator, size: float) -> None:
    write(tmp_path / "A1.tif", image(rng, 5, 6))
    for name in ("pixel_size", "time_step"):
        said = refused(tmp_path, tmp_path / "p.zarr", options(WELLS, **{name: size}))
        assert said == f"--{name.replace('_', '-')} {size}: expected a number above 0"


def test_a_plate_is_not_written_over_its_images(tmp_path: Path, rng: np.random.Generator) -> None:
    file = write(tmp_path / "A" / "01" / "x.tif", image(rng, 5, 6))
    by_folder = options("(?P<row>[A-H])/(?P<column>[0-9]+)/")
    assert "choose another place for the plate" in refused(tmp_path, tmp_path, by_folder)
    assert "choose another place" in refused(tmp_path / "A", tmp_path, options(".*", well="A1"))
    assert file.exists()
    # In the folder of its images it may lie.
    ingest(str(tmp_path), str(tmp_path / "p.zarr"), by_folder)
    assert file.exists()


def chained(path: Path, pixels: NDArray[Any], compression: str | None) -> None:
    """A stack whose pages are chained one after the other, as cameras write them."""
    with tifffile.TiffWriter(path) as file:
        for page in pixels:
            file.write(page, contiguous=False, metadata=None, compression=compression)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("chain", [True, False], ids=["chained", "shaped"])
def test_truncated_files_are_named_wherever_they_end(
    tmp_path: Path, rng: np.random.Generator, compression: str | None, chain: bool
) -> None:
    pixels = image(rng, 4, 20, 30)
    file = tmp_path / "tiffs" / "A1.tif"
    if chain:
        file.parent.mkdir()
        chained(file, pixels, compression)
    else:
        write(file, pixels, compression=compression)
    whole = file.read_bytes()
    for length in (0, 4, 100, *range(200, len(whole) - 1, 397)):
        file.write_bytes(whole[:length])
        with pytest.raises(SchemaError) as caught:
            read_image(str(file), "TYX")
        assert str(caught.value).startswith(f"{file}: "), length
    said = refused(tmp_path / "tiffs", tmp_path / "p.zarr", options(WELLS, axes="TYX"))
    assert said.startswith(f"none of 1 well(s) could be written; A01: {file}: ")
    assert not (tmp_path / "p.zarr" / "zarr.json").exists()
    file.write_bytes(whole)
    ingest(str(tmp_path / "tiffs"), str(tmp_path / "p.zarr"), options(WELLS, axes="TYX"))
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01")[:, 0], pixels)


def test_site_names_that_ngff_does_not_allow(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "A1_s-1.tif", image(rng, 5, 6))
    said = refused(tmp_path, tmp_path / "p.zarr", options(r"(?P<well>A1)_(?P<site>s-\d)"))
    assert "site A01/s-1: NGFF names sites by letters and digits alone" in said
    assert not (tmp_path / "p.zarr" / "zarr.json").exists()


@pytest.mark.parametrize("files", [(), ("notes.txt",)])
def test_folders_without_images(tmp_path: Path, files: Sequence[str]) -> None:
    folder = tmp_path / "tiffs"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")
    assert refused(folder, tmp_path / "p.zarr", options(WELLS)) == f"{folder}: holds no .tif or .tiff files"
    assert refused(tmp_path / "no", tmp_path / "p.zarr", options(WELLS)).endswith("/no: no such file or folder")


def test_a_users_mistakes_on_the_command_line(tmp_path: Path, rng: np.random.Generator, command: Command) -> None:
    write(tmp_path / "A1.tif", image(rng, 5, 6))
    plate = tmp_path / "p.zarr"
    done = command("ingest", tmp_path, plate, "--pattern", "(?P<well>A1)", "--z", "sum")
    assert (done.code, "'sum' is not one of" in done.err) == (2, True)
    done = command("ingest", tmp_path, plate, "--layout", "cv8000", "--pattern", "x", "--well", "A1")
    assert (done.code, "--pattern, --well is for --layout pattern" in done.err) == (2, True)
    done = command("ingest", tmp_path, plate, "--pattern", "(?P<wel>A1)")
    assert (done.code, "did you mean 'well'?" in done.err) == (1, True)
    done = command("ingest", tmp_path, plate, "--pattern", "(?P<well>A1)", "--channel-names", "dna,")
    assert (done.code, "--channel-names 'dna,': a name is empty" in done.err) == (1, True)
    assert not plate.exists()
    done = command("ingest", tmp_path, plate, "--pattern", "(?P<well>A1)", "--channel-names", " dna ")
    assert (done.code, open_site(open_plate(str(plate)).sites("A01")["0"]).channels) == (0, ("dna",))


# --- real files ------------------------------------------------------------------------------


def test_mitocheck_movie(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "mitocheck_movie" / "mitocheck-movie"
    # Its wells are numbered, which tells no row and column: the user says which well this is.
    pattern = r"--P(?P<site>\d+)--T(?P<time>\d+)--Z(?P<z>\d+)--(?P<channel>C)\.tif"
    ingest(str(folder), str(tmp_path / "p.zarr"), options(pattern, well="A2"))
    files = sorted(folder.glob("*.tif"))
    expected = np.stack([tifffile.imread(file) for file in files])
    assert expected.shape == (30, 190, 211)
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A02", "1")[:, 0], expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cell_migration/cancer_cell_migration_crop.tif", (48, 130, 130)),
        ("nuclei_tracks/example_images.tif", (6, 200, 200)),
    ],
)
def test_real_stacks(tmp_path: Path, real_data: Path, name: str, shape: tuple[int, ...]) -> None:
    ingest(str(real_data / name), str(tmp_path / "p.zarr"), options(".*", well="B2", axes="TYX", channel="dna"))
    expected = np.squeeze(tifffile.imread(real_data / name))
    assert expected.shape == shape
    pixels = stored(tmp_path / "p.zarr", "B02")
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels[:, 0], expected)


# --- what instruments write ------------------------------------------------------------------


def valid(plate: Path) -> None:
    """Check a plate, its wells, images and their levels against the specification."""
    hcs = ome_zarr_models.v05.hcs.HCS.from_zarr(zarr.open_group(plate, mode="r"))
    for well in hcs.well_groups:
        assert well.ome_attributes is not None
    opened = open_plate(str(plate))
    for name in opened.well_paths:
        for url in opened.sites(name).values():
            ome_zarr_models.v05.image.Image.from_zarr(zarr.open_group(url, mode="r"))


def channel_entries(plate: Path, well: str, site: str) -> list[tuple[str, str]]:
    attributes = zarr.open_group(open_plate(str(plate)).sites(well)[site], mode="r").attrs.asdict()
    return [(entry["label"], entry["color"]) for entry in attributes["ome"]["omero"]["channels"]]


@pytest.mark.parametrize("z", ["max", "mean", "none"])
def test_imagexpress_stack(tmp_path: Path, real_data: Path, z: Any) -> None:
    folder = real_data / "vendor_layouts" / "ImageXpress" / "9987_Plate_3434"
    plate = tmp_path / "3434.zarr"
    done = ingest(str(folder), str(plate), IngestOptions(layout=ImageXpressLayout(), z=z))
    # 2 sites × 3 channels × 3 z folders a well, of which ZStep_0 is the microscope's own projection.
    assert done.files == {"B02": 12, "B03": 12}
    assert done.left_out["well"].value_counts().to_dict() == {"B02": 6, "B03": 6}
    valid(plate)
    for well in ("B02", "B03"):
        for site in ("1", "2"):
            planes = np.array(
                [
                    [
                        tifffile.imread(folder / f"TimePoint_1/ZStep_{step}/9987_{well}_s{site}_w{channel}.TIF")
                        for step in (1, 2)
                    ]
                    for channel in (1, 2, 3)
                ]
            )
            image = open_site(open_plate(str(plate)).sites(well)[site])
            assert image.axes == ("tczyx" if z == "none" else "tcyx")
            assert image.pixel_size == pytest.approx(1.3672)
            assert image.channels == ("DAPI", "FITC", "Texas Red")
            if z == "mean":
                np.testing.assert_allclose(image.read()[0], planes.mean(axis=1), rtol=1e-6)
            else:
                np.testing.assert_array_equal(image.read()[0], planes.max(axis=1))
            if z == "none":
                np.testing.assert_array_equal(zarr.open_array(image.url + "/0")[0], planes)
    assert channel_entries(plate, "B02", "1") == [("DAPI", "0000FF"), ("FITC", "00FF00"), ("Texas Red", "FF0000")]
    missing = read_missing(str(plate))
    # z plane 3 and channel 4 are promised, and nowhere.
    assert missing["promised"].all()
    assert missing.groupby(["channel", "z"]).size().to_dict() == {
        ("1", 3): 4, ("2", 3): 4, ("3", 3): 4, ("4", 1): 4, ("4", 2): 4, ("4", 3): 4,
    }  # fmt: skip


def test_imagexpress_movie_goes_on_without_what_its_htd_promises(
    tmp_path: Path, real_data: Path, command: Command
) -> None:
    folder = real_data / "vendor_layouts" / "ImageXpress" / "9987_Plate_3435"
    plate = tmp_path / "3435.zarr"
    done = command("ingest", folder, plate, "--layout", "imagexpress")
    assert done.code == 0
    assert "plate 3435: 2 well(s), 8 image file(s) a well" in done.out
    assert "80 plane(s) are missing, 80 of them promised by the metadata; 0 are zeros" in done.out
    valid(plate)
    missing = read_missing(str(plate))
    # Six time points and four wavelengths are promised, of which two and two are there.
    assert len(missing) == 2 * 2 * (6 * 4 - 2 * 2)
    assert set(missing["written"]) == {"no"}
    site = open_site(open_plate(str(plate)).sites("B03")["2"])
    assert (site.shape, site.channels) == ((2, 2, 256, 256), ("DAPI", "FITC"))
    # The two images were taken at 13:15:50.916 and 13:16:20.945.
    assert site.time_step == pytest.approx(30.029)
    for t in (0, 1):
        expected = tifffile.imread(folder / f"TimePoint_{t + 1}/9987_B03_s2_w2.TIF")
        np.testing.assert_array_equal(site.read(channels=["FITC"], frames=[t])[0, 0], expected)


def test_an_image_that_says_the_time_step_can_be_mended(tmp_path: Path, real_data: Path) -> None:
    source, plate = tmp_path / "in", tmp_path / "p.zarr"
    shutil.copytree(real_data / "vendor_layouts/ImageXpress/9987_Plate_3435", source)
    file = source / "TimePoint_1" / "9987_B02_s1_w1.TIF"
    whole = file.read_bytes()
    damaged(file, "truncated")
    how = IngestOptions(layout=ImageXpressLayout())
    assert list(ingest(str(source), str(plate), how).failed) == ["B02"]
    file.write_bytes(whole)
    done = ingest(str(source), str(plate), how)
    assert (done.kept, done.failed) == (("B03",), {})
    for well in ("B02", "B03"):
        assert open_site(open_plate(str(plate)).sites(well)["1"]).time_step is not None


def test_a_plate_in_parts_each_with_the_metadata_of_all(tmp_path: Path, real_data: Path) -> None:
    plate = tmp_path / "p.zarr"
    for well, other in (("B02", "B03"), ("B03", "B02")):
        source = tmp_path / well
        whole = real_data / "vendor_layouts/ImageXpress/9987_Plate_3435"
        shutil.copytree(whole, source, ignore=shutil.ignore_patterns(f"*_{other}_*"))
        missing = ingest(str(source), str(plate), IngestOptions(layout=ImageXpressLayout())).missing
        # Of 48 planes a well 8 are there; of the other well all are missing until it comes.
        assert Counter(missing["well"]) == {"B02": {"B02": 40, "B03": 48}, "B03": {"B03": 40}}[well]
    assert Counter(read_missing(str(plate))["well"]) == {"B02": 40, "B03": 40}


def test_imagexpress_plate_of_one_image(tmp_path: Path, real_data: Path) -> None:
    plate = tmp_path / "3420.zarr"
    folder = real_data / "vendor_layouts" / "ImageXpress" / "9987_Plate_3420"
    done = ingest(str(folder), str(plate), IngestOptions(layout=ImageXpressLayout()))
    assert (done.files, done.missing.empty) == ({"B02": 1}, True)
    assert not (plate / "missing_planes.csv").exists()
    valid(plate)
    np.testing.assert_array_equal(stored(plate, "B02", "1")[0, 0], tifffile.imread(folder / "TimePoint_1/9987_B02.TIF"))


def test_cv8000_export(tmp_path: Path, real_data: Path) -> None:
    plate = tmp_path / "cv.zarr"
    folder = real_data / "vendor_layouts" / "CV8000"
    done = ingest(str(folder), str(plate), IngestOptions(layout=Cv8000Layout(), z="none"))
    assert done.files == dict.fromkeys(("D08", "E03", "F08"), 4 * 4 * 2)
    assert done.left_out["reason"].tolist() == ["correction image"] * 6
    valid(plate)
    site = open_site(open_plate(str(plate)).sites("E03")["4"])
    assert zarr.open_array(site.url + "/0").shape == (1, 2, 4, 2000, 2000)
    assert (site.channels, site.pixel_size) == (("BP445/45", "BP525/50"), 0.325)


def write_cv8000(folder: Path, rng: np.random.Generator) -> NDArray[np.uint16]:
    """One well × two fields × two channels × two z planes: (2, 2, 2, 6, 8)."""
    pixels = image(rng, 2, 2, 2, 6, 8)
    for f, c, z in np.ndindex(pixels.shape[:3]):
        write(folder / f"a plate_C05_T0001F{f + 1:03d}L01A01Z{z + 1:02d}C{c + 1:02d}.tif", pixels[f, c, z])
    write(folder / "DC_DCAM#1_CAM3.tif", image(rng, 6, 8))
    return pixels


def test_cv8000_names_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = write_cv8000(tmp_path / "in", rng)
    ingest(str(tmp_path / "in"), str(tmp_path / "p.zarr"), IngestOptions(layout=Cv8000Layout()))
    valid(tmp_path / "p.zarr")
    for f in (0, 1):
        np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "C05", str(f + 1))[0], pixels[f].max(axis=1))


def test_phenix_export_with_a_frame_missing(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = image(rng, 2, 3, 2, 6, 8)  # fields, times, channels
    folder = tmp_path / "in" / "Images"
    for f, t, c in np.ndindex(pixels.shape[:3]):
        name = f"r02c03f{f + 1:02d}p01-ch{c + 1}sk{t + 1}fk1fl1.tiff"
        if (f, t, c) != (1, 1, 0):
            write(folder / name, pixels[f, t, c], compression="lzw")
    names = "".join(
        f"<Image><URL>r02c03f{f:02d}p01-ch{c}sk{t}fk1fl1.tiff</URL><ChannelName>{('dna', 'tmrm')[c - 1]}</ChannelName>"
        f"<ImageResolutionX Unit='m'>5.98E-07</ImageResolutionX>"
        f"<MeasurementTimeOffset Unit='s'>{90 * t}</MeasurementTimeOffset></Image>"
        for f in (1, 2)
        for t in (1, 2, 3)
        for c in (1, 2)
    )
    (folder / "Index.idx.xml").write_text(f"<EvaluationInputData><Images>{names}</Images></EvaluationInputData>")
    plate = tmp_path / "p.zarr"
    ingest(str(tmp_path / "in"), str(plate), IngestOptions(layout=PhenixLayout()))
    valid(plate)
    site = open_site(open_plate(str(plate)).sites("B03")["2"])
    assert (site.channels, site.pixel_size, site.time_step) == (("dna", "tmrm"), 0.598, 90.0)
    pixels[1, 1, 0] = 0
    np.testing.assert_array_equal(site.read(), pixels[1])
    assert read_missing(str(plate)).values.tolist() == [["B03", "2", 2, "1", 1, True, "zeros"]]


def test_mitoreid_fields_get_wells_and_a_plate_map(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = {drug: image(rng, 2, 3, 6, 8) for drug in ("dmso", "dmso-2", "10", "2", "2-2")}
    for drug, movie in pixels.items():
        for t, c in np.ndindex(2, 3):
            write(tmp_path / "in" / drug / f"{drug}_{t + 1}_w{c + 1}.tif", movie[t, c])
    plate = tmp_path / "l1.zarr"
    done = ingest(str(tmp_path / "in"), str(plate), IngestOptions(layout=MitoReidLayout()))
    valid(plate)
    assert done.plate_map == str(tmp_path / "l1.plate_map.csv")
    plate_map = read_plate_map(done.plate_map)
    assert plate_map[["plate", "well", "compound", "role", "replicate"]].values.tolist() == [
        ["l1", "A01", "dmso", "negative_control", "l1"],
        ["l1", "A02", "dmso", "negative_control", "l1"],
        ["l1", "A03", "2", "treatment", "l1"],
        ["l1", "A04", "2", "treatment", "l1"],
        ["l1", "A05", "10", "treatment", "l1"],
    ]
    for well, drug in zip(plate_map["well"], ("dmso", "dmso-2", "2", "2-2", "10"), strict=True):
        np.testing.assert_array_equal(stored(plate, well, "1"), pixels[drug])


def test_a_patterns_missing_planes_become_zeros_when_told(
    tmp_path: Path, rng: np.random.Generator, command: Command
) -> None:
    pixels = write_plate_files(tmp_path / "tiffs", rng)
    for name in ("C3_s2_t001_dna_z0.tif", "C3_s2_t001_dna_z1.tif", "B2_s1_t000_tmrm_z1.tif"):
        next((tmp_path / "tiffs").rglob(name)).unlink()
    plate = tmp_path / "p.zarr"
    done = command("ingest", tmp_path / "tiffs", plate, "--pattern", NAMES, "--allow-missing")
    assert done.code == 0
    assert "3 plane(s) are missing, 0 of them promised by the metadata; 2 are zeros" in done.out
    pixels = pixels[:, :, :, ::-1]
    lost = pixels[1, 1].max(axis=2)
    lost[1, 0] = 0
    np.testing.assert_array_equal(stored(plate, "C03", "2"), lost)
    # z is projected from what is there.
    one_plane = pixels[0, 0].max(axis=2)
    one_plane[0, 1] = pixels[0, 0, 0, 1, 0]
    np.testing.assert_array_equal(stored(plate, "B02", "1"), one_plane)
    missing = read_missing(str(plate))
    assert missing[[*PLANE, "written"]].values.tolist() == [
        ["B02", "1", 0, "tmrm", 1, "without"],
        ["C03", "2", 1, "dna", 0, "zeros"],
        ["C03", "2", 1, "dna", 1, "zeros"],
    ]


# --- wells that fail, and wells that are there -----------------------------------------------


def three_wells(folder: Path, rng: np.random.Generator) -> NDArray[np.uint16]:
    pixels = image(rng, 3, 40, 50)
    for w in range(3):
        write(folder / f"A{w + 1}.tif", pixels[w], compression="lzw")
    return pixels


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    elif how == "colour":
        tifffile.imwrite(path, np.zeros((40, 50, 3), np.uint8), photometric="rgb")
    elif how == "pages":
        write(path, np.zeros((4, 40, 50), np.uint16))
    elif how == "forms":
        with tifffile.TiffWriter(path) as file:
            for shape in ((40, 50), (20, 30)):
                file.write(np.ones(shape, np.uint16), metadata=None, contiguous=False)
    elif how == "mask":
        tifffile.imwrite(path, np.zeros((40, 50), bool))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "is not a readable TIFF image"),
        ("empty", "is not a readable TIFF image"),
        ("text", "is not a readable TIFF image"),
        ("colour", r"is a colour image of shape \(40, 50, 3\)"),
        ("pages", r"has the shape \(4, 40, 50\), --axes YX"),
        ("forms", "holds 2 images of different forms"),
        ("mask", "has pixels of type bool"),
    ],
)
def test_a_bad_file_costs_its_well_and_can_be_mended(
    tmp_path: Path, rng: np.random.Generator, command: Command, how: str, said: str
) -> None:
    pixels = three_wells(tmp_path / "in", rng)
    file, plate = tmp_path / "in" / "A2.tif", tmp_path / "p.zarr"
    whole = file.read_bytes()
    damaged(file, how)
    done = command("ingest", tmp_path / "in", plate, "--pattern", WELLS)
    assert done.code == 3
    assert re.search(rf"failed: A02: {file}: {said}", done.out)
    assert list(open_plate(str(plate)).well_paths) == ["A01", "A03"]
    assert list(read_record(str(plate)).failed) == ["A02"]
    assert not (plate / "A" / "02").exists()
    valid(plate)
    # Once it is mended, only what is missing is done.
    written = {well: (plate / "A" / well / "zarr.json").stat().st_mtime_ns for well in ("01", "03")}
    file.write_bytes(whole)
    done = command("ingest", tmp_path / "in", plate, "--pattern", WELLS)
    assert done.code == 0
    assert "3 well(s), 2 of them there already" in done.out
    assert {well: (plate / "A" / well / "zarr.json").stat().st_mtime_ns for well in written} == written
    assert read_record(str(plate)).failed == {}
    for w in range(3):
        np.testing.assert_array_equal(stored(plate, f"A0{w + 1}")[0, 0], pixels[w])


def test_a_second_run_changes_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    three_wells(tmp_path / "in", rng)
    plate = tmp_path / "p.zarr"
    assert ingest(str(tmp_path / "in"), str(plate), options(WELLS)).kept == ()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in plate.rglob("*") if path.is_file()}
    again = ingest(str(tmp_path / "in"), str(plate), options(WELLS))
    assert again.kept == ("A01", "A02", "A03")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in plate.rglob("*") if path.is_file()} == before
    for changed in ({"pixel_size": 0.5}, {"z": "mean"}, {"channels": ("dna",)}):
        with pytest.raises(InputError, match="written from other files or in another way"):
            ingest(str(tmp_path / "in"), str(plate), options(WELLS, **changed))
    assert ingest(str(tmp_path / "in"), str(plate), options(WELLS, pixel_size=0.5, overwrite=True)).kept == ()
    assert open_site(open_plate(str(plate)).sites("A02")["0"]).pixel_size == 0.5


def test_a_well_that_is_being_replaced_is_not_named(tmp_path: Path, rng: np.random.Generator) -> None:
    three_wells(tmp_path / "in", rng)
    plate = tmp_path / "p.zarr"
    ingest(str(tmp_path / "in"), str(plate), options(WELLS))
    damaged(tmp_path / "in" / "A2.tif", "truncated")
    done = ingest(str(tmp_path / "in"), str(plate), options(WELLS, overwrite=True))
    assert list(done.failed) == ["A02"]
    assert list(open_plate(str(plate)).well_paths) == ["A01", "A03"]


def test_a_source_of_which_no_well_can_be_read(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "bad" / "B1_t1.tif", image(rng, 5, 6))
    write(tmp_path / "bad" / "B2_t0.tif", image(rng, 5, 6))
    for file in (tmp_path / "bad").iterdir():
        damaged(file, "truncated")
    how = options(r"(?P<well>[AB]\d)_t(?P<time>\d)", allow_missing=True)
    plate = tmp_path / "p.zarr"
    assert "none of 2 well(s) could be written; B01: " in refused(tmp_path / "bad", plate, how)
    assert list(plate.rglob("*.*")) == []
    # Beside wells that are there it is a failure to record.
    ingest(str(write(tmp_path / "good" / "A1_t0.tif", image(rng, 5, 6))), str(plate), how)
    done = ingest(str(tmp_path / "bad"), str(plate), how)
    assert (done.files, list(done.failed)) == ({}, ["B01", "B02"])
    assert next(describe(done)) == "plate p: 0 well(s), 0 image file(s) a well"
    assert list(read_record(str(plate)).failed) == ["B01", "B02"]


def test_an_interrupted_ingest_goes_on(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = three_wells(tmp_path / "in", rng)
    plate = tmp_path / "p.zarr"
    honest = stage._Writer._commit
    named: list[list[str]] = []

    def stopping(writer: stage._Writer) -> None:
        honest(writer)
        named.append(sorted(writer.named))
        raise KeyboardInterrupt

    monkeypatch.setattr(stage._Writer, "_commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        ingest(str(tmp_path / "in"), str(plate), options(WELLS))
    monkeypatch.undo()
    assert list(open_plate(str(plate)).well_paths) == named[0]
    done = ingest(str(tmp_path / "in"), str(plate), options(WELLS))
    assert list(done.kept) == named[0]
    for w in range(3):
        np.testing.assert_array_equal(stored(plate, f"A0{w + 1}")[0, 0], pixels[w])


def test_a_lost_worker_costs_its_well(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_wells(tmp_path / "in", rng)
    honest = stage._attempt

    def dying(job: Any) -> Any:
        if job.well == "A02":
            os._exit(1)
        return honest(job)

    monkeypatch.setattr(stage, "_attempt", dying)
    done = ingest(str(tmp_path / "in"), str(tmp_path / "p.zarr"), options(WELLS))
    monkeypatch.undo()
    assert list(done.failed) == ["A02"]
    assert done.failed["A02"].startswith("its worker was lost")
    assert list(open_plate(str(tmp_path / "p.zarr")).well_paths) == ["A01", "A03"]
    assert ingest(str(tmp_path / "in"), str(tmp_path / "p.zarr"), options(WELLS)).failed == {}


def test_wells_of_several_sources_keep_their_records(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "a" / "A1_t0.tif", image(rng, 5, 6))
    write(tmp_path / "a" / "A1_t2.tif", image(rng, 5, 6))
    write(tmp_path / "a" / "A1_t3.tif", image(rng, 5, 6))
    write(tmp_path / "b" / "B1_t0.tif", image(rng, 5, 6))
    plate = tmp_path / "p.zarr"
    for source in ("a", "b"):
        ingest(str(tmp_path / source), str(plate), options(r"(?P<well>[AB]1)_t(?P<time>\d)", allow_missing=True))
    assert read_missing(str(plate))["well"].tolist() == ["A01"]
    assert set(read_record(str(plate)).wells) == {"A01", "B01"}
    assert stored(plate, "A01").shape[0] == 4
    write(tmp_path / "a" / "A1_t1.tif", image(rng, 5, 6))
    ingest(str(tmp_path / "a"), str(plate), options(r"(?P<well>[AB]1)_t(?P<time>\d)", overwrite=True))
    assert read_missing(str(plate)).empty


# --- lazily ----------------------------------------------------------------------------------


def test_a_site_reads_its_files_frame_by_frame(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = image(rng, 3, 2, 5, 6)
    files = [PlaneFile(str(write(tmp_path / f"t{t}c{c}.tif", pixels[t, c])), t, str(c), 0) for t, c in np.ndindex(3, 2)]
    read: list[str] = []

    def reading(url: str, axes: str) -> NDArray[Any]:
        read.append(Path(url).name)
        return read_image(url, axes)

    monkeypatch.setattr("pipelines.tiff.read_image", reading)
    site = SiteFiles(files, Grid((0, 1, 2), ("0", "1"), (0,)), "YX", "max")
    assert (site.shape, site.dtype, read) == ((3, 2, 5, 6), np.uint16, [])
    np.testing.assert_array_equal(site[1], pixels[1])
    assert read == ["t1c0.tif", "t1c1.tif"]


def test_a_stack_is_read_once_and_not_kept(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = image(rng, 2, 3, 5, 6)  # channels, times
    files = [PlaneFile(str(write(tmp_path / f"c{c}.tif", pixels[c])), 0, str(c), 0) for c in (0, 1)]
    read: dict[str, weakref.ref[NDArray[Any]]] = {}

    def reading(url: str, axes: str) -> NDArray[Any]:
        assert url not in read
        block = read_image(url, axes)
        read[url] = weakref.ref(block)
        return block

    monkeypatch.setattr("pipelines.tiff.read_image", reading)
    site = SiteFiles(files, Grid((0,), ("0", "1"), (0,)), "TYX", "max")
    np.testing.assert_array_equal([site[t] for t in range(3)], pixels.swapaxes(0, 1))
    assert [Path(url).name for url in read] == ["c0.tif", "c1.tif"]
    # And is let go of with its last frame, while the site may wait for others of its well.
    assert all(block() is None for block in read.values())


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "<u2", "int16", "float32", "int64", "uint64"])
def test_pixels_keep_their_type(tmp_path: Path, dtype: str) -> None:
    pixels = np.arange(-15, 15).reshape(5, 6).astype(dtype)
    write(tmp_path / "A1.tif", pixels)
    ingest(str(tmp_path), str(tmp_path / "p.zarr"), options(WELLS))
    back = stored(tmp_path / "p.zarr", "A01")[0, 0]
    assert back.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(back, pixels)


def test_hidden_files_are_not_looked_at(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = image(rng, 5, 6)
    write(tmp_path / "P_A01_w1.TIF", pixels)
    (tmp_path / "._P_A01_w1.TIF").write_bytes(b"of macOS")
    write(tmp_path / ".snapshot" / "P_A01_w1.TIF", image(rng, 5, 6))
    (tmp_path / "p.zarr").mkdir()
    (tmp_path / "p.zarr" / ".DS_Store").write_bytes(b"of macOS")
    done = ingest(str(tmp_path), str(tmp_path / "p.zarr"), IngestOptions(layout=ImageXpressLayout()))
    assert done.files == {"A01": 1}
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01", "1")[0, 0], pixels)


def test_an_htd_without_images(tmp_path: Path, real_data: Path) -> None:
    shutil.copy(real_data / "vendor_layouts/ImageXpress/9987_Plate_3420/9987.HTD", tmp_path)
    said = refused(tmp_path, tmp_path / "p.zarr", IngestOptions(layout=ImageXpressLayout()))
    assert "layout imagexpress matches none of 0 image file names" in said
    assert "9987.HTD promises 1 planes" in said


def test_what_is_told_of_an_ingest() -> None:
    missing = pd.DataFrame(
        [["B02", "1", 1, "1", 1, True, "no"], ["B02", "1", 2, "1", 1, False, "zeros"]],
        columns=[*PLANE, "promised", "written"],
    )
    left_out = pd.DataFrame([["a.tif", "", "thumbnail"]], columns=["path", "well", "reason"])
    sites = Counter({((1, 1, 4, 4), ("dna",)): 3})
    done = Ingested("p.zarr", "p", {"A01": 2, "A02": 1}, ("A01",), {"A03": "broken"}, sites, left_out, missing, "m.csv")
    assert list(describe(done)) == [
        "plate p: 2 well(s), 1 of them there already, 1 to 2 image file(s) a well",
        "  3 site(s) written of (T, C, H, W) = (1, 1, 4, 4), channels ['dna']",
        "  1 file(s) left out: thumbnail",
        "  2 plane(s) are missing, 1 of them promised by the metadata; 1 are zeros in the plate: well B02, site 1, "
        "time 1, channel 1, z 1; well B02, site 1, time 2, channel 1, z 1; all in p.zarr/missing_planes.csv",
        "  plate map: m.csv",
        "  failed: A03: broken",
    ]
