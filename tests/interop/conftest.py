"""Fixtures for tests against the published Petals, which lives in a virtual environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness import swarm
from harness.processes import Processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the published Petals and minutes rather than seconds."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.interop)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def peer_python() -> Path:
    """The Python of the published Petals; skips when it is not installed."""
    python = swarm.peer_python()
    if python is None:
        pytest.skip("the published Petals is not installed: make peer-venv (or set PETALS_PEER_PYTHON)")
    return python


@pytest.fixture
def stock_server(
    processes: Processes, peer_python: Path, tiny_llama: Path
) -> Callable[..., swarm.StockServer]:
    """Start a published server: `stock_server("0:4", [maddr]).wait_online()`."""

    def start(blocks: str, peers: Sequence[str] = (), **more: Any) -> swarm.StockServer:
        return swarm.start_stock_server(processes, peer_python, tiny_llama, blocks, peers, **more)

    return start


@pytest.fixture
def stock_generate(
    processes: Processes, peer_python: Path, tiny_llama: Path
) -> Callable[..., dict[str, Any]]:
    """Run the published client: `stock_generate([maddr], "--check", "--grad")` → its JSON."""
    return partial(swarm.stock_generate, processes, peer_python, tiny_llama)
