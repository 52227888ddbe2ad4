"""`petals-agent doctor` as a person or a script runs it: beside a running agent, alone, and when something is wrong."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
from pathlib import Path
from typing import Any

from harness.live import start_live, write_config
from harness.processes import Processes
from harness.swarm import PETALS_AGENT, start_bootstrap
from models.shards import write_checkpoint

NAMES = [
    "config",
    "file modes",
    "identity",
    "unit",
    "clock",
    "listen ports",
    "bootstrap peers",
    "reachability",
    "addresses",
    "gpu",
    "model",
    "weights",
    "memory",
    "memory limit",
    "disk",
    "open files",
]


def run(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*PETALS_AGENT, "doctor", "--config", str(config), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL)


def report(config: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status and the checks by name; the schema holds each time."""
    done = run(config, "--json")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert set(said) == {"ok", "checks"} and [one["name"] for one in said["checks"]] == NAMES
    for one in said["checks"]:
        assert set(one) == {"name", "outcome", "found", "remedy", "seconds"}
        assert one["outcome"] in ("ok", "skipped", "warning", "problem") and one["found"]
        assert one["seconds"] >= 0 and (one["remedy"] or one["outcome"] in ("ok", "skipped"))
        assert not (one["remedy"] and one["outcome"] == "ok")
    problems = [one for one in said["checks"] if one["outcome"] == "problem"]
    assert said["ok"] == (not problems) == (done.returncode == 0)
    return done.returncode, {one["name"]: one for one in said["checks"]}


def test_beside_a_running_agent(processes: Processes, tmp_path: Path, tiny_llama: Path) -> None:
    """Its port, its key and its memory are its own; without it the same key and port are free."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    maddr = start_bootstrap(processes)
    more = f'[swarm]\nlisten = ["/ip4/127.0.0.1/tcp/{port}"]'
    agent = start_live(processes, tmp_path, tiny_llama, "0:2", [maddr], more)
    agent.config.chmod(0o640)
    peer_id = agent.online()["peer_id"]
    code, checks = report(agent.config)
    assert code == 0, checks
    assert checks["listen ports"]["found"] == f"port {port} is held by our own agent"
    assert peer_id in checks["identity"]["found"] and "in use" in checks["identity"]["found"]
    assert checks["bootstrap peers"]["outcome"] == checks["clock"]["outcome"] == "ok"
    assert checks["memory"]["found"] == "the running agent has its blocks in memory"
    assert checks["reachability"]["outcome"] in ("ok", "warning")
    agent.process.terminate()
    code, checks = report(agent.config)
    assert code == 0 and checks["listen ports"]["found"] == f"port {port} is free"
    assert peer_id in checks["identity"]["found"] and "in use" not in checks["identity"]["found"]
    assert checks["reachability"]["outcome"] == "skipped"


def test_a_taken_port_is_a_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        more = f'[swarm]\nlisten = ["/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"]'
        config = write_config(tmp_path, write_checkpoint(tmp_path / "model"), "0:4", [], more)
        code, checks = report(config)
        assert code == 1 and checks["listen ports"]["outcome"] == "problem"
        done = run(config)
    assert done.returncode == 1 and "→ See who has it: sudo ss -ltnp" in done.stdout
    assert done.stdout.startswith("ok       config")
    assert done.stdout.splitlines()[-1].startswith("16 checks: 1 problems,")


def test_without_a_valid_configuration(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[model\n")
    code, checks = report(config)
    assert code == 1 and checks["config"]["outcome"] == "problem"
    assert checks["gpu"]["outcome"] != "skipped", "it needs no configuration"
    assert checks["model"]["outcome"] == "skipped"


def test_on_a_terminal_each_is_told_as_it_is_done(tmp_path: Path) -> None:
    """In colours, and the quick ones before torch has been asked."""
    config = write_config(tmp_path, write_checkpoint(tmp_path / "model"), "0:4", [])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PETALS_AGENT, "doctor", "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.STDOUT,
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := _read(ours):
            said += chunk
        assert process.wait(60) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"\x1b[32m" in said
    order = [name for line in said.splitlines() for name in (b" config ", b" gpu ") if name in line]
    assert order == [b" config ", b" gpu "]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""
