"""Entry nodes go and come back, and so do all peers that were met: nothing is restarted for it, and the swarm heals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.hurt import start_victim
from harness.live import LiveAgent
from harness.peer import Peer
from harness.processes import Process, Processes, wait_until
from harness.swarm import PETALS_AGENT

ONLINE = 2


def start_entry(processes: Processes, folder: Path, port: int) -> tuple[Process, str]:
    """An entry node that comes back as itself; its address."""
    folder.mkdir(exist_ok=True)
    listen, key = f"/ip4/127.0.0.1/tcp/{port}", str(folder / "entry.key")
    command = [*PETALS_AGENT, "bootstrap", "--listen", listen, "--identity", key, "--json"]
    folders = {"STATE_DIRECTORY": str(folder), "RUNTIME_DIRECTORY": str(folder / "run")}
    entry = processes.start("entry", command, env=folders)
    wait_until(lambda: entry.events() or entry.returncode is not None, 60, "the entry node's address")
    return entry, str(entry.events()[0]["maddrs"][0])


def seen_from(maddr: str, peer_id: str, timeout: float = 60) -> None:
    """A newcomer at `maddr` finds the record."""
    with Peer([maddr]) as newcomer:
        wait_until(lambda: newcomer.state(peer_id) == ONLINE, timeout, f"the record, seen from {maddr}")


def end(entry: Process) -> None:
    os.kill(entry.pid, signal.SIGKILL)
    entry.wait(10)


@pytest.mark.timeout(300)
def test_entry_nodes_and_all_others_go_and_come_back(
    processes: Processes, tmp_path: Path, tiny_llama: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    entry, maddr = start_entry(processes, tmp_path / "entry", port)
    victim = start_victim(processes, tmp_path / "a", tiny_llama, maddr, None)  # type: ignore[arg-type]
    first: LiveAgent = victim.agent
    other = start_victim(processes, tmp_path / "b", tiny_llama, maddr, None)  # type: ignore[arg-type]
    peer_id = first.online()["peer_id"]
    other_maddr = other.agent.online()["maddrs"][0]
    remembers = first.identity.with_name("peers.json")
    other_id = other_maddr.rsplit("/", 1)[1]
    wait_until(
        lambda: remembers.exists() and other_id in remembers.read_text(), 60, "the other is remembered"
    )

    # entry node away, p2pd away: back through a peer that was met
    end(entry)
    first.kill_child("p2pd")
    first.until(lambda s: s["restarts"]["p2pd"] == 1 and s["state"] == "online", 60, "online by another way")
    seen_from(other_maddr, peer_id)

    # all away
    gone_at = time.time()
    other.agent.process.terminate()
    first.until(lambda s: s["peers"] == 0, 60, "loneliness")
    wait_until(lambda: victim.told("nobody answers", gone_at, ("company",)), 60, "it is noticed")
    print(f"all peers gone: noticed after {time.time() - gone_at:.1f} s")
    wait_until(lambda: victim.told("no other peer is known", gone_at), 90, "the probe's word")
    assert first.status()["state"] == "online"
    first.kill_child("p2pd")
    first.until(lambda s: "no bootstrap peer" in s["network"], 60, "it waits")

    # and back
    back_at = time.time()
    entry, maddr = start_entry(processes, tmp_path / "entry", port)
    status = first.online()
    seen_from(maddr, peer_id)
    print(
        f"all peers gone and back: found by a newcomer {time.time() - back_at:.1f} s after the entry node's start"
    )
    assert status["restarts"]["container"] == 0 and status["peer_id"] == peer_id
    assert victim.recoveries() == []
