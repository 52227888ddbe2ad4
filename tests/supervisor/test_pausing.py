"""The device is somebody else's while a plugin or an operator says so: sessions end in peace, everything is unloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.live import LiveAgent, ask, start_again, start_live
from harness.open_session import OpenSession
from harness.peer import Peer, chain
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT, start_bootstrap

pytestmark = pytest.mark.timeout(180)
OFFLINE, ONLINE = 0, 2

OWNER = """
from pathlib import Path
from petals_agent.hooks import Pause, hookimpl

GAME = Path(__file__).with_suffix(".game")

@hookimpl
def should_pause(paused):
    if not GAME.exists():
        return None
    text = GAME.read_text()
    if text == "raise":
        raise OSError("no look at the game")
    if text == "quit":
        return None
    return Pause("a game", drain_s=float(text))
"""


@dataclass
class Scene:
    agent: LiveAgent
    peer: Peer
    peer_id: str
    game: Path
    processes: Processes

    def state(self) -> object:
        return self.peer.state(self.peer_id)

    def paused(self) -> None:
        status = self.agent.until(lambda status: status["state"] == "paused", 30, "a pause")
        assert status["pids"]["container"] is None and status["health"] == "healthy"
        wait_until(lambda: self.state() == OFFLINE, 30, "OFFLINE in the DHT")


@pytest.fixture
def scene(processes: Processes, tmp_path: Path, tiny_llama: Path) -> Iterator[Scene]:
    maddr = start_bootstrap(processes)
    folder = write_plugins(tmp_path / "plugins", owner=OWNER)
    more = f'[plugins]\ndirs = ["{folder}"]\npause_period = 0.2'
    with Peer([maddr]) as peer:
        agent = start_live(processes, tmp_path / "agent", tiny_llama, "0:8", [maddr], more)
        yield Scene(agent, peer, agent.online()["peer_id"], folder / "owner.game", processes)


def test_a_plugin_pauses_and_resumes(scene: Scene) -> None:
    hidden = torch.randn(1, 3, 256, generator=torch.Generator().manual_seed(0))
    right = scene.peer.step(scene.peer_id, chain(0, 8), hidden)
    with OpenSession(scene.peer, scene.peer_id, chain(0, 8), 20) as session:
        session.step(hidden)
        scene.game.write_text("60")
        wait_until(lambda: scene.state() == OFFLINE, 30, "OFFLINE in the DHT")
        status = scene.agent.status()
        assert status["state"] == "draining" and status["pause"] == "a game"
        session.step(hidden)  # it goes on
        assert scene.agent.status()["pids"]["container"] is not None
    scene.paused()
    # a plugin that fails says nothing: what is stays
    scene.game.write_text("raise")
    scene.agent.until(lambda status: status["plugins"][0]["failures"] == 2, 30, "failures")
    assert scene.agent.status()["state"] == "paused"
    scene.game.write_text("quit")
    scene.agent.online()
    wait_until(lambda: scene.state() == ONLINE, 30, "ONLINE in the DHT")
    assert torch.allclose(scene.peer.step(scene.peer_id, chain(0, 8), hidden), right, atol=1e-4)
    assert scene.agent.status()["restarts"]["container"] == 0, "a pause is no failure"


def test_who_changes_their_mind_cuts_nobody_off(scene: Scene) -> None:
    hidden = torch.randn(1, 1, 256)
    with OpenSession(scene.peer, scene.peer_id, chain(0, 8), 20) as session:
        session.step(hidden)
        container = scene.agent.status()["pids"]["container"]
        scene.game.write_text("60")
        scene.agent.until(lambda status: status["state"] == "draining", 30, "the drain")
        scene.game.unlink()
        assert scene.agent.online()["pids"]["container"] == container
        session.step(hidden)


def test_sessions_get_no_more_time_than_that(scene: Scene) -> None:
    with OpenSession(scene.peer, scene.peer_id, chain(0, 8), 20) as session:
        session.step(torch.randn(1, 1, 256))
        scene.game.write_text("0.5")
        scene.paused()
        texts = [event["text"] for event in scene.agent.status()["events"]]
        assert any("1 sessions were cut off" in text for text in texts)


def test_a_plugin_that_is_disabled_leaves_the_pause_to_the_operator(scene: Scene) -> None:
    scene.game.write_text("0")
    scene.paused()
    scene.game.write_text("raise")
    scene.agent.until(lambda status: status["plugins"][0]["state"] == "disabled", 30, "its end")
    scene.agent.until(lambda status: status["state"] == "paused", 5, "the pause")
    assert "a plugin may want it still" in scene.agent.command("resume").stdout
    scene.agent.online()


def test_the_more_urgent_of_two_counts(scene: Scene) -> None:
    with OpenSession(scene.peer, scene.peer_id, chain(0, 8), 20) as session:
        session.step(torch.randn(1, 1, 256))
        scene.game.write_text("3600")
        scene.agent.until(lambda status: status["state"] == "draining", 30, "the drain")
        scene.agent.until(lambda status: status["sessions"] == 1, 30, "the session")
        assert scene.agent.command("pause", "--timeout", "0").returncode == 0
        scene.paused()


def test_resume_counts_though_a_plugin_fails(scene: Scene) -> None:
    scene.agent.command("pause", "--timeout", "0")
    scene.paused()
    scene.game.write_text("raise")
    scene.agent.command("resume")
    scene.agent.online()


def test_who_starts_into_a_pause_loads_nothing(scene: Scene) -> None:
    scene.agent.process.terminate()
    scene.game.write_text("60")
    agent = start_again(scene.processes, scene.agent.config)
    status = agent.until(lambda status: status["state"] == "paused", 60, "a pause")
    assert status["pids"]["container"] is None and status["blocks"] is None
    scene.game.unlink()
    assert agent.online()["blocks"] == "0:8"


def test_an_operator_pauses_and_resumes(scene: Scene) -> None:
    done = scene.agent.command("pause", "--reason", "I render", "--timeout", "1")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "paused"
    scene.paused()
    assert scene.agent.status()["pause"] == "I render"
    done = scene.agent.command("resume")
    assert (done.returncode, done.stdout.strip()) == (0, "blocks are chosen and loaded again")
    scene.agent.online()
    scene.agent.command("pause", "--timeout", "0")
    scene.paused()
    assert scene.agent.process.terminate() == 0, "a stop out of a pause is a clean one"


def test_who_waits_for_a_pause_hears_that_it_was_called_off(scene: Scene) -> None:
    with OpenSession(scene.peer, scene.peer_id, chain(0, 8), 20) as session:
        session.step(torch.randn(1, 1, 256))
        line = [*PETALS_AGENT, "pause", "--timeout", "3600", "--config", scene.agent.config]
        waiting = scene.processes.start("pause", line)
        scene.agent.until(lambda status: status["state"] == "draining", 30, "the drain")
        scene.agent.command("resume")
        assert waiting.wait(30) == 69
        assert "the pause was called off" in waiting.output()


@pytest.mark.parametrize("drain_s", [b'"x"', b"-1", b"1e99", b"null"])
def test_an_order_that_makes_no_sense(scene: Scene, drain_s: bytes) -> None:
    answer = ask(scene.agent.socket, b'{"do": "pause", "drain_s": ' + drain_s + b"}")
    assert answer["ok"] is False and "a number of seconds up to 86400" in answer["error"]
    assert scene.agent.status()["pause"] is None
