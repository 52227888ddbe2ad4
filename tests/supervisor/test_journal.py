"""A running agent's journal: events of both processes with their fields, levels that follow a reload, nothing on stderr."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.journal import SITE, Journal
from harness.live import LiveAgent, write_config
from harness.processes import Processes, wait_until
from harness.swarm import ONE_THREAD, PETALS_AGENT


@dataclass
class Scene:
    agent: LiveAgent
    journal: Journal

    def event(self, name: str, **fields: str) -> dict[str, str]:
        """The last event of that name; waits for one."""
        values = {f"PETALS_{key.upper()}": value for key, value in fields.items()}
        found = wait_until(
            lambda: self.journal.having(PETALS_EVENT=name, **values), 30, f"{name} {values} in the journal"
        )
        return found[-1]


@pytest.fixture(scope="module")
def scene(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("j")
    journal = Journal(folder / "journal")
    (folder / "sitecustomize.py").write_text(SITE.format(path=str(journal.path)))
    config = write_config(folder / "agent", tiny_llama, "0:2", [])
    process = module_processes.start(
        "agent",
        [*PETALS_AGENT, "run", "--config", config],
        env={**ONE_THREAD, "PYTHONPATH": str(folder)},
        grace=20,
    )
    agent = LiveAgent(process, config)
    agent.online()
    yield Scene(agent, journal)
    process.terminate()
    journal.entries()
    journal.close()
    assert "state" in {entry.get("PETALS_EVENT") for entry in journal.all[-5:]}
    assert process.err.read_text() == ""


def test_events_of_a_start(scene: Scene) -> None:
    online = scene.event("state", state="online")
    assert online["MESSAGE"].startswith("joining → online: serving blocks 0:2")
    assert (online["PRIORITY"], online["SYSLOG_IDENTIFIER"]) == ("6", "petals-agent")
    assert (online["PETALS_BEFORE"], online["PETALS_SPAN"]) == ("joining", "0:2")
    assert float(online["PETALS_DURATION_S"]) > 0
    assert scene.event("load", span="0:2")["CODE_FILE"].endswith("supervisor/serving.py")
    assert scene.event("announce", announced="online")["PETALS_SPAN"] == "0:2"


def test_the_container_writes_there_too(scene: Scene) -> None:
    check = scene.event("self_check", process="container")
    assert check["LOGGER"] == "petals_agent.backends" and float(check["PETALS_ERROR"]) < 1e-3


def test_deaths_and_repairs(scene: Scene) -> None:
    scene.agent.online()
    scene.agent.kill_child("p2pd")
    ended = scene.event("p2pd")
    assert ended["PRIORITY"] == "4" and "-9" in ended["PETALS_REASON"]
    scene.event("state", state="recovering")
    scene.agent.online()
    scene.agent.kill_child("container")
    assert "signal 9" in scene.event("container", process="agent")["PETALS_REASON"]
    scene.agent.online()


def test_levels_follow_a_reload(scene: Scene) -> None:
    scene.agent.online()
    assert scene.journal.having(PRIORITY="7") == []
    text = scene.agent.config.read_text()

    def reload(level: str) -> None:
        scene.agent.config.write_text(f'{text}\n[log]\nlevel = "{level}"\n')
        done = subprocess.run(
            [*PETALS_AGENT, "reload", "--wait", "-c", scene.agent.config],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    reload("debug")
    assert "log.level" in scene.event("reload")["PETALS_APPLIED"]
    wait_until(lambda: scene.journal.having(PRIORITY="7", PETALS_PROCESS="agent"), 30, "the agent's details")
    scene.agent.kill_child("p2pd")  # so that the container has something to say
    wait_until(
        lambda: scene.journal.having(PRIORITY="7", PETALS_PROCESS="container"), 60, "the container's details"
    )
    scene.agent.online()
    reload("warning")
    scene.journal.entries()
    before = len(scene.journal.all)
    scene.agent.kill_child("container")
    wait_until(
        lambda: [e for e in scene.journal.entries() if e.get("PETALS_EVENT") == "container"], 30, "a warning"
    )
    scene.agent.online()
    scene.journal.entries()
    said = [entry for entry in scene.journal.all[before:] if entry["PETALS_PROCESS"] == "agent"]
    assert {entry["PRIORITY"] for entry in said} <= {"2", "3", "4"}
    reload("info")
    scene.event("reload", applied="log.level")
