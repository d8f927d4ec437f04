"""What stands in the way of a run on this machine, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil
import ray
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from pipelines.cluster import cluster, cluster_address
from pipelines.config import ResourcesConfig
from storage_schemas import store
from storage_schemas.errors import InputError

State = Literal["ok", "warning", "wrong"]

_MIN_MEMORY = 4 * 2**30  # bytes that a run of the defaults should find free
_MIN_DISK = 10 * 2**30  # bytes for what Ray spills and logs
_MIN_FILES = 4096  # files that a process may hold open; each worker of Ray costs the raylet a few


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
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _torch, _machine, _gpus, _auth, _ray]
    findings = [finding for check in checks for finding in check()]
    findings += [_storage(url) for url in urls]
    return pd.DataFrame([asdict(finding) for finding in findings])


# --- software ---------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Whether what is installed lies in the ranges that the package was written to."""
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
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("screening", "ray", "numpy", "zarr"))
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


def _machine() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPUs", "ok", f"{usable} that this process may use")
    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} of {_gib(memory.total)} free"
    if memory.available < _MIN_MEMORY:
        mend = f"a run wants about {_gib(_MIN_MEMORY)}: end what else runs, or lower resources.cpus"
        yield Finding("memory", "warning", found, mend)
    else:
        yield Finding("memory", "ok", found)
    yield from _disks()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _MIN_FILES:
        yield Finding("open files", "warning", f"at most {files}", f"ulimit -n {_MIN_FILES} before the run")
    else:
        yield Finding("open files", "ok", "no limit" if files == resource.RLIM_INFINITY else f"at most {files}")


def _disks() -> Iterator[Finding]:
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    free = shutil.disk_usage(temporary).free
    if free < _MIN_DISK:
        mend = f"Ray spills and logs there; make {_gib(_MIN_DISK)} free or name another disk by RAY_TMPDIR"
        yield Finding("temporary disk", "warning", f"{temporary}: {_gib(free)} free", mend)
    else:
        yield Finding("temporary disk", "ok", f"{temporary}: {_gib(free)} free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        wanted = ResourcesConfig().object_store_mb
        if free < wanted * 2**20:
            mend = (
                f"Ray's object store wants {wanted} MiB there (resources.object_store_mb); in a container: --shm-size"
            )
            yield Finding("shared memory", "warning", f"{_gib(free)} free", mend)
        else:
            yield Finding("shared memory", "ok", f"{_gib(free)} free")


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        mend = "" if ResourcesConfig().train_gpus else "set resources.train_gpus and resources.embed_gpus to use them"
        yield Finding("GPUs", "ok", ", ".join(names), mend)
    elif Path("/dev/nvidia0").exists():
        cause = "torch is built for CPUs" if torch.version.cuda is None else "its driver does not work (nvidia-smi)"
        mend = "install the CUDA build of the same version of torch, or mend the driver"
        yield Finding("GPUs", "wrong", f"there is one, and {cause}", mend)
    else:
        yield Finding("GPUs", "ok", "none")


# --- Ray --------------------------------------------------------------------------------------


def _auth() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    there = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    shown = f"RAY_AUTH_MODE={mode or 'not set'}, {'a' if there else 'no'} token"
    if mode.lower() == "disabled":
        mend = "whoever reaches the cluster's ports can run commands on it: RAY_AUTH_MODE=token for all its processes"
        yield Finding("authentication", "warning", shown, mend)
    elif not there:
        state: State = "wrong" if cluster_address() and mode else "warning" if cluster_address() else "ok"
        mend = "ray get-auth-token --generate, or copy the cluster's token there" if cluster_address() else ""
        yield Finding("authentication", state, f"{shown} ({path})", mend)
    elif path.is_file() and path.stat().st_mode & 0o077:
        yield Finding("authentication", "warning", f"{shown}, which others can read", f"chmod 600 {path}")
    else:
        yield Finding("authentication", "ok", shown)


def _ray() -> Iterator[Finding]:
    """Whether the cluster that ``RAY_ADDRESS`` names lets us in, and what it has."""
    address = cluster_address()
    if not address:
        yield Finding("Ray", "ok", "no RAY_ADDRESS: a run starts Ray on this machine")
        return
    try:
        with cluster(ResourcesConfig()):
            there = ray.cluster_resources()
            alive = sum(node["Alive"] for node in ray.nodes())
    except InputError as error:
        yield Finding("Ray", "wrong", f"RAY_ADDRESS={address}", str(error))
        return
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    yield Finding("Ray", "ok", f"{address}: {alive} node(s), {cpus:g} CPUs, {gpus:g} GPUs now; it may grow by itself")


# --- storage ----------------------------------------------------------------------------------


def _storage(url: str) -> Finding:
    """Whether a file can be written under a URL, read back, and removed."""
    probe = store.join(url, f".screening-doctor-{uuid.uuid4().hex}")
    data = b"screening"
    doing = "opened"
    try:
        store.filesystem(url)
        doing = "listed"
        store.list_names(url)
        doing = "written to"
        store.write_bytes(probe, data)
        try:
            doing = "read back from"
            if store.read_bytes(probe) != data:
                return Finding("storage", "wrong", f"{url}: gives back other bytes than were written", "mend the store")
        finally:
            store.remove(probe)
    except InputError as error:
        return Finding("storage", "wrong", f"{url}: cannot be {doing}", str(error))
    except Exception as error:  # each store has errors of its own
        mend = "check the address, the network and the credentials that this machine has for it"
        return Finding("storage", "wrong", f"{url}: cannot be {doing}: {type(error).__name__}", mend)
    return Finding("storage", "ok", f"{url}: written, read and removed")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
