"""What stands in the way of a run on this machine, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil
import ray
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipelines import events
from pipelines.cluster import cluster, cluster_address
from pipelines.config import ResourcesConfig
from storage_schemas import store
from storage_schemas.errors import InputError

State = Literal["ok", "warning", "wrong"]

_MIN_MEMORY = 4 * 2**30  # bytes that a run of the defaults should find free
_MIN_DISK = 10 * 2**30  # bytes for what Ray spills and logs
_MIN_FILES = 4096  # files that a process may hold open; each worker of Ray costs the raylet a few
_MIN_INODES = 100_000  # files that Ray may still make there
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # below the temporary folder
_LONGEST_SOCKET = 107  # bytes that Linux takes
_PROBE = 8 * 2**20  # bytes that are written and read to see how fast a store is
_SLOW = 10.0  # seconds for that, above which a run waits for its store
_MAX_SKEW = 60.0  # seconds between the clocks of a store and of this machine; S3 refuses at 15 minutes
_ANSWERS = 20.0  # seconds for a cluster's head to answer a stranger

# Exits with 0 if the core of the cluster at an address answers somebody without a token, and with 3 if it refuses.
_STRANGER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=b"screening", timeout=5)
except AuthenticationError:
    sys.exit(3)
"""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        state: ``wrong`` keeps a run from working, ``warning`` may.
        found: what is there.
        mend: what to do about it; empty where all is well.
    """

    check: str
    state: State
    found: str
    mend: str = ""


def examine(urls: Sequence[str] = ()) -> pd.DataFrame:
    """Look at everything that a run depends on.

    Args:
        urls: folders or object-store prefixes that must be reached. A file is written there and removed again.

    Returns:
        A row a finding: check, state, found, mend.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _torch, _machine, _gpus, _auth, _ray, _open_clusters]
    findings = [finding for check in checks for finding in _looked(check)]
    findings += [finding for url in urls for finding in _storage(url)]
    return pd.DataFrame([asdict(finding) for finding in findings])


def _looked(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds, and what has kept it from looking."""
    try:
        yield from check()
    except OSError as error:
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding(name, "wrong", f"cannot be looked at: {error}", "let this user read it")


# --- software ---------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Whether Python and what is installed lie in the ranges that the package was written to."""
    wanted = [Requirement(line) for line in importlib.metadata.requires("screening") or []]
    wrong = []
    needed = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    python = platform.python_version()
    if not SpecifierSet(importlib.metadata.metadata("screening")["Requires-Python"]).contains(python):
        wrong.append(f"Python {python} is too old")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("screening", "ray", "numpy", "zarr")]
    shown = ", ".join([f"Python {python}", *versions])
    if wrong:
        mend = "pip install --constraint constraints.txt ."
        yield Finding("packages", "wrong", "; ".join(wrong), mend)
    else:
        yield Finding("packages", "ok", f"{len(needed)} in their ranges: {shown}")


def _torch() -> Iterator[Finding]:
    """Whether torchvision is made for this torch, by version and by build."""
    torch, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    shown = f"torch {torch} ({_build('torch')}), torchvision {vision} ({_build('torchvision')})"
    wanted = _wanted_torch()
    if wanted is not None and not wanted.specifier.contains(Version(torch).public, prereleases=True):
        mend = f"torchvision {vision} needs {wanted}: pip install --constraint constraints.txt torch torchvision"
        yield Finding("torch", "wrong", shown, mend)
    elif _build("torch") != _build("torchvision"):
        yield Finding(
            "torch",
            "warning",
            shown,
            "of two builds: torchvision's own operators do not work; no stage uses them. Take both from the same index",
        )
    else:
        yield Finding("torch", "ok", shown)


def _wanted_torch() -> Requirement | None:
    for line in importlib.metadata.requires("torchvision") or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name == "torch":
            return requirement
    return None


def _build(package: str) -> str:
    """``cpu``, ``cu130`` and the like, as the package's own version file says; it is not imported, which might fail."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, "its metadata is there"
    assert spec.origin is not None, "it is a package with a file"
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = ['\"](.+)['\"]$", text, re.MULTILINE)
    return (Version(version[1]).local if version else None) or "no build named"


# --- the machine ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    """What the control groups of a process allow it: CPUs and bytes; None where they do not limit it."""

    cpus: float | None
    memory: float | None


def _limits(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> _Limits:
    """Read the limits of this process's control groups and of those above them, of version 2 or 1."""
    cpus, memory = [], []
    for entry in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = entry.split(":", 2)
        kinds = controllers.split(",") if controllers else [""]
        for kind in {"", "cpu", "memory"} & set(kinds):
            for folder in (groups / kind / path.lstrip("/"), *(groups / kind / path.lstrip("/")).parents):
                if not folder.is_relative_to(groups / kind):
                    break
                cpus.append(_cpu_quota(folder))
                memory += [_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes")]
    return _Limits(min(filter(None, cpus), default=None), min(filter(None, memory), default=None))


def _cpu_quota(folder: Path) -> float | None:
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else float(quota) / float(period)
    quota_us, period_us = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota_us / period_us if quota_us and period_us else None


def _number(path: Path) -> float | None:
    """A number above 0 that a file holds alone; None for no file, ``max`` and -1."""
    text = path.read_text().strip() if path.is_file() else ""
    return float(text) if text.isdecimal() and int(text) else None


def _machine() -> Iterator[Finding]:
    limits = _limits()
    yield _cpus(limits)
    yield _memory(limits)
    yield from _disks()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _MIN_FILES:
        yield Finding("open files", "warning", f"at most {files}", f"ulimit -n {_MIN_FILES} before the run")
    else:
        yield Finding("open files", "ok", "no limit" if files == resource.RLIM_INFINITY else f"at most {files}")


def _cpus(limits: _Limits) -> Finding:
    """Whether Ray would start as many workers as there are CPUs for."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = min(there, limits.cpus or there)
    counted = ray._private.utils.get_num_cpus()
    found = f"{usable:g} that this process may use"
    if counted > max(1.0, usable):
        mend = f"Ray counts {counted} here and would crowd them: set resources.cpus={max(1, int(usable))}"
        return Finding("CPUs", "warning", found, mend)
    return Finding("CPUs", "ok", found)


def _memory(limits: _Limits) -> Finding:
    memory = psutil.virtual_memory()
    limited = limits.memory is not None and limits.memory < memory.total
    total = limits.memory if limited and limits.memory else memory.total
    free = min(memory.available, total)
    found = f"{_gib(free)} of {_gib(total)} free{' (the limit of its control group)' if limited else ''}"
    if free < _MIN_MEMORY:
        mend = f"a run wants about {_gib(_MIN_MEMORY)}: end what else runs, raise the limit, or lower resources.cpus"
        return Finding("memory", "warning", found, mend)
    return Finding("memory", "ok", found)


def _disks() -> Iterator[Finding]:
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    # Ray makes it where it is not there.
    there = next(folder for folder in (Path(temporary), *Path(temporary).absolute().parents) if folder.exists())
    disk = os.statvfs(there)
    free, inodes = disk.f_bavail * disk.f_frsize, disk.f_favail
    found = f"{temporary}: {_gib(free)} free"
    if len(os.fsencode(temporary)) + len(_SOCKET) > _LONGEST_SOCKET:
        mend = f"Ray's sockets would have names of more than {_LONGEST_SOCKET} bytes: name a shorter RAY_TMPDIR"
        yield Finding("temporary disk", "wrong", found, mend)
    elif free < _MIN_DISK:
        mend = f"Ray spills and logs there; make {_gib(_MIN_DISK)} free or name another disk by RAY_TMPDIR"
        yield Finding("temporary disk", "warning", found, mend)
    elif disk.f_files and inodes < _MIN_INODES:
        mend = "Ray spills and logs there; remove small files or name another disk by RAY_TMPDIR"
        yield Finding("temporary disk", "warning", f"{found}, for {inodes:,} more files", mend)
    else:
        yield Finding("temporary disk", "ok", found)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        wanted = ResourcesConfig().object_store_mb
        if free < wanted * 2**20:
            mend = (
                f"Ray's object store wants {wanted} MiB there (resources.object_store_mb) and would be slow on the "
                "temporary disk; in a container: --shm-size"
            )
            yield Finding("shared memory", "warning", f"{_gib(free)} free", mend)
        else:
            yield Finding("shared memory", "ok", f"{_gib(free)} free")


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = [f"{device.name} ({device.major}.{device.minor}, {_gib(device.total_memory)})" for device in devices]
        found = f"{', '.join(names)}; driver {_driver()}, CUDA {torch.version.cuda} in torch"
        built = torch.cuda.get_arch_list()
        if any(not _runs_on(built, device.major, device.minor) for device in devices):
            mend = f"this torch is built for {', '.join(built)}: install a build of it for the GPU's capability"
            yield Finding("GPUs", "wrong", found, mend)
        else:
            mend = "" if ResourcesConfig().train_gpus else "set resources.train_gpus and resources.embed_gpus to use it"
            yield Finding("GPUs", "ok", found, mend)
    elif Path("/dev/nvidia0").exists():
        cause = "torch is built for CPUs" if torch.version.cuda is None else "its driver does not work (nvidia-smi)"
        mend = "install the CUDA build of the same version of torch, or mend the driver"
        yield Finding("GPUs", "wrong", f"there is one, driver {_driver()}, and {cause}", mend)
    else:
        yield Finding("GPUs", "ok", "none")


def _driver(told: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's driver."""
    version = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]*)", told.read_text()) if told.is_file() else None
    return version[1] if version else "unknown"


def _runs_on(built: Sequence[str], major: int, minor: int) -> bool:
    """Whether code built for these runs: binaries within a major version, intermediate code on all later ones."""
    for architecture in built:
        kind, _, digits = architecture.partition("_")
        version = re.match(r"\d+", digits)
        if version is None:
            continue
        of = (int(version[0]) // 10, int(version[0]) % 10)
        if of <= (major, minor) and (kind == "compute" or of[0] == major):
            return True
    return False


# --- Ray --------------------------------------------------------------------------------------


def _auth() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    given = bool(os.environ.get("RAY_AUTH_TOKEN"))  # comes before the file
    there = given or path.is_file()
    shown = f"RAY_AUTH_MODE={mode or 'not set'}, {'a' if there else 'no'} token"
    if mode.lower() == "disabled":
        mend = "whoever reaches the cluster's ports can run commands on it: RAY_AUTH_MODE=token for all its processes"
        yield Finding("authentication", "warning", shown, mend)
    elif not there:
        state: State = "wrong" if cluster_address() and mode else "warning" if cluster_address() else "ok"
        mend = "ray get-auth-token --generate, or copy the cluster's token there" if cluster_address() else ""
        yield Finding("authentication", state, f"{shown} ({path})", mend)
    elif not given and not path.read_text(encoding="utf-8", errors="replace").strip():
        mend = f"rm {path}; ray get-auth-token --generate, or copy the cluster's token there"
        yield Finding("authentication", "wrong", f"{shown}, which is empty ({path})", mend)
    elif not given and path.stat().st_mode & 0o077:
        yield Finding("authentication", "warning", f"{shown}, which others can read", f"chmod 600 {path}")
    else:
        yield Finding("authentication", "ok", shown)


def _ray() -> Iterator[Finding]:
    """Whether the cluster that ``RAY_ADDRESS`` names lets us in, what it has, and where its dashboard listens."""
    address = cluster_address()
    if not address:
        yield Finding("Ray", "ok", "no RAY_ADDRESS: a run starts Ray on this machine")
        return
    try:
        with cluster(ResourcesConfig()):
            there = ray.cluster_resources()
            alive = sum(node["Alive"] for node in ray.nodes())
            dashboard = ray._private.worker.get_dashboard_url() or ""
    except InputError as error:
        yield Finding("Ray", "wrong", f"RAY_ADDRESS={address}", str(error))
        return
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    yield Finding("Ray", "ok", f"{address}: {alive} node(s), {cpus:g} CPUs, {gpus:g} GPUs now; it may grow by itself")
    yield _dashboard(dashboard)


def _dashboard(address: str) -> Finding:
    """Whether the dashboard, which submits jobs too, can be reached from other machines."""
    host = address.rpartition(":")[0].strip("[]")
    if not host:
        mend = "jobs cannot be submitted: install the extra cluster on the head (ray[default]) and start it again"
        return Finding("dashboard", "warning", "none", mend)
    if host == "localhost" or (re.fullmatch(r"[\d.]+|.*:.*", host) and ipaddress.ip_address(host).is_loopback):
        return Finding("dashboard", "ok", f"{address}: reached from the head alone, or through `ray dashboard`")
    mend = "ray start --head --dashboard-host=127.0.0.1, and reach it through `ray dashboard` or SSH"
    return Finding("dashboard", "warning", f"{address}: other machines can reach it", mend)


def _open_clusters() -> Iterator[Finding]:
    """Whether a cluster of this machine, or the one that ``RAY_ADDRESS`` names, obeys somebody without a token."""
    named = cluster_address()
    addresses = {named} if ":" in named and "://" not in named else set()
    answering = sorted(filter(_answers, addresses | _clusters_here()))
    with ThreadPoolExecutor() as pool:
        opened = [name for name, open_ in zip(answering, pool.map(_lets_strangers_in, answering), strict=True) if open_]
    if opened:
        mend = "start it with RAY_AUTH_MODE=token for all its processes: whoever reaches its ports can run commands"
        yield Finding("strangers", "warning", f"let in by the Ray at {', '.join(opened)}", mend)
    else:
        yield Finding("strangers", "ok", "let in by no Ray that is known here")


def _clusters_here() -> set[str]:
    """Addresses of the clusters whose processes run on this machine."""
    return set(ray._private.services.find_gcs_addresses())


def _answers(address: str) -> bool:
    """Whether anything listens there; the processes of other machines' namespaces may be seen and not reached."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 1.0).close()
    except (OSError, ValueError):
        return False
    return True


def _lets_strangers_in(address: str) -> bool:
    """Ask from a process that has no token and does not want one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_TOKEN")}
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _STRANGER, address],
            env={**environment, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            timeout=_ANSWERS,
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


# --- storage ----------------------------------------------------------------------------------


def _storage(url: str) -> Iterator[Finding]:
    """Whether files can be written under a URL, read back, listed and removed; how fast, and by which clock."""
    shown = events.masked(url)
    folder = store.join(url, f".screening-doctor-{uuid.uuid4().hex}")
    data = os.urandom(_PROBE)
    doing = "opened"
    try:
        store.filesystem(url)
        doing = "written to"
        start = time.monotonic()
        store.write_bytes(store.join(folder, "large"), data)
        written = time.monotonic() - start
        try:
            doing = "read back from"
            start = time.monotonic()
            same = store.read_bytes(store.join(folder, "large")) == data
            read = time.monotonic() - start
            doing = "listed"
            store.write_bytes(store.join(folder, "small"), b"screening")
            now = time.time()
            clock = store.list_times(folder)["small"]
            start = time.monotonic()
            store.read_bytes(store.join(folder, "small"))
            latency = time.monotonic() - start
            doing = "cleaned up"
        finally:
            store.remove(folder)
    except InputError as error:
        yield Finding("storage", "wrong", f"{shown}: cannot be {doing}", events.masked(str(error)))
        return
    except Exception as error:  # each store has errors of its own
        mend = "check the address, the network and the credentials that this machine has for it"
        why = events.masked(f"{type(error).__name__}: {error}")
        yield Finding("storage", "wrong", f"{shown}: cannot be {doing}: {why}", mend)
        return
    speed = f"{_speed(written)} written, {_speed(read)} read, a small file in {1000 * latency:.0f} ms"
    found = f"{shown}: written, read, listed and removed; {speed}"
    if not same:
        yield Finding("storage", "wrong", f"{shown}: gives back other bytes than were written", "mend the store")
    elif max(written, read) > _SLOW:
        yield Finding("storage", "warning", found, "a run would wait for it: use a store nearer to the machines")
    else:
        yield Finding("storage", "ok", found)
    if abs(clock - now) > _MAX_SKEW:
        found = f"{shown}: its clock differs by {clock - now:+.0f} s from this machine's"
        mend = "set the clocks (NTP): S3 refuses who is late, and `screening status --watch` tells wrong rates"
        yield Finding("clock", "warning", found, mend)


def _speed(seconds: float) -> str:
    return f"{_PROBE / 2**20 / max(seconds, 1e-6):.0f} MiB/s"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
