"""What an upgrade keeps, and that a purge keeps nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cache import scratch
from e2e.machine import Machine
from e2e.swarm import AGENT, APP, CONFIG, Swarm
from e2e.trees import Trees
from harness.processes import Processes, wait_until

SITE = f"{APP}/lib/python3.11/site-packages"
NEWER = "99.1"


@pytest.fixture(scope="module")
def newer(trees: Trees) -> Iterator[Path]:
    """The same package with a higher version and another default configuration."""
    folder = scratch()
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "-R", trees.package, tree], check=True, timeout=120)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^Version: (\S+)$", r"Version: \1+next", control.read_text()))
    package = tree / SITE.lstrip("/") / "petals_agent"
    module = package / "__init__.py"
    module.write_text(re.sub(r'(?m)^__version__ = "(\S+)"$', rf'__version__ = "{NEWER}"', module.read_text()))
    for compiled in package.glob("__pycache__/__init__.*.pyc"):  # Python would not compare it with the source
        compiled.unlink()
    default = tree / CONFIG.lstrip("/")
    default.write_text(default.read_text() + "# a newer comment\n")
    command = ["dpkg-deb", "-Zzstd", "-z1", "--root-owner-group", "-b", tree, folder]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    shutil.rmtree(tree)
    yield next(folder.glob("*.deb"))
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def machine(trees: Trees, newer: Path, processes: Processes) -> Iterator[Machine]:
    """With the newer package at hand."""
    folder = scratch()
    options = [f"--bind-ro={newer.parent}:/deb"]
    yield Machine(processes, [trees.installed, trees.base], folder / "m1", options=options)
    processes.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_upgrade_keeps_what_was_changed_and_restarts_what_runs(swarm: Swarm, newer: Path) -> None:
    machine = swarm.machine
    before = machine.path(CONFIG).read_text()
    swarm.start()
    peer_id, pid = swarm.status()["peer_id"], machine.show(AGENT, "MainPID")["MainPID"]

    quick = ["-o", "Dpkg::Options::=--force-unsafe-io", "-o", "Dpkg::Options::=--force-confold"]
    machine.run("apt-get", "install", "-y", *quick, f"/deb/{newer.name}", timeout=300)

    machine.wait_for(AGENT, ActiveState="active", SubState="running", Result="success", NRestarts="0")
    assert machine.show(AGENT, "MainPID")["MainPID"] != pid
    assert swarm.status()["peer_id"] == peer_id and swarm.status()["state"] == "online"
    assert machine.path(CONFIG).read_text() == before
    assert "a newer comment" in machine.path(CONFIG + ".dpkg-dist").read_text()
    assert machine.run("stat", "-c", "%a %U:%G", CONFIG).stdout.strip() == "640 root:petals-agent"
    events = [str(entry["MESSAGE"]) for entry in machine.journal("-u", AGENT)]
    assert any("upgrade of the package" in text for text in events), events
    assert swarm.generate("Once upon a time", 4)["tokens"]

    machine.run("apt-get", "purge", "-y", "petals-agent", timeout=300)
    assert machine.processes_of("petals-agent") == []
    machine.run("rm", "-r", "/etc/systemd/system/petals-agent-bootstrap.service.d")  # the test's own
    left = machine.run("find", "/", "-xdev", "-name", "*petals*").stdout.split()
    assert left == []
    failed = machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "*petals*").stdout
    assert failed == ""
    assert machine.run("getent", "passwd", "petals-agent").returncode == 0
    assert not machine.path(APP).exists()


def test_scripts_run_twice_and_wait_for_the_operator_if_told_so(swarm: Swarm, newer: Path) -> None:
    machine = swarm.machine
    swarm.start()
    pid = machine.show(AGENT, "MainPID")
    setting = machine.path("/etc/default/petals-agent")
    setting.write_text(setting.read_text().replace("=yes", "=no"))
    scripts = "/var/lib/dpkg/info/petals-agent"
    for _ in range(2):
        machine.run(f"{scripts}.prerm", "upgrade", "9")
        machine.run(f"{scripts}.postinst", "configure", "0")
    assert machine.show(AGENT, "MainPID") == pid and swarm.status()["drain"] is None

    # a container that comes from the newer package does not mix with this agent: systemd starts a newer one
    old = swarm.status()
    assert old["version"] != NEWER
    machine.run("dpkg", "--force-confold", "--force-unsafe-io", "-i", f"/deb/{newer.name}", timeout=300)
    assert machine.show(AGENT, "MainPID") == pid
    machine.run("kill", "-KILL", str(old["pids"]["container"]))
    machine.wait_for(AGENT, NRestarts="1", ActiveState="active", SubState="running")
    status = swarm.status()
    assert (status["version"], status["state"], status["peer_id"]) == (NEWER, "online", old["peer_id"])
    assert any(
        f"petals-agent {NEWER} is installed now" in str(e["MESSAGE"]) for e in machine.journal("-u", AGENT)
    )
    pid = machine.show(AGENT, "MainPID")

    setting.write_text(setting.read_text().replace("=no", "=yes"))
    machine.run(f"{scripts}.prerm", "upgrade", "9")
    assert swarm.status()["drain"]["stage"] == "drained"
    machine.run(f"{scripts}.postinst", "configure", "0")
    wait_until(lambda: machine.show(AGENT, "MainPID") != pid, 60, "another agent")
    machine.wait_for(AGENT, ActiveState="active", SubState="running")
    assert swarm.status()["drain"] is None
