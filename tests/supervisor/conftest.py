"""A small swarm that most tests here share: an entry node, two agents that serve half of a model each, a reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.live import LiveAgent, start_live
from harness.peer import Peer
from harness.processes import Processes
from harness.swarm import start_bootstrap


@dataclass
class Swarm:
    """Its entry address, its agents, and a member that looks at them from outside."""

    maddr: str
    first: LiveAgent
    second: LiveAgent
    peer: Peer


@pytest.fixture(scope="package")
def swarm(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("swarm")
    processes = Processes(folder / "logs")
    try:
        maddr = start_bootstrap(processes)
        with Peer([maddr]) as peer:
            first = start_live(processes, folder / "a", tiny_llama, "0:4", [maddr])
            second = start_live(processes, folder / "b", tiny_llama, "4:8", [maddr])
            yield Swarm(maddr, first, second, peer)
    finally:
        processes.close()
