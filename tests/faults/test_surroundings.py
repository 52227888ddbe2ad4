"""What the agent needs is full, taken, unreadable or torn: it says so, goes on where that is possible, and else leaves."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from harness.hurt import HIDDEN, Victim, online, start_victim, starve, wait_gone
from harness.live import start_again, write_config
from harness.peer import Peer, chain
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT, start_bootstrap

OFFLINE, ONLINE = 0, 2
DISK_MB = 110  # more than the probe wants to be free
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def swarm(module_processes: Processes) -> Iterator[tuple[str, Peer]]:
    """An entry node's address, and a peer that looks on."""
    maddr = start_bootstrap(module_processes)
    with Peer([maddr]) as peer:
        yield maddr, peer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Returns a function that mounts a small file system of its own."""
    mounted: list[Path] = []

    def mount(name: str) -> Path:
        place = tmp_path / name
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with open(place / "ballast", "wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(2**20)) == 2**20:
                pass
        except OSError:
            pass
    assert shutil.disk_usage(place).free == 0


def leaves_cleanly(victim: Victim, peer: Peer) -> None:
    family = victim.agent.family()
    os.kill(victim.agent.process.pid, signal.SIGTERM)
    assert victim.agent.process.wait(30) == 0
    wait_gone(family)
    assert peer.state(victim.peer_id) == OFFLINE


def test_full_disks(
    small_disk: Callable[[str], Path],
    swarm: tuple[str, Peer],
    processes: Processes,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    """State and cache: we go on, with what must be kept in memory, and say what to do."""
    state, cache = small_disk("a/state"), small_disk("cache")
    maddr, peer = swarm
    more = f'[model]\ncache_dir = "{cache}"'
    victim = online(start_victim(processes, tmp_path / "a", tiny_llama, maddr, peer, more))
    filled = time.time()
    fill(state)
    fill(cache)
    wait_until(lambda: victim.told("MiB are free", filled), 30, "it is noticed")
    victim.agent.kill_child("container")
    victim.agent.until(lambda s: s["restarts"]["container"] == 1 and s["state"] == "online", 90, "another")
    assert torch.allclose(peer.step(victim.peer_id, chain(0, 8), HIDDEN), victim.right, atol=1e-3)
    assert victim.recoveries() == []
    for place in (state, cache):
        (place / "ballast").unlink()
    wait_until(lambda: victim.told("content again", filled), 30, "room is seen")
    leaves_cleanly(victim, peer)


def test_a_full_disk_at_the_start(
    small_disk: Callable[[str], Path],
    swarm: tuple[str, Peer],
    processes: Processes,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    """Without an identity there is nothing to be; with one, we serve."""
    state = small_disk("a/state")
    maddr, _ = swarm
    config = write_config(tmp_path / "a", tiny_llama, "0:8", [maddr])
    fill(state)
    failed = start_again(processes, config)
    assert failed.process.wait(60) == 69
    assert "No space left on device" in failed.process.err.read_text()
    (state / "ballast").unlink()
    first = start_again(processes, config)
    peer_id = first.online()["peer_id"]
    assert first.process.terminate() == 0
    fill(state)
    assert start_again(processes, config).online()["peer_id"] == peer_id


def test_the_listen_port_is_taken_at_a_restart(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """The record would be true for two minutes to come, if it were not withdrawn by another p2pd."""
    maddr, peer = swarm
    victim = online(
        start_victim(processes, tmp_path / "a", tiny_llama, maddr, peer, "[swarm]\nupdate_period = 60")
    )
    port = int(str(victim.agent.status()["maddrs"][0]).split("/")[4])
    victim.signal("agent", signal.SIGSTOP)  # it would be faster than we are
    victim.signal("p2pd", signal.SIGKILL)
    with closing(socket.socket()) as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bound() -> bool:
            try:
                thief.bind(("127.0.0.1", port))
            except OSError:
                return False
            return True

        wait_until(bound, 10, "the port")
        thief.listen()
        victim.signal("agent", signal.SIGCONT)
        taken = time.time()
        victim.agent.until(lambda s: "another process listens there" in s["network"], 30, "it says why")
        wait_until(lambda: peer.state(victim.peer_id) != ONLINE, 60, "no ONLINE record")
        print(f"listen port taken: ONLINE record withdrawn after {time.time() - taken:.1f} s")
    status = victim.agent.until(
        lambda s: s["state"] == "online" and s["announced"] == "online", 60, "online again"
    )
    back = time.time() - taken
    print(f"listen port taken: online {back:.1f} s after")
    assert status["peer_id"] == victim.peer_id and status["restarts"]["container"] == 0
    wait_until(lambda: peer.state(victim.peer_id) == ONLINE, 20, "the record")
    assert victim.recoveries() == []


@pytest.mark.parametrize("damage", ["a folder", "no key", "no rights"])
def test_identity_cannot_be_read(
    damage: str, swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """Killed and started again: it must not become somebody else, and the record of before goes."""
    maddr, peer = swarm
    victim = online(start_victim(processes, tmp_path / "a", tiny_llama, maddr, peer))
    family = victim.agent.family()
    victim.signal("agent", signal.SIGKILL)
    wait_gone(family)
    victim.agent.process.wait(10)
    key = victim.agent.identity
    content = key.read_bytes()
    key.unlink()
    if damage == "a folder":
        key.mkdir()
    elif damage == "no key":
        key.write_bytes(b"garbage")
    elif os.geteuid() == 0:
        pytest.skip("root may read every file")
    else:
        key.write_bytes(content)
        key.chmod(0)
    again = start_again(processes, victim.agent.config)
    assert again.process.wait(60) == 69
    assert str(key) in again.process.err.read_text()
    command = ["post-stop", "--config", str(victim.agent.config)]
    stopped = processes.run("post-stop", [*PETALS_AGENT, *command], timeout=30)
    assert stopped.returncode == 0
    assert peer.state(victim.peer_id) != ONLINE


def test_a_torn_shard_at_a_restart(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """Nobody can serve that: OFFLINE, with the file's name, and no loop of starts."""
    maddr, peer = swarm
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    victim = online(start_victim(processes, tmp_path / "a", model, maddr, peer))
    family = victim.agent.family()
    shard = sorted(model.glob("*.safetensors"))[0]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    victim.agent.kill_child("container")
    killed = time.time()
    assert victim.agent.process.wait(90) == 66
    print(f"torn shard: OFFLINE and ended {time.time() - killed:.1f} s after the restart")
    assert str(shard) in victim.agent.process.err.read_text()
    wait_gone(family)
    assert peer.state(victim.peer_id) == OFFLINE


@pytest.fixture
def tight() -> Iterator[Callable[[int], None]]:
    """Returns a function that puts a process into a control group with hardly any memory."""
    group = Path("/sys/fs/cgroup/memory") / f"petals-agent-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")

    def confine(pid: int) -> None:
        (group / "memory.limit_in_bytes").write_text(str(16 * 2**20))
        (group / "cgroup.procs").write_text(str(pid))

    yield confine
    wait_until(lambda: not (group / "cgroup.procs").read_text(), 30, "an empty group")
    group.rmdir()


def test_the_kernel_ends_the_container(
    tight: Callable[[int], None],
    swarm: tuple[str, Peer],
    processes: Processes,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    """Out of memory, for real: it is told from other deaths, and costs the container alone."""
    maddr, peer = swarm
    victim = online(start_victim(processes, tmp_path / "a", tiny_llama, maddr, peer))
    tight(victim.pids["container"])
    large = torch.randn(1, 8000, 256)
    began = time.time()
    with pytest.raises(Exception, match=""):  # what a caller sees is that nobody is there any more
        peer.run(peer.stepping(victim.peer_id, chain(0, 8), large), 20)
    status = victim.agent.until(
        lambda s: s["restarts"]["container"] == 1 and s["state"] == "online", 90, "another container"
    )
    assert victim.told("out of memory", began, ("container",))
    assert status["pids"]["p2pd"] == victim.pids["p2pd"] and victim.recoveries() == []
    assert torch.allclose(peer.step(victim.peer_id, chain(0, 8), HIDDEN), victim.right, atol=1e-3)


def test_no_memory_is_left(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """An address-space limit: a request that asks for too much fails alone, the others are answered."""
    maddr, peer = swarm
    victim = online(start_victim(processes, tmp_path / "a", tiny_llama, maddr, peer))
    starve(victim)
    with victim.watch() as watch:
        large = torch.randn(1, 8000, 256)
        with pytest.raises(Exception) as refused:  # whatever its allocation failed in
            peer.run(peer.stepping(victim.peer_id, chain(0, 8), large), 20)
        tried = time.time()
        watch.until(lambda: watch.calm_since(tried), 90, "others are answered")
        print(
            f"no memory: outage of others {watch.outage(0):.1f} s; {victim.recoveries()}; {refused.value!r:.200}"
        )
        victim.agent.online()
