"""The checkout itself: no traces of a developer's machine, no big files, versions and pins that agree, links that work."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import petals_agent

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 400_000
LARGER = {
    "agent/petals_agent/demo/model/": 6_000_000,
    "packaging/demo-model/": 2_000_000,
}  # the demo's weights and text
# written so that this file does not match itself
TRACES = re.compile(
    r"/home/[a-z]+/|/root/[a-z.]|/tmp/w[/]|/wor[k]/|/opt/whee[l]s|/opt/pyp[i]|pypi\.or[g]|pythonhosted\.or[g]"
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


@cache
def tracked() -> list[Path]:
    """Files that git knows."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_traces_of_a_machine() -> None:
    found = []
    for path in tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{relative(path)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if TRACES.search(line)
        ]
    assert not found


def test_no_big_files() -> None:
    for path in tracked():
        limit = next(
            (size for folder, size in LARGER.items() if relative(path).startswith(folder)), MAX_BYTES
        )
        assert path.stat().st_size <= limit, f"{relative(path)} has {path.stat().st_size} bytes, over {limit}"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert project["version"] == petals_agent.__version__ == newest.group(1)


def test_pins_lie_in_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "packaging" / "constraints.txt").read_text().splitlines()
    pins = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1]
        for line in lines
        if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *(one for group in project["optional-dependencies"].values() for one in group),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate():
            pin = pins.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
            assert pin, f"{requirement.name} has no pin in packaging/constraints.txt"
            assert requirement.specifier.contains(pin), f"{requirement} does not allow the pin {pin}"


def test_links_in_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked():
        if path.suffix == ".md":
            links = LINK.findall(path.read_text())
            broken += [f"{relative(path)}: {link}" for link in links if not (path.parent / link).exists()]
    assert not broken


def test_every_folder_says_what_it_is_for() -> None:
    for folder in ("agent", "plugins", "packaging", "systemd", "docs", "tests", "tests/benchmarks"):
        assert (ROOT / folder / "README.md").is_file(), f"{folder} has no README.md"


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
