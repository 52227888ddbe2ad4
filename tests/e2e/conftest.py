"""Fixtures of the end-to-end suite, and the line that says whether it ran."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from e2e.cache import scratch
from e2e.host import CannotRun, Mirror, prepare
from e2e.machine import Machine
from e2e.swarm import Swarm
from e2e.trees import Trees, make_trees
from harness.processes import Processes

HERE = Path(__file__).parent
FIRST_S = 1500  # the first test waits for Debian, the package and its installation
_outcome: dict[str, str] = {}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what boots a machine; making the trees is slow, whichever test comes first."""
    for item in items:
        if HERE in item.path.parents and "mirror" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(FIRST_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Left out, and nobody would know: so it is said."""
    if _outcome:
        terminalreporter.write_line(f"E2E: {_outcome['text']}")


def _leave_out(reason: CannotRun) -> NoReturn:
    _outcome["text"] = f"left out ({reason})"
    pytest.skip(_outcome["text"])


@pytest.fixture(scope="session")
def mirror() -> Mirror:
    """Where Debian comes from; without root, tools or mirror all tests that boot a machine are left out."""
    try:
        return prepare()
    except CannotRun as reason:
        _leave_out(reason)


@pytest.fixture(scope="session")
def trees(mirror: Mirror, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trees]:
    """Debian, the package, and Debian with the package."""
    processes = Processes(tmp_path_factory.mktemp("trees"))
    try:
        made = make_trees(mirror, processes)
        _outcome["text"] = "run"
        yield made
    except CannotRun as reason:
        _leave_out(reason)
    finally:
        processes.close()


@pytest.fixture
def machine(trees: Trees, processes: Processes) -> Iterator[Machine]:
    """A booted Debian with the package installed and nothing configured."""
    folder = scratch()
    yield Machine(processes, [trees.installed, trees.base], folder / "m1")
    processes.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def swarm(machine: Machine) -> Swarm:
    """In the machine: an entry node that runs, and a configured agent that does not yet."""
    return Swarm(machine)
