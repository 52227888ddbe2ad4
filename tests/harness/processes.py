"""Start processes, read what they say, and be sure that none is left: each carries a mark that its children inherit."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
_MARK = "PETALS_AGENT_TEST_MARK"
_POLL_S = 0.02


def wait_until(condition: Callable[[], T], timeout: float, what: str) -> T:
    """Poll until `condition()` is true and return its value; fails after `timeout` seconds, naming `what`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(_POLL_S)
    return value


class Process:
    """A started program; its output lies in `<log>.out` and `<log>.err`.

    `grace`: seconds between SIGTERM and SIGKILL when it is ended; 0 kills at once.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str],
        cwd: Path | None,
        grace: float,
    ) -> None:
        self.name = name
        self.grace = grace
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        self.started = time.monotonic()
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self._popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,  # a group of its own, so that it can be ended as a whole
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._popen.poll()

    def output(self) -> str:
        """The last lines of both streams, for messages."""
        parts = [(path.suffix[1:], path.read_text(errors="replace")[-3000:]) for path in (self.err, self.out)]
        return "\n".join(f"--- {self.name}: std{kind}\n{text}" for kind, text in parts)

    def events(self) -> list[dict[str, Any]]:
        """The complete lines of standard output that are JSON objects."""
        complete = [
            line for line in self.out.read_text(errors="replace").splitlines(True) if line.endswith("\n")
        ]
        return [json.loads(line) for line in complete if line.startswith("{")]

    def wait_event(self, event: str, timeout: float = 90) -> dict[str, Any]:
        """The first JSON line whose "event" is this one; fails with its output if it ends or takes longer."""

        def find() -> dict[str, Any] | None:
            ended = self.returncode is not None  # asked first: a line before the end still counts
            found = next((line for line in self.events() if line.get("event") == event), None)
            if found is None and ended:
                raise AssertionError(
                    f"{self.name} ended with {self.returncode} before {event!r}\n{self.output()}"
                )
            return found

        try:
            found = wait_until(find, timeout, f"{self.name}: event {event!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        assert found is not None
        return found

    def wait(self, timeout: float) -> int:
        """Wait for the end; returns the exit status, fails with its output after `timeout` seconds."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still ran after {timeout:g} s\n{self.output()}") from None

    def terminate(self) -> int:
        """SIGTERM, wait for its grace, then SIGKILL to its whole group; returns the exit status."""
        if self.grace and self.returncode is None:
            self._popen.terminate()
            try:
                return self._popen.wait(self.grace)
            except subprocess.TimeoutExpired:
                pass
        return self.kill()

    def kill(self) -> int:
        """SIGKILL to its whole group: it and those children that did not leave the group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self._popen.wait(10)

    def tree(self) -> list[psutil.Process]:
        """It and all its descendants that live now."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Processes:
    """Starts processes; `close()` ends them all by pid and fails if one that descends from them lives on."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self._mark = secrets.token_hex(8)
        self._started: list[Process] = []

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace: float = 10,
    ) -> Process:
        """Start `command` in a process group of its own, with `env` on top of ours."""
        full = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), _MARK: self._mark}
        log = self.logs / f"{len(self._started):02d}-{name}"
        process = Process(name, [str(part) for part in command], log, env=full, cwd=cwd, grace=grace)
        self._started.append(process)
        return process

    def run(self, name: str, command: Sequence[str | Path], *, timeout: float, **more: Any) -> Process:
        """Start and wait for the end."""
        process = self.start(name, command, **more)
        process.wait(timeout)
        return process

    def survivors(self) -> list[psutil.Process]:
        """Every live process that was started from here, directly or not, wherever it went since."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def close(self, patience: float = 10) -> None:
        """End everything; AssertionError names what outlived its parent for `patience` seconds (it is killed then)."""
        with ThreadPoolExecutor(max(1, len(self._started))) as pool:
            list(pool.map(Process.terminate, self._started))
        try:
            wait_until(lambda: not self.survivors(), patience, "the end of all children")
        except AssertionError:
            left = self.survivors()
            names = [" ".join(process.cmdline())[:200] or process.name() for process in left]
            for process in left:
                process.kill()
            raise AssertionError(f"{len(left)} processes outlived their parent: {names}") from None


def pss_mb(processes: Sequence[psutil.Process]) -> float:
    """Memory of a set of processes in MB, each shared page counted once in all (proportional set size)."""
    total = 0
    for process in processes:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total * 1024 / 1e6


def python_count(processes: Sequence[psutil.Process]) -> int:
    """How many of them run a Python interpreter."""
    count = 0
    for process in processes:
        try:
            count += Path(process.exe()).name.startswith("python")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return count
