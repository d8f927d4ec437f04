"""`ray up` and `ray down` with examples/clusters/local.yaml, over SSH to machines made of namespaces."""

from __future__ import annotations

import shlex
import shutil
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from machines import BIN, ROOT, Machine, machines
from runs import eventually

pytestmark = pytest.mark.slow

SSHD = """
Port 22
HostKey {key}
AuthorizedKeysFile %h/.ssh/authorized_keys
PasswordAuthentication no
UsePAM no
Subsystem sftp internal-sftp
"""

NODES = "import ray; ray.init(logging_level=40); print(*(node['NodeManagerAddress'] for node in ray.nodes()))"


@dataclass(frozen=True)
class Site:
    """Somebody's laptop, and the machines that it reaches by SSH: a head and workers."""

    laptop: Machine
    head: Machine
    workers: tuple[Machine, ...]
    config: Path

    @property
    def nodes(self) -> tuple[Machine, ...]:
        """The machines of the cluster."""
        return self.head, *self.workers

    def ray(self, command: str, *arguments: str) -> str:
        return self.laptop.check("ray", command, "--yes", self.config, *arguments, folder=ROOT, timeout=500)

    def on_head(self, command: str) -> str:
        """What a shell command prints that is run as `ray exec` runs it."""
        return self.laptop.check("ray", "exec", self.config, command, folder=ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    missing = [tool for tool in ("ssh", "ssh-keygen", "rsync", "sshd") if which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (openssh-client, openssh-server, rsync)")
    folder = tmp_path_factory.mktemp("site")
    with machines(folder, "laptop", "head", "worker1", "worker2") as (laptop, head, *workers):
        key = laptop.home / ".ssh" / "id_ed25519"
        key.parent.mkdir(mode=0o700)
        laptop.check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        laptop.check("ray", "get-auth-token", "--generate")
        for machine in (head, *workers):
            admit(machine, key.with_suffix(".pub").read_text())
            prepare_environment(machine)
        config = yaml.safe_load((ROOT / "examples/clusters/local.yaml").read_text())
        # The state of clusters is kept under their names.
        config["cluster_name"] = laptop.temporary.name
        config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
        config["auth"]["ssh_user"] = "root"
        path = laptop.home / "cluster.yaml"
        path.write_text(yaml.safe_dump(config))
        yield Site(laptop, head, tuple(workers), path)


def which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")


def admit(machine: Machine, public_key: str) -> None:
    """Start an SSH server that admits the key."""
    (machine.home / ".ssh").mkdir(mode=0o700)
    (machine.home / ".ssh" / "authorized_keys").write_text(public_key)
    (machine.home / ".bashrc").touch()
    key = machine.home / "host_key"
    machine.check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    config = machine.home / "sshd_config"
    config.write_text(SSHD.format(key=key))
    machine.check("sh", "-c", f"mount -t tmpfs tmpfs /run && mkdir /run/sshd && {which('sshd')} -f {config}")


def prepare_environment(machine: Machine) -> None:
    """An environment that sees the packages of this one: what the set-up installs by pip is the project alone."""
    environment = machine.home / "screening" / "env"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    seen = [line for line in machine.environment["PYTHONPATH"].split(":") if "site-packages" in line]
    (packages / "seen.pth").write_text("\n".join(seen))
    python = environment / "bin" / "python"
    programs = {
        "ray": f"exec {python} -m ray.scripts.scripts",
        # In place of the package index; what it is given first is `install`.
        "pip": f"shift; exec {python} -m pip install --no-index --no-deps --no-build-isolation",
    }
    for name, program in programs.items():
        path = environment / "bin" / name
        path.write_text(f'#!/bin/sh\n{program} "$@"\n')
        path.chmod(0o755)


@pytest.fixture(scope="module")
def up(site: Site) -> Site:
    """The cluster, up."""
    site.ray("up")
    eventually(lambda: all(worker.processes("raylet/raylet") for worker in site.workers))
    return site


def test_all_machines_run_the_project_and_share_the_token(up: Site) -> None:
    token = (up.laptop.home / ".ray" / "auth_token").read_text()
    addresses = {machine.address for machine in up.nodes}
    for machine in up.nodes:
        assert (machine.home / ".ray" / "auth_token").read_text() == token
        assert (machine.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
        (installed,) = (machine.home / "screening" / "env").glob("lib/python*/site-packages/screening")
        assert (installed / "cli.py").read_bytes() == (ROOT / "screening" / "cli.py").read_bytes()
        assert machine.processes("raylet/raylet")
        assert not list((machine.home / "screening").rglob("tests"))
    eventually(lambda: addresses <= set(up.on_head(f"python -c {shlex.quote(NODES)}").split()))
    assert "screening run" in up.on_head("screening run --help")


def test_without_the_token_no_one_is_told_anything(up: Site) -> None:
    stranger = {"HOME": str(up.laptop.temporary)}
    address = f"--address={up.head.address}:6379"
    assert up.laptop.run("ray", "status", address, RAY_AUTH_MODE="token").returncode == 0
    for more in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "guessed"}):
        done = up.laptop.run("ray", "status", address, **stranger, **more)
        assert done.returncode != 0
        assert "Active" not in done.stdout


def test_dashboard_is_reached_through_ssh_alone(up: Site) -> None:
    tunnel = up.laptop.start("ray", "dashboard", up.config, log=up.laptop.home / "tunnel.log")
    try:
        eventually(lambda: asked(up.laptop, "127.0.0.1") == "401")
    finally:
        tunnel.terminate()
        tunnel.wait()
    token = (up.laptop.home / ".ray" / "auth_token").read_text()
    assert asked(up.head, "127.0.0.1", token) == "200"
    assert asked(up.laptop, up.head.address, token) == "refused"


def asked(machine: Machine, address: str, token: str = "") -> str:
    """What a machine is answered that asks the dashboard at an address: a status of HTTP, or that none listens."""
    program = f"""
import urllib.error, urllib.request
headers = {{"Authorization": "Bearer {token}"}} if {token!r} else {{}}
try:
    print(urllib.request.urlopen(urllib.request.Request("http://{address}:8265/api/version", headers=headers)).status)
except urllib.error.HTTPError as error:
    print(error.code)
except urllib.error.URLError as error:
    print("refused" if isinstance(error.reason, ConnectionRefusedError) else error.reason)
"""
    return machine.check("python", "-c", program).strip()


def test_ray_down_ends_it_on_all_machines(up: Site) -> None:
    up.ray("down")
    assert not up.head.processes("gcs_server")
    # Workers are not told; they go when they have not heard of the head for a while.
    eventually(lambda: not any(worker.processes("raylet/raylet") for worker in up.workers), timeout=180)
