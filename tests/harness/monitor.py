"""A `petals-agent monitor` of a private swarm on loopback, which reads it each second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from harness.processes import Process, Processes, wait_until
from harness.swarm import PETALS_AGENT, PREFIX


@dataclass
class Monitor:
    """A running monitor and where it answers."""

    process: Process
    url: str

    def answers(self, path: str = "/healthz", status: int = 200) -> bool:
        """Whether it gives that answer; fails with what it printed when it has ended."""
        assert self.process.returncode is None, self.process.output()
        try:
            return httpx.get(f"{self.url}{path}", timeout=10).status_code == status
        except httpx.TransportError:
            return False


def start_monitor(
    processes: Processes, folder: Path, peers: Sequence[str], port: int, *options: str, **environ: str
) -> Monitor:
    """Start it with a configuration that names no model, and wait for its first reading."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "petals-agent.toml"
    config.write_text(f'[monitor]\nprefixes = ["{PREFIX}"]\nperiod = "1s"\nhistory = "history.sqlite"\n')
    command = [*PETALS_AGENT, "monitor", "--config", config, "--listen", f"127.0.0.1:{port}"]
    command += [part for peer in peers for part in ("--initial-peers", peer)]
    env = {"RUNTIME_DIRECTORY": str(folder), "STATE_DIRECTORY": str(folder), **environ}
    process = processes.start("monitor", [*command, *options], env=env, grace=20)
    monitor = Monitor(process, f"http://127.0.0.1:{port}")
    wait_until(monitor.answers, 60, "the monitor's first reading")
    return monitor
