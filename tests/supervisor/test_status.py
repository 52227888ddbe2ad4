"""The control socket and what reads it: `petals-agent status`."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from harness.live import ask
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT
from petals_agent.supervisor.control import LINE_LIMIT, MAX_CONNECTIONS

from .conftest import Swarm


def status(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*PETALS_AGENT, "status", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_json(swarm: Swarm) -> None:
    live = swarm.first.online()
    done = status("--json", "--config", swarm.first.config)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["state"], found["blocks"], found["sessions"]) == ("online", "0:4", 0)
    assert found["peer_id"] == live["peer_id"] and found["peers"] >= 1 and found["relayed"] is False
    assert found["maddrs"][0].endswith(found["peer_id"])
    assert {"cache_used", "tokens_per_s", "uptime", "events", "network", "pids", "restarts"} <= found.keys()


def test_text(swarm: Swarm) -> None:
    peer_id = swarm.first.online()["peer_id"]
    done = status("--config", swarm.first.config)
    assert done.returncode == 0, done.stderr
    assert "online" in done.stdout and peer_id in done.stdout and "0:4 of 8" in done.stdout
    assert "\x1b" not in done.stdout  # no colours in a pipe


def test_watch_ends_quietly(swarm: Swarm, processes: Processes) -> None:
    swarm.first.online()
    watch = processes.start("watch", [*PETALS_AGENT, "status", "--watch", "--json", "-c", swarm.first.config])
    wait_until(lambda: len(watch.events()) >= 2, 30, "two snapshots")
    os.kill(watch.pid, signal.SIGINT)
    assert watch.wait(10) == 0
    assert watch.err.read_text() == ""


def test_without_an_agent(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text('[control]\nsocket = "none.sock"\n')
    done = status("--config", config)
    assert done.returncode == 69
    assert "no agent runs with the control socket" in done.stderr and "none.sock" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_socket_of_a_dead_agent(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text('[control]\nsocket = "dead.sock"\n')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dead.sock"))
    done = status("--config", config)
    assert done.returncode == 69 and "no agent runs" in done.stderr


def test_socket_is_for_owner_and_group(swarm: Swarm) -> None:
    swarm.first.online()
    assert stat.S_IMODE(swarm.first.socket.stat().st_mode) == 0o660


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"do": 7}',
        b'{"do": ["status"]}',
        b'{"do": "fly"}',
        b"\xff\xfe",
        b"[" * 50000,
    ],
)
def test_garbage_gets_an_error(swarm: Swarm, line: bytes) -> None:
    swarm.first.until(lambda status: True, 30, "an answer")
    answer = ask(swarm.first.socket, line)
    assert answer["ok"] is False and answer["error"]
    assert swarm.first.process.err.read_text().count("Traceback") == 0


def test_long_line_names_the_limit(swarm: Swarm) -> None:
    swarm.first.until(lambda status: True, 30, "an answer")
    answer = ask(swarm.first.socket, b'{"do": "' + b"x" * 2 * LINE_LIMIT)
    assert answer["ok"] is False and str(LINE_LIMIT) in answer["error"]


def test_many_requests_on_one_connection(swarm: Swarm) -> None:
    swarm.first.until(lambda status: True, 30, "an answer")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(swarm.first.socket))
        connection.sendall(b'{"do": "status"}\n' * 50 + b"nonsense\n")
        lines = connection.makefile("rb")
        answers = [json.loads(lines.readline()) for _ in range(51)]
    assert [answer["ok"] for answer in answers] == [True] * 50 + [False]


def test_connections_are_limited_and_come_back(swarm: Swarm) -> None:
    swarm.first.until(lambda status: True, 30, "an answer")
    idle = [socket.socket(socket.AF_UNIX) for _ in range(MAX_CONNECTIONS + 20)]
    try:
        for connection in idle:
            connection.connect(str(swarm.first.socket))
        deadline = time.monotonic() + 10
        answer = {}
        while answer.get("ok") is not False and time.monotonic() < deadline:  # some are not accepted yet
            answer = ask(swarm.first.socket, b'{"do": "status"}')
        assert answer["ok"] is False and str(MAX_CONNECTIONS) in answer["error"]
    finally:
        for connection in idle:
            connection.close()
    wait_until(lambda: swarm.first.status(), 10, "room for us again")
