"""Forward and backward through the engine equal autograd over the plain modules, in both ways of keeping activations."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.churn import FIRST, LAST, load
from harness.waiting import until
from models.tiny import VARIANTS
from petals_agent.engine.backend import Backend
from petals_agent.engine.engine import Engine
from petals_agent.engine.session import Session
from petals_agent.models.span import SpanModel

TOLERANCE = 1e-4  # of the largest value
START, END = 1, 4
Tiny = Callable[[str], Path]
Loaded = tuple[list[Backend], SpanModel]


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> Loaded:
    return load(tiny("llama"))


class Watched:
    """A backend that counts the blocks it ran and the graphs that are alive, and can be held."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.blocks = 0
        self.graphs: list[weakref.ref[torch.Tensor]] = []
        self.most_graphs = 0
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def block(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self.open.wait(10)
        self.blocks += 1
        output = self._backend.block(layer, hidden)
        if output.requires_grad:
            self.graphs.append(weakref.ref(output))
            self.most_graphs = max(self.most_graphs, sum(graph() is not None for graph in self.graphs))
        return output


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max() / expected.abs().max())


def autograd(
    reference: SpanModel, hidden: torch.Tensor, prompts: torch.Tensor | None, grad: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output, [grad of the input, grad of the prompts]) of blocks [START, END)."""
    inputs = [hidden.clone().requires_grad_()]
    added = None
    if prompts is not None:
        # one for each row, as gradients are answered
        added = prompts.expand(-1, hidden.shape[0], -1, -1).clone().requires_grad_()
        inputs.append(added)
    output = reference.view(START, END)(inputs[0], added)
    return output.detach(), list(torch.autograd.grad(output, inputs, grad))


def tensors(rows: int, count: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, grad = torch.randn(2, rows, count, width, generator=generator)
    return hidden, grad


async def both(
    backend: Any, hidden: torch.Tensor, prompts: torch.Tensor | None, grad: torch.Tensor, keep_bytes: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the engine answers to a forward and to a backward."""
    engine = Engine(backend, keep_bytes=keep_bytes)
    engine.start()
    try:
        async with asyncio.timeout(60):
            forward = await engine.train(FIRST + START, FIRST + END, hidden, prompts)
            return forward, await engine.train(FIRST + START, FIRST + END, hidden, prompts, grad)
    finally:
        engine.stop()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family(tiny: Tiny, variant: str) -> None:
    backends, reference = load(tiny(variant))
    hidden, grad = tensors(2, 9, reference.hidden_size)
    expected, (expected_grad,) = autograd(reference, hidden, None, grad)
    for backend in backends:
        forward, backward = asyncio.run(both(backend, hidden, None, grad, 2**30))
        assert len(forward) == len(backward) == 1
        assert difference(forward[0], expected) < TOLERANCE, backend.name
        assert difference(backward[0], expected_grad) < TOLERANCE, backend.name


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("prompt_rows", [1, 3])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_prompts_and_their_gradients(llama: Loaded, number: int, prompt_rows: int, keep_bytes: int) -> None:
    backends, reference = llama
    hidden, grad = tensors(3, 7, reference.hidden_size)
    prompts = torch.randn(END - START, prompt_rows, 4, reference.hidden_size)
    expected, expected_grads = autograd(reference, hidden, prompts, grad)
    forward, backward = asyncio.run(both(backends[number], hidden, prompts, grad, keep_bytes))
    assert difference(forward[0], expected) < TOLERANCE
    assert len(backward) == 2 and backward[1].shape == (END - START, 3, 4, reference.hidden_size)
    for ours, theirs in zip(backward, expected_grads, strict=True):
        assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(("keep_bytes", "graphs", "blocks"), [(2**30, 3, 3), (0, 1, 5)])
def test_activations_are_kept_or_computed_again(
    llama: Loaded, keep_bytes: int, graphs: int, blocks: int
) -> None:
    """Without room for three graphs: two forwards without one, then each block once more (the last only once)."""
    backends, reference = llama
    watched = Watched(backends[0])
    hidden, grad = tensors(1, 5, reference.hidden_size)

    async def backward() -> None:
        engine = Engine(watched, keep_bytes=keep_bytes)
        engine.start()
        try:
            await asyncio.wait_for(engine.train(FIRST + START, FIRST + END, hidden, None, grad), 60)
        finally:
            engine.stop()

    asyncio.run(backward())
    assert (watched.most_graphs, watched.blocks) == (graphs, blocks)


def test_many_backwards_share_one_budget(llama: Loaded) -> None:
    """30 at once, and room for the graphs of one of them: all are right, and few are under way at any time."""
    backends, reference = llama
    watched = Watched(backends[0])
    hidden, grad = tensors(2, 6, reference.hidden_size)
    room = hidden.numel() * 4 * 13 * (END - START)
    _, (expected,) = autograd(reference, hidden, None, grad)

    async def flood() -> list[list[torch.Tensor]]:
        engine = Engine(watched, keep_bytes=room)
        works = [
            asyncio.create_task(engine.train(FIRST + START, FIRST + END, hidden, None, grad))
            for _ in range(30)
        ]
        await asyncio.sleep(0)
        engine.start()
        try:
            return await asyncio.wait_for(asyncio.gather(*works), 60)
        finally:
            engine.stop()

    answers = asyncio.run(flood())
    assert all(difference(answer[0], expected) < TOLERANCE for answer in answers)
    assert watched.most_graphs <= (END - START) + 1, "one job keeps its own, the others one at a time"


def test_a_short_forward_does_not_wait_for_a_long_backward(llama: Loaded) -> None:
    backends, reference = llama
    width = reference.hidden_size

    async def race() -> list[str]:
        engine = Engine(backends[0])
        order: list[str] = []

        async def work(name: str, end: int, grad: torch.Tensor | None) -> None:
            await engine.train(FIRST, FIRST + end, torch.zeros(1, 3, width), None, grad)
            order.append(name)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(work("long", 5, torch.ones(1, 3, width)))
            group.create_task(work("short", 1, None))
            await asyncio.sleep(0)
            engine.start()
        engine.stop()
        return order

    assert asyncio.run(race()) == ["short", "long"]


def test_decoding_goes_on_beside_training(llama: Loaded) -> None:
    """A session gets its steps while a long queue of backwards is far from done."""
    backends, reference = llama
    width = reference.hidden_size

    async def race() -> int:
        engine = Engine(backends[0])
        engine.start()
        hidden, grad = tensors(4, 64, width)
        works = [asyncio.create_task(engine.train(FIRST, LAST, hidden, None, grad)) for _ in range(40)]
        session = Session(1, 30, FIRST, LAST)
        async with asyncio.timeout(60):
            for _ in range(10):
                await engine.step(session, torch.zeros(1, 1, width))
            unfinished = sum(not work.done() for work in works)
            await asyncio.gather(*works)
        engine.stop()
        return unfinished

    assert asyncio.run(race()) >= 10


def test_cancelled_work_stops_at_the_next_block(llama: Loaded) -> None:
    backends, reference = llama
    watched = Watched(backends[0])
    watched.open.clear()
    hidden, grad = tensors(1, 5, reference.hidden_size)

    async def cancel() -> list[torch.Tensor]:
        engine = Engine(watched)
        engine.start()
        gone = asyncio.create_task(engine.train(FIRST, LAST, hidden, None, grad))
        assert await asyncio.to_thread(watched.reached.wait, 10)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        watched.open.set()
        async with asyncio.timeout(60):
            answer = await engine.train(FIRST, FIRST + 1, hidden)
            await until(lambda: engine.queued == 0, 10, "the cancelled work is dropped")
        engine.stop()
        return answer

    (answer,) = asyncio.run(cancel())
    assert torch.isfinite(answer).all()
    assert watched.blocks == 2, "one of the cancelled work, one of the other"


def test_an_error_reaches_only_the_one_who_caused_it(llama: Loaded) -> None:
    backends, reference = llama
    width = reference.hidden_size

    async def both_ways() -> tuple[object, object]:
        engine = Engine(backends[0])
        engine.start()
        good, bad = await asyncio.wait_for(
            asyncio.gather(
                engine.train(FIRST, FIRST + 2, torch.zeros(1, 3, width)),
                engine.train(FIRST, FIRST + 2, torch.zeros(1, 3, width + 1)),
                return_exceptions=True,
            ),
            60,
        )
        engine.stop()
        return good, bad

    good, bad = asyncio.run(both_ways())
    assert isinstance(good, list) and isinstance(bad, RuntimeError)
