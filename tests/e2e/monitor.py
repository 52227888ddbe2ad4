"""The packaged monitor in a machine: installed as a person would, and asked from inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from e2e.machine import Machine
from harness.processes import wait_until

PACKAGE = "petals-agent-monitor"
UNIT = f"{PACKAGE}.service"
FOLDER = f"/usr/lib/{PACKAGE}"
CONFIG = f"/etc/{PACKAGE}/{PACKAGE}.toml"
ADDRESS = "127.0.0.1:8099"
# there is no curl in the machine
FETCH = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=15)
except urllib.error.HTTPError as error:
    answer = error
sys.stdout.write(f"{answer.status} {answer.read().decode()}")
"""


class Monitor:
    """Installed when built, from the folder that the machine sees as /deb; nothing is configured and nothing runs."""

    def __init__(self, machine: Machine, package: Path) -> None:
        self.machine = machine
        self.installation = self.install(package)

    def install(self, package: Path) -> str:
        """apt install ./FILE; what it said."""
        quick = ["-o", "Dpkg::Options::=--force-unsafe-io", "-o", "Dpkg::Options::=--force-confold"]
        done = self.machine.run("apt-get", "install", "-y", *quick, f"/deb/{package.name}", timeout=180)
        return done.stdout + done.stderr

    def configure(self, **sections: dict[str, Any]) -> None:
        """Set keys in a drop-in."""
        lines: list[str] = []
        for name, values in sections.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        self.machine.path(f"{CONFIG}.d/test.toml").write_text("\n".join([*lines, ""]))

    def change_unit(self, *lines: str) -> None:
        """Settings of the unit on top of what is installed."""
        file = self.machine.path(f"/etc/systemd/system/{UNIT}.d/test.conf")
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(["[Service]", *lines, ""]))
        self.machine.run("systemctl", "daemon-reload")

    def start(self) -> None:
        """systemctl start, which returns with the first reading of the swarm."""
        done = self.machine.run("systemctl", "start", UNIT, check=False, timeout=90)
        assert done.returncode == 0, f"{done.stderr}\n{self.machine.log(UNIT)}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer; 0 while nobody listens."""
        done = self.machine.run("python3", "-c", FETCH, f"http://{ADDRESS}{path}", check=False)
        if done.returncode:
            return 0, done.stderr
        status, _, text = done.stdout.partition(" ")
        return int(status), text

    def state(self) -> dict[str, Any]:
        """/api/v1/state."""
        status, text = self.get("/api/v1/state")
        assert status == 200, text
        return dict(json.loads(text))

    def health(self) -> tuple[int, dict[str, Any]]:
        """/healthz."""
        status, text = self.get("/healthz")
        return status, json.loads(text) if status else {}

    def status(self) -> str:
        """The line of `systemctl status`."""
        lines = self.machine.run("systemctl", "status", UNIT, check=False).stdout.splitlines()
        (line,) = [line for line in lines if line.strip().startswith("Status:")] or [""]
        return line.strip().removeprefix('Status: "').removesuffix('"')

    def pid(self) -> str:
        return self.machine.show(UNIT, "MainPID")["MainPID"]

    def p2pd(self) -> str:
        """The process id of its p2pd."""
        find = ["pgrep", "--parent", self.pid(), "p2pd"]
        return wait_until(lambda: self.machine.run(*find, check=False).stdout.strip(), 30, "a p2pd")
