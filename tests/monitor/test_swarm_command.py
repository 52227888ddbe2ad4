"""`petals-agent swarm` as a person and a script run it."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import pytest

from harness.peer import Peer
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT
from petals_agent.cli import swarm_command
from petals_agent.errors import SwarmError
from petals_agent.monitor.collector import JOINING, Collector

from . import synthetic
from .swarms import peer


def announce(other: Peer) -> None:
    """A model of two servers that nobody can reach, one of them still loading."""
    other.store("_petals.models", "tiny", {"num_blocks": 4, "repository": None}, 300)
    for seed, state in ((1, 2), (2, 1)):
        for block in range(4):
            other.store(f"tiny.{block}", peer(seed), (state, 12.5, {"start_block": 0, "end_block": 4}), 300)


def test_text_and_json(processes: Processes, bootstrap: str) -> None:
    with Peer([bootstrap]) as other:
        announce(other)
        command = [*PETALS_AGENT, "swarm", "--initial-peers", bootstrap]
        text = processes.run("swarm", command, timeout=60)
        assert text.returncode == 0, text.output()
        lines = text.out.read_text().splitlines()
        assert lines[0] == "Model tiny: broken" and "\x1b" not in "".join(lines)
        assert f"...{peer(1)[-6:]}, 12.5 RPS, 0:4 |????|" in lines
        assert f"...{peer(2)[-6:]}, 12.5 RPS, 0:4 |JJJJ|" in lines
        assert "# - online" in lines and lines[-1].endswith("1 of 1 entry addresses answer.")
        done = processes.run("json", [*command, "--json"], timeout=60)
        assert done.returncode == 0, done.output()
        assert json.loads(done.out.read_text())["models"][0]["dht_prefix"] == "tiny"
        assert not text.err.read_text() and not done.err.read_text()


def test_watch_in_a_pipe_is_a_line_for_each_state(processes: Processes, bootstrap: str) -> None:
    with Peer([bootstrap]) as other:
        announce(other)
        command = [*PETALS_AGENT, "swarm", "--initial-peers", bootstrap, "--json", "--watch"]
        watching = processes.start("watch", command)
        states = wait_until(lambda: len(found := watching.events()) >= 2 and found, 60, "two states")
        assert states[1]["taken_at"] > states[0]["taken_at"]
        watching._popen.send_signal(signal.SIGINT)
        assert watching.wait(15) == 130, watching.output()
        assert "Traceback" not in watching.err.read_text()


def test_sigterm_leaves_nothing(processes: Processes, bootstrap: str, tmp_path: Path) -> None:
    command = [*PETALS_AGENT, "swarm", "--initial-peers", bootstrap, "--json", "--watch"]
    watching = processes.start("watch", command, env={"TMPDIR": str(tmp_path)})
    wait_until(watching.events, 60, "a state")
    assert list(tmp_path.glob("petals-swarm-*"))
    watching._popen.terminate()
    assert watching.wait(15) == 143, watching.output()
    assert not list(tmp_path.glob("petals-swarm-*")) and not watching.err.read_text()


async def test_what_is_watched_grows_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swarm_command, "_WATCH_PERIOD_S", 0.5)
    collector = Collector([f"/ip4/127.0.0.1/tcp/9/p2p/{peer(1)}"], tmp_path)
    collector.state = synthetic.small(now=time.time())
    shown = ""
    watching = asyncio.create_task(swarm_command._print_states(collector, json_=False, watch=True))
    async with asyncio.timeout(20):
        while "Read 2 s ago" not in shown:
            await asyncio.sleep(0.1)
            shown += capsys.readouterr().out
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert "Read 0 s ago" in shown


@pytest.mark.parametrize(("problem", "is_waited_for"), [(JOINING, True), ("nobody answers", False)])
async def test_who_is_slow_to_join_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, is_waited_for: bool
) -> None:
    monkeypatch.setattr(swarm_command, "_NOT_JOINED_S", 0.0)
    monkeypatch.setattr(swarm_command, "_PATIENCE_S", 2.0)
    collector = Collector([f"/ip4/127.0.0.1/tcp/9/p2p/{peer(1)}"], tmp_path)
    collector.state = collector.state.model_copy(update={"problem": problem})
    began = time.monotonic()
    with pytest.raises(SwarmError, match=problem):
        await swarm_command._first_reading(collector)
    assert (time.monotonic() - began >= 2.0) == is_waited_for


def test_a_configuration_s_prefixes_are_read_in_another_swarm_too(
    processes: Processes, bootstrap: str, tmp_path: Path
) -> None:
    config = tmp_path / "petals-agent.toml"
    config.write_text('[monitor]\nprefixes = ["_mine"]\n')
    command = [*PETALS_AGENT, "swarm", "--initial-peers", bootstrap, "--config", config, "--json"]
    done = processes.run("swarm", command, timeout=60)
    assert [model["dht_prefix"] for model in json.loads(done.out.read_text())["models"]] == ["_mine"]


def test_nobody_there(processes: Processes) -> None:
    command = [*PETALS_AGENT, "swarm", "--initial-peers", f"/ip4/127.0.0.1/tcp/9/p2p/{peer(1)}"]
    done = processes.run("swarm", command, timeout=90)
    assert done.returncode == 69
    assert "no bootstrap peer answers" in done.err.read_text() and "Traceback" not in done.err.read_text()


def test_wrong_words(processes: Processes, tmp_path: Path) -> None:
    for options in (
        ["--initial-peers", "nonsense"],
        ["--initial-peers", f"/ip4/1.2.3.4/tcp/9/p2p/{peer(1)}", "--prefix", "a b"],
    ):
        done = processes.run("swarm", [*PETALS_AGENT, "swarm", *options], timeout=60)
        assert done.returncode == 78, done.output()
    (tmp_path / "petals-agent.toml").write_text("[swarm]\ninitial_peers = []\n")
    done = processes.run(
        "swarm", [*PETALS_AGENT, "swarm", "--config", tmp_path / "petals-agent.toml"], timeout=60
    )
    assert done.returncode == 78 and "--initial-peers" in done.err.read_text()
