"""A plugin hears of the agent's life as it is: states in their order, illness and repair, and each stop exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.live import LiveAgent, start_live
from harness.peer import Peer
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap

pytestmark = pytest.mark.timeout(240)

SPY = """
import json
from dataclasses import asdict
from pathlib import Path
from petals_agent.hooks import Probe, Reading, Recovery, hookimpl

BOOK = Path(__file__).with_suffix(".book")
FEVER = Path(__file__).with_suffix(".fever")

def write(hook, **facts):
    with BOOK.open("a") as file:
        file.write(json.dumps({"hook": hook, **facts}, default=str) + "\\n")

@hookimpl
def on_start(config):
    write("on_start", model=config.model)

@hookimpl
def on_state_change(change):
    write("on_state_change", after=change.after)

@hookimpl
def on_unhealthy(verdict, proposed):
    write("on_unhealthy", proposed=proposed, reasons=verdict.reasons)
    return Recovery.REATTACH if proposed is Recovery.RESTART_P2PD else None

@hookimpl
def on_verdict(verdict):
    write("on_verdict", health=verdict.health, reasons=verdict.reasons)

@hookimpl
def on_recovered(report):
    write("on_recovered", steps=report.steps)

@hookimpl
def health_probes(config):
    def look():
        return Reading("failed", "39 degrees") if FEVER.exists() else Reading("ok")
    return [Probe(name="fever", check=look, period=1, failures=2, cure=Recovery.RESTART_P2PD)]

@hookimpl
def after_shutdown(report):
    write("after_shutdown", clean=report.clean, reason=report.reason, result=report.service_result)
"""


class Spy:
    """The plugin's book."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_plugins(folder, spy=SPY)

    def heard(self, hook: str) -> list[dict[str, Any]]:
        book = self.folder / "spy.book"
        lines = book.read_text().splitlines() if book.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["hook"] == hook]

    def fever(self, on: bool) -> None:
        file = self.folder / "spy.fever"
        file.touch() if on else file.unlink()


@pytest.fixture
def spy(tmp_path: Path) -> Spy:
    return Spy(tmp_path / "plugins")


def start(processes: Processes, tmp_path: Path, model: Path, spy: Spy, maddr: str) -> LiveAgent:
    more = f'[plugins]\ndirs = ["{spy.folder}"]'
    agent = start_live(processes, tmp_path / "a", model, "0:8", [maddr], more)
    agent.online()
    return agent


def post_stop(agent: LiveAgent) -> None:
    command = [sys.executable, "-m", "petals_agent.cli.main", "post-stop", "--config", str(agent.config)]
    environment = {**os.environ, "SERVICE_RESULT": "watchdog", "EXIT_CODE": "killed", "EXIT_STATUS": "ABRT"}
    subprocess.run(command, check=True, timeout=60, env=environment)


def test_a_life(processes: Processes, tmp_path: Path, tiny_llama: Path, spy: Spy) -> None:
    maddr = start_bootstrap(processes)
    agent = start(processes, tmp_path, tiny_llama, spy, maddr)
    wait_until(lambda: len(spy.heard("on_state_change")) >= 2, 20, "its states")
    assert [entry["after"] for entry in spy.heard("on_state_change")][:2] == ["joining", "online"]
    assert len(spy.heard("on_start")) == 1
    spy.fever(True)
    wait_until(lambda: spy.heard("on_unhealthy"), 30, "the illness")
    first = spy.heard("on_unhealthy")[0]
    assert first["proposed"] == "restart_p2pd" and "39 degrees" in str(first["reasons"])
    spy.fever(False)
    wait_until(lambda: spy.heard("on_recovered"), 30, "the end of it")
    healths = [entry["health"] for entry in spy.heard("on_verdict")]
    assert healths[-1] == "healthy" and "unhealthy" in healths
    assert spy.heard("on_recovered")[0]["steps"][0] == "reattach", "the plugin's choice, not the ladder's"
    agent.online()
    os.kill(agent.process.pid, signal.SIGTERM)
    wait_until(lambda: agent.process.returncode is not None, 60, "its end")
    post_stop(agent)
    (told,) = spy.heard("after_shutdown")
    assert told["clean"] and told["reason"] == "asked to stop"
    assert [entry["after"] for entry in spy.heard("on_state_change")][-1] == "offline"


def test_a_death(processes: Processes, tmp_path: Path, tiny_llama: Path, spy: Spy) -> None:
    maddr = start_bootstrap(processes)
    agent = start(processes, tmp_path, tiny_llama, spy, maddr)
    os.kill(agent.process.pid, signal.SIGKILL)
    wait_until(lambda: agent.process.returncode is not None, 30, "its end")
    assert spy.heard("after_shutdown") == []
    for _ in range(2):
        post_stop(agent)
    (told,) = spy.heard("after_shutdown")
    assert not told["clean"] and told["result"] == "watchdog"


def test_nobody_speaks_for_the_living(
    processes: Processes, tmp_path: Path, tiny_llama: Path, spy: Spy
) -> None:
    """As when the unit is started beside an agent that runs by hand, and fails."""
    maddr = start_bootstrap(processes)
    agent = start(processes, tmp_path, tiny_llama, spy, maddr)
    peer_id = agent.status()["peer_id"]
    post_stop(agent)
    assert spy.heard("after_shutdown") == []
    with Peer([maddr]) as peer:
        assert peer.state(peer_id) == 2, "ONLINE"
    os.kill(agent.process.pid, signal.SIGTERM)
    wait_until(lambda: spy.heard("after_shutdown"), 60, "its end")


def test_a_death_that_nobody_told_is_told_at_the_next_start(
    processes: Processes, tmp_path: Path, tiny_llama: Path, spy: Spy
) -> None:
    maddr = start_bootstrap(processes)
    agent = start(processes, tmp_path, tiny_llama, spy, maddr)
    os.kill(agent.process.pid, signal.SIGKILL)
    wait_until(lambda: agent.process.returncode is not None, 30, "its end")
    start(processes, tmp_path, tiny_llama, spy, maddr)
    (told,) = spy.heard("after_shutdown")
    assert not told["clean"]
