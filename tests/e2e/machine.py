"""A throw-away Debian 12 with systemd: an overlay over file trees, booted by systemd-nspawn, with nothing but loopback."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.processes import Process, Processes, wait_until

BOOT_S = 60.0
ENVIRONMENT = (
    "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG=C.UTF-8",
    "HOME=/root",
    "DEBIAN_FRONTEND=noninteractive",
    "SYSTEMD_COLORS=0",
    "SYSTEMD_PAGER=",
)
# it ends when we do, and with the first process of its namespace all others end: nspawn's own children survive its SIGKILL
ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private")
ALONE += ("--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
# the mount lives in a namespace of its own, so nothing is left of it whatever happens to us
BOOT = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root" || exit 1
folder=$2 name=$3; shift 3
exec systemd-nspawn -q -D "$folder/root" -M "$name" -b --keep-unit --register=no --private-network \
    --link-journal=no --resolv-conf=off --timezone=off "$@"
"""


class Machine:
    """Booted when built; `processes` ends it. What it writes lies in `folder`/upper."""

    def __init__(
        self, processes: Processes, lowers: Sequence[Path], folder: Path, *, options: Sequence[str] = ()
    ) -> None:
        for name in ("upper", "work", "root"):
            (folder / name).mkdir(parents=True)
        lower = ":".join(str(path) for path in lowers)
        name = folder.name
        self._process: Process = processes.start(
            "machine",
            [*ALONE, "sh", "-c", BOOT, "boot", lower, str(folder), name, *options],
            grace=0,  # nothing in it is worth an orderly stop
        )
        self._pid = wait_until(self._init, BOOT_S, f"the first process of {name}")
        wait_until(self._running, BOOT_S, f"{name} to boot\n{self._process.output()}")

    def _init(self) -> int:
        assert self._process.returncode is None, f"the machine did not start\n{self._process.output()}"
        pid = self._process.pid
        try:
            for _ in range(2):  # nspawn, and what it boots
                pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            return pid if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd" else 0
        except (FileNotFoundError, IndexError, ProcessLookupError):
            return 0

    def _running(self) -> bool:
        assert self._process.returncode is None, f"the machine ended\n{self._process.output()}"
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def run(
        self, *command: str | Path, timeout: float = 60, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root; a failure of it fails the test with its output unless `check` is False."""
        enter = ["nsenter", "-t", str(self._pid), "-a", "-r", "-w", "env", "-i", *ENVIRONMENT]
        done = subprocess.run(
            [*enter, *map(str, command)], input=stdin, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def path(self, inside: str) -> Path:
        """A file of the machine as seen from here."""
        return Path(f"/proc/{self._pid}/root") / inside.lstrip("/")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        lines = self.run("systemctl", "show", unit, "-p", ",".join(properties)).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def wait_for(self, unit: str, timeout: float = 90, **wanted: str) -> dict[str, str]:
        """Wait until these properties of a unit have these values; fails with its journal."""
        try:
            return wait_until(
                lambda: (seen := self.show(unit, *wanted)) == wanted and seen, timeout, f"{unit} {wanted}"
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; now {self.show(unit, *wanted)}\n{self.log(unit)}") from None

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries of the journal, as objects."""
        lines = self.run("journalctl", "-o", "json", *matches).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def log(self, unit: str) -> str:
        """The journal of a unit as a person reads it, its end."""
        return self.run("journalctl", "-u", unit, "-o", "short-precise", check=False).stdout[-6000:]

    def processes_of(self, user: str) -> list[str]:
        """Command lines of what runs as `user`."""
        found = self.run("ps", "-u", user, "-o", "args=", check=False).stdout
        return found.splitlines()

    def power_off(self) -> None:
        """Shut it down in order and wait for it."""
        self.run("systemctl", "poweroff", check=False)
        deadline = time.monotonic() + 30
        while self._process.returncode is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self._process.returncode == 0, f"no orderly power-off\n{self._process.output()}"
