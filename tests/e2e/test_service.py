"""The life of the service as an operator sees it: configure, start, text, reload, stop, and what goes wrong."""

from __future__ import annotations

import json

from e2e.machine import Machine
from e2e.swarm import AGENT, CONFIG, ENTRY, Swarm
from harness.processes import wait_until

PROMPT = "Once upon a time"


def test_edit_start_text_stop(swarm: Swarm) -> None:
    machine = swarm.machine
    swarm.start()
    running = {"ActiveState": "active", "SubState": "running", "NRestarts": "0"}
    assert machine.show(AGENT, *running) == running
    machine.wait_for(AGENT, timeout=20, StatusText="online: blocks 0:8, 0 sessions")
    status = swarm.status()
    assert status["state"] == "online"
    assert swarm.states() == {status["peer_id"]: "ONLINE"}

    answer = swarm.generate(PROMPT, 12)
    assert len(answer["tokens"]) == 12
    assert answer["route"] == [{"peer_id": status["peer_id"], "start": 0, "end": 8}]

    entries = machine.journal("-u", AGENT, "PETALS_EVENT=state")
    assert [entry["PETALS_STATE"] for entry in entries][-1] == "online"
    assert all(entry["_SYSTEMD_UNIT"] == AGENT for entry in entries)

    machine.run("systemctl", "stop", AGENT, timeout=90)
    assert machine.show(AGENT, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert "ONLINE" not in swarm.states().values()
    machine.run("systemctl", "stop", ENTRY)
    assert machine.processes_of("petals-agent") == []


def test_wrong_configuration_is_named_and_not_tried_again(machine: Machine) -> None:
    done = machine.run("systemctl", "start", AGENT, check=False)  # no model is configured
    assert done.returncode == 1
    seen = machine.show(AGENT, "ActiveState", "ExecMainStatus", "NRestarts", "Result")
    assert seen == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0", "Result": "exit-code"}
    messages = [entry["MESSAGE"] for entry in machine.journal("-u", AGENT)]
    assert any("model.path" in str(message) or "[model]" in str(message) for message in messages), messages
    alerts = wait_until(lambda: machine.journal("-t", "petals-agent-alert"), 20, "the alert")
    assert [(alert["PRIORITY"], alert["PETALS_EVENT"]) for alert in alerts] == [("1", "alert")]
    assert alerts[0]["MESSAGE"].startswith(f"{AGENT}: exit-code (exited 78)")


def test_configuration_check_in_the_terminal(machine: Machine) -> None:
    done = machine.run("petals-agent", "config", "check", check=False)
    assert done.returncode == 78 and CONFIG in done.stdout + done.stderr


def test_status_is_for_root_and_the_group(swarm: Swarm) -> None:
    machine = swarm.machine
    swarm.start()
    nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup"]
    ask = ["env", "HOME=/nonexistent", "petals-agent", "status", "--json"]
    assert json.loads(machine.run(*nobody, "--groups=petals-agent", *ask).stdout)["state"] == "online"
    assert machine.run(*nobody, "--clear-groups", *ask, check=False).returncode != 0


def test_doctor_finds_no_problem(swarm: Swarm) -> None:
    swarm.start()
    done = swarm.machine.run("petals-agent", "doctor", "--json", check=False, timeout=120)
    problems = [one for one in json.loads(done.stdout)["checks"] if one["outcome"] == "problem"]
    assert (problems, done.returncode) == ([], 0)


def test_reload_applies_what_it_can_and_refuses_what_is_wrong(swarm: Swarm) -> None:
    machine = swarm.machine
    swarm.start()
    pid = machine.show(AGENT, "MainPID")
    swarm.edit(log__level="debug", serve__max_sessions=7)
    machine.run("systemctl", "reload", AGENT)
    (done,) = machine.journal("-u", AGENT, "PETALS_EVENT=reload")
    assert "log.level" in done["MESSAGE"] and "serve.max_sessions" in done["MESSAGE"]

    swarm.edit(log__level="loud")
    assert machine.run("systemctl", "reload", AGENT, check=False).returncode != 0
    wrong = machine.journal("-u", AGENT, "PETALS_EVENT=reload")[-1]
    assert wrong["PRIORITY"] == "4" and 'log.level = "loud"' in wrong["MESSAGE"]
    assert machine.show(AGENT, "MainPID") == pid
    machine.wait_for(AGENT, ActiveState="active", SubState="running")
    assert swarm.status()["state"] == "online"


def test_drain_outlives_a_restart(swarm: Swarm) -> None:
    machine = swarm.machine
    swarm.start()
    peer_id = swarm.status()["peer_id"]
    machine.run("petals-agent", "drain", "--force", "--reason", "new memory")
    assert swarm.status()["drain"]["stage"] == "drained"
    assert "ONLINE" not in swarm.states().values()

    machine.run("systemctl", "restart", AGENT, timeout=150)
    wait_until(lambda: (swarm.status()["drain"] or {}).get("stage") == "drained", 60, "drained again")
    assert "new memory" in str(swarm.status()["drain"])
    machine.run("petals-agent", "undrain")
    wait_until(lambda: swarm.states() == {peer_id: "ONLINE"}, 60, "ONLINE")
    assert swarm.generate(PROMPT, 4)["tokens"]


def test_two_agents_on_one_host(swarm: Swarm) -> None:
    machine = swarm.machine
    second, other = "petals-agent@second.service", "/etc/petals-agent/second.toml"
    machine.run("cp", "-p", CONFIG, other)
    swarm.edit(serve__blocks="0:4")
    swarm.edit(other, serve__blocks="4:8", swarm__listen=["/ip4/127.0.0.1/tcp/31331"])
    swarm.start()
    machine.run("systemctl", "start", second, timeout=150)
    peers = [swarm.status()["peer_id"]]
    peers += [
        json.loads(machine.run("petals-agent", "status", "--json", "--config", other).stdout)["peer_id"]
    ]
    assert swarm.states() == {peer: "ONLINE" for peer in peers}
    answer = swarm.generate(PROMPT, 4)
    assert answer["route"] == [
        {"peer_id": peers[0], "start": 0, "end": 4},
        {"peer_id": peers[1], "start": 4, "end": 8},
    ]
    machine.run(
        "systemctl", "stop", AGENT, timeout=90
    )  # the other one's folders lie inside those of this one
    assert json.loads(machine.run("petals-agent", "status", "--json", "--config", other).stdout)
    machine.run("systemctl", "stop", second, timeout=90)
    assert machine.show(second, "Result") == {"Result": "success"}
