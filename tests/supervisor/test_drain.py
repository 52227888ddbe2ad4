"""Maintenance: the last holder waits, open sessions go on, nobody new is let in, a restart does not forget it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.live import LiveAgent, ask, start_again, start_live
from harness.open_session import OpenSession
from harness.peer import Peer, chain
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT, start_bootstrap

OFFLINE, ONLINE = 0, 2


@dataclass
class Scene:
    agent: LiveAgent
    peer: Peer
    peer_id: str
    processes: Processes

    def state(self) -> object:
        return self.peer.state(self.peer_id)


@pytest.fixture
def scene(processes: Processes, tmp_path: Path, tiny_llama: Path) -> Iterator[Scene]:
    maddr = start_bootstrap(processes)
    with Peer([maddr]) as peer:
        agent = start_live(processes, tmp_path / "agent", tiny_llama, "0:8", [maddr])
        yield Scene(agent, peer, agent.online()["peer_id"], processes)


@pytest.mark.timeout(180)
def test_a_drain_from_begin_to_end(scene: Scene) -> None:
    agent, peer = scene.agent, scene.peer
    hidden = torch.randn(1, 3, 256, generator=torch.Generator().manual_seed(0))
    right = peer.step(scene.peer_id, chain(0, 8), hidden)

    # the last holder waits, and says how to go on
    assert agent.command("drain", "--reason", "new disk", "--no-wait").returncode == 0
    status = agent.until(
        lambda status: status["drain"] and status["drain"]["stage"] == "waiting", 30, "a drain that waits"
    )
    assert status["drain"]["reason"] == "new disk"
    assert (
        "nobody else serves blocks 0:8" in status["drain"]["detail"]
        and "--force" in status["drain"]["detail"]
    )
    assert status["state"] == "online" and scene.state() == ONLINE

    # open sessions go on, new ones are refused
    with OpenSession(peer, scene.peer_id, chain(0, 8), 20) as session:
        assert torch.allclose(session.step(hidden), right, atol=1e-4)
        agent.command("drain", "--force", "--no-wait")
        wait_until(lambda: scene.state() == OFFLINE, 30, "OFFLINE in the DHT")
        assert agent.status()["drain"]["stage"] == "emptying"
        with pytest.raises(Exception, match="is leaving"):
            peer.step(scene.peer_id, chain(0, 8), hidden)
        session.step(hidden)
    status = agent.until(lambda status: status["drain"]["stage"] == "drained", 30, "drained")
    assert status["state"] == "draining" and status["pids"]["container"]

    # a restart does not forget it
    container = status["pids"]["container"]
    agent.kill_child("container")
    agent.until(
        lambda status: status["state"] == "draining" and status["pids"]["container"] not in (None, container),
        60,
        "draining with another container",
    )
    agent.process.terminate()
    again = start_again(scene.processes, agent.config)
    again.until(lambda status: status["state"] == "draining", 60, "draining after a restart")
    wait_until(lambda: scene.state() == OFFLINE, 30, "OFFLINE in the DHT")
    assert again.command("undrain").returncode == 0
    again.online()
    wait_until(lambda: scene.state() == ONLINE, 30, "ONLINE in the DHT")
    assert torch.allclose(peer.step(scene.peer_id, chain(0, 8), hidden), right, atol=1e-4)


def test_with_another_holder_it_begins_at_once(scene: Scene, tmp_path: Path, tiny_llama: Path) -> None:
    maddr = scene.agent.status()["maddrs"][0]
    other = start_live(scene.processes, tmp_path / "other", tiny_llama, "0:8", [maddr])
    other.online()
    done = scene.agent.command("drain", "--until-restart")
    assert done.returncode == 0 and "drained" in done.stdout and "waiting" not in done.stdout
    assert not (scene.agent.identity.parent / "drain.json").exists()
    assert scene.state() == OFFLINE


def test_sessions_that_do_not_end_are_waited_for_no_longer_than_asked(scene: Scene) -> None:
    hidden = torch.randn(1, 1, 256)
    with OpenSession(scene.peer, scene.peer_id, chain(0, 8), 20) as session:
        session.step(hidden)
        done = scene.agent.command("drain", "--force", "--timeout", "0.5")
        assert done.returncode == 0 and "drained" in done.stdout
        text = " ".join(event["text"] for event in scene.agent.status()["events"])
        assert "1 sessions were still open after 0.5 s" in text


def test_who_waits_for_a_drain_hears_that_it_was_called_off(scene: Scene) -> None:
    """The last holder waits for another one."""
    waiting = scene.processes.start("drain", [*PETALS_AGENT, "drain", "--config", scene.agent.config])
    wait_until(lambda: "nobody else serves blocks 0:8" in waiting.output(), 30, "why it waits")
    assert scene.agent.command("undrain").returncode == 0
    assert waiting.wait(30) == 69
    assert "the drain was called off" in waiting.output()
    assert scene.agent.command("drain", "--force").returncode == 0


@pytest.mark.parametrize(
    "request_",
    [
        b'{"do": "drain", "reason": "caf\\udce9"}',
        b'{"do": "drain", "timeout": "x"}',
        b'{"do": "drain", "timeout": -1}',
        b'{"do": "drain", "reason": 3}',
    ],
)
def test_an_order_that_makes_no_sense(scene: Scene, request_: bytes) -> None:
    answer = ask(scene.agent.socket, request_)
    assert answer["ok"] is False and "of a drain must be" in answer["error"]
    assert scene.agent.status()["drain"] is None
