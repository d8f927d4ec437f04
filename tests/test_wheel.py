"""What users install: the wheel holds the four packages whole, and its command starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("screening", "pipelines", "tune", "storage_schemas")


def run(*command: str | Path, **variables: str) -> str:
    ran = subprocess.run(
        command,
        # Anywhere but the checkout, which Python would put before the installed packages.
        cwd=tempfile.gettempdir(),
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel)
    return target


def version() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == ours
    assert "screening/report/templates/report.css" in held


def test_command_starts_from_the_wheel(installed: Path) -> None:
    program = installed / "bin" / "screening"
    where = {"PYTHONPATH": str(installed)}
    location = run(sys.executable, "-c", "import screening; print(screening.__file__)", **where).strip()
    assert Path(location).is_relative_to(installed)
    assert "query" in run(program, "--help", **where)
    assert version() in run(program, "--version", **where)
