"""Machines on this machine: Linux namespaces with addresses, homes and process tables of their own.

Nothing of a machine is seen outside of it, neither its ports nor `ray stop`, which would end all Ray that it finds;
and when its first process is killed, all of it is gone at once, as in a power cut.

Where namespaces are not allowed there are rooms: groups of processes with a home, which share all else.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NETWORK = "10.77"

_TOOLS = ("unshare", "nsenter", "ip", "bash")
_NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts")
# Bash, as the first process, buries orphans that have ended; Ray waits for them.
_START = """
mount --bind {users} /etc/passwd && mount --bind {temporary} /tmp/ray && mount -t tmpfs -o size=8g tmpfs /dev/shm &&
hostname {name} && ip link set lo up ||
exit 1
echo up
sleep infinity & wait
"""


class NoMachinesError(Exception):
    """No machines can be made here, for the reason that it gives."""


class Machine:
    """A machine with a home of its own, whose only user is root.

    Attributes:
        address: on the network of the machines that were made together.
        home: the user's, a folder that this process sees as well.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self.home = folder / name
        self.home.mkdir()
        # Where Ray's files lie; paths of sockets must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix=name, dir="/tmp"))
        self._boot(folder)

    def _boot(self, folder: Path) -> None:
        Path("/tmp/ray").mkdir(exist_ok=True)  # which each machine has another folder in the place of
        users = folder / f"{self.name}.passwd"
        entries = Path("/etc/passwd").read_text().splitlines()
        own = f"root:x:0:0:root:{self.home}:/bin/bash"
        users.write_text("\n".join(own if entry.startswith("root:") else entry for entry in entries) + "\n")
        self._first = subprocess.Popen(
            [
                *("unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child"),
                *("bash", "-c", _START.format(users=users, temporary=self.temporary, name=self.name)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        if self._first.stdout.readline() != "up\n":
            raise NoMachinesError(f"no namespaces can be made here: {self._first.stderr.read().strip()}")
        (child,) = psutil.Process(self._first.pid).children()
        self.pid = child.pid

    @property
    def environment(self) -> dict[str, str]:
        """What is set on the machine: nothing of the outside but where programs and packages are."""
        packages = [path for path in sys.path if "site-packages" in path]
        return {
            "HOME": str(self.home),
            "USER": "root",
            "LANG": "C.UTF-8",
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *packages]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: object, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in the home; what it prints goes into the log."""
        with log.open("ab") as sink:
            return subprocess.Popen(
                self._inside(command, self.home),
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )

    def run(
        self, *command: object, folder: Path | None = None, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in the home or another folder."""
        return subprocess.run(
            self._inside(command, folder or self.home),
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def check(self, *command: object, folder: Path | None = None, timeout: float = 300, **environment: str) -> str:
        """Run a command that must succeed; what it printed."""
        done = self.run(*command, folder=folder, timeout=timeout, **environment)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def processes(self, word: str) -> list[psutil.Process]:
        """The machine's processes whose command line holds the word."""
        try:
            own = os.readlink(f"/proc/{self.pid}/ns/pid")
        except OSError:  # it has been killed
            return []
        return [
            process for process in psutil.process_iter() if _belongs(process, own) and word in command_line(process)
        ]

    def kill(self) -> None:
        """Cut the power."""
        self._first.kill()
        self._first.wait()

    def close(self) -> None:
        """Cut the power and forget the disk."""
        self.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _inside(self, command: Sequence[object], folder: Path) -> list[str]:
        enter = ("nsenter", f"--target={self.pid}", *_NAMESPACES, "--")
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *map(str, command)]


class Room(Machine):
    """In place of a machine where namespaces are not allowed: processes that know the room by their environment."""

    _MARK = "SCREENING_ROOM"

    def _boot(self, folder: Path) -> None:
        pass

    @property
    def environment(self) -> dict[str, str]:
        """As of a machine, with the room's mark, which whatever is started in it passes on."""
        return {**super().environment, self._MARK: str(self.temporary), "RAY_TMPDIR": str(self.temporary)}

    def processes(self, word: str) -> list[psutil.Process]:
        """The room's processes whose command line holds the word."""
        return [process for process in psutil.process_iter() if self._holds(process) and word in command_line(process)]

    def kill(self) -> None:
        """Kill what is in the room; it may start more until its last process is gone."""
        while left := self.processes(""):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 5)

    def _holds(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(self._MARK) == str(self.temporary) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _inside(self, command: Sequence[object], folder: Path) -> list[str]:
        return ["sh", "-c", 'cd "$0" && exec "$@"', str(folder), *map(str, command)]


class Network:
    """Machines that hear one another. The first that is added is the switch, without which the others hear nothing.

    Attributes:
        made: its machines, in the order in which they were added, lost ones among them.
    """

    def __init__(self, folder: Path) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            tools = ", ".join(missing)
            raise NoMachinesError(f"machines are made by {tools}, which are not installed (util-linux, iproute2)")
        self.made: list[Machine] = []
        self._folder = folder

    def add(self, name: str) -> Machine:
        """A new machine, up and connected."""
        number = len(self.made) + 1
        machine = Machine(name, f"{NETWORK}.{number // 250}.{number % 250}", self._folder)
        self.made.append(machine)
        if number == 1:
            self._ip(machine, "link", "add", "net", "type", "bridge")
        else:
            wire = ("type", "veth", "peer", "name", "net", "netns", machine.pid)
            self._ip(self.made[0], "link", "add", f"to_{number}", "master", "net", *wire)
            self._ip(self.made[0], "link", "set", f"to_{number}", "up")
        self._ip(machine, "address", "add", f"{machine.address}/16", "dev", "net")
        self._ip(machine, "link", "set", "net", "up")
        # Ray takes for a machine's address that by which it would go to the internet. It leads nowhere.
        where = ("dev", "net") if number == 1 else ("via", self.made[0].address)
        self._ip(machine, "route", "add", "default", *where)
        return machine

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let this thread, and those that it starts, hear the network from where its switch is."""
        before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        inside = os.open(f"/proc/{self.made[0].pid}/ns/net", os.O_RDONLY)
        try:
            _enter(inside)
            yield
        finally:
            _enter(before)
            os.close(before)
            os.close(inside)

    def close(self) -> None:
        """Forget all machines."""
        for machine in self.made:
            machine.close()

    @staticmethod
    def _ip(machine: Machine, *command: object) -> None:
        target = f"--target={machine.pid}"
        subprocess.run(["nsenter", target, "--net", "ip", *map(str, command)], check=True, capture_output=True)


class House:
    """Rooms, with one address for all; as :class:`Network` to those that use it."""

    def __init__(self, folder: Path) -> None:
        self.made: list[Machine] = []
        self._folder = folder

    def add(self, name: str) -> Machine:
        """A new room."""
        room = Room(name, "127.0.0.1", self._folder)
        self.made.append(room)
        return room

    @contextmanager
    def joined(self) -> Iterator[None]:
        """All hear one another as it is."""
        yield

    def close(self) -> None:
        """Forget all rooms."""
        for room in self.made:
            room.close()


def _enter(network: int) -> None:
    """Move this thread into a network namespace, given as an open file (os.setns comes with Python 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _belongs(process: psutil.Process, namespace: str) -> bool:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
    except OSError:
        return False


def command_line(process: psutil.Process) -> str:
    """What a process was started with; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def machines(folder: Path, *names: str) -> Iterator[list[Machine]]:
    """Machines on one network, for as long as the block lasts; the test is skipped where there can be none.

    Args:
        folder: where their homes are made.
        names: of the machines; the first is also the network's switch.
    """
    with ExitStack() as stack:
        try:
            network = Network(folder)
            stack.callback(network.close)
            made = [network.add(name) for name in names]
        except NoMachinesError as error:
            pytest.skip(str(error))
        yield made
