"""The monitor's package: alone in a bare Debian, beside an agent, and without a swarm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from e2e.cache import scratch
from e2e.machine import Machine
from e2e.monitor import ADDRESS, CONFIG, FOLDER, PACKAGE, UNIT, Monitor
from e2e.swarm import AGENT, ENTRY, Swarm
from e2e.trees import ROOT, Trees
from harness.processes import Processes, wait_until

NOBODY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
WATCHDOG_S = 10
START_S = 10
MEGABYTE = 1_000_000


@pytest.fixture
def monitor(request: pytest.FixtureRequest, trees: Trees, processes: Processes) -> Iterator[Monitor]:
    """In a machine with the agent's package; with the parameter "alone", in a bare one."""
    folder = scratch()
    alone = getattr(request, "param", "") == "alone"
    lowers = [trees.base] if alone else [trees.installed, trees.base]
    options = [f"--bind-ro={trees.monitor.parent}:/deb"]
    yield Monitor(Machine(processes, lowers, folder / "m1", options=options), trees.monitor)
    processes.close()
    shutil.rmtree(folder, ignore_errors=True)


def newer(package: Path, machine: Machine) -> Path:
    """The same package with a higher version, in the machine's /srv."""
    folder = scratch()
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True, timeout=120)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^Version: (\S+)$", r"Version: \1+next", control.read_text()))
    made = machine.path("/srv/newer.deb")
    command = ["dpkg-deb", "-Zzstd", "-z1", "--root-owner-group", "-b", tree, made]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    shutil.rmtree(folder)
    return made


@pytest.mark.parametrize("monitor", ["alone"], indirect=True)
def test_alone_in_a_bare_debian(monitor: Monitor, trees: Trees) -> None:
    machine = monitor.machine
    assert monitor.installation.count(f"[swarm] initial_peers in {CONFIG}") == 1, monitor.installation
    stopped = {"ActiveState": "inactive", "UnitFileState": "disabled"}
    assert machine.show(UNIT, *stopped) == stopped

    version = machine.run(PACKAGE, "--version").stdout.split()[1]
    assert version == machine.run("dpkg-query", "-W", "-f", "${Version}", PACKAGE).stdout
    assert machine.run("dpkg", "-V", PACKAGE).stdout == ""
    assert trees.monitor.stat().st_size < 80 * MEGABYTE
    listed = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(machine.run(f"{FOLDER}/bin/python", "-c", listed).stdout)
    inside = {canonicalize_name(name): version for name, version in found.items()}
    lines = (ROOT / "packaging/lock-monitor.txt").read_text().splitlines()
    pairs = [line.split()[0].split("==") for line in lines if not line.startswith("#")]
    assert inside == {canonicalize_name(name): pin for name, pin in pairs} | {"petals-agent": version}
    assert not {"torch", "transformers", "grpcio", "scipy"} & set(inside)
    for page in ("man1/petals-agent-monitor.1", "man5/petals-agent-monitor.toml.5"):
        assert machine.path(f"/usr/share/man/{page}.gz").is_file()
    done = machine.run("systemd-analyze", "verify", "--man=no", UNIT, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    machine.run("systemd-analyze", "security", "--threshold=15", UNIT)

    # without any configuration, as anybody: the public swarm, which is out of reach here
    machine.run("mv", CONFIG, "/srv/")
    run = ["systemd-run", "--unit=bare", "--uid=nobody", "--setenv=HOME=/tmp/nobody", PACKAGE]
    machine.run(*run)
    status, health = wait_until(lambda: (seen := monitor.health())[0] and seen, 30, "the page")
    assert (status, health["ok"]) == (503, False)
    assert "<html" in monitor.get("/")[1]
    machine.run("systemctl", "stop", "bare")
    machine.run("mv", "/srv/petals-agent-monitor.toml", CONFIG)

    monitor.configure(monitor={"period": "soon"})
    assert machine.run("systemctl", "start", UNIT, check=False).returncode == 1
    wrong = {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    machine.wait_for(UNIT, **wrong)
    assert any("monitor.period" in str(entry["MESSAGE"]) for entry in machine.journal("-u", UNIT))

    machine.run("systemctl", "enable", UNIT)
    assert UNIT in machine.show("multi-user.target", "Wants")["Wants"]
    assert UNIT not in machine.show("multi-user.target", "After")["After"], (
        "the boot would wait for the swarm"
    )

    # a swarm that does not answer: `systemctl start` returns, the page says why, and nothing is restarted for it
    monitor.configure(swarm={"initial_peers": [f"/ip4/127.0.0.1/tcp/9/p2p/{NOBODY}"]})
    monitor.change_unit(f"TimeoutStartSec={START_S}")
    machine.run("systemctl", "start", UNIT, timeout=90)
    assert monitor.status().startswith("Reading the swarm for the first time (no bootstrap peer answers")
    assert machine.show(UNIT, "ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "0"}
    status, health = monitor.health()
    assert status == 503 and "no bootstrap peer answers" in health["problem"]

    machine.run("apt-get", "remove", "-y", PACKAGE, timeout=120)
    assert machine.processes_of(PACKAGE) == []
    assert machine.path(CONFIG).is_file() and machine.path(f"/var/lib/{PACKAGE}").is_dir()
    assert not machine.path(FOLDER).exists()
    machine.run("apt-get", "purge", "-y", PACKAGE, timeout=120)
    machine.run("rm", "-r", f"/etc/systemd/system/{UNIT}.d")  # the test's own
    left = machine.run("find", "/", "-xdev", "-name", "*petals*", "-not", "-path", "/deb/*")
    assert left.stdout == ""
    assert machine.run("getent", "passwd", PACKAGE).returncode == 0


def test_beside_an_agent(monitor: Monitor, trees: Trees) -> None:
    machine = monitor.machine
    swarm = Swarm(machine)
    monitor.configure(swarm={"initial_peers": [swarm.entry]}, monitor={"period": "1s"})
    monitor.change_unit(f"WatchdogSec={WATCHDOG_S}")
    monitor.start()

    # the agent is told to ask the monitor whether it can be reached
    swarm.edit(swarm__reachability=f"http://{ADDRESS}")
    swarm.start()
    agent = machine.show(AGENT, "MainPID")
    peer_id = swarm.status()["peer_id"]
    assert machine.journal("-u", AGENT, "PETALS_EVENT=reachability") == []

    def seen() -> str:
        servers = [server for model in monitor.state()["models"] for server in model["servers"]]
        return "".join(server["state"] for server in servers if server["peer_id"] == peer_id)

    wait_until(lambda: seen() == "online", 60, "the agent in the monitor's state")
    wait_until(lambda: monitor.status().startswith("1 models (1 healthy), 1 of 1 servers"), 10, "the status")
    age = re.fullmatch(r".* online, read (\d+) s ago; http://127\.0\.0\.1:8099", monitor.status())
    assert age and int(age[1]) <= 5, monitor.status()
    running = {"ActiveState": "active", "SubState": "running", "NRestarts": "0"}
    for unit in (UNIT, AGENT, ENTRY):
        assert machine.show(unit, *running) == running
    assert monitor.health()[0] == 200
    assert peer_id in monitor.get("/")[1] or peer_id in monitor.get("/models/demo")[1]
    assert json.loads(monitor.get(f"/api/v1/is_reachable/{peer_id}")[1])["success"] is True
    assert json.loads(monitor.get(f"/api/v1/is_reachable/{NOBODY}")[1])["success"] is False
    for command in (PACKAGE, "petals-agent"):
        text = machine.run(command, "swarm", timeout=90).stdout
        assert peer_id[-6:] in text and "########" in text, text

    # its p2pd hangs: it starts another one
    p2pd = monitor.p2pd()
    machine.run("kill", "-STOP", p2pd)
    wait_until(lambda: monitor.p2pd() != p2pd and monitor.state()["problem"] == "", 60, "another p2pd")
    assert machine.show(UNIT, *running) == running

    # it hangs itself: systemd starts another one, which knows what the first one saw
    past = json.loads(monitor.get("/api/v1/history/demo")[1])["points"]
    assert past
    machine.run("kill", "-STOP", monitor.pid())
    machine.wait_for(UNIT, **(running | {"NRestarts": "1"}))
    for words in ("Watchdog timeout", "Fatal Python error: Aborted"):
        assert any(words in str(entry["MESSAGE"]) for entry in machine.journal("-u", UNIT)), words
    assert json.loads(monitor.get("/api/v1/history/demo")[1])["points"][0]["at"] == past[0]["at"]
    wait_until(lambda: seen() == "online", 60, "the agent in the monitor's state")

    # an upgrade, and its end; the agent does not notice
    newer(trees.monitor, machine)
    pid, before = monitor.pid(), machine.path(CONFIG).read_text()
    machine.path(CONFIG).write_text(before + "# mine\n")
    machine.run("dpkg", "--force-unsafe-io", "-i", "/srv/newer.deb", timeout=120)
    wait_until(lambda: monitor.pid() not in (pid, "0"), 30, "another process")
    machine.wait_for(UNIT, **running)
    assert machine.path(CONFIG).read_text().endswith("# mine\n")
    assert json.loads(monitor.get("/api/v1/history/demo")[1])["points"][0]["at"] == past[0]["at"]
    machine.run("apt-get", "purge", "-y", PACKAGE, timeout=120)
    assert machine.processes_of(PACKAGE) == []
    for folder in ("/etc", "/var/lib", "/run", "/usr/lib"):
        assert not machine.path(f"{folder}/{PACKAGE}").exists()
    assert machine.show(AGENT, "MainPID") == agent and swarm.status()["state"] == "online"
    assert machine.run("dpkg", "-V", "petals-agent").stdout.split()[2:] == [
        "/etc/petals-agent/petals-agent.toml"
    ]


def test_without_the_swarm_it_says_so_and_is_started_again(monitor: Monitor) -> None:
    machine = monitor.machine
    swarm = Swarm(machine)
    monitor.configure(swarm={"initial_peers": [swarm.entry]}, monitor={"period": "1s"})
    monitor.change_unit(f"WatchdogSec={WATCHDOG_S}")
    monitor.start()
    pid = monitor.pid()
    machine.run("systemctl", "stop", ENTRY)
    wait_until(lambda: monitor.status().startswith("OUT OF DATE: 0 models"), 90, "the status line")
    assert monitor.pid() == pid
    status, health = monitor.health()
    assert (status, health["ok"]) == (503, False) and health["age_s"] > 60 and health["problem"]
    assert monitor.state()["taken_at"] > 0  # the old state is shown, with its age

    machine.wait_for(UNIT, NRestarts="1", timeout=WATCHDOG_S + 30)
    wait_until(lambda: monitor.status().startswith("Reading the swarm for the first time"), 30, "a new start")
    machine.run("systemctl", "start", ENTRY)
    wait_until(lambda: monitor.health()[0] == 200, 60, "the swarm to be read again")
    machine.wait_for(UNIT, ActiveState="active", SubState="running", NRestarts="1")
