"""A pause outlives whatever happens to the plugin that wants it: its host's death in the middle of an answer, and reloads."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.live import LiveAgent, start_live
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT, start_bootstrap

pytestmark = pytest.mark.timeout(180)

OWNER = """
import os, time
from pathlib import Path
from petals_agent.hooks import Pause, hookimpl

GAME = Path(__file__).with_suffix(".game")

@hookimpl
def should_pause(paused):
    what = GAME.read_text()
    if what == "die":
        os._exit(3)
    if what == "hang":
        Path(__file__).with_suffix(".hangs").touch()
        time.sleep(1000)
    return Pause("a game", drain_s=0.0) if what == "play" else None
"""


@dataclass
class Scene:
    agent: LiveAgent
    game: Path

    @property
    def over(self) -> bool:
        """Whether a pause has ended, be it for a moment."""
        return any("over: a game" in event["text"] for event in self.agent.status()["events"])

    def reload(self, times: int = 1) -> None:
        """So often at once."""
        line = [*PETALS_AGENT, "reload", "--wait", "--config", str(self.agent.config)]
        reloads = [subprocess.Popen(line, stdin=subprocess.DEVNULL) for _ in range(times)]
        assert [one.wait(60) for one in reloads] == [0] * times

    def ends(self) -> None:
        """The game does, and the pause with it."""
        assert self.agent.status()["state"] == "paused" and not self.over
        self.game.write_text("no")
        self.reload()
        self.agent.online()
        assert self.over


@pytest.fixture
def scene(processes: Processes, tmp_path: Path, tiny_llama: Path) -> Iterator[Scene]:
    """An agent that pauses."""
    folder = write_plugins(tmp_path / "plugins", owner=OWNER)
    game = folder / "owner.game"
    game.write_text("play")
    more = f'[plugins]\ndirs = ["{folder}"]\npause_period = 0.2\ntimeout = 60'
    agent = start_live(processes, tmp_path / "agent", tiny_llama, "0:8", [start_bootstrap(processes)], more)
    agent.until(lambda status: status["state"] == "paused", 60, "a pause")
    yield Scene(agent, game)


def test_the_plugin_host_dies_while_it_is_asked(scene: Scene) -> None:
    """So often that the plugin is disabled."""
    scene.game.write_text("die")
    scene.agent.until(lambda status: status["plugins"][0]["state"] == "disabled", 60, "three deaths")
    scene.ends()


def test_reloads_while_it_is_asked(scene: Scene) -> None:
    scene.game.write_text("hang")
    wait_until(scene.game.with_suffix(".hangs").exists, 60, "a look that hangs")
    scene.game.write_text("play")
    scene.reload(times=3)
    scene.ends()
