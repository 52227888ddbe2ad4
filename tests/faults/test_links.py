"""A host whose network is away for a while: nothing is restarted for it, and it is back when the link is."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.hurt import HIDDEN, INJECT, QUICK, Victim
from harness.live import LiveAgent, write_config
from harness.peer import Peer, chain
from harness.processes import Process, Processes, wait_until
from harness.swarm import ONE_THREAD, PETALS_AGENT

ONLINE = 2
OUTSIDE, INSIDE = "10.213.197.1", "10.213.197.2"  # a link of our own, which leads nowhere else
pytestmark = pytest.mark.timeout(300)


@dataclass
class Island:
    """A network namespace with one link to ours."""

    name: str

    def run(self, *command: str) -> None:
        done = subprocess.run(["ip", *command], capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def build(self) -> None:
        self.run("netns", "add", self.name)
        self.run("link", "add", f"{self.name}o", "type", "veth", "peer", f"{self.name}i", "netns", self.name)
        self.run("addr", "add", f"{OUTSIDE}/30", "dev", f"{self.name}o")
        self.run("link", "set", f"{self.name}o", "up")
        self.run("-n", self.name, "addr", "add", f"{INSIDE}/30", "dev", f"{self.name}i")
        self.run("-n", self.name, "link", "set", "lo", "up")

    def link(self, state: str) -> None:
        self.run("-n", self.name, "link", "set", f"{self.name}i", state)

    def destroy(self) -> None:
        subprocess.run(["ip", "link", "del", f"{self.name}o"], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@pytest.fixture
def island() -> Iterator[Island]:
    found = Island(f"pa{os.getpid() % 100000}")
    try:
        try:
            found.build()
        except OSError as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        yield found
    finally:
        found.destroy()


def start_entry(processes: Processes, folder: Path) -> str:
    folder.mkdir()
    listen, key = f"/ip4/{OUTSIDE}/tcp/0", str(folder / "entry.key")
    folders = {"STATE_DIRECTORY": str(folder), "RUNTIME_DIRECTORY": str(folder / "run")}
    command = [*PETALS_AGENT, "bootstrap", "--listen", listen, "--identity", key, "--json"]
    entry: Process = processes.start("entry", command, env=folders)
    wait_until(lambda: entry.events() or entry.returncode is not None, 60, "the entry node's address")
    return next(maddr for maddr in entry.events()[0]["maddrs"] if OUTSIDE in maddr)


def test_a_host_without_any_link(
    island: Island, processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    maddr = start_entry(processes, tmp_path / "entry")
    more = QUICK + f'[swarm]\nlisten = ["/ip4/{INSIDE}/tcp/0"]\n[health.probes."swarm.peers"]\nperiod = "1s"'
    config = write_config(tmp_path / "a", tiny_llama, "0:8", [maddr], more)
    command = ["ip", "netns", "exec", island.name, *PETALS_AGENT, "run", "--config", str(config)]
    process = processes.start("a", command, env={**ONE_THREAD, "PYTHONPATH": str(INJECT)}, grace=20)
    agent = LiveAgent(process, config)
    with Peer([maddr]) as peer:
        victim = Victim(agent, tmp_path, peer)
        agent.until(lambda s: "no bootstrap peer" in s["network"], 90, "it says that nobody is there")
        island.link("up")
        up = time.time()
        before = agent.online()
        print(f"link there: online after {time.time() - up:.1f} s")
        peer_id = before["peer_id"]
        right = peer.step(peer_id, chain(0, 8), HIDDEN)

        island.link("down")
        cut = time.time()
        wait_until(lambda: peer.state(peer_id) != ONLINE, 60, "the record expires by itself")
        print(f"link away: no ONLINE record after {time.time() - cut:.1f} s")
        wait_until(lambda: victim.told("no other peer is known", cut), 120, "it is noticed")
        print(f"link away: noticed after {victim.told('no other peer is known', cut) - cut:.1f} s")  # type: ignore[operator]
        assert agent.status()["pids"] == before["pids"]

        island.link("up")
        up = time.time()
        wait_until(lambda: peer.state(peer_id) == ONLINE, 120, "the record is there again")
        print(f"link back: ONLINE after {time.time() - up:.1f} s")
        assert (peer.step(peer_id, chain(0, 8), HIDDEN) - right).abs().max() < 1e-3
        assert agent.status()["pids"] == before["pids"] and victim.recoveries() == []
