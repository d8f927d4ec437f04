"""`screening simulate`: a simulated screen on disk, with its truth and a configuration that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import yaml

from pipelines.progress import progress
from screening.simulation import (
    CHANNELS,
    KINETIC_PAIR,
    SimulationConfig,
    compound_effects,
    design,
    simulate_site,
)
from storage_schemas import plate as plates
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.truth import Truth

RUN_CONFIG = "run.yaml"


def run_settings(config: SimulationConfig) -> dict[str, object]:
    """A configuration for the simulated screen: a network small enough to learn in minutes on two cores."""
    return {
        "title": "Simulated screen",
        "seed": config.seed,
        "inputs": {
            "plates": ["plates/*.zarr"],
            "plate_map": "plate_map.csv",
            "compounds": "compounds.csv",
        },
        "segment": {
            "channels": {"nucleus": "nucleus", "cytoplasm": "mitochondria", "network": "mitochondria"},
            "clips": {
                "frames": min(config.frames, 8),
                "size": 64,
                "window": {"method": "fixed", "size": 64},
            },
        },
        "model": {"depth": 10, "width": 16, "stem_frames": 3, "temporal": "standard"},
        "train": {
            "epochs": 10,
            "p": 9,
            "k": 4,
            "optimizer": {"method": "adamw", "lr": 0.005},
            "validation_clips": 256,
        },
        "augment": {"blur_probability": 0.0},
        "evaluation": {"contrasts": [list(KINETIC_PAIR)] if set(KINETIC_PAIR) <= set(config.moas) else []},
    }


def simulate(config: SimulationConfig, out: str) -> int:
    """Write a simulated screen: plates, plate map, compounds, truth and ``run.yaml``.

    Wells that are there already are kept, so that an interrupted simulation goes on; ``run.yaml`` comes last.

    Args:
        config: of the simulation.
        out: folder or URL prefix; new, or that of the same simulation.

    Returns:
        How many wells the screen has.

    Raises:
        InputError: if the folder holds something else.
    """
    out = store.absolute(out)
    _check_folder(config, out)
    plate_map, compounds = design(config)
    wells = [WellKey(*row) for row in plate_map[["plate", "well"]].itertuples(index=False)]
    job = _Job(config, out)
    rows = [{"unit": str(well)} for well in wells]
    with progress("simulate", len(wells), "wells") as advance:
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        for _ in dataset.map(job, num_cpus=1).iter_rows():
            advance()
    for name, of_plate in plate_map.groupby("plate"):
        plates.list_wells(_plate_url(out, str(name)), str(name), of_plate["well"].tolist())
    for table, name in (
        (plate_map, "plate_map.csv"),
        (compounds, "compounds.csv"),
        (compound_effects(config), "truth/compound_effects.csv"),
    ):
        store.write_bytes(store.join(out, name), table.to_csv(index=False).encode())
    settings = yaml.safe_dump(run_settings(config), sort_keys=False)
    store.write_bytes(store.join(out, RUN_CONFIG), settings.encode())
    return len(wells)


def _check_folder(config: SimulationConfig, out: str) -> None:
    mark = store.join(out, "simulation.json")
    wanted = config.model_dump(mode="json")
    if store.exists(mark):
        if store.read_json(mark) != wanted:
            raise InputError(f"{out}: holds another simulated screen; choose another folder")
        return
    names = [name for name in store.list_names(out) if not name.startswith(".")]
    if names:
        raise InputError(f"{out}: holds {names[:5]}; choose a new or empty folder")
    store.write_json(mark, wanted)


def _plate_url(out: str, plate: str) -> str:
    return store.join(out, "plates", f"{plate}.zarr")


@dataclass(frozen=True)
class _Job:
    """Simulates and writes one well, unless it is there."""

    config: SimulationConfig
    out: str

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        well = WellKey.parse(row["unit"])
        truth = Truth(self.out)
        if truth.has(well):
            return row
        config = self.config
        sites = {str(site): simulate_site(config, well.plate, well.well, site) for site in range(config.sites_per_well)}
        plates.create_well(
            _plate_url(self.out, well.plate),
            well.well,
            {name: site.stack for name, site in sites.items()},
            CHANNELS,
            pixel_size=config.pixel_size_um,
            time_step=config.minutes_per_frame * 60,
        )
        truth.write(
            well,
            {name: (site.nuclei.astype(np.int32), site.cells) for name, site in sites.items()},
            {name: site.parents for name, site in sites.items()},
            {name: site.bad_frames for name, site in sites.items()},
        )
        return row
