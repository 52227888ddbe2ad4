"""systemd's part when something is killed or hangs: the watchdog, restarts, and what post-stop clears away."""

from __future__ import annotations

import time
from typing import Any

import pytest

from e2e.machine import Machine
from e2e.swarm import AGENT, Swarm
from harness.processes import wait_until

WATCHDOG_S = 10  # instead of the unit's 30, to wait less


@pytest.fixture
def running(swarm: Swarm) -> Swarm:
    """An agent that is ONLINE, with a shorter watchdog."""
    drop_in = swarm.machine.path(f"/etc/systemd/system/{AGENT}.d/watchdog.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    swarm.machine.run("systemctl", "daemon-reload")
    swarm.start()
    return swarm


def freeze(machine: Machine, pid: int) -> float:
    """SIGSTOP to a process of the machine; returns the wall clock's time."""
    machine.run("kill", "-STOP", str(pid))
    return time.time()


def when(entry: dict[str, Any]) -> float:
    """Wall clock's time of an entry, when it came to the journal."""
    return int(entry["__REALTIME_TIMESTAMP"]) / 1e6


def watchdog_timeouts(machine: Machine) -> list[dict[str, Any]]:
    """What systemd says before it sends SIGABRT."""
    entries = machine.journal("-u", AGENT)
    return [entry for entry in entries if "Watchdog timeout" in str(entry["MESSAGE"])]


def wait_restarted(swarm: Swarm, main_pid: str) -> None:
    """systemd has started it once more, and it serves."""
    swarm.machine.wait_for(AGENT, NRestarts="1", timeout=WATCHDOG_S + 60)
    swarm.machine.wait_for(AGENT, ActiveState="active", SubState="running")
    assert swarm.machine.show(AGENT, "MainPID")["MainPID"] != main_pid
    assert swarm.generate("Once upon a time", 4)["tokens"]


def test_frozen_agent_is_restarted_by_the_watchdog(running: Swarm) -> None:
    machine, pid = running.machine, running.machine.show(AGENT, "MainPID")["MainPID"]
    frozen = freeze(machine, int(pid))
    wait_restarted(running, pid)
    (timeout,) = watchdog_timeouts(machine)
    assert when(timeout) - frozen < WATCHDOG_S + 5
    stacks = [
        entry for entry in machine.journal("-u", AGENT) if "Fatal Python error" in str(entry["MESSAGE"])
    ]
    assert stacks, "where it hung is not in the journal"


def test_frozen_container_is_repaired_without_a_restart(running: Swarm) -> None:
    machine, before = running.machine, running.status()["pids"]
    freeze(machine, before["container"])

    def repaired() -> bool:
        status = running.status()
        return status["state"] == "online" and status["pids"]["container"] not in (None, before["container"])

    wait_until(repaired, 60, "another container that serves")
    assert machine.show(AGENT, "MainPID", "NRestarts") == {"MainPID": str(before["agent"]), "NRestarts": "0"}
    steps = [entry["PETALS_STEP"] for entry in machine.journal("-u", AGENT, "PETALS_EVENT=recovery")]
    assert steps and running.generate("Once upon a time", 4)["tokens"]


def test_without_repair_the_watchdog_restarts_and_the_reason_is_in_the_journal(running: Swarm) -> None:
    machine = running.machine
    running.edit(health__repair=False)
    machine.run("systemctl", "reload", AGENT)
    before = running.status()["pids"]
    frozen = freeze(machine, before["container"])
    wait_restarted(running, str(before["agent"]))
    (withheld,) = machine.journal("-u", AGENT, "PETALS_EVENT=ping_withheld")
    (timeout,) = watchdog_timeouts(machine)
    assert when(withheld) - frozen < 5, "noticed too late"
    assert when(withheld) < when(timeout) < frozen + 5 + WATCHDOG_S
    assert "container" in withheld["PETALS_REASON"]


def test_killed_agent_leaves_nothing_behind(running: Swarm) -> None:
    machine, before = running.machine, running.status()
    # no new start for now, so that what is left can be seen
    hold = machine.path(f"/etc/systemd/system/{AGENT}.d/hold.conf")
    hold.write_text("[Service]\nRestart=no\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "kill", "--signal", "KILL", "--kill-who", "main", AGENT)
    machine.wait_for(AGENT, ActiveState="failed", Result="signal")
    for name in ("container", "p2pd"):
        assert not machine.path(f"/proc/{before['pids'][name]}").exists(), name
    assert len(machine.journal("-u", AGENT, "PETALS_EVENT=post_stop")) == 1
    assert "ONLINE" not in running.states().values()
    alerts = wait_until(lambda: machine.journal("-t", "petals-agent-alert"), 20, "the alert")
    assert "signal (killed KILL)" in alerts[0]["MESSAGE"]

    hold.unlink()
    machine.run("systemctl", "daemon-reload")
    running.start()
    assert running.status()["peer_id"] == before["peer_id"]
    assert running.states() == {before["peer_id"]: "ONLINE"}


def test_killed_agent_is_restarted(running: Swarm) -> None:
    pid = running.machine.show(AGENT, "MainPID")["MainPID"]
    running.machine.run("systemctl", "kill", "--signal", "KILL", "--kill-who", "main", AGENT)
    wait_restarted(running, pid)
