"""Fixtures for tests against the published Petals, which lives in a virtual environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from harness import swarm
from harness.processes import Processes

from .members import Swarm


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


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory, peer_python: Path, tiny_llama: Path) -> Iterator[Swarm]:
    """The servers that most tests here share."""
    started = Swarm(tmp_path_factory.mktemp("interop"), tiny_llama, peer_python)
    yield started
    started.close()


@pytest.fixture
def calm(shared: Swarm) -> Iterator[None]:
    """After the test our servers must have no session left and nothing to regret."""
    yield
    shared.check_calm()


@pytest.fixture(scope="session")
def local(tiny_llama: Path) -> LlamaForCausalLM:
    """The whole model in this process, which uses one thread: the machine is shared with the servers."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # random weights may emit it at any time
    model.generation_config.pad_token_id = 0
    return model
