"""Fixtures for every test: processes that end with it, free ports, a tiny model on disk."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.processes import Processes
from harness.swarm import PEER_SCRIPTS, start_bootstrap


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Start processes here: all are ended with the test, which fails if one of their children lives on."""
    started = Processes(tmp_path / "logs")
    yield started
    started.close()


@pytest.fixture(scope="module")
def module_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """The same for a whole module, for servers that its tests share."""
    started = Processes(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Returns a function that names a TCP port of 127.0.0.1 that nobody listens on now."""

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 8 layers × 256, float32, in shards; the same bytes every time."""
    spec = importlib.util.spec_from_file_location("peer_model", PEER_SCRIPTS / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from the name of a variant to its folder; nobody may change what is in it."""
    from models.tiny import tiny_model  # imports torch and transformers

    folders: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = tiny_model(variant, tmp_path_factory.mktemp(variant))
        return folders[variant]

    return make


@pytest.fixture
def bootstrap(processes: Processes) -> str:
    """The multiaddress of a DHT node on loopback."""
    return start_bootstrap(processes)
