"""A reload: what can change at run time does, the rest is named, and a wrong file changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.live import LiveAgent, start_live
from harness.peer import Peer
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap
from petals_agent.config import config_from
from petals_agent.supervisor.reloading import LIVE, merge

MODEL = {"path": "/models/m", "dht_prefix": "m"}


@given(st.sampled_from(["debug", "info", "error"]), st.integers(1, 3600), st.integers(1, 9), st.booleans())
def test_live_keys_are_taken_and_others_named(level: str, period: int, sessions: int, repair: bool) -> None:
    old = config_from({"model": MODEL})
    tables = {
        "model": MODEL,
        "log": {"level": level},
        "swarm": {"update_period": period},
        "serve": {"max_sessions": sessions},
        "health": {"repair": repair},
    }
    done = merge(old, config_from(tables))
    assert (done.config.log.level, done.config.swarm.update_period) == (level, period)
    assert done.config.health.repair is repair
    assert done.config.serve.max_sessions == old.serve.max_sessions
    assert done.needs_restart == ("serve.max_sessions",)
    assert ("log.level" in done.applied) == (level != "info")
    assert {tuple(key.split(".")) for key in done.applied} <= LIVE


def test_a_reload_of_the_same_changes_nothing() -> None:
    old = config_from({"model": MODEL})
    done = merge(old, config_from({"model": MODEL}))
    assert (done.config, done.applied, done.needs_restart) == (old, (), ())


@pytest.fixture(scope="module")
def scene(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[tuple[LiveAgent, Peer]]:
    maddr = start_bootstrap(module_processes)
    with Peer([maddr]) as peer:
        agent = start_live(
            module_processes,
            tmp_path_factory.mktemp("agent"),
            tiny_llama,
            "0:2",
            [maddr],
            "[swarm]\nupdate_period = 60",
        )
        agent.online()
        yield agent, peer


def reload(agent: LiveAgent) -> subprocess.CompletedProcess[str]:
    return agent.command("reload", "--wait")


def test_a_running_agent_goes_by_the_new_file(scene: tuple[LiveAgent, Peer]) -> None:
    """The period becomes shorter: a record that would expire sooner than the one before is refused by the DHT."""
    agent, peer = scene
    text = agent.config.read_text()
    text = text.replace("update_period = 60", 'update_period = 1\npublic_name = "renamed"')
    agent.config.write_text(text.replace("[serve]", "[serve]\nmax_sessions = 7"))
    done = reload(agent)
    assert done.returncode == 0, done.stderr
    assert "in effect now: swarm.public_name, swarm.update_period" in done.stdout
    assert "needs a restart" in done.stdout and "serve.max_sessions" in done.stdout
    peer_id = agent.status()["peer_id"]
    wait_until(lambda: peer.record(peer_id).get("public_name") == "renamed", 20, "the new name in the DHT")
    assert "refused our" not in agent.process.output()


def test_a_wrong_file_changes_nothing(scene: tuple[LiveAgent, Peer]) -> None:
    agent, _ = scene
    before, text = agent.online()["uptime"], agent.config.read_text()
    agent.config.write_text(text + "\n[log]\nlevel = 3\n")
    try:
        done = reload(agent)
        assert done.returncode == 78 and "log.level = 3" in done.stderr
        os.kill(agent.status()["pids"]["agent"], signal.SIGHUP)
        status = agent.until(
            lambda status: "nothing was changed" in status["events"][-1]["text"], 20, "its answer"
        )
        assert "log.level = 3" in status["events"][-1]["text"]
        assert status["state"] == "online" and status["uptime"] > before
    finally:
        agent.config.write_text(text)


def test_a_signal_reloads_too(scene: tuple[LiveAgent, Peer]) -> None:
    agent, _ = scene
    agent.config.write_text(agent.config.read_text().replace("renamed", "again"))
    os.kill(agent.status()["pids"]["agent"], signal.SIGHUP)
    agent.until(
        lambda status: "in effect now: swarm.public_name" in status["events"][-1]["text"], 20, "its answer"
    )


PICKY = """
from pydantic import BaseModel
from petals_agent.hooks import hookimpl

class Config(BaseModel, extra="forbid"):
    level: int

class Plugin:
    def __init__(self, config): ...
    @hookimpl
    def on_recovered(self): ...
"""


def test_plugins_are_looked_for_anew(scene: tuple[LiveAgent, Peer], tmp_path: Path) -> None:
    agent, _ = scene
    folder = write_plugins(tmp_path / "plugins", a=PICKY, b=PICKY)
    before = agent.config.read_text()
    tables = f'[plugins]\ndirs = ["{folder}"]\n[plugins.a]\nlevel = 1\n[plugins.b]\nlevel = "x"\n'
    agent.config.write_text(before + tables)
    done = reload(agent)
    assert done.returncode == 0 and "plugins in use: a" in done.stdout
    line = (before + tables).splitlines().index('level = "x"') + 1
    assert f'plugin not used: b: {agent.config}:{line}: plugins.b.level = "x"' in done.stderr
    states = {plugin["name"]: plugin["state"] for plugin in agent.status()["plugins"]}
    assert states == {"a": "ready", "b": "refused"} and agent.status()["pids"]["plugins"]
    assert any("plugin b is not used" in event["text"] for event in agent.status()["events"])
    agent.config.write_text(before)
    assert "plugin" not in reload(agent).stderr
    assert agent.status()["plugins"] == [] and agent.status()["pids"]["plugins"] is None
