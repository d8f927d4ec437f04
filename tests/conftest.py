"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from screening import cli

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from screening.simulation import SimulationConfig

# Ray reports usage over the network unless told not to.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# What makes a run on the small screen a matter of seconds.
SMALL_RUN = (
    "model.width=4",
    "segment.clips.size=32",
    "train.epochs=2",
    "train.p=3",
    "train.k=2",
    "evaluation.n_bootstrap=50",
    "resources.cpus=2",
    "resources.object_store_mb=100",
)


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class FinishedRun:
    """A screen that was run from plates to report, and what the command said."""

    folder: Path
    outcome: Outcome


Command = Callable[..., Outcome]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Of several processes one has all the files that ask for :func:`finished_run`: a minute's work, done once.

    The other files go to whichever process is free.
    """
    # A marker of xdist would say it, but pytest 9.2 takes no heed of it (pytest-xdist's issue 1386).
    from xdist.scheduler import LoadFileScheduling

    asks = re.compile(r"\bfinished_(run|screen)\b")

    @cache
    def group(file: str) -> str:
        return "finished run" if asks.search((config.rootpath / file).read_text()) else file

    class OneFinishedRun(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(super()._split_scope(nodeid))

    return OneFinishedRun(config, log)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real microscopy and profile data; tests that need it are skipped without it."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SCREENING_TEST_DATA", beside_checkout))
    if not folder.is_dir():
        pytest.skip(f"no real data: neither SCREENING_TEST_DATA nor {beside_checkout} is there")
    return folder


@pytest.fixture(scope="session")
def subprocess_command() -> Command:
    """The command line in a process of its own, as a user starts it."""

    def run(*arguments: object) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-c", "from screening.cli import main; main()", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=500,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process, which saves the seconds that imports and Ray take to start."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["screening", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = 0 if end.code is None else end.code
        else:
            code = 0
        assert isinstance(code, int)
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs in this process: what needs one here uses it and leaves it running."""
    from pipelines.cluster import cluster
    from pipelines.config import ResourcesConfig

    with cluster(ResourcesConfig(cpus=2, object_store_mb=100)):
        yield


@pytest.fixture(scope="session")
def small_simulation() -> SimulationConfig:
    """Two plates of eight wells: two mechanisms of three compounds, and two controls a plate."""
    from screening.simulation import SimulationConfig

    return SimulationConfig(
        replicates=2,
        moas=("uncoupler", "potassium ionophore"),
        compounds_per_moa=3,
        controls_per_plate=2,
        frames=4,
        height=256,
        width=256,
        cells_per_site=8,
    )


@pytest.fixture(scope="session")
def small_screen(tmp_path_factory: pytest.TempPathFactory, small_simulation: SimulationConfig, local_ray: None) -> Path:
    """The folder of a small simulated screen: plates, tables, truth and run.yaml. Only to be read: copy it to edit."""
    from pipelines.simulate import simulate

    folder = tmp_path_factory.mktemp("small") / "simulated"
    simulate(small_simulation, str(folder))
    return folder


@pytest.fixture(scope="session")
def small_settings() -> list[str]:
    """Options of `screening run` that make a run on the small screen a matter of seconds."""
    return [part for setting in SMALL_RUN for part in ("--set", setting)]


@pytest.fixture(scope="session")
def finished_run(
    small_screen: Path,
    small_settings: list[str],
    subprocess_command: Command,
    tmp_path_factory: pytest.TempPathFactory,
) -> FinishedRun:
    """One whole run on the small screen through the real command. Only to be read: copy its folder to edit."""
    folder = tmp_path_factory.mktemp("finished") / "screen"
    outcome = subprocess_command("run", small_screen / "run.yaml", "--out", folder, *small_settings)
    assert outcome.code == 0, outcome.err
    return FinishedRun(folder, outcome)


@pytest.fixture(scope="session")
def finished_screen(finished_run: FinishedRun) -> Path:
    """The folder of :func:`finished_run`."""
    return finished_run.folder
