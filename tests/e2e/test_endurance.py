"""What must not end in a restart, with the limits as they are shipped, and the end of restarts where none helps."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from e2e.machine import Machine
from e2e.swarm import AGENT, APP, CONFIG, MODEL, Swarm
from harness.processes import wait_until

LOAD_S = float(os.environ.get("PETALS_E2E_LOAD_S", "60"))
SLOW_S = 60.0
CLIENTS = 8
STEP_S = 12.0  # of one step, where it is made slow
INJECTED, ORDERS = "/srv/inject", "/srv/orders"
INJECTION = Path(__file__).parents[1] / "faults" / "inject" / "sitecustomize.py"
SLOW, OTHER = "petals-agent@slow.service", "/etc/petals-agent/slow.toml"
# texts as fast as they come, by several clients at once; prints how many, and how many differ from the first
DRIVE = """
import json, sys, threading, time
from petals_agent.client.generate import Client
model, entry, seconds, clients = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
until, texts, wrong = time.monotonic() + seconds, [], []
def drive():
    with Client(model, [entry], "demo") as client:
        while time.monotonic() < until:
            texts.append(client.generate([3, 4, 5], 16).ids)
            if texts[-1] != texts[0]:
                wrong.append(texts[-1])
threads = [threading.Thread(target=drive) for _ in range(clients)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"texts": len(texts), "wrong": len(wrong)}))
"""


def drop_in(machine: Machine, unit: str, *lines: str) -> None:
    """Settings of a unit for this test, on top of what is installed."""
    file = machine.path(f"/etc/systemd/system/{unit}.d/test.conf")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["[Service]", *lines, ""]))
    machine.run("systemctl", "daemon-reload")


def let_in(machine: Machine) -> str:
    """Put the injection of faults there; the setting that makes a unit's container take it."""
    machine.path(ORDERS).mkdir()
    machine.path(INJECTED).mkdir()
    shutil.copy(INJECTION, machine.path(INJECTED))
    machine.run("chmod", "-R", "a+rX", INJECTED, ORDERS)
    return f"Environment=PYTHONPATH={INJECTED} PETALS_AGENT_FAULTS={ORDERS}"


def unrest(machine: Machine, unit: str) -> list[str]:
    """What its journal says of repairs and withheld pings."""
    events = ("recovery", "ping_withheld", "give_up")
    found = machine.journal("-u", unit, *(f"PETALS_EVENT={event}" for event in events))
    return [str(entry["MESSAGE"]) for entry in found]


def test_full_load_and_a_slow_load_are_no_illness(swarm: Swarm) -> None:
    """Both at once; the load takes three times as long as systemd waits without being asked for more time."""
    machine = swarm.machine
    faults = let_in(machine)
    machine.run("cp", "-p", CONFIG, OTHER)
    swarm.edit(OTHER, swarm__listen=["/ip4/127.0.0.1/tcp/31331"])
    swarm.start()
    drop_in(
        machine,
        SLOW,
        faults,
        f"Environment=PETALS_AGENT_SLOW_S={SLOW_S:g}",
        f"TimeoutStartSec={SLOW_S / 3:g}",
    )
    machine.path(f"{ORDERS}/slow.stay").touch()
    machine.run("systemctl", "start", "--no-block", SLOW)
    machine.wait_for(SLOW, timeout=40, ActiveState="activating")
    drive = [f"{APP}/bin/python", "-c", DRIVE, MODEL, swarm.entry, f"{LOAD_S:g}", str(CLIENTS)]
    driven = json.loads(machine.run(*drive, timeout=LOAD_S + 120).stdout)
    machine.wait_for(SLOW, timeout=180, ActiveState="active", SubState="running")
    times = machine.show(SLOW, "InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    began, ready = (int(times[f"{name}TimestampMonotonic"]) / 1e6 for name in ("InactiveExit", "ActiveEnter"))
    assert ready - began >= SLOW_S, "the load was not slow"
    assert driven["wrong"] == 0 and driven["texts"] > CLIENTS, driven
    for unit, config in ((AGENT, CONFIG), (SLOW, OTHER)):
        status = json.loads(machine.run("petals-agent", "status", "--json", "--config", config).stdout)
        assert status["restarts"] == {"container": 0, "p2pd": 0}, machine.log(unit)
        assert machine.show(unit, "NRestarts")["NRestarts"] == "0"
        assert unrest(machine, unit) == []


def test_a_stop_waits_for_the_step_in_flight_longer_than_systemd_would(swarm: Swarm) -> None:
    machine = swarm.machine
    swarm.edit(serve__drain_timeout="60s")
    drop_in(
        machine,
        AGENT,
        let_in(machine),
        f"Environment=PETALS_AGENT_LATE_S={STEP_S:g}",
        "TimeoutStopSec=4",
    )
    swarm.start()
    machine.path(f"{ORDERS}/late.stay").touch()
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(swarm.generate("Once upon a time", 1)))
    asking.start()
    wait_until(lambda: swarm.status()["in_flight"] > 0, 60, "a step in flight")
    began = time.monotonic()
    machine.run("systemctl", "stop", AGENT, timeout=120)
    took = time.monotonic() - began
    asking.join(60)
    assert len(answers[0]["tokens"]) == 1, "the step was not answered"
    assert machine.show(AGENT, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert took > 4, f"stopped after {took:.1f} s: nothing was in flight"
    assert "ONLINE" not in swarm.states().values()


def test_restarts_that_do_not_help_come_to_an_end(swarm: Swarm) -> None:
    machine = swarm.machine
    file = machine.path(f"/etc/systemd/system/{AGENT}.d/limit.conf")
    file.parent.mkdir(exist_ok=True)
    file.write_text("[Unit]\nStartLimitBurst=3\n")
    machine.run("systemctl", "daemon-reload")
    swarm.start()
    for restarts in ("1", "2"):
        machine.run("systemctl", "kill", "--signal", "KILL", "--kill-who", "main", AGENT)
        machine.wait_for(AGENT, NRestarts=restarts, ActiveState="active", SubState="running")
    machine.run("systemctl", "kill", "--signal", "KILL", "--kill-who", "main", AGENT)
    machine.wait_for(AGENT, ActiveState="failed")
    alert = wait_until(lambda: machine.journal("-t", "petals-agent-alert"), 20, "the alert")[-1]
    assert alert["MESSAGE"].startswith(AGENT) and alert["PRIORITY"] == "1"
    assert "ONLINE" not in swarm.states().values()
    assert machine.show(AGENT, "TasksCurrent") == {"TasksCurrent": "[not set]"}
