"""Machines on this machine: Linux namespaces with addresses, homes and process tables of their own.

Nothing of a machine is seen outside of it, neither its ports nor `ray stop`, which would end all Ray that it finds;
and when its first process is killed, all of it is gone at once, as in a power cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"

_TOOLS = ("unshare", "nsenter", "ip", "bash")
_NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts")
# Bash, as the first process, buries orphans that have ended; Ray waits for them.
_START = """
mount --bind {users} /etc/passwd && mount -t tmpfs -o size=8g tmpfs /dev/shm && hostname {name} && ip link set lo up ||
exit 1
echo up
sleep infinity & wait
"""


class Machine:
    """A machine with a home of its own, whose only user is root.

    Attributes:
        address: on the network of the machines that were made together.
        home: the user's, a folder that this process sees as well.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.address = address
        self.home = folder / name
        self.home.mkdir()
        # Paths of sockets must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix=name, dir="/tmp"))
        users = folder / f"{name}.passwd"
        entries = Path("/etc/passwd").read_text().splitlines()
        own = f"root:x:0:0:root:{self.home}:/bin/bash"
        users.write_text("\n".join(own if entry.startswith("root:") else entry for entry in entries) + "\n")
        self._first = subprocess.Popen(
            [
                *("unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child"),
                *("bash", "-c", _START.format(users=users, name=name)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        if self._first.stdout.readline() != "up\n":
            raise OSError(self._first.stderr.read().strip())
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
            "RAY_TMPDIR": str(self.temporary),
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
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [process for process in psutil.process_iter() if _belongs(process, own) and word in _line(process)]

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


def _belongs(process: psutil.Process, namespace: str) -> bool:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
    except OSError:
        return False


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def machines(folder: Path, *names: str) -> Iterator[list[Machine]]:
    """Machines on one network, for as long as the block lasts; the test is skipped where there can be none.

    Args:
        folder: where their homes are made.
        names: of the machines; the first is also the network's switch, without which the others hear nothing.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"machines are made by {', '.join(missing)}, which are not installed (util-linux, iproute2)")
    with ExitStack() as stack:
        made: list[Machine] = []
        for number, name in enumerate(names, 1):
            try:
                machine = Machine(name, f"{NETWORK}.{number}", folder)
            except OSError as error:
                pytest.skip(f"no namespaces can be made here: {error}")
            stack.callback(machine.close)
            made.append(machine)
        _connect(made)
        yield made


def _connect(made: Sequence[Machine]) -> None:
    switch = f"--target={made[0].pid}"

    def ip(target: str, *command: object) -> None:
        subprocess.run(["nsenter", target, "--net", "ip", *map(str, command)], check=True, capture_output=True)

    ip(switch, "link", "add", "net", "type", "bridge")
    ip(switch, "address", "add", f"{made[0].address}/24", "dev", "net")
    ip(switch, "link", "set", "net", "up")
    # Ray takes for a machine's address that by which it would go to the internet. It leads nowhere.
    ip(switch, "route", "add", "default", "dev", "net")
    for machine in made[1:]:
        wire = f"to_{machine.address.rpartition('.')[2]}"
        ip(switch, "link", "add", wire, "master", "net", "type", "veth", "peer", "name", "net", "netns", machine.pid)
        ip(switch, "link", "set", wire, "up")
        ip(f"--target={machine.pid}", "address", "add", f"{machine.address}/24", "dev", "net")
        ip(f"--target={machine.pid}", "link", "set", "net", "up")
        ip(f"--target={machine.pid}", "route", "add", "default", "via", made[0].address)
