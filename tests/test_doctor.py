"""`screening doctor`: what it finds right, what it finds wrong, and that it says how to mend each."""

from __future__ import annotations

import importlib.metadata
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command

from pipelines import doctor
from pipelines.doctor import examine


def found(check: str, *urls: str) -> dict[str, Any]:
    """The only finding of one check."""
    table = examine(urls)
    (row,) = table[table["check"] == check].to_dict("records")
    return {str(name): value for name, value in row.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and no setting of Ray's."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def versions(monkeypatch: pytest.MonkeyPatch, **told: str | None) -> None:
    """Let packages be of another version, or not there."""
    true = importlib.metadata.version

    def version(name: str) -> str:
        if name not in told:
            return true(name)
        if (answer := told[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return answer

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_all_is_well_here(command: Command, tmp_path: Path) -> None:
    done = command("doctor", tmp_path, "--format", "json")
    rows = json.loads(done.out)
    assert done.code == 0, rows
    assert {row["check"] for row in rows} >= {"packages", "torch", "CPUs", "memory", "GPUs", "authentication", "Ray"}
    assert all(row["mend"] for row in rows if row["state"] != "ok")
    assert not list(tmp_path.glob(".screening-doctor*"))
    assert "storage" in command("doctor", tmp_path).out


def test_packages_out_of_range_or_missing_are_named(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    versions(monkeypatch, ray="1.13.0", zarr="3.1.6", scipy=None)
    packages = found("packages")
    assert packages["state"] == "wrong"
    assert "ray 1.13.0" in packages["found"]
    assert "scipy is missing" in packages["found"]
    assert "zarr" not in packages["found"]
    assert "pip install" in packages["mend"]
    assert command("doctor").code == 1


def test_torchvision_of_another_torch_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch="2.12.0+cpu")
    assert found("torch")["state"] == "wrong"
    assert "torch" in found("torch")["mend"]


@pytest.mark.parametrize(("builds", "state"), [(("cpu", "cpu"), "ok"), (("cpu", "cu130"), "warning")])
def test_builds_of_torch_and_torchvision_are_compared(
    builds: tuple[str, str], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_build", dict(zip(("torch", "torchvision"), builds, strict=True)).__getitem__)
    assert found("torch")["state"] == state


def test_build_is_that_of_the_imported_torch() -> None:
    assert torch.__version__.endswith(f"+{doctor._build('torch')}")


@pytest.mark.parametrize(
    ("token", "mode", "address", "rights", "state"),
    [
        (False, None, None, None, "ok"),  # of one's own machine alone
        (True, "token", None, 0o600, "ok"),
        (True, "token", None, 0o644, "warning"),
        (True, "disabled", None, 0o600, "warning"),
        (False, "token", "127.0.0.1:1", None, "wrong"),
    ],
)
def test_authentication(
    token: bool,
    mode: str | None,
    address: str | None,
    rights: int | None,
    state: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("secret")
        (home / ".ray" / "auth_token").chmod(rights or 0)
    for name, value in {"RAY_AUTH_MODE": mode, "RAY_ADDRESS": address}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    (auth,) = doctor._auth()
    assert auth.state == state
    assert bool(auth.mend) == (state != "ok")
    assert "secret" not in auth.found + auth.mend


def test_cluster_that_is_not_there_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have left one running
        (answer,) = doctor._ray()
    assert answer.state == "wrong"
    assert "RAY_ADDRESS" in answer.mend


def test_storage_that_cannot_be_used_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in (str(tmp_path / "file"), "nowhere://bucket", "/proc/nothing"):
        storage = found("storage", url)
        assert storage["state"] == "wrong", url
        assert url in storage["found"]
        assert storage["mend"]
