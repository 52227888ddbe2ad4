"""The canary sings for sound blocks, also beside users' steps, and tells what is wrong with others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from engine.churn import FIRST, LAST, load
from petals_agent.container.canary import Canary
from petals_agent.engine.backend import Backend
from petals_agent.engine.engine import Engine
from petals_agent.engine.session import Session
from petals_agent.errors import ContainerError


@pytest.fixture
async def engine(tiny: Callable[[str], Path]) -> AsyncIterator[Engine]:
    backends, _ = load(tiny("llama"))
    running = Engine(backends[0])
    running.start()
    yield running
    running.stop()


async def recorded(engine: Engine) -> Canary:
    canary = Canary(engine, FIRST, LAST)
    await canary.record()
    return canary


async def test_sound_blocks_beside_users(engine: Engine) -> None:
    canary = await recorded(engine)
    before = engine.stats.tokens
    sessions = [Session(1, 30, FIRST, LAST) for _ in range(4)]
    hidden = torch.randn(1, 1, engine.backend.hidden_size)

    async def steps(session: Session) -> None:
        for _ in range(20):
            await engine.step(session, hidden)

    async def songs() -> None:
        for _ in range(5):
            assert await canary.check() is None

    await asyncio.wait_for(asyncio.gather(songs(), *map(steps, sessions)), 60)
    assert engine.stats.tokens - before == 80, "the canary is not among what was done for users"


def broken(function: Callable[..., torch.Tensor], how: str) -> Callable[..., torch.Tensor]:
    def run(*arguments: object) -> torch.Tensor:
        if how == "raises":
            raise RuntimeError("the kernel fell")
        output = function(*arguments)
        return output * float("nan") if how == "nan" else output * 1.5

    return run


@pytest.mark.parametrize("method", ["block", "step"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "fails: RuntimeError: the kernel fell"),
        ("nan", "NaN or infinity"),
        ("drifts", "something else"),
    ],
)
async def test_what_is_broken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, how: str, words: str
) -> None:
    canary = await recorded(engine)
    backend: Backend = engine.backend
    monkeypatch.setattr(backend, method, broken(getattr(backend, method), how))
    problem = await canary.check()
    assert problem is not None and words in problem
    assert problem.startswith(f"block {FIRST}" if method == "block" else "a step through the span")
    monkeypatch.undo()
    assert await canary.check() is None


async def test_what_was_never_sound(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.backend, "block", broken(engine.backend.block, "nan"))
    with pytest.raises(ContainerError, match=f"block {FIRST} computes NaN or infinity right after the load"):
        await Canary(engine, FIRST, LAST).record()
