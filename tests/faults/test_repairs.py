"""Container and p2pd are killed, stopped, hung and spoilt: noticed, withdrawn, repaired, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.hurt import FAULTS, Fault, Victim, measure, online, start_victim
from harness.peer import Peer
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap
from petals_agent.swarm.reachability import PROBE_IDLE_S

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def swarm(module_processes: Processes) -> Iterator[tuple[str, Peer]]:
    """An entry node's address, and a peer that looks on."""
    maddr = start_bootstrap(module_processes)
    with Peer([maddr]) as peer:
        yield maddr, peer


@pytest.fixture(scope="module")
def sturdy(
    swarm: tuple[str, Peer],
    module_processes: Processes,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
) -> Victim:
    """One agent for all faults that take no step of the ladder: they cannot add up to an illness."""
    return online(start_victim(module_processes, tmp_path_factory.mktemp("s") / "a", tiny_llama, *swarm))


def tidy(victim: Victim) -> bool:
    """Whether nothing too many is left, and nothing is stopped."""
    family = victim.agent.family()  # agent, container, two p2pd
    sockets = list(victim.agent.socket.parent.iterdir())  # control, streams, two of p2pd
    try:
        running = [process for process in family if process.status() != psutil.STATUS_STOPPED]
    except psutil.NoSuchProcess:
        return False  # just now
    return len(family) == len(running) == 4 and len(sockets) == 4


def check(victim: Victim, fault: Fault) -> None:
    """Do it, and see that all is as before."""
    before = victim.agent.online()
    outcome = measure(victim, fault)
    print(outcome.text)
    assert set(outcome.steps) <= fault.steps, outcome
    assert fault.vain or not outcome.vain, outcome
    status = victim.agent.online()
    assert (status["peer_id"], status["maddrs"]) == (before["peer_id"], before["maddrs"])
    # if a peer has just asked us about another one, the p2pd for that stays a while
    wait_until(
        lambda: tidy(victim), PROBE_IDLE_S + 20, f"four processes and four sockets: {victim.agent.family()}"
    )
    if "container" in fault.name:
        assert outcome.withdrawn is not None, outcome


def names(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.steps], ids=names)
def test_what_is_replaced_without_a_step(fault: Fault, sturdy: Victim) -> None:
    check(online(sturdy), fault)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.steps], ids=names)
def test_what_takes_a_step(
    fault: Fault, swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    check(online(start_victim(processes, tmp_path / "a", tiny_llama, *swarm)), fault)


def test_a_load_that_stands_still(
    swarm: tuple[str, Peer], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """The first container hangs in its load; the next one does not."""
    quick = '[health.probes."container.load"]\ntimeout = "15s"\nperiod = "1s"'
    victim = start_victim(processes, tmp_path / "a", tiny_llama, *swarm, quick, orders=("hang",))
    status = victim.agent.until(lambda s: s["restarts"]["container"] == 1, 90, "the end of the first")
    assert status["state"] == "recovering" and victim.told("container.load failed")
    assert online(victim).recoveries() == ["restart_container"]
    assert victim.agent.status()["restarts"] == {"container": 1, "p2pd": 0}
