"""Blocks that a plugin wants are served wherever blocks are chosen, as far as the operator's limits allow it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.live import LiveAgent, start_live
from harness.moving import rebalance
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap

pytestmark = pytest.mark.timeout(180)

QUICK = """[balance]
enabled = true
mean_balance_check_period = 0.3
mean_block_selection_delay = 0.1
cooldown = 1
drain_timeout = 5
[swarm]
update_period = 1
[serve]
num_blocks = 4
"""
GUIDE = """
import json
from pathlib import Path
from petals_agent.hooks import Probe, Reading, Recovery, Span, hookimpl

HERE = Path(__file__)

def order(name):
    file = HERE.with_suffix("." + name)
    return json.loads(file.read_text()) if file.exists() else None

@hookimpl
def choose_blocks(swarm, candidates, num_blocks):
    with HERE.with_suffix(".room").open("a") as file:
        file.write(f"{num_blocks}\\n")
    start, end = order("choose")
    return Span(start, num_blocks if end is None else end)

@hookimpl
def before_rebalance(plan, swarm):
    blocks = order("before")
    return None if blocks is None else Span(*blocks)

def look():
    return Reading("failed", "a fever") if order("fever") else Reading("ok")

@hookimpl
def health_probes(config):
    return [Probe(name="fever", check=look, period=1, failures=1, cure=Recovery.CHOOSE_OTHERS)]

@hookimpl
def on_unhealthy(verdict, proposed):
    return None if proposed is Recovery.CHOOSE_OTHERS else Recovery.NOTHING
"""


@dataclass
class Guided:
    """An agent whose plugin wants what stands in its files."""

    agent: LiveAgent
    plugin: Path

    def order(self, name: str, value: Any) -> None:
        _order(self.plugin, name, value)

    def balance(self, words: str) -> None:
        """Wait for a look that leads to this."""
        self.agent.until(lambda status: words in status["balance"], 30, words)


def _order(plugin: Path, name: str, value: Any) -> None:
    file = plugin.with_suffix(f".{name}")
    new = file.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.replace(file)


@pytest.fixture
def guided(processes: Processes, tmp_path: Path, tiny_llama: Path) -> Iterator[Guided]:
    maddr = start_bootstrap(processes)
    folder = write_plugins(tmp_path / "plugins", guide=GUIDE)
    plugin = folder / "guide.py"
    _order(plugin, "choose", [2, 6])
    more = f'{QUICK}[plugins]\ndirs = ["{folder}"]'
    yield Guided(start_live(processes, tmp_path / "a", tiny_llama, "auto", [maddr], more), plugin)


def test_at_the_start_at_each_look_and_when_blocks_did_us_no_good(guided: Guided) -> None:
    agent = guided.agent
    assert agent.online()["blocks"] == "2:6"
    guided.balance("plugin guide wants these blocks")
    guided.order("choose", [4, 8])
    agent.until(lambda status: status["blocks"] == "4:8" and status["state"] == "online", 60, "the move")
    container = agent.status()["pids"]["container"]
    guided.order("fever", True)
    agent.until(lambda s: any(e["name"] == "recovery" for e in s["events"]), 30, "a repair")
    guided.order("fever", False)
    status = agent.until(
        lambda s: s["state"] == "online" and s["pids"]["container"] not in (None, container),
        90,
        "another one",
    )
    assert status["blocks"] == "4:8", "not others, since the plugin wants these"
    texts = [event["text"] for event in status["events"] if event["name"] == "recovery"]
    assert any("choose others" in text for text in texts), texts


def test_not_more_than_serve_num_blocks(guided: Guided) -> None:
    agent = guided.agent
    assert agent.online()["blocks"] == "2:6"
    guided.order("choose", [0, 8])
    guided.balance("plugin guide wants blocks 0:8: 4 of the model's 8 are possible here")
    guided.order("choose", [6, 10])
    guided.balance("plugin guide wants blocks 6:10: 4 of the model's 8 are possible here")
    guided.order("choose", [2, 6])
    guided.order("before", [0, 7])
    refused = rebalance(agent, blocks="4:8")
    assert not refused["ok"] and "wants blocks 0:7: 4 of the model's 8 are possible" in refused["error"], (
        refused
    )
    assert agent.online()["blocks"] == "2:6"
    room = set(guided.plugin.with_suffix(".room").read_text().split())
    assert room == {"4"}, "what a plugin is told"
    guided.order("before", None)
    guided.order("choose", [0, None])
    wait_until(lambda: agent.status().get("blocks") == "0:4", 60, "a move to as many as are possible")
