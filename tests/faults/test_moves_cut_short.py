"""A move that does not come to its end: its load hangs, the agent is stopped or paused; plugins hear of it, and nobody waits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.hurt import HIDDEN, INJECT
from harness.live import LiveAgent, all_gone, ask, noise, start_live
from harness.open_session import OpenSession
from harness.peer import Peer, chain
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.promises import Promises
from harness.swarm import start_bootstrap

pytestmark = pytest.mark.timeout(150)

OFFLINE, JOINING = 0, 1
LIMIT_S = 4
SETTINGS = f"""[log]
format = "json"
[balance]
enabled = true
mean_balance_check_period = 0.3
mean_block_selection_delay = 0.1
drain_timeout = 3
[serve]
num_blocks = 4
blocks = "auto"
[health.probes."container.load"]
timeout = "{LIMIT_S}s"
period = "60s"
"""
BOOK = """
import json, time
from pathlib import Path
from petals_agent.hooks import Span, hookimpl

HERE = Path(__file__)

def write(hook, **facts):
    with HERE.with_suffix(".book").open("a") as file:
        file.write(json.dumps({"hook": hook, "time": time.time(), **facts}, default=str) + "\\n")

@hookimpl
def choose_blocks(swarm, candidates, num_blocks):
    return Span(2, 6) if HERE.with_suffix(".move").exists() else Span(0, 4)

@hookimpl
def on_state_change(change):
    write("on_state_change", after=change.after)

@hookimpl
def after_rebalance(plan, report):
    write("after_rebalance", moved=report.moved, span=str(report.span), reason=report.reason)
"""


@dataclass
class Scene:
    """An agent that loads blocks 2:6 beside its 0:4, and gets no further."""

    agent: LiveAgent
    plugin: Path
    peer: Peer
    peer_id: str
    container: int

    def heard(self, hook: str) -> list[dict[str, Any]]:
        book = self.plugin.with_suffix(".book")
        lines = book.read_text().splitlines() if book.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["hook"] == hook]

    def begin(self) -> None:
        """Let the load begin."""
        order = self.agent.config.parent / "orders" / "slow"
        order.touch()
        wait_until(lambda: not order.exists(), 10, "the order is taken")
        self.plugin.with_suffix(".move").touch()
        wait_until(lambda: self.peer.state(self.peer_id, "tiny.5") == JOINING, 30, "the load")

    def report(self) -> dict[str, Any]:
        """The only one."""
        wait_until(lambda: self.heard("after_rebalance"), 20, "the report")
        (report,) = self.heard("after_rebalance")
        return report

    def promised(self) -> list[int]:
        """The blocks that are announced as anything but OFFLINE."""
        states = {block: self.peer.state(self.peer_id, f"tiny.{block}") for block in range(8)}
        return [block for block, state in states.items() if state not in (None, OFFLINE)]


@pytest.fixture
def scene(processes: Processes, tmp_path: Path, tiny_llama: Path) -> Iterator[Scene]:
    maddr = start_bootstrap(processes)
    folder = write_plugins(tmp_path / "plugins", book=BOOK)
    plugin = folder / "book.py"
    orders = tmp_path / "a" / "orders"
    orders.mkdir(parents=True)
    env = {"PYTHONPATH": str(INJECT), "PETALS_AGENT_FAULTS": str(orders), "PETALS_AGENT_SLOW_S": "900"}
    more = f'{SETTINGS}[plugins]\ndirs = ["{folder}"]'
    with Peer([maddr]) as peer:
        agent = start_live(processes, tmp_path / "a", tiny_llama, "auto", [maddr], more, env=env)
        status = agent.online()
        assert status["blocks"] == "0:4"
        yield Scene(agent, plugin, peer, status["peer_id"], status["pids"]["container"])


def test_a_load_that_hangs(scene: Scene) -> None:
    """It is noticed, what was promised is withdrawn, who is connected may go on for a while, and another container serves on."""
    scene.begin()
    with OpenSession(scene.peer, scene.peer_id, chain(0, 4), 16) as session:
        session.step(HIDDEN)
        wait_until(lambda: 5 not in scene.promised(), 30, "it is no more promised")
        session.step(HIDDEN)
    scene.plugin.with_suffix(".move").unlink()
    report = scene.report()
    assert (report["moved"], report["span"]) == (False, "0:4")
    assert "the load stands still at" in report["reason"] and f"limit {LIMIT_S} s" in report["reason"]
    status = scene.agent.until(
        lambda s: s["state"] == "online" and s["pids"]["container"] not in (None, scene.container),
        60,
        "another",
    )
    assert status["blocks"] == "0:4" and status["restarts"]["container"] == 1
    promises = Promises(scene.peer, scene.peer_id)
    wait_until(lambda: promises.kept((0, 4)), 10, "exactly the old blocks")
    assert scene.peer.step(scene.peer_id, chain(0, 4), HIDDEN).isfinite().all()


def test_a_stop(scene: Scene) -> None:
    scene.begin()
    family, process = scene.agent.family(), scene.agent.process
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: process.returncode is not None, 60, "its end")
    assert process.returncode == 0 and all_gone(family)
    assert scene.promised() == []
    report = scene.report()
    assert (report["moved"], report["span"], report["reason"]) == (False, "0:4", "the agent stops")
    (said,) = (
        event["time"]
        for event in scene.agent.logged()
        if event["event"] == "announce" and event.get("announced") == "offline"
    )
    assert said < report["time"], "others are told before plugins are"
    states = [entry["after"] for entry in scene.heard("on_state_change")]
    assert states[-3:] == ["rebalancing", "stopping", "offline"]
    assert noise(process) == []


def test_a_pause(scene: Scene) -> None:
    scene.begin()
    assert ask(scene.agent.socket, b'{"do": "pause", "drain_s": 0}')["ok"]
    status = scene.agent.until(lambda status: status["state"] == "paused", 30, "the pause")
    assert status["pids"]["container"] is None
    wait_until(lambda: scene.promised() == [], 20, "nothing is promised")
    report = scene.report()
    assert report["moved"] is False and "the container ended" in report["reason"]
    assert ask(scene.agent.socket, b'{"do": "resume"}')["ok"]
    assert scene.agent.online()["blocks"] == "2:6", "chosen anew, as the plugin wants them by now"
    promises = Promises(scene.peer, scene.peer_id)
    wait_until(lambda: promises.kept((2, 6)), 10, "exactly these")
