"""Busy is not stalled, loading is not stalled, idle is not stalled: nothing is repaired that is not broken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.hurt import HIDDEN, Victim, online, start_victim
from harness.peer import Peer, chain
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap

BUSY_S = 40.0
LOAD_S = 40.0
SESSIONS = 12
PROMPTS = (1, 3, 200, 1000)  # tokens; the long ones hold the engine up
LIMITS = "\n".join(
    f'[health.probes."container.{name}"]\ntimeout = "10s"' for name in ("loop", "engine", "canary")
)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def peer(processes: Processes) -> Iterator[tuple[str, Peer]]:
    """An entry node's address, and a peer."""
    maddr = start_bootstrap(processes)
    with Peer([maddr]) as member:
        yield maddr, member


async def drive(peer: Peer, victim: Victim, seconds: float) -> list[int]:
    """Sessions as fast as they are answered, several at once; how many right answers each of them got."""
    until = time.monotonic() + seconds

    async def one(number: int) -> int:
        answers = 0
        while time.monotonic() < until:
            tokens = PROMPTS[(number + answers) % len(PROMPTS)]
            hidden = HIDDEN if tokens == HIDDEN.shape[1] else torch.randn(1, tokens, HIDDEN.shape[2])
            out = await peer.stepping(victim.peer_id, chain(0, 8), hidden)
            assert out.shape == hidden.shape and bool(out.isfinite().all())
            assert hidden is not HIDDEN or torch.allclose(out, victim.right, atol=1e-3)
            answers += 1
        return answers

    return list(await asyncio.gather(*(one(number) for number in range(SESSIONS))))


def test_full_load_a_slow_load_and_idleness(
    peer: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """All at the same time on one machine, and with the short limits of the other tests."""
    busy = online(start_victim(processes, tmp_path / "busy", tiny_llama, *peer))
    idle = online(start_victim(processes, tmp_path / "idle", tiny_llama, *peer))
    slow_env = {"PETALS_AGENT_SLOW_S": str(LOAD_S)}
    slow = start_victim(processes, tmp_path / "slow", tiny_llama, *peer, env=slow_env, orders=("slow.stay",))
    began = time.monotonic()
    answers = peer[1].run(drive(peer[1], busy, BUSY_S), BUSY_S + 120)
    assert min(answers) > 0
    slow.agent.online(180)
    assert time.monotonic() - began >= LOAD_S, "the load was not slow"
    wait_until(lambda: busy.agent.status()["queued"] == 0, 30, "the end of the load")
    for victim in (busy, idle, slow):
        status = victim.agent.status()
        assert status["restarts"] == {"container": 0, "p2pd": 0}, victim.events()
        assert status["state"] == "online"
        assert victim.recoveries() == []
        unhealthy = [e for e in victim.events() if e["event"] == "health" and e["health"] == "unhealthy"]
        assert unhealthy == []
    print(f"{sum(answers)} sessions in {BUSY_S:g} s of full load, beside a load of {LOAD_S:g} s: no repair")
