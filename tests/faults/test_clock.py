"""The wall clock of agent and container jumps (libfaketime; the host's own is left alone): said, and nothing restarted."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.hurt import online, start_victim
from harness.peer import Peer
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap

ONLINE = 2
INSTALLED = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def libfaketime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's library: installed, or unpacked from its package."""
    if INSTALLED.exists():
        return INSTALLED
    folder = tmp_path_factory.mktemp("faketime")
    try:
        subprocess.run(
            ["apt-get", "download", "libfaketime"], cwd=folder, check=True, capture_output=True, timeout=60
        )
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), "x"], cwd=folder, check=True, capture_output=True)
        return next(folder.rglob(INSTALLED.name))
    except (OSError, ValueError, StopIteration, subprocess.SubprocessError) as error:
        pytest.skip(f"libfaketime cannot be had: {error}")


@pytest.fixture
def peer(processes: Processes) -> Iterator[tuple[str, Peer]]:
    """An entry node's address, and a peer."""
    maddr = start_bootstrap(processes)
    with Peer([maddr]) as member:
        yield maddr, member


@pytest.mark.parametrize("jump", ["+20", "-20"])
def test_clock_jumps(
    jump: str,
    libfaketime: Path,
    peer: tuple[str, Peer],
    processes: Processes,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    env = {
        "LD_PRELOAD": str(libfaketime),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
    }
    quick = '[health.probes."swarm.announced"]\nperiod = "1s"\nfailures = 2'
    victim = online(start_victim(processes, tmp_path / "a", tiny_llama, *peer, quick, env=env))
    with victim.watch() as watch:
        watch.until(lambda: watch.calm_since(0), 60, "calm")
        jumped = time.time()
        clock.write_text(f"{jump}\n")

        def told(words: str) -> bool:  # its times are not ours
            return any(e["event"] == "probe" and words in e["message"] for e in victim.events())

        wait_until(lambda: told("our clock is"), 60, "it is noticed")
        print(f"clock {jump} s: noticed after {time.time() - jumped:.1f} s")
        seen = time.time()
        if jump == "-20":  # the record expires on arrival
            wait_until(lambda: told("peers that should know our record has it"), 60, "the record is missed")
        wait_until(lambda: time.time() - seen > 8, 20, "time for more")
        clock.write_text("+0\n")
        set_right = time.time()
        wait_until(lambda: told("host.clock is content again"), 60, "it is right again")
        watch.until(lambda: peer[1].state(victim.peer_id) == ONLINE, 60, "the record")
        watch.until(lambda: watch.calm_since(set_right), 60, "calm")
        print(f"clock {jump} s: outage {watch.outage(jumped):.1f} s; announced {watch.story(jumped)}")
        assert watch.outage(jumped) == 0.0
    status = victim.agent.online()
    assert status["pids"] == dict(victim.pids) and victim.recoveries() == []
