"""Locks, units and Debian's files agree with the rest of the checkout; the manual says what the command line says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_lock_agrees_with_pins_and_ranges(kind: str) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "packaging/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    versions = locked(kind)
    assert Version(versions["torch"]).local == ("cpu" if kind == "cpu" else None)
    differ = {name for name, pin in pins.items() if Version(versions.get(name, pin)).public != pin}
    assert not differ, "run: packaging/make_wheels.py lock"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(re.split(r"[<>=\[;]", one)[0]) for one in project["dependencies"]}
    assert names <= set(versions)
    assert not {"pytest", "hypothesis", "ruff", "mypy", "pip"} & set(versions)


def test_package_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.match(r"petals-agent \((\S+)\)", (ROOT / "packaging/debian/changelog").read_text())
    assert newest is not None and newest[1] == project["version"]


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
    for command in called:
        subprocess.run(
            [sys.executable, "-m", "petals_agent.cli.main", command, "--help"],
            check=True,
            capture_output=True,
            timeout=60,
        )


def test_manual_has_every_command_and_key(tmp_path: Path) -> None:
    import typer.main

    from petals_agent.cli.main import app

    pages = script("man_pages")
    command = pages.command_page(typer.main.get_command(app), "1.0")
    for name in ("run", "status", r"config show", "generate", "bootstrap", r"post\-stop"):
        assert rf".SS \fBpetals\-agent {name}\fP" in command
    text = (ROOT / "petals-agent.toml").read_text()
    keys = re.findall(r"(?m)^#(\w+) = ", text)
    page = pages.file_page(text, "1.0")
    assert len(keys) > 40
    assert [key for key in keys if f"\\fB{key} = " not in page] == []
    for name, content in (("petals-agent.1", command), ("petals-agent.toml.5", page)):
        (tmp_path / name).write_text(content)
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
