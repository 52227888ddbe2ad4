"""Told to stop, told twice, or killed: what was promised is answered where that is possible, and nothing stays behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from harness.live import LiveAgent, all_gone, noise, start_again, start_live
from harness.peer import Peer, chain
from harness.processes import Processes, wait_until

OFFLINE, ONLINE = 0, 2
LONG_S = 80.0
pytestmark = pytest.mark.timeout(240)


def long_requests(agent: LiveAgent, peer: Peer, count: int, tokens: int) -> list[Future[torch.Tensor]]:
    """Prefills that keep the container busy for a while; returns when the agent knows of them."""
    peer_id = agent.online()["peer_id"]
    hidden = torch.randn(1, tokens, 256)
    begun = [peer.begin(peer.stepping(peer_id, chain(0, 8), hidden), LONG_S) for _ in range(count)]
    agent.until(lambda status: status["in_flight"] > 0, 30, "requests in flight")
    return begun


def test_requests_in_flight_are_answered_first(
    processes: Processes, bootstrap: str, tmp_path: Path, tiny_llama: Path
) -> None:
    with Peer([bootstrap]) as peer:
        patient = "[serve]\ndrain_timeout = 60"
        agent = start_live(processes, tmp_path / "a", tiny_llama, "0:8", [bootstrap], patient, grace=70)
        begun = long_requests(agent, peer, 6, 2000)
        peer_id, family = agent.status()["peer_id"], agent.family()
        os.killpg(agent.process.pid, signal.SIGINT)  # as a terminal does
        wait_until(lambda: peer.state(peer_id) == OFFLINE, 10, "OFFLINE in the DHT")
        results = [future.result(LONG_S) for future in begun]
        assert all(result.shape == (1, 2000, 256) and result.isfinite().all() for result in results)
        assert agent.process.wait(20) == 0
        wait_until(lambda: all_gone(family), 5, "the end of its children")
        assert noise(agent.process) == []


def test_second_signal_ends_at_once(
    processes: Processes, bootstrap: str, tmp_path: Path, tiny_llama: Path
) -> None:
    with Peer([bootstrap]) as peer:
        patient = '[serve]\ndrain_timeout = 60\n[log]\nlevel = "warning"'
        agent = start_live(processes, tmp_path / "a", tiny_llama, "0:8", [bootstrap], patient)
        long_requests(agent, peer, 2, 8000)
        family = agent.family()
        os.kill(agent.process.pid, signal.SIGTERM)
        agent.until(lambda status: status["state"] == "stopping", 10, "stopping")

        def told_again() -> bool:  # what comes within a moment of the first one counts as the same
            if agent.process.returncode is None:
                os.kill(agent.process.pid, signal.SIGTERM)
            return agent.process.returncode is not None

        wait_until(told_again, 5, "its end")
        assert agent.process.returncode == 1
        wait_until(lambda: all_gone(family), 5, "the end of its children")
        said = agent.process.err.read_text()
        assert "a second signal (SIGTERM)" in said and " INFO " not in said


def test_killed_and_started_again_at_its_port(
    processes: Processes, bootstrap: str, tmp_path: Path, tiny_llama: Path, free_port: Callable[[], int]
) -> None:
    more = f'[swarm]\nlisten = ["/ip4/127.0.0.1/tcp/{free_port()}"]\n[serve]\ndrain_timeout = 0.5'
    agent = start_live(processes, tmp_path / "a", tiny_llama, "0:8", [bootstrap], more)
    before = agent.online()
    os.kill(before["pids"]["container"], signal.SIGSTOP)  # it cannot even notice
    family = agent.family()
    os.kill(agent.process.pid, signal.SIGKILL)
    again = start_again(processes, agent.config)
    wait_until(lambda: all_gone(family), 5, "the end of its children")
    after = again.online()
    assert after["peer_id"] == before["peer_id"] and after["maddrs"] == before["maddrs"]
    with Peer([bootstrap]) as peer:
        wait_until(lambda: peer.state(after["peer_id"]) == ONLINE, 20, "ONLINE in the DHT")
        assert peer.step(after["peer_id"], chain(0, 8), torch.ones(1, 1, 256)).isfinite().all()
        # one that takes longer than it is allowed to does not hold up the end
        long_requests(again, peer, 2, 8000)
        os.kill(again.process.pid, signal.SIGTERM)
        assert again.process.wait(30) == 0
        assert "still unanswered after 0.5 s" in again.process.err.read_text()
