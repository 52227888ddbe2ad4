"""Locks, units and Debian's files agree with the rest of the checkout; the manual says what the command line says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from petals_agent.cli import monitor_main
from petals_agent.config import Config
from petals_agent.config.load import config_from
from petals_agent.config.schema import LogConfig, MonitorConfig

ROOT = Path(__file__).resolve().parents[1]
MONITOR_UNIT = "systemd/petals-agent-monitor.service"
MONITOR_FILE = "packaging/debian/petals-agent-monitor.toml"
UNITS = sorted((ROOT / "systemd").glob("*.service"))
LOCKED = re.compile(r"([A-Za-z0-9._-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def script(name: str) -> ModuleType:
    """One of the scripts in packaging/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "packaging" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(kind: str) -> dict[str, str]:
    """Version by name; every line has a hash."""
    lines = (ROOT / "packaging" / f"lock-{kind}.txt").read_text().splitlines()
    found = [LOCKED.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found)
    return {canonicalize_name(line[1]): line[2] for line in found if line}


def pinned() -> dict[str, str]:
    """Version by name, of constraints.txt."""
    lines = (ROOT / "packaging/constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {canonicalize_name(name): version for name, version in pairs}


def project() -> dict[str, Any]:
    """[project] of pyproject.toml."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def names(requirements: Sequence[str]) -> set[str]:
    """What is required, without versions."""
    return {canonicalize_name(re.split(r"[<>=\[;]", one)[0]) for one in requirements}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_lock_agrees_with_pins_and_ranges(kind: str) -> None:
    versions = locked(kind)
    assert Version(versions["torch"]).local == ("cpu" if kind == "cpu" else None)
    differ = {name for name, pin in pinned().items() if Version(versions.get(name, pin)).public != pin}
    assert not differ, "run: packaging/make_wheels.py lock"
    assert names(project()["dependencies"]) <= set(versions)
    assert not {"pytest", "hypothesis", "ruff", "mypy", "pip"} & set(versions)


def test_lock_of_the_monitor_agrees_with_pins_and_requirements() -> None:
    lines = (ROOT / "packaging/requirements-monitor.txt").read_text().splitlines()
    wanted = names([line for line in lines if line and not line.startswith("#")])
    versions, pins = locked("monitor"), pinned()
    assert wanted <= set(versions), "run: packaging/make_wheels.py lock monitor"
    assert versions.items() <= pins.items(), "run: packaging/make_wheels.py lock monitor"
    assert names(project()["optional-dependencies"]["monitor"]) <= wanted
    assert not {"torch", "transformers", "safetensors", "grpcio", "grpcio-tools", "scipy"} & set(versions)


def test_monitor_needs_nothing_beyond_its_requirements() -> None:
    """All that it imports, its lazy imports included, comes from what the lock names."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=60, check=True
    )
    providers = packages_distributions()
    loaded = {
        canonicalize_name(one)
        for top in done.stdout.split()
        for one in providers.get(top, ())
        if top != "torch"
    }
    assert "hivemind" in loaded
    assert loaded <= set(locked("monitor")) | {"petals-agent"}


# an address of each kind that p2pd reports, and the parts of hivemind that are imported in functions
IMPORTED = """
import sys
before = set(sys.modules)
import petals_agent.cli.monitor_main, petals_agent.monitor.service, petals_agent.monitor.text_view
import hivemind.dht.node, hivemind.p2p, hivemind.proto.runtime_pb2, hivemind.proto.crypto_pb2
from hivemind.utils.multiaddr import Multiaddr
peer = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
for address in ("ip4/127.0.0.1/tcp/1", "ip6/::1/udp/1/quic", "dns4/example.org/tcp/1/ws"):
    Multiaddr(f"/{address}/p2p/{peer}").to_bytes()
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_package_has_the_version_of_the_project() -> None:
    newest = re.match(r"petals-agent \((\S+)\)", (ROOT / "packaging/debian/changelog").read_text())
    assert newest is not None and newest[1] == project()["version"]


def directives(name: str) -> list[str]:
    """Lines of a unit that are no comment."""
    lines = (ROOT / "systemd" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_template_is_the_unit_with_places_of_its_own() -> None:
    unit = directives("petals-agent.service")
    unit.remove("RuntimeDirectoryPreserve=yes")  # instances are inside, none is inside an instance
    for old, new in (
        ("/etc/petals-agent/petals-agent.toml", "/etc/petals-agent/%i.toml"),
        ("Description=Petals agent", "Description=Petals agent (%i)"),
        ("StateDirectory=petals-agent", "StateDirectory=petals-agent/%i"),
        ("RuntimeDirectory=petals-agent", "RuntimeDirectory=petals-agent/%i"),
    ):
        unit = [line.replace(old, new) for line in unit]
    assert directives("petals-agent@.service") == unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_hardened(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd is older than 251")
    assert done.returncode == 0, done.stdout + done.stderr


def test_units_name_commands_that_exist() -> None:
    called = {
        found[1]
        for unit in UNITS
        for found in re.finditer(r"(?m)^Exec\w+=-?/usr/bin/petals-agent (\S+)", unit.read_text())
    }
    assert called == {"run", "reload", "post-stop", "bootstrap"}
    start = re.search(r"(?m)^ExecStart=/usr/bin/(\S+) (.+)", (ROOT / MONITOR_UNIT).read_text())
    assert start is not None and start[1] in project()["scripts"]
    assert start[2].split()[-1] == str(monitor_main.CONFIG_FILE)
    lines = [["petals_agent.cli.main", command, "--help"] for command in called]
    lines.append(["petals_agent.cli.monitor_main", *start[2].split(), "--help"])
    for line in lines:
        subprocess.run([sys.executable, "-m", *line], check=True, capture_output=True, timeout=60)


def test_command_of_the_monitor(tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> tuple[int, str]:
        command = [sys.executable, "-m", "petals_agent.cli.monitor_main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout + done.stderr

    assert run("--version") == (0, f"petals-agent-monitor {project()['version']}\n")
    status, said = run("--listen", "127.0.0.1:0", "swarm")
    assert status == 2 and "the options of swarm come after it" in said
    (tmp_path / "wrong.toml").write_text("[monitor]\nlisten = 8099\n")
    for command in (["--config", tmp_path / "wrong.toml"], ["swarm", "--config", tmp_path / "wrong.toml"]):
        status, said = run(*command)
        assert status == 78 and said.startswith("petals-agent-monitor: ") and "monitor.listen" in said


def test_manual_has_every_command_and_key(tmp_path: Path) -> None:
    import typer.main

    from petals_agent.cli.main import app

    pages = script("man_pages")
    command = pages.command_page(typer.main.get_command(app), "1.0")
    monitor = pages.monitor_page(typer.main.get_command(monitor_main.app), "1.0")
    for words in (r"\-\-listen", r"\-\-version", r".SS \fBpetals\-agent\-monitor swarm\fP", r"\-\-watch"):
        assert words in monitor
    for name in ("run", "status", r"config show", "generate", "bootstrap", r"post\-stop"):
        assert rf".SS \fBpetals\-agent {name}\fP" in command
    text = (ROOT / "petals-agent.toml").read_text()
    keys = re.findall(r"(?m)^#(\w+) = ", text)
    page = pages.file_page(text, "1.0")
    assert len(keys) > 40
    assert [key for key in keys if f"\\fB{key} = " not in page] == []
    (tmp_path / "petals-agent.1").write_text(command)
    (tmp_path / "petals-agent.toml.5").write_text(page)
    (tmp_path / "petals-agent-monitor.1").write_text(monitor)
    text = (ROOT / MONITOR_FILE).read_text()
    (tmp_path / "petals-agent-monitor.toml.5").write_text(
        pages.file_page(text, "1.0", "petals-agent-monitor")
    )
    if man := shutil.which("man"):
        pages_there = [*tmp_path.iterdir(), ROOT / "packaging/debian/petals-agent.service.8"]
        for path in pages_there:
            done = subprocess.run(
                [man, "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", path],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.stderr == "", path.name


def test_file_of_the_monitor_has_its_keys_and_their_defaults() -> None:
    """All of [monitor] and [log], and what it needs of [swarm]; the history lies where its unit may write."""
    text = (ROOT / MONITOR_FILE).read_text()
    tables = tomllib.loads(re.sub(r"(?m)^#(\w+ = )", r"\1", text))
    assert [set(tables[name]) for name in ("monitor", "log")] == [
        set(MonitorConfig.model_fields),
        set(LogConfig.model_fields),
    ]
    state = re.search(r"(?m)^StateDirectory=(.+)", (ROOT / MONITOR_UNIT).read_text())
    assert state is not None
    assert tables["monitor"].pop("history") == f"/var/lib/{state[1]}/monitor.sqlite"
    shown, defaults = config_from(tables), Config()
    for name, table in tables.items():
        for key in table:
            assert getattr(getattr(shown, name), key) == getattr(getattr(defaults, name), key), (
                f"{name}.{key}"
            )


def test_roff_escapes() -> None:
    roff = script("man_pages").roff
    assert roff(".TH is no request") == "\\&.TH is no request"
    assert roff("a\\b --c `d-e`") == "a\\eb \\-\\-c \\fBd\\-e\\fP"


def test_wheels_of_the_wrong_torch_are_refused(tmp_path: Path) -> None:
    wheels = script("make_wheels")
    for name, wrong in (("torch-2.0%2Bcpu-py3-none-any.whl", "cuda"), ("torch-2.0-py3-none-any.whl", "cpu")):
        (tmp_path / name).touch()
        with pytest.raises(wheels.WheelError, match="needs one torch of that build"):
            wheels.check_torch(wrong, tmp_path)
        wheels.check_torch({"cuda": "cpu", "cpu": "cuda"}[wrong], tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(wheels.WheelError):
        wheels.check_torch("cpu", tmp_path)
    wheels.check_torch("monitor", tmp_path)
    (tmp_path / "torch-2.0-py3-none-any.whl").touch()
    with pytest.raises(wheels.WheelError, match="needs no torch"):
        wheels.check_torch("monitor", tmp_path)
