"""Container and p2pd are killed, again and again: the peer id stays, the record follows the truth, the rest lives on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.live import LiveAgent, start_live
from harness.peer import Peer, chain
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap

JOINING, ONLINE = 1, 2


@dataclass
class Scene:
    """An agent that serves the whole model, and a caller; `hidden` through all blocks is `right`."""

    agent: LiveAgent
    peer: Peer
    peer_id: str
    hidden: torch.Tensor
    right: torch.Tensor

    def serves(self) -> bool:
        """Whether a new session gives the right answer within a second."""
        try:
            out = self.peer.run(self.peer.stepping(self.peer_id, chain(0, 8), self.hidden), 1.0)
        except Exception:
            return False
        return bool(torch.allclose(out, self.right, atol=1e-4))


@pytest.fixture(scope="module")
def scene(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[Scene]:
    maddr = start_bootstrap(module_processes)
    with Peer([maddr]) as peer:
        agent = start_live(module_processes, tmp_path_factory.mktemp("agent"), tiny_llama, "0:8", [maddr])
        peer_id = agent.online()["peer_id"]
        hidden = torch.randn(1, 3, 256, generator=torch.Generator().manual_seed(0))
        yield Scene(agent, peer, peer_id, hidden, peer.step(peer_id, chain(0, 8), hidden))


@pytest.mark.timeout(240)
def test_container_is_killed_five_times(scene: Scene) -> None:
    agent, peer = scene.agent, scene.peer
    for death in range(1, 6):
        p2pd = agent.online()["pids"]["p2pd"]
        dead = agent.kill_child("container")
        wait_until(lambda: peer.state(scene.peer_id) == JOINING, 20, "JOINING in the DHT")
        status = agent.until(
            lambda status, death=death: (
                status["restarts"]["container"] == death and status["state"] == "online"
            ),
            90,
            f"online after death {death}",
        )
        assert status["peer_id"] == scene.peer_id and status["pids"]["p2pd"] == p2pd
        assert status["pids"]["container"] not in (None, dead)
        wait_until(lambda: peer.state(scene.peer_id) == ONLINE, 20, "ONLINE in the DHT")
    for _ in range(100):
        out = peer.step(scene.peer_id, chain(0, 8), scene.hidden)
        assert torch.allclose(out, scene.right, atol=1e-4)
    versions = {peer.info(scene.peer_id, "tiny.3")["version"] for _ in range(100)}
    assert len(versions) == 1
    assert len(list(agent.socket.parent.iterdir())) == 4  # control, streams, two p2pd: none of the dead


@pytest.mark.timeout(180)
def test_p2pd_is_killed_three_times(scene: Scene) -> None:
    agent, peer = scene.agent, scene.peer
    for death in range(1, 4):
        before = agent.online()
        agent.kill_child("p2pd")
        killed = time.monotonic()
        status = agent.until(
            lambda status, death=death: status["restarts"]["p2pd"] == death and status["state"] == "online",
            30,
            f"online after death {death}",
        )
        # not asked earlier: whoever dials in vain, waits for 5 s (libp2p's back-off)
        wait_until(scene.serves, 30, "a new session")
        print(f"p2pd was killed: a new session went through after {time.monotonic() - killed:.2f} s")
        assert status["peer_id"] == scene.peer_id and status["maddrs"] == before["maddrs"]
        assert status["pids"]["container"] == before["pids"]["container"]
        assert status["pids"]["p2pd"] != before["pids"]["p2pd"]
        agent.until(lambda status: status["announced_ago"] < 2, 30, "announced anew")
        assert peer.state(scene.peer_id) == ONLINE


@pytest.mark.timeout(120)
def test_both_are_killed_at_once(scene: Scene) -> None:
    before = scene.agent.online()
    for name in ("p2pd", "container"):
        scene.agent.kill_child(name)
    scene.agent.until(
        lambda status: (
            status["state"] == "online"
            and not set(status["pids"].values()) & {before["pids"]["p2pd"], before["pids"]["container"]}
        ),
        90,
        "online with both replaced",
    )
    wait_until(scene.serves, 30, "a new session")
    assert all(scene.serves() for _ in range(20))
