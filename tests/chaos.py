"""Chaos: a screen is run on a cluster of this machine while workers, nodes and drivers are killed and the store fails.

Run: ``make chaos``, or ``python tests/chaos.py [SEED …]`` for some of the runs. What is killed and when is drawn from
the seed. Each run must end by itself with exit code 0 and leave what the undisturbed run left: the same files byte for
byte, every unit once, the same counts, no part of a file and no process. It prints a line a run, and ends with 1 if
one of them is not so.

The cluster is a head without CPUs and two workers with one each, made by `ray start` and asking for a token: machines
of Linux namespaces, or processes with ports of their own where these are not allowed. What dies is replaced by a fresh
node some seconds later, as an autoscaler would.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

import boto3
import psutil
import pyarrow.parquet as pq
import yaml
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from machines import House, Machine, Network, NoMachinesError, command_line
from rich.console import Console
from rich.table import Table
from runs import digests, indexed, kill_process
from s3_server import KEY, REGION, SECRET, S3Server

Kind = Literal["worker", "raylet", "node", "notice", "driver", "head"]
Where = Literal["disk", "S3"]
Moment = Literal["segment", "train", "embed"]
Way = Literal["train", "network", "one pass"]  # a network is trained; one is taken; and no clips are kept
T = TypeVar("T")

KINDS: tuple[Kind, ...] = get_args(Kind)
MOMENTS: tuple[Moment, ...] = get_args(Moment)
FIRST: tuple[Kind, ...] = ("worker", "raylet", "driver")  # one of them in every run
SIMULATION = {
    "replicates": 2,
    "moas": ["uncoupler", "potassium ionophore"],
    "compounds_per_moa": 4,
    "controls_per_plate": 4,
    "sites_per_well": 2,
    "frames": 6,
    "height": 256,
    "width": 256,
    "cells_per_site": 8,
}
WELLS = 24
WORKERS = 2
STARTS = 5
EPOCHS = 3
SETTINGS: dict[str, object] = {
    "model.width": 4,
    "segment.clips.size": 32,
    "segment.clips.frames": 4,
    "train.epochs": EPOCHS,
    "train.p": 3,
    "train.k": 2,
}
# One thread trains: with more, sums are rounded in another order, and nodes come and go here.
TRAINED = {"resources.cpus": 1}
STAGES = ("segment", "train", "embed", "index")
RESULTS = (
    *("calibration", "cells", "quality", "clips", "split.parquet", "train/metrics.parquet"),
    *("checkpoint", "embeddings", "profiles"),
)

SCREENING = Path(sys.executable).with_name("screening")
PATIENCE = 1200.0  # seconds for a run to end
GRACE = 10  # seconds between the notice that a spot instance gets and its end
FRESH = 3.0  # seconds until a node that was lost is replaced

# Ray notices a lost node late unless told otherwise, and the runs here are short.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
# Processes of Ray that hold no work of a run. The last is left by a driver that is killed while it trains: Ray Train's
# (2.60) does not end itself, since it says so from a thread that is not its first.
_HELPERS = (
    "_StatsActor",
    "ActorLocationTracker",
    "_AutoscalingCoordinatorActor",
    "DatasetManager",
    "PlacementGroupCleaner",
)
_IDLE = re.compile(rf"ray::(IDLE|\w*Agent|{'|'.join(_HELPERS)})")


# --- what is to happen ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something is killed.

    Attributes:
        kind: what: a process of Ray that works, a raylet, a whole node at once or after a notice, the driver, the head.
        moment: stage that has come so far when it happens.
        count: how far: units of the stage, or epochs, that are done.
        delay: seconds from then on.
        pick: which of those that there are, as a share of their number.
    """

    kind: Kind
    moment: Moment
    count: int
    delay: float
    pick: float

    def __str__(self) -> str:
        return f"{self.kind} at {self.moment} {self.count}"


@dataclass(frozen=True)
class Plan:
    """What happens in a run.

    Attributes:
        seed: that it is drawn from.
        where: plates and screen lie.
        way: that the run goes.
        faults: in the order in which they happen.
    """

    seed: int
    where: Where
    way: Way
    faults: tuple[Fault, ...]


def draw(seed: int) -> Plan:
    """The plan of a seed: one kill of a worker, a raylet or the driver at least, and up to two of any kind."""
    rng = random.Random(seed)
    kinds = [FIRST[seed % len(FIRST)], *rng.choices(KINDS, k=rng.randrange(3))]
    faults = [_draw_fault(rng, kind) for kind in kinds]
    faults.sort(key=lambda fault: (MOMENTS.index(fault.moment), fault.count))
    way: Way = "one pass" if seed % 5 == 3 else "network"
    if any(fault.moment == "train" for fault in faults):
        way = "train"
    return Plan(seed, "S3" if seed % 2 else "disk", way, tuple(faults))


def _draw_fault(rng: random.Random, kind: Kind) -> Fault:
    moment = rng.choices(MOMENTS, (0.5, 0.15, 0.35))[0]
    count = rng.randint(1, (EPOCHS if moment == "train" else WELLS) - 2)
    return Fault(kind, moment, count, rng.uniform(0, 1), rng.random())


# --- the cluster ---------------------------------------------------------------------------------


class Node:
    """A worker node, from its start on.

    Attributes:
        machine: that it is on.
    """

    def __init__(self, machine: Machine, address: str, environment: dict[str, str]) -> None:
        self.machine = machine
        sizes = ("--num-cpus=1", "--object-store-memory=100000000")
        command = ("ray", "start", f"--address={address}", *sizes)
        self._start = machine.start(*command, log=machine.home / "start.log", **environment)
        self._raylet: psutil.Process | None = None

    @property
    def raylet(self) -> psutil.Process | None:
        """Its raylet, once it has joined."""
        if self._raylet is None and self._start.poll() is not None:
            (self._raylet,) = self.machine.processes("raylet/raylet")[:1] or [None]
        return self._raylet

    @property
    def joins(self) -> bool:
        """Whether it is about to join."""
        return self._start.poll() is None

    @property
    def lost(self) -> bool:
        """Whether it has died, or could not join."""
        return not self.joins and (self.raylet is None or not _alive(self.raylet))


class Cluster:
    """A head without CPUs and two workers, which are replaced when they are lost.

    Args:
        network: of its machines.
        environment: of all processes on it.

    Attributes:
        head: where drivers run.
    """

    def __init__(self, network: Network | House, environment: dict[str, str]) -> None:
        self._network = network
        self._given = environment
        self._token = ""
        self._nodes: list[Node] = []
        self._lost: list[Machine] = []  # but for what Ray has not noticed yet, nothing is there any more
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._start()

    @property
    def environment(self) -> dict[str, str]:
        """What the processes of Ray and those who talk to them are told."""
        # Ray's own workers step back behind all else on a machine: here everything is on one.
        return {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", **HEALTH, **self._given}

    def _start(self) -> None:
        sizes = ("--num-cpus=0", "--object-store-memory=100000000", "--include-dashboard=false")
        # Ray gives up a start after half a minute, which may be too soon on a machine that is busy with much else.
        for _ in range(STARTS):
            self.head = self._machine("head")
            port = 6379 + len(self._network.made)
            self.address = f"{self.head.address}:{port}"
            done = self.head.run("ray", "start", "--head", f"--port={port}", *sizes, **self.environment)
            if done.returncode == 0:
                break
            self.head.close()
        else:
            raise RuntimeError(f"no head could be started: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        self._due += [(0.0, self._join)] * WORKERS

    def _machine(self, kind: str) -> Machine:
        machine = self._network.add(f"{kind}{len(self._network.made)}")
        if not self._token:
            machine.check("ray", "get-auth-token", "--generate")
            self._token = (machine.home / ".ray" / "auth_token").read_text()
        (machine.home / ".ray").mkdir(exist_ok=True)
        (machine.home / ".ray" / "auth_token").write_text(self._token)
        return machine

    def _join(self) -> None:
        self._nodes.append(Node(self._machine("worker"), self.address, self.environment))

    def go_on(self) -> None:
        """Do what is due by now, and have whatever nodes were lost replaced some seconds later."""
        now = time.monotonic()
        for entry in [entry for entry in self._due if entry[0] <= now]:
            # One at a time: nodes that start at once on one machine may take the same socket.
            if entry[1] != self._join or not any(node.joins for node in self._nodes):
                self._due.remove(entry)
                entry[1]()
        for node in [node for node in self._nodes if node.lost]:
            self._nodes.remove(node)
            self._lost.append(node.machine)
            self._due.append((now + FRESH, self._join))

    def working(self) -> list[psutil.Process]:
        """Processes of Ray that work for a run, in order of their age."""
        return _working(self.head, *(node.machine for node in self._nodes))

    def do(self, fault: Fault) -> bool:
        """Make a fault of a worker, a raylet, a node or the head happen; false if there is none to hit by now."""
        if fault.kind == "head":
            self._lose_head()
            return True
        if fault.kind == "worker":
            victims = self.working()
            if victims:
                kill_process(_picked(victims, fault.pick))
            return bool(victims)
        nodes = [node for node in self._nodes if node.raylet is not None and not node.lost]
        if not nodes:
            return False
        node = _picked(nodes, fault.pick)
        assert node.raylet is not None
        if fault.kind == "raylet":
            kill_process(node.raylet)
        elif fault.kind == "node":
            node.machine.kill()
        else:
            self._give_notice(re.findall(r"--node_id=(\w+)", command_line(node.raylet))[0])
            self._due.append((time.monotonic() + GRACE, node.machine.kill))
        return True

    def _give_notice(self, node_id: str) -> None:
        """Tell Ray, as the provider of a spot instance tells its owner, that the node ends soon."""
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot")
        self.head.start(
            *("ray", "drain-node", f"--address={self.address}", f"--node-id={node_id}", *reason),
            f"--deadline-remaining-seconds={GRACE}",
            log=self.head.home / "drain.log",
            **self.environment,
        )

    def _lose_head(self) -> None:
        """Cut the head's power, and start a cluster anew; workers of the old one are left to find out."""
        self.head.kill()
        self._lost += [self.head, *(node.machine for node in self._nodes)]
        self._nodes, self._due = [], []
        self._start()

    def heal(self, timeout: float = 300) -> list[str]:
        """Have two workers again, and nothing that works for a run that has ended; what is amiss after a while."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.go_on()
            ready = not self._due and sum(not node.joins for node in self._nodes) == WORKERS
            # On nodes that were lost, too: without its raylet, or its head, a worker is to end by itself.
            left = _working(self.head, *(node.machine for node in self._nodes), *self._lost)
            if ready and not left:
                break
            time.sleep(0.5)
        for machine in self._lost:
            machine.close()
        self._lost = []
        orphans = [f"process left over: {command_line(process).strip()}" for process in left]
        return orphans if ready else [*orphans, "no two workers"]


def _working(*machines: Machine) -> list[psutil.Process]:
    found = [process for machine in machines for process in machine.processes("ray::") if _works(process)]
    return sorted(found, key=lambda process: process.pid)


def _works(process: psutil.Process) -> bool:
    return _alive(process) and _IDLE.match(command_line(process)) is None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _picked(among: Sequence[T], share: float) -> T:
    return among[int(share * len(among))]


# --- where plates and screens lie ----------------------------------------------------------------


class Store(Protocol):
    """Where plates and screens lie.

    Attributes:
        inputs: folder of the simulated screen.
    """

    inputs: str

    def url(self, name: str) -> str:
        """Of a screen."""

    def listing(self, name: str) -> dict[str, str]:
        """Path in a screen -> what tells this writing of the file from an earlier one."""

    def fetch(self, name: str) -> Path:
        """A screen as a folder."""

    def remove(self, name: str) -> None:
        """What an earlier run has left of a screen."""

    def failing(self, rng: random.Random) -> AbstractContextManager[Trouble]:
        """The store's own faults, for as long as the block lasts."""


class Trouble:
    """What is done to a store as time goes.

    Args:
        due: seconds from now, and what is to be done then.
    """

    def __init__(self, due: Sequence[tuple[float, Callable[[], None]]] = ()) -> None:
        self._start = time.monotonic()
        self._due = list(due)
        self.said = ""

    def go_on(self) -> None:
        """Do what is due by now."""
        passed = time.monotonic() - self._start
        for entry in [entry for entry in self._due if entry[0] <= passed]:
            self._due.remove(entry)
            entry[1]()


class Disk:
    """A folder that all machines share; nothing is wrong with it."""

    def __init__(self, simulated: Path, screens: Path) -> None:
        self.inputs = str(simulated)
        self._screens = screens

    def url(self, name: str) -> str:
        return str(self._screens / name)

    def listing(self, name: str) -> dict[str, str]:
        folder = self._screens / name
        found = {}
        for inner, _, names in os.walk(folder):
            for path in (Path(inner, name) for name in names):
                with suppress(OSError):  # it is being replaced
                    found[str(path.relative_to(folder))] = str(path.stat().st_mtime_ns)
        return found

    def fetch(self, name: str) -> Path:
        return self._screens / name

    def remove(self, name: str) -> None:
        shutil.rmtree(self._screens / name, ignore_errors=True)

    @contextmanager
    def failing(self, rng: random.Random) -> Iterator[Trouble]:
        yield Trouble()


class Bucket:
    """A bucket of a server that fails one request in twenty, is cut off for a while, and is slow for another.

    Args:
        server: that it is of.
        simulated: folder of the simulated screen, which is put into it.
        folder: that screens are fetched into.
    """

    SHARE = 0.05  # of requests that fail
    CUT = 5.0  # seconds
    SLOW = (10.0, 0.2)  # for how many seconds, and seconds more a request

    def __init__(self, server: S3Server, simulated: Path, folder: Path) -> None:
        self.inputs = server.url("simulated")
        self._server = server
        self._folder = folder
        retries = Config(retries={"max_attempts": 10, "mode": "standard"}, connect_timeout=5, read_timeout=10)
        self._client = boto3.client(
            *("s3", REGION),
            endpoint_url=server.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=retries,
        )
        for path in simulated.rglob("*"):
            if path.is_file():
                self._client.put_object(
                    Bucket=server.bucket, Key=f"simulated/{path.relative_to(simulated)}", Body=path.read_bytes()
                )

    def url(self, name: str) -> str:
        return self._server.url(name)

    def listing(self, name: str) -> dict[str, str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._server.bucket, Prefix=f"{name}/")
        found = [entry for page in pages for entry in page.get("Contents", ())]
        return {entry["Key"].removeprefix(f"{name}/"): f"{entry['LastModified']} {entry['ETag']}" for entry in found}

    def fetch(self, name: str) -> Path:
        folder = self._folder / name
        for path in self.listing(name):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            answer = self._client.get_object(Bucket=self._server.bucket, Key=f"{name}/{path}")
            (folder / path).write_bytes(answer["Body"].read())
        return folder

    def remove(self, name: str) -> None:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        for path in self.listing(name):
            self._client.delete_object(Bucket=self._server.bucket, Key=f"{name}/{path}")

    @contextmanager
    def failing(self, rng: random.Random) -> Iterator[Trouble]:
        server, slow = self._server, rng.uniform(5, 60)
        lasts, later = self.SLOW
        trouble = Trouble(
            [
                (rng.uniform(5, 60), lambda: server.cut(self.CUT)),
                (slow, lambda: server.slow(later)),
                (slow + lasts, lambda: server.slow(0)),
            ]
        )
        server.forget()
        server.fail(self.SHARE)
        try:
            yield trouble
        finally:
            server.fail(0)
            server.slow(0)
            ended = server.counts()
            good = sum(count for how, count in ended.items() if re.search(r" [234]\d\d$", how))
            trouble.said = f"{ended.total() - good} of {ended.total()} requests failed"
            time.sleep(self.CUT)


# --- a run -----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        plan: that it was disturbed by.
        happened: faults, with the seconds since the start.
        starts: of the command.
        redone: commits of units that had been committed before.
        store: what its store did.
        seconds: it took.
        wrong: what is not as it should be; empty if the screen is that of the undisturbed run.
    """

    plan: Plan
    happened: list[tuple[Fault, float]] = field(default_factory=list)
    starts: int = 0
    redone: int = 0
    store: str = ""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


_TABLE = re.compile(r"(cells|embeddings)/.*\.parquet$")
_EPOCH = re.compile(r"train/runs/.*/epoch_(\d+)/manifest.json$")


class Progress:
    """What a screen has come to, seen from outside.

    Attributes:
        commits: of each unit: how often its table has been written.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._seen: set[tuple[str, str]] = set()
        self._counts: dict[Moment, int] = dict.fromkeys(MOMENTS, 0)
        self.commits: Counter[str] = Counter()

    def look(self) -> dict[Moment, int]:
        """How many units of each stage, and epochs, are done; as it was before where the store does not answer."""
        with suppress(BotoCoreError, ClientError):
            listing = self._store.listing(self._name)
            tables = {path: mark for path, mark in listing.items() if _TABLE.match(path)}
            new = set(tables.items()) - self._seen
            self._seen |= new
            self.commits.update(path for path, _ in new)
            epochs = [_EPOCH.match(path) for path in listing]
            self._counts = {
                "segment": sum(path.startswith("cells/") for path in tables),
                "train": max((int(epoch[1]) for epoch in epochs if epoch), default=0),
                "embed": sum(path.startswith("embeddings/") for path in tables),
            }
        return self._counts


class Chaos:
    """A cluster and a simulated screen, on which runs are disturbed.

    Args:
        folder: to work in; what an earlier one has left there is not done again.
        network: of machines, with one that the store is on.
        server: a store.
        checkpoint: of a network that fits; if there is none, that of the undisturbed run that trains one.
    """

    def __init__(
        self, folder: Path, network: Network | House, server: S3Server, checkpoint: Path | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._calm: dict[Way, Path] = {}
        self._folder = folder
        self._log = folder / "runs.log"
        simulated = folder / "simulated"
        self._cluster = Cluster(network, server.environment)
        sets = [part for name, value in SIMULATION.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        self._cluster.heal()
        self._cluster.head.check(SCREENING, "simulate", simulated, *sets, **self._environment())
        disk, bucket = Disk(simulated, folder / "screens"), Bucket(server, simulated, folder / "fetched")
        self._stores: dict[Where, Store] = {"disk": disk, "S3": bucket}

    def calm(self, way: Way) -> Path:
        """Folder of the screen of the undisturbed run.

        Raises:
            RuntimeError: if it fails.
        """
        if way not in self._calm:
            disk, name, outcome = (
                self._stores["disk"],
                f"calm_{way.replace(' ', '_')}",
                Outcome(Plan(-1, "disk", way, ())),
            )
            self._to_the_end(outcome, disk, name, Trouble())
            outcome.wrong += self._cluster.heal()
            if outcome.wrong:
                raise RuntimeError("the undisturbed run: " + "; ".join(outcome.wrong) + "\n" + self.said())
            self._calm[way] = disk.fetch(name)
        return self._calm[way]

    def said(self) -> str:
        """The last lines of the runs' log."""
        return self._log.read_text(encoding="utf-8")[-3000:]

    def run(self, plan: Plan) -> Outcome:
        """Run the screen as planned, to its end, and hold it against the undisturbed one."""
        calm = self.calm(plan.way)
        store, name = self._stores[plan.where], f"seed-{plan.seed}"  # which requests fail goes by their names
        store.remove(name)
        outcome = Outcome(plan)
        with store.failing(random.Random(plan.seed)) as trouble:
            self._to_the_end(outcome, store, name, trouble)
        outcome.store = trouble.said
        outcome.wrong += self._cluster.heal()
        if not {fault.kind for fault, _ in outcome.happened} & set(FIRST):
            outcome.wrong.append(f"ended before one of {', '.join(FIRST)} was killed")
        if not outcome.wrong:
            outcome.wrong += differences(store.fetch(name), calm)
        return outcome

    def _to_the_end(self, outcome: Outcome, store: Store, name: str, trouble: Trouble) -> None:
        """Start the command, as often as it is killed, until it ends by itself, which must be well."""
        started = time.monotonic()
        progress = Progress(store, name)
        left, reached = list(outcome.plan.faults), 0.0
        settings = self._settings(outcome.plan.way)
        driver: subprocess.Popen[bytes] | None = None
        code: int | None = None
        while code is None and time.monotonic() < started + PATIENCE:
            if driver is None:
                driver = self._start(store, name, settings)
                outcome.starts += 1
            code = driver.poll()
            self._cluster.go_on()
            trouble.go_on()
            counts = progress.look()
            now = time.monotonic()
            if left and not reached and counts[left[0].moment] >= left[0].count:
                reached = now
            if left and reached and now >= reached + left[0].delay and code is None:
                kind = left[0].kind
                if self._kill_driver() if kind == "driver" else self._cluster.do(left[0]):
                    outcome.happened.append((left.pop(0), now - started))
                    reached = 0.0
                    if kind in ("driver", "head"):
                        driver.wait()
                        driver = None
            time.sleep(0.05)
        if code is None:
            self._kill_driver()
        if code != 0:
            outcome.wrong.append(f"not over after {PATIENCE:.0f} s" if code is None else f"ended with {code}")
        outcome.seconds = time.monotonic() - started
        outcome.redone = progress.commits.total() - len(progress.commits)

    def _settings(self, way: Way) -> dict[str, object]:
        if way == "train":
            return SETTINGS | TRAINED
        checkpoint = self._checkpoint or self.calm("train") / "checkpoint"
        return SETTINGS | {"network": checkpoint} | ({"segment.clips.store": "none"} if way == "one pass" else {})

    def _start(self, store: Store, name: str, settings: dict[str, object]) -> subprocess.Popen[bytes]:
        """Start the command, the same each time."""
        config = yaml.safe_load((self._folder / "simulated" / "run.yaml").read_text())
        config["inputs"] = {
            "plates": [f"{store.inputs}/plates/*.zarr"],
            **{table: f"{store.inputs}/{table}.csv" for table in ("plate_map", "compounds")},
        }
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        sets = [part for setting, value in settings.items() for part in ("--set", f"{setting}={value}")]
        command = ("run", path, "--out", store.url(name), "--stages", ",".join(STAGES), *sets)
        return self._cluster.head.start(SCREENING, *command, log=self._log, **self._environment())

    def _environment(self) -> dict[str, str]:
        return {**self._cluster.environment, "RAY_ADDRESS": self._cluster.address}

    def _kill_driver(self) -> bool:
        drivers = self._cluster.head.processes("screening run")
        for process in drivers:
            kill_process(process)
        return bool(drivers)


# --- whether two screens are the same ------------------------------------------------------------


def differences(screen: Path, calm: Path) -> list[str]:
    """What a screen has otherwise than the undisturbed one: files, units, cells, counts; empty if nothing."""
    wrong = []
    wells, expected = (_tables(folder, "cells") for folder in (screen, calm))
    wrong += [f"unit lost: {name}" for name in sorted(expected - wells)]
    for part in ("cells", "embeddings"):
        for name in sorted(_tables(screen, part)):
            keys = list(zip(*(pq.read_table(screen / part / name)[key].to_pylist() for key in KEYS), strict=True))
            if len(set(keys)) < len(keys) or {"/".join(key[:2]) for key in keys} - {name.removesuffix(".parquet")}:
                wrong.append(f"cells doubled or strange: {part}/{name}")
    found, whole = (digests(folder, *RESULTS) | indexed(folder) for folder in (screen, calm))
    wrong += [f"missing: {name}" for name in sorted(whole.keys() - found.keys())]
    wrong += [f"too much: {name}" for name in sorted(found.keys() - whole.keys())]
    wrong += [f"differs: {name}" for name in sorted(whole.keys() & found.keys()) if found[name] != whole[name]]
    ours, theirs = (json.loads((folder / "manifest.json").read_text())["stages"] for folder in (screen, calm))
    for stage in STAGES:
        for what in ("done", "counts", "output", "fingerprint"):
            if ours.get(stage, {}).get(what) != theirs[stage][what]:
                wrong.append(f"manifest: {what} of {stage}: {ours.get(stage, {}).get(what)}, not {theirs[stage][what]}")
    wrong += [f"left over: {path.relative_to(screen)}" for path in sorted(screen.rglob("*.partial"))]
    wrong += [f"failure recorded: {path.relative_to(screen)}" for path in sorted(screen.glob("failures/**/*.json"))]
    return wrong


KEYS = ("plate", "well", "site", "track")


def _tables(screen: Path, part: str) -> set[str]:
    return {str(path.relative_to(screen / part)) for path in screen.glob(f"{part}/*/*.parquet")}


# --- the command -----------------------------------------------------------------------------------


@contextmanager
def site(folder: Path, *, ports: bool = False) -> Iterator[tuple[Network | House, S3Server, str]]:
    """Machines, of what can be had here, with a store on the first; and what they are.

    Args:
        folder: in which their homes are made.
        ports: whether they are to be processes with ports of their own also where there could be namespaces.
    """
    homes = Path(tempfile.mkdtemp(prefix="homes", dir=folder))
    network: Network | House
    try:
        if ports:
            raise NoMachinesError("as was asked for")
        network, what = Network(homes), "machines of Linux namespaces"
        network.add("store")
    except NoMachinesError as error:
        network, what = House(homes), f"processes with ports of their own ({error})"
        network.add("store")
    try:
        with network.joined(), S3Server(network.made[0].address) as server:
            yield network, server, what
    finally:
        network.close()


def described(outcome: Outcome) -> tuple[str, ...]:
    """A line of the table."""
    happened = ", ".join(f"{fault} ({at:.0f} s)" for fault, at in outcome.happened)
    where = f"{outcome.plan.where}: {outcome.store}" if outcome.store else outcome.plan.where
    equal = "no: " + outcome.wrong[0] if outcome.wrong else "yes"
    numbers = (str(outcome.starts), str(outcome.redone), f"{outcome.seconds:.0f}")
    return (str(outcome.plan.seed), where, outcome.plan.way, happened or "none", *numbers, equal)


def main() -> int:
    """Do the runs of the seeds given, print a line each, and say how many ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seeds", type=int, nargs="*", default=range(20), help="default: 0 to 19")
    parser.add_argument("--ports", action="store_true", help="processes with ports of their own, not namespaces")
    parser.add_argument("--where", choices=get_args(Where), help="not where the seed says")
    parser.add_argument("--folder", type=Path, help="to work in and keep; what is there already is not done again")
    arguments = parser.parse_args()
    console = Console(width=160, highlight=False)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with site(folder, ports=arguments.ports) as (network, server, what):
        console.print(f"a head and two workers: {what}")
        chaos = Chaos(folder, network, server)
        for seed in arguments.seeds:
            plan = draw(seed)
            outcome = chaos.run(replace(plan, where=arguments.where or plan.where))
            outcomes.append(outcome)
            console.print(f"seed {seed}: {'; '.join(outcome.wrong) or 'equal'}", soft_wrap=True)
    table = Table("seed", "where", "way", "kills", "starts", "redone", "seconds", "equal", box=None)
    for outcome in outcomes:
        table.add_row(*described(outcome))
    console.print(table)
    equal = sum(not outcome.wrong for outcome in outcomes)
    console.print(f"{equal} of {len(outcomes)} runs ended with the tables of the undisturbed one, byte for byte")
    if equal == len(outcomes) and arguments.folder is None:
        shutil.rmtree(folder)
    else:
        console.print(f"kept: {folder}")
    return int(equal < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
