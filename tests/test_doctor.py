"""`screening doctor`: what it finds right, what it finds wrong, and that it says how to mend each."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command

from pipelines import doctor
from pipelines.doctor import examine
from storage_schemas import store


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
    # Other tests, and whoever else works here, may have clusters running.
    monkeypatch.setattr(doctor, "_clusters_here", set)
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


def test_python_that_is_too_old_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.14")
    (packages,) = doctor._packages()
    assert packages.state == "wrong"
    assert "Python 3.10.14 is too old" in packages.found


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


# --- the machine ------------------------------------------------------------------------------


def write_files(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_control_groups_are_the_tightest_of_all_above(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/pods/run\n")
    write_files(groups / "pods" / "run", cpu__max="max 100000\n", memory__max="4294967296\n")
    write_files(groups / "pods", cpu__max="150000 100000\n", memory__max="max\n")
    write_files(groups / "others", cpu__max="1000 100000\n", memory__max="1\n")
    assert doctor._limits(groups, own) == doctor._Limits(1.5, 2**32)


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text("9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/\n0::/\n")
    write_files(groups / "memory" / "job", memory__limit_in_bytes="1073741824\n")
    write_files(groups / "cpu", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert doctor._limits(groups, own) == doctor._Limits(0.5, 2**30)
    write_files(groups / "cpu", cpu__cfs_quota_us="-1\n")
    assert doctor._limits(groups, own).cpus is None
    assert doctor._limits(groups, tmp_path / "absent") == doctor._Limits(None, None)


def test_limits_are_told_with_what_to_set() -> None:
    cpus, memory = doctor._cpus(doctor._Limits(0.5, None)), doctor._memory(doctor._Limits(None, 2.0**30))
    assert (cpus.state, memory.state) == ("warning", "warning")
    assert "resources.cpus=1" in cpus.mend
    assert "of 1.0 GiB free (the limit of its control group)" in memory.found


def test_what_a_small_container_lacks_is_told(tmp_path: Path) -> None:
    """Little shared memory, a full temporary disk, few open files and a store without room, all of them real."""
    small = Path("/tmp") / f"small{os.getpid()}"
    mounts = f"mount -t tmpfs -o size=16m tmpfs /dev/shm && mount -t tmpfs -o size=4m tmpfs {small}"
    doctor_ = "from screening.cli import main; main()"
    command = f'{mounts} || exit 99; ulimit -n 512; exec {sys.executable} -c "{doctor_}" doctor {small} --format json'
    small.mkdir()
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "RAY_TMPDIR": str(small), "OMP_NUM_THREADS": "1"},
        )
    except FileNotFoundError:
        pytest.skip("unshare (util-linux) is not installed")
    finally:
        small.rmdir()
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"no file systems can be mounted here: {done.stderr}")
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 1
    for check, state, mend in (
        ("shared memory", "warning", "--shm-size"),
        ("temporary disk", "warning", "RAY_TMPDIR"),
        ("open files", "warning", "ulimit -n"),
    ):
        assert rows[check]["state"] == state, rows[check]
        assert mend in rows[check]["mend"], rows[check]
    assert rows["storage"]["state"] == "wrong"
    assert re.search("No space left|disk is full", rows["storage"]["found"] + rows["storage"]["mend"])


def test_temporary_folder_whose_sockets_would_have_too_long_names_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    assert next(doctor._disks()).state == "wrong"
    assert "shorter" in next(doctor._disks()).mend


def test_temporary_folder_that_ray_would_make_is_judged_by_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "r"))
    (disk, *_) = doctor._disks()
    assert disk.found.startswith(f"{tmp_path}/r: ")


def test_what_cannot_be_looked_at_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def _auth() -> Any:
        raise PermissionError(13, "Permission denied", "auth_token")

    monkeypatch.setattr(doctor, "_auth", _auth)
    table = examine()
    assert table.loc[table["check"] == "auth", "state"].tolist() == ["wrong"]
    assert {"packages", "memory", "Ray"} <= set(table["check"])


def test_a_token_in_the_environment_comes_before_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").touch()
    assert found("authentication")["state"] == "wrong"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert found("authentication")["state"] == "ok"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_75", "sm_90"], (9, 0), True),
        (["sm_75", "sm_80"], (8, 9), True),  # a binary runs on later ones of its major version
        (["sm_86"], (8, 0), False),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (12, 0), True),
        (["sm_90a", "sm_100"], (10, 0), True),
        (["sm_75"], (7, 0), False),
    ],
)
def test_gpu_that_torch_is_not_built_for_is_wrong(
    built: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    device = SimpleNamespace(name="H", major=major, minor=minor, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    (gpus,) = doctor._gpus()
    assert gpus.state == ("ok" if runs else "wrong")
    assert f"H ({major}.{minor}, 16.0 GiB)" in gpus.found
    assert gpus.mend


def test_version_of_the_driver(tmp_path: Path) -> None:
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12\n")
    assert doctor._driver(told) == "550.54.15"
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n")
    assert doctor._driver(told) == "570.86.10"
    assert doctor._driver(tmp_path / "absent") == "unknown"


# --- Ray --------------------------------------------------------------------------------------


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


def test_empty_token_is_wrong(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("\n")
    (auth,) = doctor._auth()
    assert auth.state == "wrong"
    assert "ray get-auth-token" in auth.mend


@pytest.mark.parametrize(
    ("address", "state"),
    [
        ("127.0.0.1:8265", "ok"),
        ("localhost:8265", "ok"),
        ("[::1]:8265", "ok"),
        ("10.0.0.7:8265", "warning"),
        ("head.example.org:8265", "warning"),
        ("", "warning"),
    ],
)
def test_dashboard_that_others_can_reach_is_told(address: str, state: str) -> None:
    dashboard = doctor._dashboard(address)
    assert dashboard.state == state
    assert bool(dashboard.mend) == (state != "ok")


_RAY = """
import ray, sys
ray.init(address="local", num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "state"), [("disabled", "warning"), ("token", "ok")])
def test_cluster_that_lets_strangers_in_is_told(
    mode: str, state: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("5" * 64)
    started = subprocess.Popen(
        [sys.executable, "-c", _RAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": mode},
    )
    try:
        assert started.stdout is not None
        address = started.stdout.readline().strip()
        monkeypatch.setattr(doctor, "_clusters_here", lambda: {address, "127.0.0.1:1"})
        (strangers,) = doctor._open_clusters()
    finally:
        started.communicate("", timeout=60)
    assert strangers.state == state
    assert (address in strangers.found) == (state == "warning")


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


def test_storage_says_how_fast_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    (storage,) = doctor._storage(str(tmp_path))
    assert storage.state == "ok"
    assert storage.found.count("MiB/s") == 2
    assert not list(tmp_path.iterdir())


def test_clock_of_a_store_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "list_times", lambda url: {"small": time.time() - 300})
    storage, clock = doctor._storage(str(tmp_path))
    assert (storage.state, clock.state) == ("ok", "warning")
    assert "-300 s" in clock.found
    assert "NTP" in clock.mend


def test_slow_and_lying_stores_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SLOW", 0.0)
    (storage,) = doctor._storage(str(tmp_path))
    assert storage.state == "warning"
    monkeypatch.setattr(store, "read_bytes", lambda url: b"other")
    (storage,) = doctor._storage(str(tmp_path))
    assert storage.state == "wrong"
    assert "other bytes" in storage.found


def test_secrets_of_a_url_are_not_shown(command: Command) -> None:
    done = command("doctor", "nowhere://user:cr3t@bucket", "--format", "json")
    assert done.code == 1
    assert "cr3t" not in done.out + done.err
