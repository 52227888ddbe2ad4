"""Blocks come and go between two steps; sessions on those that stay compute as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.tiny import BLOCKS
from petals_agent.container.backends import SpanRequest, load_backend
from petals_agent.engine.backend import Backend
from petals_agent.engine.engine import Engine
from petals_agent.engine.packed import PackedBackend
from petals_agent.engine.padded import PaddedBackend
from petals_agent.engine.session import Session
from petals_agent.models.source import ModelSource, open_model
from petals_agent.models.span import load_span

CPU = torch.device("cpu")
KINDS = [
    ("llama", None),
    ("llama", PackedBackend),
    ("llama", PaddedBackend),
    ("gemma2", None),
    ("falcon", None),
    ("gpt_oss", None),
]


class Part:
    """A session over [start, end), what it was given, and what the whole model's blocks make of that."""

    def __init__(self, source: ModelSource, start: int, end: int) -> None:
        self.session = Session(1, 40, start, end)
        self._reference = load_span(source, start, end, torch.float32, CPU)
        self._reference.use_attention("eager")
        self._given = torch.zeros(1, 0, self._reference.hidden_size)

    async def step(self, engine: Engine, count: int) -> None:
        hidden = torch.randn(1, count, self._given.shape[2])
        self._given = torch.cat((self._given, hidden), dim=1)
        answer = await asyncio.wait_for(engine.step(self.session, hidden), 30)
        with torch.inference_mode():
            expected = self._reference(self._given)[:, -count:]
        torch.testing.assert_close(answer, expected, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("variant, kind", KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
async def test_sessions_live_through_moves(
    tiny: Callable[[str], Path], variant: str, kind: type[Backend] | None
) -> None:
    folder = tiny(variant)
    source = open_model(str(folder))

    def blocks(start: int, end: int) -> Backend:
        if kind is not None:
            return kind(load_span(source, start, end, torch.float32, CPU))  # type: ignore[call-arg]
        request = SpanRequest(source, start, end, torch.float32, CPU, lambda progress: None)
        return load_backend(request, folder.parent / "verdicts.json")

    backend = blocks(1, 4)
    engine = Engine(backend, cache_tokens=200)
    engine.start()

    async def join(start: int, end: int) -> None:
        piece = blocks(start, end)
        await engine.change(lambda: backend.join(piece))

    async def step(*parts: Part) -> None:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part.step(engine, 3 if part.session.length == 0 else 1))

    try:
        leaves, stays = Part(source, 1, 4), Part(source, 2, 4)
        await step(leaves, stays)
        await join(4, 6)
        assert sorted(backend.layers) == [1, 2, 3, 4, 5]
        new = Part(source, 2, 6)
        for _ in range(3):
            await step(leaves, stays, new)
        engine.close(leaves.session)
        await engine.change(lambda: backend.keep(2, 6))
        assert sorted(backend.layers) == [2, 3, 4, 5]
        for _ in range(3):
            await step(stays, new)
        await join(0, 1)  # beside a gap
        far = Part(source, 0, 1)
        await step(far, new)
        await join(1, 2)  # which closes
        assert sorted(backend.layers) == list(range(6)) and BLOCKS >= 6
        whole = Part(source, 0, 6)
        for _ in range(2):
            await step(far, stays, new, whole)
        await engine.change(lambda: backend.keep(0, 1))
        await step(far)
        with pytest.raises(Exception, match="2"):
            await asyncio.wait_for(engine.step(new.session, torch.zeros(1, 1, backend.hidden_size)), 30)
        await step(far)
    finally:
        engine.stop()


async def test_a_change_that_fails_is_told(tiny: Callable[[str], Path]) -> None:
    source = open_model(str(tiny("llama")))
    request = SpanRequest(source, 0, 2, torch.float32, CPU, lambda progress: None)
    backend = load_backend(request, tiny("llama").parent / "verdicts.json")
    engine = Engine(backend)
    engine.start()

    def fail() -> None:
        raise RuntimeError("no")

    try:
        with pytest.raises(RuntimeError, match="no"):
            await engine.change(fail)
        await Part(source, 0, 2).step(engine, 2)
    finally:
        engine.stop()
