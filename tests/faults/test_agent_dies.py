"""The agent itself is killed or stopped, or gives up: its unit brings it back, and no record outlives it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from harness.hurt import INJECT, QUICK, Victim, wait_gone
from harness.live import LiveAgent, write_config
from harness.peer import Peer
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap
from harness.unit import Unit, hurt_agent, watch

OFFLINE, JOINING, ONLINE = 0, 1, 2
WATCHDOG_S = 6.0  # 30 in the unit
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def swarm(module_processes: Processes) -> Iterator[tuple[str, Peer]]:
    """An entry node's address, and a peer that looks on."""
    maddr = start_bootstrap(module_processes)
    with Peer([maddr]) as peer:
        yield maddr, peer


def unit(
    processes: Processes, folder: Path, model: Path, maddr: str, more: str = "", *, restart: bool = True
) -> Unit:
    """A unit whose container obeys orders in `folder`/orders."""
    orders = folder / "orders"
    orders.mkdir(parents=True)
    env = {"PYTHONPATH": str(INJECT), "PETALS_AGENT_FAULTS": str(orders)}
    config = write_config(folder, model, "0:8", [maddr], QUICK + more)
    return Unit(processes, config, WATCHDOG_S, env, restart)


def events(agent: LiveAgent, name: str) -> list[dict[str, object]]:
    victim = Victim(agent, Path(), None)  # type: ignore[arg-type]  only its log is read
    return [event for event in victim.events() if event["event"] == name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_agent(
    number: int, swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    maddr, peer = swarm
    with unit(processes, tmp_path / "a", tiny_llama, maddr) as service:
        before = service.agent.online()
        outcome = hurt_agent(service, peer, f"agent, signal {number}", number)
        print(outcome.text)
        assert service.ends[0].watchdog == (number == signal.SIGSTOP)
        assert outcome.withdrawn is not None and outcome.wrong == 0
        after = service.agent.online()
        assert after["peer_id"] == before["peer_id"]
        service.systemd.wait_for("READY=1")
        os.kill(service.agent.process.pid, signal.SIGTERM)
        assert service.wait_end(2, 60).status == 0
        assert "STOPPING=1" in service.systemd.texts
        assert str(events(service.agent, "announce")[-1]["message"]).startswith("OFFLINE")
        assert peer.state(before["peer_id"]) in (OFFLINE, None)  # None: it has expired, 4 s later


def test_a_stop_that_ends_by_itself_is_no_failure(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """Stopped for a while, as a debugger or a suspended host does: nothing is restarted for that."""
    maddr, peer = swarm
    more = '[health.probes."swarm.p2pd"]\ntimeout = "1s"\nperiod = "500ms"'
    with (
        unit(processes, tmp_path / "a", tiny_llama, maddr, more) as service,
        watch(service.agent, peer) as seen,
    ):
        for _ in range(2):
            seen.until(lambda: seen.calm_since(time.time() - 5), 60, "calm")
            os.kill(service.agent.process.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            wait_until(lambda stopped=stopped: time.monotonic() - stopped > 4.5, 10, "4.5 s")
            os.kill(service.agent.process.pid, signal.SIGCONT)
            heard = time.monotonic()
            wait_until(lambda heard=heard: len(service.systemd.pings_after(heard)) > 5, 30, "pings")
        status = service.agent.online()
        assert status["restarts"] == {"container": 0, "p2pd": 0}
        assert events(service.agent, "recovery") == [] and service.ends == []


def test_with_repair_the_pings_go_on(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    maddr, _ = swarm
    with unit(processes, tmp_path / "a", tiny_llama, maddr) as service:
        before = service.agent.online()["pids"]["container"]
        service.systemd.wait_for("READY=1")
        os.kill(before, signal.SIGSTOP)
        frozen = time.monotonic()
        service.agent.until(
            lambda s: s["pids"]["container"] not in (None, before) and s["state"] == "online", 90, "another"
        )
        wait_until(lambda: service.systemd.pings_after(frozen + 5), 30, "pings")
        pings = [0.0, *service.systemd.pings_after(frozen)]
        assert max(later - sooner for sooner, later in pairwise(pings)) < WATCHDOG_S
        assert not service.ends and not events(service.agent, "ping_withheld")
        assert events(service.agent, "recovery")


def test_without_repair_the_pings_end_and_systemd_acts(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    maddr, peer = swarm
    with unit(processes, tmp_path / "a", tiny_llama, maddr, "[health]\nrepair = false") as service:
        first = service.agent
        status, family = first.online(), first.family()
        service.systemd.wait_for("READY=1")
        os.kill(status["pids"]["container"], signal.SIGSTOP)
        frozen = time.monotonic()
        wait_until(lambda: events(first, "ping_withheld"), 30, "the reason in the log")
        assert service.agent is first, "the reason must be there before the end"
        wait_until(lambda: peer.state(status["peer_id"]) != ONLINE, 20, "no ONLINE record")
        end = service.wait_end(1, 60)
        pings = [at for at in service.systemd.pings_after(frozen) if at < end.at - frozen]
        last = max(pings, default=0.0)  # noticed before the next one was due
        print(
            f"container stopped, no repair: last ping after {last:.1f} s, ended after {end.at - frozen:.1f} s"
        )
        assert end.watchdog and last <= 5.0
        assert not events(first, "recovery")
        wait_gone(family)
        assert service.wait_start(1, 60).online()["peer_id"] == status["peer_id"]


def test_what_comes_back_after_each_repair_is_given_up(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    maddr, peer = swarm
    more = "[health]\nrecoveries_per_hour = 2"
    folder = tmp_path / "a"
    with unit(processes, folder, tiny_llama, maddr, more, restart=False) as service:
        peer_id, family = service.agent.online()["peer_id"], service.agent.family()
        service.systemd.wait_for("READY=1")
        began = time.monotonic()
        with watch(service.agent, peer) as seen:
            hurt: set[int] = set()
            while "WATCHDOG=trigger" not in service.systemd.texts and len(hurt) < 5:
                status = service.agent.status()
                pid = status["pids"]["container"] if status.get("state") == "online" else None
                if pid is not None and pid not in hurt:
                    hurt.add(pid)
                    (folder / "orders" / "weights").touch()
            service.systemd.wait_for("WATCHDOG=trigger", 60)
            triggered = time.time()
            assert peer.state(peer_id) == OFFLINE
            end = service.wait_end(1, 60)
            wait_until(lambda: time.time() - triggered > 6, 10, "a few update periods")
            said = [state for at, state in seen.states if at > triggered]
            assert ONLINE not in said and JOINING not in said, seen.story(triggered)
        print(f"a fault that returns: given up after {end.at - began:.1f} s")
        assert end.status != 0
        (given_up,) = events(service.agent, "give_up")
        assert "container.canary" in str(given_up["reason"]) and "recoveries_per_hour = 2" in str(given_up)
        assert len([e for e in events(service.agent, "recovery") if "reason" in e]) == 2
        wait_gone(family)
        assert peer.state(peer_id) != ONLINE
        assert "STATUS=giving up" in "\n".join(service.systemd.texts)
