"""Runs as jobs of a cluster that `ray start` made: a head and two workers, machines made of namespaces."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from machines import ROOT, Machine, machines
from runs import digests, eventually

pytestmark = pytest.mark.slow

DASHBOARD = "http://127.0.0.1:8265"
STORE = "--object-store-memory=200000000"
# The job API of Ray as a user has it, but for what the command line does not print.
INFO = """
import sys
from ray.job_submission import JobSubmissionClient
print(JobSubmissionClient(sys.argv[1]).get_job_info(sys.argv[2]).model_dump_json())
"""


# As cluster.yaml, but nodes are raylets that Ray's own autoscaler starts on the head.
GROWING = {
    "cluster_name": "growing",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "disable_node_updaters": True,
        "foreground_node_launch": True,
        "worker_liveness_check": False,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 1, "object_store_memory": 200_000_000}, "node_config": {}, "max_workers": 2},
    },
    # What Ray's schema fills in for `ray up`.
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    **{
        f"{whose}{command}": []
        for whose in ("head_", "worker_")
        for command in ("setup_commands", "start_ray_commands")
    },
}


@dataclass(frozen=True)
class Jobs:
    """A cluster that asks for a token, and the machine that its head is, where users log in."""

    head: Machine

    def submit(self, folder: Path, *entrypoint: object, wait: bool = True, name: str = "") -> Any:
        options = ["--address", DASHBOARD, "--working-dir", ".", *(["--submission-id", name] if name else [])]
        options += [] if wait else ["--no-wait"]
        return self.head.run(
            *("ray", "job", "submit", *options, "--", *entrypoint), folder=folder, timeout=900, RAY_AUTH_MODE="token"
        )

    def job(self, action: str, name: str) -> str:
        return self.head.check("ray", "job", action, "--address", DASHBOARD, name, RAY_AUTH_MODE="token")

    def info(self, name: str) -> dict[str, Any]:
        told = self.head.check("python", "-c", INFO, DASHBOARD, name, RAY_AUTH_MODE="token")
        return dict(json.loads(told))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with machines(tmp_path_factory.mktemp("cluster"), "head", "worker1", "worker2") as (head, *workers):
        head.check("ray", "get-auth-token", "--generate")
        # As in cluster.yaml: no unit runs where the jobs' drivers do.
        head.check("ray", "start", "--head", "--port=6379", "--num-cpus=0", STORE, RAY_AUTH_MODE="token")
        for worker in workers:
            shutil.copytree(head.home / ".ray", worker.home / ".ray")
            address = f"--address={head.address}:6379"
            worker.check("ray", "start", address, "--num-cpus=1", STORE, RAY_AUTH_MODE="token")
        yield Jobs(head)


@pytest.fixture
def run_folder(small_screen: Path, tmp_path: Path) -> Path:
    """A folder to submit from: settings and tables of a small screen, and data that must stay where they are."""
    folder = tmp_path / "run"
    (folder / "plates" / "decoy.zarr").mkdir(parents=True)
    (folder / "plates" / "decoy.zarr" / "c0").write_bytes(b"pixels")
    (folder / "raw.tif").write_bytes(b"pixels")
    shutil.copy(ROOT / ".rayignore", folder)
    config = yaml.safe_load((small_screen / "run.yaml").read_text())
    for name in ("plate_map", "compounds"):
        shutil.copy(small_screen / config["inputs"][name], folder)
    config["inputs"]["plates"] = [str(small_screen / plate) for plate in config["inputs"]["plates"]]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_job_stopped_and_submitted_again_ends_as_a_run_without_a_cluster(
    jobs: Jobs, run_folder: Path, small_settings: list[str], finished_screen: Path, tmp_path: Path
) -> None:
    out = tmp_path / "screen"
    entrypoint = ("screening", "run", "run.yaml", "--out", out, *small_settings)
    started = jobs.submit(run_folder, *entrypoint, wait=False, name="first")
    assert started.returncode == 0, started.stdout + started.stderr
    eventually(lambda: any(out.glob("cells/*/*.parquet")))
    jobs.job("stop", "first")
    assert jobs.info("first")["status"] == "STOPPED"
    assert not (out / "report.html").exists()
    eventually(lambda: not jobs.head.processes("screening run"), timeout=30)

    done = jobs.submit(run_folder, *entrypoint, name="second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out}: done" in done.stdout
    assert jobs.info("second")["driver_exit_code"] == 0
    logs = jobs.job("logs", "second")
    assert "segment: 16/16 wells" in logs
    assert "train: " in logs
    parts = ("cells", "clips", "quality", "calibration", "split.parquet")
    assert digests(out, *parts) == digests(finished_screen, *parts)
    # One worker with as many threads as the run without a cluster had: the same network to the bit.
    for table in sorted(finished_screen.glob("embeddings/*/*.parquet")):
        assert pq.read_table(out / table.relative_to(finished_screen)).equals(pq.read_table(table))
    ours, theirs = (json.loads((screen / "evaluation.json").read_text()) for screen in (out, finished_screen))
    assert ours == theirs


def test_cluster_without_workers_grows_for_a_job(
    run_folder: Path, small_settings: list[str], finished_screen: Path, tmp_path: Path
) -> None:
    (tmp_path / "machines").mkdir()
    with machines(tmp_path / "machines", "alone") as (head,):
        (head.home / "growing.json").write_text(json.dumps(GROWING))
        token = {"RAY_AUTH_MODE": "token"}
        head.check("ray", "get-auth-token", "--generate")
        start = ("ray", "start", "--head", "--port=6379", "--num-cpus=0", STORE, "--autoscaling-config=growing.json")
        head.check(*start, RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1", **token)
        jobs = Jobs(head)
        done = jobs.submit(run_folder, "screening", "run", "run.yaml", "--out", tmp_path / "screen", *small_settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "waiting for the cluster to grow" in done.stdout
    parts = ("cells", "clips", "quality", "calibration", "split.parquet")
    assert digests(tmp_path / "screen", *parts) == digests(finished_screen, *parts)
    tables = ("embeddings", "evaluation.json")
    assert digests(tmp_path / "screen", *tables).keys() == digests(finished_screen, *tables).keys()


def test_nodes_get_the_settings_and_no_data(jobs: Jobs, run_folder: Path) -> None:
    done = jobs.submit(run_folder, "find", ".", "-type", "f")
    assert done.returncode == 0, done.stdout
    assert "./run.yaml" in done.stdout
    assert "./plate_map.csv" in done.stdout
    assert "decoy" not in done.stdout
    assert ".tif" not in done.stdout


def test_exit_code_of_the_command_is_told(jobs: Jobs, run_folder: Path) -> None:
    """`ray job submit` itself knows 0 and 1 only; the job keeps the code."""
    wanted = {
        1: ("screening", "status", "nowhere"),
        2: ("screening", "run", "run.yaml", "--out", "out", "--set", "train.epoch=1"),
    }
    for code, command in wanted.items():
        name = f"code_{code}"
        assert jobs.submit(run_folder, *command, name=name).returncode == 1
        info = jobs.info(name)
        assert (info["status"], info["driver_exit_code"]) == ("FAILED", code)
        assert command[-1].partition("=")[0] in jobs.job("logs", name)


def test_code_of_the_working_directory_comes_before_what_is_installed(jobs: Jobs, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "screening", tmp_path / "screening", ignore=shutil.ignore_patterns("__pycache__"))
    done = jobs.submit(tmp_path, "python", "-c", "import screening; print(screening.__file__)")
    assert done.returncode == 0, done.stdout
    assert "working_dir_files" in done.stdout, done.stdout


# --- who is let in ----------------------------------------------------------------------------

# Each entry to the cluster, asked by somebody on the head itself.
ENTRIES = {
    "job API": ("ray", "job", "list", "--address", DASHBOARD),
    "job submission": ("ray", "job", "submit", "--address", DASHBOARD, "--", "echo", "in"),
    "state API": ("ray", "list", "nodes", "--address", DASHBOARD),
    "core": ("python", "-c", "import ray; ray.init('auto'); print(len(ray.nodes()))"),
    "client": ("python", "-c", "import ray; ray.init('ray://{head}:10001'); print(len(ray.nodes()))"),
    "status": ("ray", "status", "--address", "{head}:6379"),
}


def ask(jobs: Jobs, entry: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [part.replace("{head}", jobs.head.address) for part in ENTRIES[entry]]
    return jobs.head.run(*command, timeout=200, **environment)


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_opens_with_the_token_and_with_nothing_else(jobs: Jobs, entry: str) -> None:
    nobody = jobs.head.temporary / "nobody"
    nobody.mkdir(exist_ok=True)
    assert ask(jobs, entry, RAY_AUTH_MODE="token").returncode == 0
    strangers = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "guessed"})
    for environment in strangers:
        done = ask(jobs, entry, HOME=str(nobody), **environment)
        assert done.returncode != 0, (environment, done.stdout)


def test_dashboard_shows_nothing_without_the_token(jobs: Jobs) -> None:
    program = """
import sys, urllib.error, urllib.request
for path in ("/api/version", "/nodes?view=summary", "/api/jobs/", "/api/cluster_status", "/logs", "/metrics"):
    for headers in ({}, {"Authorization": "Bearer guessed"}):
        try:
            print(path, urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, headers=headers)).status)
        except urllib.error.HTTPError as error:
            print(path, error.code)
"""
    answers = [line.split() for line in jobs.head.check("python", "-c", program, DASHBOARD).splitlines()]
    assert {code for _, code in answers} <= {"401", "403", "404"}, answers
    assert {code for path, code in answers if path in ("/api/version", "/api/jobs/")} <= {"401", "403"}, answers


def test_run_that_is_not_let_in_says_how_to_be(jobs: Jobs, run_folder: Path) -> None:
    nobody = jobs.head.temporary / "nobody"
    nobody.mkdir(exist_ok=True)
    where = {"RAY_ADDRESS": f"{jobs.head.address}:6379", "HOME": str(nobody)}
    command = ("screening", "run", "run.yaml", "--out", "out")
    for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "guessed"}):
        done = jobs.head.run(*command, folder=run_folder, timeout=200, **where, **environment)
        assert done.returncode == 1
        assert "~/.ray/auth_token" in done.stderr
        assert "Traceback" not in done.stderr
