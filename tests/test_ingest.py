from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import Command
from numpy.typing import NDArray

from pipelines.ingest import IngestOptions, describe, ingest
from screening.layouts import PatternLayout
from storage_schemas.errors import InputError
from storage_schemas.plate import open_plate, open_site

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
    wells = ingest(str(tmp_path / "tiffs"), str(plate), options(NAMES, pixel_size=0.5, time_step=60.0))
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
    ingest(str(tmp_path / "tiffs"), str(plate), options(NAMES, projection="mean"))
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
    assert "note: 1 file(s) do not match the pattern and are left out: thumbnail.TIF" in done.err
    assert "plate p: 1 well(s)" in done.out
    assert "A01 site 0: (T, C, H, W) = (1, 1, 5, 6), channels ['0']" in done.out


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
    with pytest.raises(InputError, match=r"has the well\(s\) \['A01'\] already; give --overwrite"):
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
        assert "A1_t0.tif and the files of the same site differ in size or type" in said


def test_shape_that_does_not_fit_the_axes(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "A1.tif", image(rng, 4, 5, 6))
    said = refused(tmp_path, tmp_path / "p.zarr", options(WELLS))
    assert said == f"{tmp_path}/A1.tif: has the shape (4, 5, 6), --axes YX says 2 dimensions"
    assert "--axes TCYX says 4 dimensions" in refused(tmp_path, tmp_path / "p.zarr", options(WELLS, axes="TCYX"))


@pytest.mark.parametrize("axes", ["XY", "TXY", "SYX", "TTYX", "", "Y"])
def test_unknown_axes(tmp_path: Path, rng: np.random.Generator, axes: str) -> None:
    write(tmp_path / "A1.tif", image(rng, 4, 5, 6))
    said = refused(tmp_path, tmp_path / "p.zarr", options(WELLS, axes=axes))
    assert said == f"--axes {axes!r}: expected a subset of T, C, Z and, last, YX"


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
        said = refused(tmp_path / "tiffs", tmp_path / "p.zarr", options(WELLS, axes="TYX"))
        assert said.startswith(f"{file}: "), length
        assert not (tmp_path / "p.zarr").exists()
    file.write_bytes(whole)
    ingest(str(tmp_path / "tiffs"), str(tmp_path / "p.zarr"), options(WELLS, axes="TYX"))
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01")[:, 0], pixels)


def test_what_was_written_before_an_unreadable_file_stays(tmp_path: Path, rng: np.random.Generator) -> None:
    first = image(rng, 5, 6)
    write(tmp_path / "A1.tif", first)
    (tmp_path / "A2.tif").write_text("not an image")
    said = refused(tmp_path, tmp_path / "p.zarr", options(WELLS))
    assert said.startswith(f"{tmp_path}/A2.tif: is not a readable TIFF image")
    assert list(open_plate(str(tmp_path / "p.zarr")).well_paths) == ["A01"]
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", "A01")[0, 0], first)


def test_site_names_that_ngff_does_not_allow(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "A1_s-1.tif", image(rng, 5, 6))
    said = refused(tmp_path, tmp_path / "p.zarr", options(r"(?P<well>A1)_(?P<site>s-\d)"))
    assert "site A01/s-1: NGFF names sites by letters and digits alone" in said
    assert not (tmp_path / "p.zarr").exists()


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
    done = command("ingest", tmp_path, plate, "--pattern", "(?P<well>A1)", "--projection", "sum")
    assert (done.code, "neither max nor mean" in done.err) == (2, True)
    done = command("ingest", tmp_path, plate, "--pattern", "(?P<wel>A1)")
    assert (done.code, "did you mean 'well'?" in done.err) == (1, True)
    assert not plate.exists()


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


def test_imagexpress_export(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "vendor_layouts" / "ImageXpress" / "9987_Plate_3434"
    pattern = (
        r"TimePoint_(?P<time>\d+)/ZStep_(?P<z>[1-9]\d*)/\d+_(?P<well>[A-P]\d+)_s(?P<site>\d+)_w(?P<channel>\d)\.TIF"
    )
    plate = tmp_path / "3434.zarr"
    assert ingest(str(folder), str(plate), options(pattern, channels=("a", "b", "c"))) == ["B02", "B03"]
    for well in ("B02", "B03"):
        for site in ("1", "2"):
            # ZStep_0 is the microscope's own projection, which the pattern leaves out.
            expected = [
                np.max(
                    [
                        tifffile.imread(folder / f"TimePoint_1/ZStep_{z}/9987_{well}_s{site}_w{channel}.TIF")
                        for z in (1, 2)
                    ],
                    axis=0,
                )
                for channel in (1, 2, 3)
            ]
            np.testing.assert_array_equal(stored(plate, well, site), np.array(expected)[None])
    lines = list(describe(str(plate)))
    assert lines[0] == "plate 3434: 2 well(s)"
    assert sum(bool(re.search(r"\(1, 3, 256, 256\), channels \['a', 'b', 'c'\]", line)) for line in lines) == 4
