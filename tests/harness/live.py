"""A `petals-agent run` on loopback under test: configured, asked over its control socket, and hurt on purpose."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.processes import Process, Processes, wait_until
from harness.swarm import ONE_THREAD, PETALS_AGENT

UPDATE_PERIOD_S = 2.0


def write_config(folder: Path, model: Path, blocks: str, peers: Sequence[str], more: str = "") -> Path:
    """A private swarm's server in `folder`; `more` holds further lines of TOML, whose tables may repeat ours."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dht_prefix": "tiny", "dtype": "float32"},
        "swarm": {
            "initial_peers": list(peers),
            "listen": ["/ip4/127.0.0.1/tcp/0"],
            "identity": "state/id.key",
            "update_period": UPDATE_PERIOD_S,
        },
        "serve": {"blocks": blocks, "device": "cpu", "throughput": 1.0},
        "balance": {"enabled": False},
        "control": {"socket": "run/c.sock"},
    }
    table = tables["model"]
    for line in more.splitlines():
        if line.startswith("["):
            table = tables.setdefault(line.strip("[] "), {})
        elif "=" in line:
            key, value = line.split("=", 1)
            table[key.strip()] = json.loads(value)
    lines = []
    for name, values in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "petals-agent.toml"
    config.write_text("\n".join(lines) + "\n")
    return config


def ask(path: Path, line: bytes, timeout: float = 10.0) -> dict[str, Any]:
    """Send one line to a control socket and read one back; empty when nobody is there, has room, or goes on."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            connection.sendall(line + b"\n")
            answer = connection.makefile("rb").readline()
        except (FileNotFoundError, ConnectionError, BlockingIOError):  # the last: its queue is full
            return {}
    return dict(json.loads(answer)) if answer else {}


@dataclass
class LiveAgent:
    """A running agent; every wait fails with what it said when it ends or takes too long."""

    process: Process
    config: Path

    @property
    def socket(self) -> Path:
        return self.config.parent / "run" / "c.sock"

    @property
    def identity(self) -> Path:
        return self.config.parent / "state" / "id.key"

    def status(self) -> Mapping[str, Any]:
        """Its answer to `status`; empty while it does not answer."""
        result: Mapping[str, Any] = ask(self.socket, b'{"do": "status"}').get("result", {})
        return result

    def until(
        self, condition: Callable[[Mapping[str, Any]], Any], timeout: float, what: str
    ) -> Mapping[str, Any]:
        """Wait until its status fulfils `condition`, and return that status."""

        def fulfilled() -> Mapping[str, Any] | None:
            assert self.process.returncode is None, f"it ended with {self.process.returncode}"
            status = self.status()
            return status if status and condition(status) else None

        try:
            found = wait_until(fulfilled, timeout, f"{self.process.name}: {what}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.process.output()}") from None
        assert found is not None
        return found

    def online(self, timeout: float = 90) -> Mapping[str, Any]:
        """Wait until it serves and the DHT has taken that."""
        return self.until(
            lambda status: status["state"] == "online" and status["announced"] == "online", timeout, "online"
        )

    def kill_child(self, name: str) -> int:
        """SIGKILL to its "container" or "p2pd"; returns the pid."""
        pid = int(self.status()["pids"][name])
        os.kill(pid, signal.SIGKILL)
        return pid

    def logged(self, since: float = 0.0) -> list[dict[str, Any]]:
        """The events after `since` (unix seconds) in its log, which must be JSON; keys without their prefix."""
        lines = self.process.err.read_text(errors="replace").splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [
            {key.removeprefix("petals_"): value for key, value in entry.items()}
            for entry in entries
            if "petals_event" in entry and entry["time"] > since
        ]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`petals-agent WORDS` for this agent, as an operator types it."""
        line = [*PETALS_AGENT, *words, "--config", str(self.config)]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    def family(self) -> list[psutil.Process]:
        """Its processes; ask before it ends and they could be found no more."""
        return self.process.tree()


def start_live(
    processes: Processes,
    folder: Path,
    model: Path,
    blocks: str = "0:8",
    peers: Sequence[str] = (),
    more: str = "",
    *,
    grace: float = 20,
    env: Mapping[str, str] | None = None,
) -> LiveAgent:
    """Write its configuration into `folder` and start it."""
    return start_again(processes, write_config(folder, model, blocks, peers, more), grace=grace, env=env)


def start_again(
    processes: Processes, config: Path, *, grace: float = 20, env: Mapping[str, str] | None = None
) -> LiveAgent:
    """Start the agent that is configured in `config`, with `env` on top of ours."""
    process = processes.start(
        config.parent.name,
        [*PETALS_AGENT, "run", "--config", config],
        env={**ONE_THREAD, **(env or {})},
        grace=grace,
    )
    return LiveAgent(process, config)


def all_gone(family: Sequence[psutil.Process]) -> bool:
    """Whether none of these processes runs any more."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


NOISE = (
    "Traceback",
    "Task was destroyed",
    "never retrieved",
    "never awaited",
    "Exception in callback",
    "Unclosed",
)


def noise(process: Process) -> list[str]:
    """Lines of its error output that nobody should see at an orderly end."""
    return [line for line in process.err.read_text().splitlines() if any(word in line for word in NOISE)]
