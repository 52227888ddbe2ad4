"""Two servers, each with half of a tiny Llama, and a caller: three real p2pds on loopback, shared by the tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio
import torch
import uvloop

from harness.waiting import until
from models.tiny import tiny_model
from petals_agent.container.backends import SpanRequest, load_backend
from petals_agent.engine.backend import Backend
from petals_agent.models.source import open_model
from petals_agent.models.span import SpanModel, load_span
from serving.caller import Caller
from serving.host import Host

torch.set_num_threads(1)
BLOCKS, HALF = 6, 4


@dataclass(frozen=True)
class Swarm:
    """`first` serves blocks 0:4, `second` 4:6; `model` is all of them, by transformers' own attention."""

    first: Host
    second: Host
    caller: Caller
    model: SpanModel


@dataclass(frozen=True)
class Model:
    """What the servers are made of."""

    halves: tuple[Backend, Backend]
    whole: SpanModel


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Servers run on uvloop."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny Llama in two halves, and as one reference."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("llama"))
    source, cpu = open_model(str(folder)), torch.device("cpu")

    def part(start: int, end: int) -> Backend:
        request = SpanRequest(source, start, end, torch.float32, cpu, lambda progress: None)
        return load_backend(request, folder.parent / "verdicts.json")

    whole = load_span(source, 0, BLOCKS, torch.float32, cpu)
    whole.use_attention("eager")
    return Model((part(0, HALF), part(HALF, BLOCKS)), whole)


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    """A folder whose path is short enough for unix sockets."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(model: Model, sockets: Path) -> AsyncIterator[Swarm]:
    """Started once for each module."""
    first = await Host.start(model.halves[0], 0, HALF, sockets)
    second = await Host.start(model.halves[1], HALF, BLOCKS, sockets, initial_peers=first.maddrs)
    caller = await Caller.start([*first.maddrs, *second.maddrs])
    yield Swarm(first, second, caller, model.whole)
    await caller.stop()
    await second.stop()
    await first.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def swarm(running: Swarm) -> AsyncIterator[Swarm]:
    """The servers, idle and with the usual limits; after the test nothing of it may be left in them."""
    yield running
    await running.caller.vanish()
    for host in (running.first, running.second):
        await until(lambda host=host: host.idle, 5, "sessions and cache are free")
        host.restore()
