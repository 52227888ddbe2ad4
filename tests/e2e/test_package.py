"""What the package contains and what its installation does."""

from __future__ import annotations

import json

from packaging.utils import canonicalize_name

from e2e.machine import Machine
from e2e.swarm import APP, CONFIG
from e2e.trees import INSTALL_LOG, ROOT, Trees

UNITS = ("petals-agent.service", "petals-agent@.service", "petals-agent-bootstrap.service")
UNITS += ("petals-agent-alert@.service",)


def test_installation_says_what_to_do_and_starts_nothing(trees: Trees, machine: Machine) -> None:
    log = (trees.installed / INSTALL_LOG).read_text()
    assert log.count(f"set [model] path in {CONFIG}") == 1, log
    for unit in ("petals-agent.service", "petals-agent-bootstrap.service"):
        assert machine.show(unit, "ActiveState", "UnitFileState") == {
            "ActiveState": "inactive",
            "UnitFileState": "disabled",
        }
    assert machine.run("systemctl", "is-system-running").stdout.strip() == "running"


def test_files_and_modes(machine: Machine) -> None:
    modes = {
        CONFIG: "640 root:petals-agent",
        "/etc/petals-agent/petals-agent.toml.d": "755 root:root",
        "/etc/petals-agent/plugins": "755 root:root",
        f"{APP}/lib/python3.11/site-packages/hivemind/hivemind_cli/p2pd": "755 root:root",
        "/usr/bin/petals-agent": "755 root:root",
    }
    for path, mode in modes.items():
        assert machine.run("stat", "-L", "-c", "%a %U:%G", path).stdout.strip() == mode, path
    assert machine.run("dpkg", "-V", "petals-agent").stdout == ""
    assert machine.run("readlink", "-f", "/usr/bin/petals-agent").stdout.strip() == f"{APP}/bin/petals-agent"


def test_only_what_the_agent_needs_is_inside(machine: Machine) -> None:
    listed = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(machine.run(f"{APP}/bin/python", "-c", listed).stdout)
    inside = {canonicalize_name(name): version for name, version in found.items()}
    lines = (ROOT / "packaging/lock-cpu.txt").read_text().splitlines()
    pairs = [line.split()[0].split("==") for line in lines if not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in pairs}
    assert inside.pop("petals-agent") == machine.run("petals-agent", "--version").stdout.split()[1]
    assert inside == locked
    for module in (
        "hivemind",
        "torch",
        "transformers",
        "petals_agent.container.main",
        "petals_agent.cli.main",
    ):
        machine.run(f"{APP}/bin/python", "-c", f"import {module}", timeout=120)


def test_command_manual_and_completion(machine: Machine, trees: Trees) -> None:
    version = machine.run("petals-agent", "--version").stdout.split()[1]
    assert version == machine.run("dpkg-query", "-W", "-f", "${Version}", "petals-agent").stdout
    for page in ("man1/petals-agent.1", "man5/petals-agent.toml.5", "man8/petals-agent.service.8"):
        assert (trees.installed / f"usr/share/man/{page}.gz").is_file()
    complete = """
        source /usr/share/bash-completion/bash_completion
        _completion_loader petals-agent
        COMP_WORDS=(petals-agent sta) COMP_CWORD=1
        $(complete -p petals-agent | sed 's/.*-F \\([^ ]*\\).*/\\1/') petals-agent
        echo ${COMPREPLY[@]}
    """
    done = machine.run("bash", "-c", complete)
    assert done.stdout.split() == ["status"], done.stderr
    zsh = (trees.installed / "usr/share/zsh/vendor-completions/_petals-agent").read_text()
    assert zsh.startswith("#compdef petals-agent")


def test_units_are_accepted_and_hardened(machine: Machine) -> None:
    for unit in UNITS:
        path = f"/lib/systemd/system/{unit.replace('@', '@name')}"
        done = machine.run("systemd-analyze", "verify", "--man=no", path, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), unit
        machine.run("systemd-analyze", "security", "--offline=yes", "--threshold=20", path)
