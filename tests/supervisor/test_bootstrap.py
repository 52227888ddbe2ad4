"""The entry node's command: its address stays, a taken port is refused; agents wait for it and come back to it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.live import LiveAgent, noise, start_live
from harness.peer import Peer
from harness.processes import Process, Processes, pss_mb, wait_until
from harness.swarm import PETALS_AGENT

ONLINE = 2


def start(processes: Processes, folder: Path, listen: str, *options: str) -> Process:
    """In `folder`, with a key that outlives it."""
    folder.mkdir(exist_ok=True)
    command = [
        *PETALS_AGENT,
        "bootstrap",
        "--listen",
        listen,
        "--identity",
        str(folder / "entry.key"),
        "--json",
    ]
    folders = {"STATE_DIRECTORY": str(folder), "RUNTIME_DIRECTORY": str(folder / "run")}
    return processes.start("bootstrap", [*command, *options], env=folders)


def maddr_of(entry: Process) -> str:
    def printed() -> str | None:
        assert entry.returncode is None, entry.output()
        return entry.events()[0]["maddrs"][0] if entry.events() else None

    found = wait_until(printed, 60, "the entry node's address")
    assert found is not None
    return found


@pytest.mark.timeout(180)
def test_agent_waits_for_its_entry_node(
    processes: Processes, tmp_path: Path, tiny_llama: Path, free_port: Callable[[], int]
) -> None:
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    entry = start(processes, tmp_path / "entry", listen)
    maddr = maddr_of(entry)
    assert maddr.startswith(listen)
    assert entry.terminate() == 0 and noise(entry) == []
    agent = start_live(processes, tmp_path / "a", tiny_llama, "0:8", [maddr])
    waiting = agent.until(
        lambda status: "no bootstrap peer" in status["network"], 60, "it says what it waits for"
    )
    assert maddr in waiting["network"] and waiting["state"] in ("starting", "joining")
    entry = start(processes, tmp_path / "entry", listen)
    assert maddr_of(entry) == maddr
    found = agent.online()
    assert found["network"] == "connected" and found["relayed"] is False
    assert len(entry.tree()) <= 3  # itself, p2pd, for some seconds a probe
    assert pss_mb(entry.tree()[:1]) < 150
    with Peer([maddr]) as peer:
        assert peer.state(found["peer_id"]) == ONLINE
    comes_back_to_a_restarted_entry_node(processes, tmp_path, agent, entry, listen)


def comes_back_to_a_restarted_entry_node(
    processes: Processes, tmp_path: Path, agent: LiveAgent, entry: Process, listen: str
) -> None:
    """The agent's record must be found by a member that knows only the new one."""
    peer_id = agent.status()["peer_id"]
    entry.kill()
    wait_until(lambda: not entry.tree(), 10, "the end of the entry node")
    maddr = maddr_of(start(processes, tmp_path / "entry", listen))
    with Peer([maddr]) as peer:
        wait_until(lambda: peer.state(peer_id) == ONLINE, 60, "the record at the new entry node")


def test_taken_port(processes: Processes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        listen = f"/ip4/127.0.0.1/tcp/{squatter.getsockname()[1]}"
        entry = start(processes, tmp_path / "entry", listen)
        assert entry.wait(60) == 69
    assert f"petals-agent: cannot listen on {listen}: another process listens there" in entry.err.read_text()
    assert noise(entry) == []


def test_key_of_a_running_entry_node(processes: Processes, tmp_path: Path) -> None:
    first = start(processes, tmp_path / "entry", "/ip4/127.0.0.1/tcp/0")
    maddr_of(first)
    second = start(processes, tmp_path / "entry", "/ip4/127.0.0.1/tcp/0")
    assert second.wait(60) == 78
    assert "another agent on this host runs with the identity" in second.err.read_text()
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(20) == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--listen", "127.0.0.1:31337", "no multiaddress"),
        ("--initial-peers", "/ip4/127.0.0.1/tcp/1", "/p2p/PEER"),
    ],
)
def test_address_that_is_none(
    processes: Processes, tmp_path: Path, option: str, value: str, words: str
) -> None:
    entry = start(processes, tmp_path / "entry", "/ip4/127.0.0.1/tcp/0", option, value)
    assert entry.wait(60) == 78
    assert f"{option} {value}" in entry.err.read_text() and words in entry.err.read_text()
