"""Real runs of the command in processes of their own: to watch, to kill, and to compare what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import psutil

T = TypeVar("T")
Victim = Literal["driver", "group", "tree"]

# Ray's own helpers on a node: they hold no work, and wait a minute for the dead before they go.
_AGENTS = ("DashboardAgent", "RuntimeEnvAgent")


class Run:
    """The command line, started as a user starts it, in a process group of its own."""

    def __init__(self, log: Path, *arguments: object, **environment: str) -> None:
        self._log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from screening.cli import main; main()", *map(str, arguments)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def wait(self, timeout: float = 900) -> int:
        """The exit code, once it has ended; a run that does not end is killed."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill("tree")
            raise

    def wait_until(self, reached: Callable[[], bool], timeout: float = 900) -> None:
        """Return as soon as ``reached`` says so; fail if the run ends before or takes too long."""
        end = time.monotonic() + timeout
        while not reached():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > end:
                self.kill("tree")
                raise AssertionError(f"the run {'ended' if ended else 'hangs'}:\n{self.said()}")
            time.sleep(0.005)

    def said(self) -> str:
        """What this run, and those before it with the same log, printed."""
        return self._log.read_text(encoding="utf-8")

    def processes(self) -> list[psutil.Process]:
        """The driver and everything that it has started, directly or not."""
        try:
            driver = psutil.Process(self._process.pid)
            return [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, victim: Victim, timeout: float = 30) -> None:
        """``kill -9``, and wait until nothing that works for the run is left.

        Args:
            victim: the driver alone, its process group (Ray's workers have groups of their own), or every process.
            timeout: seconds after which what is left counts as an orphan.
        """
        tree = self.processes()
        working = [process for process in tree if not _is_agent(process)]
        if victim == "driver":
            self._process.kill()
        elif victim == "group":
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            for process in tree:
                kill_process(process)
        self._process.wait()
        _, orphans = psutil.wait_procs(working, timeout)
        for process in orphans:
            kill_process(process)
        assert not orphans, f"still there {timeout} s after the {victim} was killed: {orphans}"


class PeakMemory:
    """The most memory that a run's processes hold together while it goes on, in bytes.

    Proportional set size: pages that processes share, Ray's object store among them, count once.
    """

    def __init__(self, run: Run, interval: float = 0.1) -> None:
        self.peak = 0
        self._run = run
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, sum(map(_memory, self._run.processes())))


def digests(folder: Path, *parts: str) -> dict[str, str]:
    """Path -> digest of every file in those parts of a folder."""
    files = [path for part in parts for path in _files(folder / part)]
    assert files, f"none of {parts} is in {folder}"
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def indexed(screen: Path) -> dict[str, str]:
    """Digests of what the index says, but for the name of its build, which is drawn."""
    manifest = json.loads((screen / "index" / "manifest.json").read_text(encoding="utf-8"))
    build = f"index/{manifest.pop('build')}"
    files = {name.removeprefix(f"{build}/"): digest for name, digest in digests(screen, build).items()}
    return {"index": json.dumps([manifest, files], sort_keys=True)}


def times(folder: Path, *parts: str) -> dict[str, int]:
    """Path -> time of the last write, in ns, of every file in those parts of a folder."""
    files = [path for part in parts for path in _files(folder / part)]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(files)}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


def eventually(look: Callable[[], T], wanted: Callable[[T], bool] = bool, timeout: float = 300) -> T:
    """What is seen once it is as wanted."""
    end = time.monotonic() + timeout
    while not wanted(seen := look()):
        assert time.monotonic() < end, f"not within {timeout:.0f} s: {seen}"
        time.sleep(0.1)
    return seen


def _is_agent(process: psutil.Process) -> bool:
    try:
        return any(agent in " ".join(process.cmdline()) for agent in _AGENTS)
    except psutil.Error:
        return False


def kill_process(process: psutil.Process) -> None:
    """`kill -9`, if it is still there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
