"""Memory does not grow with a screen: what a stage holds depends on a well, not on how many there are."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml
from runs import PeakMemory, Run

from screening.simulation import CHANNELS, SimulationConfig, design, simulate_site
from storage_schemas.plate import create_well, list_wells

WELLS = [f"{row}{column}" for row in "ABC" for column in range(1, 5)]
COMPOUNDS = {f"{moa}-{number}": moa for moa in ("fast", "slow") for number in range(3)}
# Clips this large make a well's clips weigh about as much as its movie.
SETTINGS = (
    "segment.clips.size=128",
    "segment.clips.window.size=96",
    "model.width=4",
    "train.epochs=1",
    "train.p=2",
    "train.k=8",
    "train.validation_clips=64",
    "resources.cpus=2",
    "resources.object_store_mb=100",
)


def write_screen(folder: Path, n_plates: int) -> Path:
    """Plates of twelve wells with the same few movies again and again, so that more wells are only more wells."""
    config = SimulationConfig(height=256, width=256, cells_per_site=12)
    layout, _ = design(config)
    wells = layout.loc[layout["plate"] == "plate-1", "well"][:3]
    movies = [simulate_site(config, "plate-1", well, 0).stack for well in wells]
    rows = []
    for number in range(n_plates):
        plate = f"p{number}"
        for position, well in enumerate(WELLS):
            create_well(f"{folder}/plates/{plate}.zarr", well, {"0": movies[position % len(movies)]}, CHANNELS)
            compound = list(COMPOUNDS)[position % len(COMPOUNDS)]
            rows.append(
                {"plate": plate, "well": well, "compound": compound, "role": "treatment", "replicate": str(number)}
            )
        list_wells(f"{folder}/plates/{plate}.zarr", plate, WELLS)
    pd.DataFrame(rows).to_csv(folder / "plate_map.csv", index=False)
    pd.DataFrame(COMPOUNDS.items(), columns=["compound", "moa"]).to_csv(folder / "compounds.csv", index=False)
    settings = {
        "inputs": {"plates": ["plates/*.zarr"], "plate_map": "plate_map.csv", "compounds": "compounds.csv"},
        "segment": {
            "channels": {"nucleus": "nucleus", "cytoplasm": "mitochondria"},
            "clips": {"frames": 8, "window": {"method": "fixed"}},
        },
        "model": {"depth": 10, "stem_frames": 3},
        "profiles": {"recipe": {"method": "standardised", "reference": "plate"}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def peaks(folder: Path, n_plates: int) -> dict[str, int]:
    """Bytes at the peak of each of the two stages that go over all wells."""
    folder.mkdir()
    config = write_screen(folder, n_plates)
    found = {}
    for stage in ("segment", "train", "embed"):
        options = [part for setting in SETTINGS for part in ("--set", setting)]
        run = Run(folder / "log", "run", config, "--out", folder / "screen", "--stages", stage, *options)
        with PeakMemory(run) as memory:
            assert run.wait() == 0, run.said()
        found[stage] = memory.peak
    return found


@pytest.mark.slow
def test_four_times_the_wells_take_no_more_memory(tmp_path: Path) -> None:
    # The fewer take long enough for every process to reach its working size.
    few, many = peaks(tmp_path / "few", 2), peaks(tmp_path / "many", 8)
    for stage in ("segment", "embed"):
        assert many[stage] < 1.1 * few[stage], f"{stage}: {few[stage] / 2**20:.0f} → {many[stage] / 2**20:.0f} MiB"
