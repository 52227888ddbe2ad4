"""Agents find the gaps of a swarm by themselves, say why they stay, and go where they are told; plugins have the last word."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from harness.live import LiveAgent, ask, start_live
from harness.peer import Peer
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap
from petals_agent.config import config_from
from petals_agent.supervisor.agent import Agent

QUICK = """[balance]
enabled = true
mean_balance_check_period = 1
mean_block_selection_delay = 0.2
cooldown = 3
drain_timeout = 5
[serve]
blocks = "auto"
num_blocks = 4"""
pytestmark = pytest.mark.timeout(300)


def rebalance(agent: LiveAgent, **more: Any) -> dict[str, Any]:
    import json

    return ask(agent.socket, json.dumps({"do": "rebalance", **more}).encode(), 90)


def blocks(agents: list[LiveAgent]) -> list[str]:
    return sorted(str(agent.status().get("blocks")) for agent in agents)


def test_gaps_are_filled_and_then_nothing_moves(
    processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """Three serve the same blocks; the other half is nobody's."""
    maddr = start_bootstrap(processes)
    fixed = start_live(processes, tmp_path / "fixed", tiny_llama, "0:4", [maddr])
    fixed.online()
    agents = []
    for name in ("one", "two"):
        agent = start_live(processes, tmp_path / name, tiny_llama, "0:4", [maddr], QUICK)
        agents.append(agent)
        agent.online()
    wait_until(lambda: "4:8" in blocks(agents), 60, "the gap is filled")
    told = [
        agent.until(lambda s: "stayed" in s["balance"], 30, "a look that leads to nothing")
        for agent in agents
    ]
    print([status["balance"] for status in told])
    before = blocks(agents)
    moves = sum(event["name"] == "move" for agent in agents for event in agent.status()["events"])
    looks = rebalance(agents[0], dry_run=True)
    assert looks["ok"] and not looks["result"]["moved"] and "stayed" in looks["result"]["said"]
    assert blocks(agents) == before and moves <= 2
    done = rebalance(agents[0], blocks="2:6")
    assert done["ok"] and done["result"]["moved"], done
    with Peer([maddr]) as peer:
        peer_id = agents[0].online()["peer_id"]
        assert peer.state(peer_id, "tiny.5") == 2


PIN = """
from petals_agent.hooks import Span, Veto, hookimpl

@hookimpl
def choose_blocks(swarm, candidates, num_blocks):
    return Span(2, 6)

@hookimpl
def before_rebalance(plan, swarm):
    if plan.new.start == 4:
        return Veto("not these")
"""


def test_plugins_have_the_last_word(processes: Processes, tmp_path: Path, tiny_llama: Path) -> None:
    maddr = start_bootstrap(processes)
    plugins = write_plugins(tmp_path / "plugins", pin=PIN)
    more = QUICK + f'\n[plugins]\ndirs = ["{plugins}"]'
    agent = start_live(processes, tmp_path / "a", tiny_llama, "0:4", [maddr], more)
    agent.until(lambda s: s["blocks"] == "2:6" and s["state"] == "online", 90, "the plugin's blocks")
    agent.until(
        lambda s: "plugin pin wants these blocks" in s["balance"], 30, "the plugin is asked at each look"
    )
    refused = rebalance(agent, blocks="4:8")
    assert not refused["ok"] and "not these" in str(refused["error"])
    assert agent.online()["blocks"] == "2:6"


def test_the_wait_is_uniform(tmp_path: Path) -> None:
    """should_choose_other_blocks waits uniform(0, 2·mean) by the agent's own generator, and looks only then."""
    config = config_from(
        {
            "model": {"path": str(tmp_path), "dht_prefix": "tiny"},
            "swarm": {"identity": str(tmp_path / "id.key")},
        }
    )
    agent = Agent(config)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    agent.balancing._rng, agent.balancing._sleep = random.Random(7), sleep
    twin = random.Random(7)

    async def ask_often() -> list[bool]:
        return [await agent.balancing.should_choose_other_blocks() for _ in range(500)]

    assert not any(asyncio.run(ask_often())), "an agent that is not online moves nowhere"
    assert waits == [twin.random() * 2 * 120.0 for _ in range(500)]
    assert 100 < sum(waits) / len(waits) < 140
    with pytest.raises(RuntimeError, match="while the agent runs"):
        agent.should_choose_other_blocks()
