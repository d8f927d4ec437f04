"""Starting Ray: an existing cluster where there is one, else one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from pipelines import events
from storage_schemas.errors import InputError

READER_CPUS = 0.25  # that an actor asks for which reads and augments batches
_PATIENCE = 10.0  # seconds for a cluster's head to answer; Ray itself would try for minutes

if TYPE_CHECKING:  # the configuration pulls in torch, which segmentation workers do without
    from pipelines.config import ResourcesConfig


@contextmanager
def cluster(resources: ResourcesConfig) -> Iterator[None]:
    """Use the Ray that there is, for as long as the block lasts.

    It is, in this order: the one that this process is connected to already, as in a notebook or a test, which is left
    running; the cluster that ``RAY_ADDRESS`` names, which Ray sets in a job; or one started on this machine.

    Raises:
        InputError: if the cluster cannot be reached or does not let us in, if what is asked of it is not there, or for
            what failed in the block.
    """
    if ray.is_initialized():
        with _translated():
            yield
        return
    # Ray's own bars would fight with ours, and one screen's stages are told apart by ours.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core logs as an error what Ray Data's every actor pool does; what goes wrong is raised as well.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _silenced_stderr():
        if address := cluster_address():
            _connect(address, **common)
        else:
            ray.init(
                address="local",
                num_cpus=resources.cpus,
                object_store_memory=resources.object_store_mb * 2**20,
                include_dashboard=False,
                **common,
            )
    quiet_ray_data()
    try:
        with _translated():
            check_room(resources)
            yield
    finally:
        ray.shutdown()


def cluster_address() -> str:
    """The running cluster that ``RAY_ADDRESS`` names; empty if Ray is to be started on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def _connect(address: str, **options: Any) -> None:
    """Connect to a running cluster.

    Raises:
        InputError: if it is not there, or does not let us in.
    """
    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS={address}: a run is driven from a machine of the cluster; submit it as a job "
            "(`ray job submit`, see docs/cluster.md), or give the head's address as host:port"
        )
    absent = (
        f"RAY_ADDRESS={address}: no Ray cluster answers there; start it (`ray start --head`, `ray up`), mend the "
        "address, or unset RAY_ADDRESS to use this machine"
    )
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except OSError as error:
        raise InputError(f"{absent} ({error})") from error
    try:
        ray.init(**options)
    except RuntimeError as error:  # Ray checks its version and Python's first
        raise InputError(f"RAY_ADDRESS={address}: {error}; install the same versions here and there") from error
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if not host:
            raise InputError(f"{absent} ({error})") from error
        raise InputError(
            f"RAY_ADDRESS={address}: what answers there does not let us in ({error}); one that asks for a token "
            "wants RAY_AUTH_MODE=token and its token in ~/.ray/auth_token (or the file that RAY_AUTH_TOKEN_PATH names)"
        ) from error


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what a task raised, not Ray's account of where it ran."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from error
        raise InputError(f"a task failed: {error}") from error
    except ray.exceptions.RayError as error:
        raise InputError(f"Ray could not go on: {error}") from error


def check_room(resources: ResourcesConfig) -> None:
    """Refuse what this machine can never place: Ray would wait for it without end.

    A cluster may still grow: there it is said what is waited for.

    Raises:
        InputError: naming the setting.
    """
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    memory = there.get("memory", 0.0) / 2**20
    workers = resources.train_workers
    readers = READER_CPUS * resources.train_readers * workers
    wanted = {
        "segment_cpus": (resources.segment_cpus, cpus, "CPUs"),
        "segment_gpus": (resources.segment_gpus, gpus, "GPUs"),
        "train_readers": (readers + training_cpus(resources).asked * workers, cpus, "CPUs, with the training workers,"),
        "segment_memory_mb": (resources.segment_memory_mb, memory, "MiB of memory"),
        "embed_memory_mb": (resources.embed_memory_mb * (resources.embed_actors or 1), memory, "MiB of memory"),
        "train_memory_mb": (resources.train_memory_mb * workers, memory, "MiB of memory"),
        "train_gpus": (resources.train_gpus * workers, gpus, "GPUs"),
        "embed_gpus": (resources.embed_gpus * (resources.embed_actors or 1), gpus, "GPUs"),
    }
    for name, (asked, room, what) in wanted.items():
        if asked > room and cluster_address():
            events.note(
                f"resources.{name} asks for {asked:g} {what} and {room:g} are up: waiting for the cluster to grow"
            )
        elif asked > room:
            raise InputError(f"resources.{name} asks for {asked:g} {what} and there are {room:g}; set it lower")


@dataclass(frozen=True)
class ActorCpus:
    """The CPUs of each of several actors that compute side by side.

    Attributes:
        asked: that Ray is to set aside for it.
        threads: that it computes with.
    """

    asked: float
    threads: int


def embedding_actors(resources: ResourcesConfig) -> tuple[int | None, ActorCpus]:
    """How many actors embed, and the CPUs of each; on a GPU it only feeds.

    On a cluster there are as many as there is work and room for, which is what None stands for. One machine has one
    a GPU, or one that computes on all of its CPUs.
    """
    if resources.embed_actors is None and cluster_address() and resources.cpus is None:
        return None, ActorCpus(resources.embed_cpus, max(1, int(resources.embed_cpus)))
    actors = resources.embed_actors or _gpu_actors(resources) or 1
    share = usable_cpus(resources) / actors
    return actors, _actor_cpus(resources, resources.embed_cpus, share, share)


def one_pass_actors(resources: ResourcesConfig) -> tuple[int, ActorCpus]:
    """How many actors embed beside the tasks that segment, and the CPUs of each."""
    cpus = usable_cpus(resources)
    actors = resources.embed_actors or _gpu_actors(resources) or max(1, int(cpus / 2))
    # One well at least must find room beside them, and a task that reads; where there is none they share its CPU.
    left = max(0.0, cpus - max(1.0, resources.segment_cpus)) / actors
    return actors, _actor_cpus(resources, resources.embed_cpus, 1, left)


def _gpu_actors(resources: ResourcesConfig) -> int:
    """How many actors find room on the GPUs that are up, one at least; 0 if they ask for none."""
    if not resources.embed_gpus:
        return 0
    return max(1, int(ray.cluster_resources().get("GPU", 0.0) / resources.embed_gpus))


def training_cpus(resources: ResourcesConfig) -> ActorCpus:
    """The CPUs of a training worker: where CPUs are few it asks for so few that all find room on half of the nodes."""
    share = usable_cpus(resources) / resources.train_workers
    return _actor_cpus(resources, resources.train_cpus, share, 0.25 * share)


def _actor_cpus(resources: ResourcesConfig, wanted: float, share: float, most: float) -> ActorCpus:
    """What is wanted, or as much of it as there can be at most.

    A cluster has as few CPUs as happen to be up and may grow: there is no most of it, unless the run is told one.
    """
    asked = wanted if cluster_address() and resources.cpus is None else min(wanted, most)
    return ActorCpus(asked, max(1, int(max(share, asked))))


def usable_cpus(resources: ResourcesConfig) -> float:
    """CPUs that a run may count on: as many as it is told, as when runs share a cluster, or else those that are up.

    A cluster may come to have as many as it is told; what this machine has not it will not have.
    """
    there = cpus_up()
    told = float(resources.cpus or there)
    return told if cluster_address() else min(there, told)


def cpus_up() -> float:
    """CPUs of the nodes that are up now; a cluster that has yet to start its first worker counts as one."""
    there: float = ray.cluster_resources().get("CPU", 0.0)
    return there or 1.0


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Drop what Ray's core says of its own log settings; what goes wrong is raised, not only logged."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def quiet_ray_data() -> None:
    """Switch Ray Data's progress bars and its narration off; stages report for themselves."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
