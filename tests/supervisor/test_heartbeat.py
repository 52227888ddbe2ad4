"""An agent in a fleet: the other members are plain programs, so that only one model is loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.live import LiveAgent, noise, start_live
from harness.plugins import write_plugins
from harness.processes import Process, Processes, wait_until
from harness.swarm import PETALS_AGENT, TESTS
from petals_agent.heartbeat.rules import Timing
from petals_agent.swarm.identity import ensure_identity

PROGRAM = TESTS / "heartbeat" / "program.py"
PERIOD_S = 2.0
BOUND_S = Timing.of(PERIOD_S).bound + 30.0
ROOT = TESTS.parent
PLUGIN = """
from pathlib import Path
from petals_agent.hooks import hookimpl

@hookimpl
def on_unhealthy(verdict, proposed):
    with Path({file!r}).open("a") as file:
        print(verdict.health, proposed.value, verdict.cure, verdict.reasons[0], file=file)
"""
pytestmark = pytest.mark.timeout(300)


class Fleet:
    """An agent and as many programs as there are keys."""

    def __init__(
        self,
        processes: Processes,
        folder: Path,
        entry: str,
        model: Path,
        programs: int,
        on_failure: str,
        more: str = "",
    ) -> None:
        self.processes, self.entry = processes, entry
        self.keys = [folder / f"{number}.key" for number in range(programs)]
        self.me = ensure_identity(folder / "a" / "state" / "id.key")
        self.peers = [self.me, *map(ensure_identity, self.keys)]
        more += (
            f"[heartbeat]\nmembers = {json.dumps(self.peers)}\nperiod = {PERIOD_S}\n"
            f'on_failure = "{on_failure}"\n[log]\nformat = "json"'
        )
        self.agent: LiveAgent = start_live(processes, folder / "a", model, "0:8", [entry], more)
        self.programs = [self.start(number) for number in range(programs)]

    def start(self, number: int) -> Process:
        members = [part for peer in self.peers for part in ("--member", peer)]
        command = [sys.executable, PROGRAM, self.keys[number], "--entry", self.entry, *members]
        command += ["--period", str(PERIOD_S), "--start-timeout", "120"]
        return self.processes.start(f"program{number}", command, grace=5)

    def until(self, condition: Any, timeout: float, what: str) -> Mapping[str, Any]:
        def holds(status: Mapping[str, Any]) -> bool:
            return bool(status["heartbeat"]) and bool(condition(status, status["heartbeat"]))

        return self.agent.until(holds, timeout, what)

    def beating(self) -> Mapping[str, Any]:
        return self.until(
            lambda status, beat: beat["state"] == "running" and beat["round"] and beat["problem"] is None,
            120,
            "the fleet beats",
        )


def command(fleet: Fleet, *options: str) -> subprocess.CompletedProcess[str]:
    words = [*PETALS_AGENT, "heartbeat", "--config", str(fleet.agent.config), *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def scraped(agent: LiveAgent) -> dict[str, float]:
    """Metrics of the heartbeat, by name and label, without the prefix."""
    (said,) = [one for one in agent.logged() if one["event"] == "metrics"]
    with urllib.request.urlopen(f"http://{said['address']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        name: float(value)
        for name, value in re.findall(r"^petals_agent_heartbeat_(\S+) (\S+)$", text, re.MULTILINE)
    }


def test_a_life_in_a_fleet(processes: Processes, tmp_path: Path, bootstrap: str, tiny_llama: Path) -> None:
    asked = tmp_path / "asked"
    folder = write_plugins(tmp_path / "plugins", told=PLUGIN.format(file=str(asked)))
    more = f'[metrics]\nlisten = "127.0.0.1:0"\n[plugins]\ndirs = ["{folder}"]\n'
    fleet = Fleet(processes, tmp_path, bootstrap, tiny_llama, 2, "unhealthy", more)
    fleet.agent.online()
    status = fleet.beating()
    assert sorted(status["heartbeat"]["members"]) == sorted(fleet.peers)
    fleet.until(
        lambda status, beat: not any(reason.startswith("heartbeat") for reason in status["reasons"]),
        20,
        "no finding",
    )
    shown = command(fleet)
    assert shown.returncode == 0 and all(peer in shown.stdout for peer in fleet.peers), shown.stdout
    assert "this host" in shown.stdout and ": well" in shown.stdout
    assert json.loads(command(fleet, "--json").stdout)["on_failure"] == "unhealthy"

    # as Prometheus sees it
    names = re.findall(r"^\| `heartbeat_(\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    found = scraped(fleet.agent)
    assert {name.partition("{")[0] for name in found} == set(names)
    assert (found["members"], found["missing_members"], found["failures_in_a_row"]) == (3, 0, 0)
    assert (found['state{state="running"}'], found['state{state="gathering"}'], found["failed"]) == (1, 0, 0)
    assert found["round"] >= status["heartbeat"]["round"]
    assert abs(time.time() - found["last_success_time_seconds"]) < 30

    # p2pd is replaced: no alarm
    number = status["heartbeat"]["round"]
    fleet.agent.kill_child("p2pd")
    later = fleet.until(lambda status, beat: (beat["round"] or 0) > number + 4, 90, "rounds go on")
    assert later["heartbeat"]["failure"] is None and later["restarts"]["p2pd"] == 1

    # a member dies: we are unhealthy, plugins are asked, nothing is repaired, and we serve on
    fleet.programs[0].kill()
    said = fleet.until(lambda status, beat: beat["failure"], BOUND_S, "the fleet has failed")
    said = fleet.until(lambda status, beat: status["health"] == "unhealthy", 20, "it is a finding")
    assert said["state"] == "online" and said["reasons"][0].startswith("heartbeat: 3 rounds in a row")
    assert scraped(fleet.agent)["failed"] == 1
    wait_until(asked.exists, 20, "the plugin is asked")
    assert asked.read_text().startswith("unhealthy nothing None heartbeat: 3 rounds in a row failed")
    restarts = said["restarts"]
    assert said["announced"] == "online"
    shown = command(fleet)
    assert shown.returncode == 75 and "3 rounds in a row failed" in shown.stdout, shown.stdout

    # and comes back: all gather anew
    fleet.programs[0] = fleet.start(0)
    fleet.beating()
    well = fleet.until(lambda status, beat: status["health"] == "healthy", 60, "healthy again")
    assert well["restarts"] == restarts and well["announced"] == "online"
    assert command(fleet).returncode == 0
    events = [one for one in fleet.agent.logged() if one["event"] == "heartbeat"]
    assert [one["level"] for one in events] == ["info", "warning", "info"], events
    fleet.agent.process.terminate()
    assert noise(fleet.agent.process) == []


def test_exit_ends_the_agent_for_a_new_start(
    processes: Processes, tmp_path: Path, bootstrap: str, tiny_llama: Path
) -> None:
    fleet = Fleet(processes, tmp_path, bootstrap, tiny_llama, 1, "exit")
    fleet.agent.online()
    fleet.beating()
    os.kill(fleet.programs[0].pid, signal.SIGSTOP)
    try:
        assert fleet.agent.process.wait(BOUND_S) == 75
    finally:
        os.kill(fleet.programs[0].pid, signal.SIGCONT)
    failed = next(one for one in fleet.agent.logged() if one["event"] == "failed")
    assert (failed["code"], failed["exit_code"]) == ("heartbeat", 75)
    assert "the fleet is not consistent" in failed["message"]
    assert "announced" not in failed and noise(fleet.agent.process) == []


def test_a_list_without_us_is_a_wrong_configuration(
    processes: Processes, tmp_path: Path, bootstrap: str, tiny_llama: Path
) -> None:
    others = [ensure_identity(tmp_path / f"{number}.key") for number in range(2)]
    more = f"[heartbeat]\nmembers = {json.dumps(others)}"
    agent = start_live(processes, tmp_path / "a", tiny_llama, "0:8", [bootstrap], more)
    assert agent.process.wait(60) == 78
    me = ensure_identity(agent.identity)
    assert f"heartbeat.members does not name this host, whose peer id is {me}" in agent.process.output()
