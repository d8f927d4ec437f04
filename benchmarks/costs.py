"""Time, storage and cost of a large screen, from what was measured on small ones.

    python benchmarks/costs.py sizes SCREEN         what a segmented screen takes on a local disk, by kind
    python benchmarks/costs.py [--NAME VALUE ...]   a screen of 1,000 plates of 384 wells, or another

Every assumption is an option; ``--help`` lists them, each with where its default is from. Prices are examples to be
replaced by your own. All is proportional, so it holds where nothing saturates: enough wells for all cores, a store that
bears their reading, and a driver that hands units out faster than they are done (``benchmarks/scale.py``). Nothing of
this size has been run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from pipelines.config import configuration_of
from pipelines.inputs import open_inputs
from storage_schemas.clips import open_clips
from storage_schemas.plate import open_site
from storage_schemas.screen import Screen

EXAMPLE = "an example"
DEMO = "`costs.py sizes` of the demo"


@dataclass(frozen=True)
class Assumptions:
    """What is assumed, each with its unit and where its default is from."""

    plates: Annotated[int, "plates", EXAMPLE] = 1000
    wells: Annotated[int, "wells a plate", EXAMPLE] = 384
    sites: Annotated[int, "sites a well", EXAMPLE] = 4
    frames: Annotated[int, "frames a site", EXAMPLE] = 16
    channels: Annotated[int, "channels", EXAMPLE] = 3
    side: Annotated[int, "pixels along a site's side, 16 bit", EXAMPLE] = 1024
    cells: Annotated[int, "cells with a clip, a site", EXAMPLE] = 100
    tracks: Annotated[int, "cells that were followed, a site", EXAMPLE] = 150
    clip: Annotated[int, "pixels along a clip's side, 8 bit", EXAMPLE] = 64
    dimension: Annotated[int, "numbers of an embedding", "ResNet-18"] = 512
    segment_cpu_s: Annotated[
        float, "CPU s of a site of 16 × 3 × 1024², files written", "`engine.py segment`, the loop"
    ] = 1.9
    embed_per_cpu_s: Annotated[float, "clips a second and core", "`network.py`, ResNet-18, 16 × 112²"] = 9.6
    embed_per_gpu_s: Annotated[float, "clips a second and GPU; 0: on CPUs", "not measured"] = 0.0
    efficiency: Annotated[float, "of the engine", "an assumption; `engine.py` measures it"] = 0.85
    cores: Annotated[int, "cores at work", EXAMPLE] = 1000
    gpus: Annotated[int, "GPUs at work", EXAMPLE] = 8
    pixel_bytes: Annotated[float, "stored, of a byte of pixels", DEMO] = 0.804
    label_bytes: Annotated[float, "stored, of a byte of pixels", DEMO] = 0.024
    clip_bytes: Annotated[float, "stored, of a byte of clips", DEMO] = 0.598
    track_bytes: Annotated[float, "of the table of cells, a track and frame", DEMO] = 586.0
    quality_bytes: Annotated[float, "a frame", DEMO] = 491.0
    index_bytes: Annotated[float, "a number of an embedding, in the index", "`index.py`: 1,953 MiB and 166"] = 4.34
    frame_objects: Annotated[float, "objects of a frame's pixels and labels", DEMO] = 7.25
    well_objects: Annotated[float, "objects that a well's stages write beside labels", DEMO] = 5.0
    price_cpu_hour: Annotated[float, "for a core for an hour", EXAMPLE] = 0.02
    price_gpu_hour: Annotated[float, "for a GPU for an hour", EXAMPLE] = 2.0
    price_tb_month: Annotated[float, "for 10¹² bytes for a month", EXAMPLE] = 20.0
    price_million_requests: Annotated[float, "for 10⁶ requests", EXAMPLE] = 2.0
    months: Annotated[float, "that all is kept", EXAMPLE] = 1.0


def sizes(url: str) -> dict[str, float]:
    """What the assumptions of sizes are on a segmented screen, it and its plates on a local disk."""
    screen = Screen.open(url)
    config = configuration_of(screen)
    inputs = open_inputs(config.inputs)
    kinds: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    frames = pixels = clips = n_sites = 0
    for well in inputs.wells:
        for site in inputs.plates[well.plate].sites(well.well).values():
            shape = open_site(site).shape
            n_sites, frames, pixels = (
                n_sites + 1,
                frames + shape[0],
                pixels + 2 * shape[0] * shape[1] * shape[2] * shape[3],
            )
            for path in files(site):
                kind = "labels" if "/labels/" in path.as_posix() else "pixels"
                kinds[kind] += path.stat().st_size
                objects["frame"] += 1
        array = open_clips(screen.clips(well))
        clips += array.size * array.dtype.itemsize
        for kind, where in (("clips", screen.clips), ("cells", screen.cells), ("quality", screen.quality)):
            kinds[kind] += sum(path.stat().st_size for path in files(where(well)))
            objects["well"] += len(files(where(well)))
        objects["well"] += 1  # of its embeddings
    tracked = screen.read_manifest().stages["segment"].counts["tracks"] * frames / n_sites
    return {
        "pixel_bytes": kinds["pixels"] / pixels,
        "label_bytes": kinds["labels"] / pixels,
        "clip_bytes": kinds["clips"] / clips,
        "track_bytes": kinds["cells"] / tracked,
        "quality_bytes": kinds["quality"] / frames,
        "frame_objects": objects["frame"] / frames,
        "well_objects": objects["well"] / len(inputs.wells),
    }


def files(url: str) -> list[Path]:
    """The file, or all in a folder and below."""
    path = Path(url)
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


def plan(a: Assumptions) -> list[tuple[str, float, str]]:
    """What a screen takes: name, amount, unit.

    The time of a site goes with its pixels, as that of 1024² and 2048² does (``benchmarks/site.py``).
    """
    wells = a.plates * a.wells
    sites = wells * a.sites
    frames = sites * a.frames
    clips = sites * a.cells
    pixels = 2.0 * frames * a.channels * a.side**2
    stored = {
        "plates": pixels * a.pixel_bytes,
        "labels": pixels * a.label_bytes,
        "clips": clips * a.frames * a.channels * a.clip**2 * a.clip_bytes,
        "tables of cells and quality": sites * a.tracks * a.frames * a.track_bytes + frames * a.quality_bytes,
        "embeddings": 4.0 * clips * a.dimension,
        "index of cells": clips * a.dimension * a.index_bytes,
    }
    segment = pixels / (2 * 16 * 3 * 1024**2) * a.segment_cpu_s / 3600
    embed_cpu = 0.0 if a.embed_per_gpu_s else clips / a.embed_per_cpu_s / 3600
    embed_gpu = clips / a.embed_per_gpu_s / 3600 if a.embed_per_gpu_s else 0.0
    segment_wall = segment / a.cores / a.efficiency
    embed_wall = embed_cpu / a.cores / a.efficiency
    embed_wall += embed_gpu / a.gpus / a.efficiency if a.gpus and embed_gpu else 0.0
    shorter = min(wall for wall in (segment_wall, embed_wall) if wall)
    requests = frames * a.frame_objects + 2 * wells * a.well_objects  # what is written of a well is read again
    cost = {
        "CPUs": (segment + embed_cpu) / a.efficiency * a.price_cpu_hour,
        "GPUs": embed_gpu / a.efficiency * a.price_gpu_hour,
        "storage": sum(stored.values()) / 1e12 * a.price_tb_month * a.months,
        "requests": requests / 1e6 * a.price_million_requests,
    }
    return [
        ("wells", wells, ""),
        ("sites", sites, ""),
        ("cells with a clip", clips, ""),
        ("pixels", pixels / 1e12, "TB, not stored so"),
        *((f"stored: {name}", size / 1e12, "TB") for name, size in stored.items()),
        ("segmentation", segment, "CPU hours"),
        ("embedding", embed_cpu, "CPU hours"),
        ("embedding", embed_gpu, "GPU hours"),
        (f"both on {a.cores:,} cores, one after the other", segment_wall + embed_wall, "hours"),
        ("units a second that the driver must hand out", wells / shorter / 3600, ""),
        ("requests, one an object", requests / 1e6, "million"),
        *((f"cost: {name}", amount, "") for name, amount in cost.items()),
        ("cost", sum(cost.values()), ""),
    ]


def main(arguments: list[str]) -> None:
    """Print sizes, or assumptions and what follows from them."""
    if arguments[:1] == ["sizes"]:
        for name, value in sizes(arguments[1]).items():
            print(f"{name:<16}{value:>10.3f}")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said = {name: get_args(hint) for name, hint in get_type_hints(Assumptions, include_extras=True).items()}
    for field in fields(Assumptions):
        kind, meaning, source = said[field.name]
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=f"{meaning} ({source})"
        )
    assumed = Assumptions(**vars(parser.parse_args(arguments)))
    print("Assumed:")
    for name, (_, meaning, source) in said.items():
        value = getattr(assumed, name)
        given = "" if value == getattr(Assumptions, name) else "given; default from "
        print(f"  {name:<24}{value:>10,}  {meaning} ({given}{source})")
    print("Extrapolated:")
    for name, amount, unit in plan(assumed):
        print(f"  {name:<46}{amount:>16,.{1 if unit else 0}f} {unit}")


if __name__ == "__main__":
    main(sys.argv[1:])
