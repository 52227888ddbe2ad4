"""The engine's thread: who shares a batch, who fails with whom, and what is left of a client that goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.churn import FIRST, LAST, load
from harness.waiting import until
from petals_agent.engine.backend import Backend, Prompts
from petals_agent.engine.engine import Engine
from petals_agent.engine.plan import StepPlan
from petals_agent.engine.session import Session
from petals_agent.errors import RequestError
from petals_agent.models.span import SpanModel

BLOCKS = LAST - FIRST
BOMB = 12345.0  # a value at which the backend below fails
Loaded = tuple[list[Backend], SpanModel]


@pytest.fixture(scope="module")
def llama(tiny: Callable[[str], Path]) -> Loaded:
    return load(tiny("llama"))


class Watched:
    """A backend that raises at BOMB, counts its steps, and can be held before one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.tokens: list[int] = []  # of each step
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(
        self, hidden: torch.Tensor, plan: StepPlan, start: int, end: int, prompts: Prompts
    ) -> torch.Tensor:
        self.reached.set()
        assert self.open.wait(10)
        self.tokens.append(hidden.shape[0])
        if (hidden == BOMB).any():
            raise RuntimeError("the bomb went off")
        return self._backend.step(hidden, plan, start, end, prompts)


@pytest.fixture
def watched(llama: Loaded) -> Watched:
    return Watched(llama[0][0])


def sessions(count: int, start: int = 0, end: int = BLOCKS) -> list[Session]:
    return [Session(1, 30, FIRST + start, FIRST + end) for _ in range(count)]


async def together(engine: Engine, steps: Sequence[tuple[Session, torch.Tensor]]) -> list[Any]:
    """Hand over all steps before the engine looks, so that they meet in one batch; answers or errors."""
    tasks = [asyncio.create_task(engine.step(session, hidden)) for session, hidden in steps]
    await asyncio.sleep(0)
    engine.start()
    try:
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    finally:
        engine.stop()


def inputs(count: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, width, generator=generator) for _ in range(count)]


async def test_ready_sessions_share_a_batch(llama: Loaded, watched: Watched) -> None:
    _, reference = llama
    hidden = inputs(8, reference.hidden_size)
    answers = await together(Engine(watched), list(zip(sessions(8), hidden, strict=True)))
    assert watched.tokens == [8]
    for answer, one in zip(answers, hidden, strict=True):
        assert torch.allclose(answer, reference.view(0, BLOCKS)(one), atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
async def test_input_that_is_not_finite_fails_alone(llama: Loaded, watched: Watched, bad: float) -> None:
    _, reference = llama
    hidden = inputs(5, reference.hidden_size)
    hidden[2] = hidden[2].double()
    hidden[2][0, 0, 3] = bad
    answers = await together(Engine(watched), list(zip(sessions(5), hidden, strict=True)))
    assert isinstance(answers[2], RequestError) and "NaN or infinity" in str(answers[2])
    for answer, one in zip(answers[:2] + answers[3:], hidden[:2] + hidden[3:], strict=True):
        assert torch.allclose(answer, reference.view(0, BLOCKS)(one), atol=1e-4)


async def test_a_work_that_the_backend_fails_at_fails_alone(llama: Loaded, watched: Watched) -> None:
    """The others of its batch are answered, and go on as if nothing had been."""
    _, reference = llama
    width = reference.hidden_size
    hidden = inputs(4, width)
    hidden[1][0, 0, 0] = BOMB
    open_sessions = sessions(4)
    engine = Engine(watched)
    engine.start()
    try:
        async with asyncio.timeout(30):
            first = await asyncio.gather(*(engine.step(s, torch.ones(1, 3, width)) for s in open_sessions))
            answers = await asyncio.gather(
                *(engine.step(s, x) for s, x in zip(open_sessions, hidden, strict=True)),
                return_exceptions=True,
            )
            last = await engine.step(open_sessions[3], torch.ones(1, 1, width))
    finally:
        engine.stop()
    assert len(first) == 4
    assert isinstance(answers[1], RuntimeError) and str(answers[1]) == "the bomb went off"
    whole = torch.cat((torch.ones(1, 3, width), hidden[3], torch.ones(1, 1, width)), dim=1)
    expected = reference.view(0, BLOCKS)(whole)
    assert torch.allclose(answers[3], expected[:, 3:4], atol=1e-4)
    assert torch.allclose(last, expected[:, 4:], atol=1e-4)


async def test_a_long_step_that_fails_in_the_middle_is_answered_once(llama: Loaded, watched: Watched) -> None:
    """Its chunks that went well are no answer, and what is left of it does not run."""
    _, reference = llama
    hidden = torch.zeros(1, 5000, reference.hidden_size)
    hidden[0, 4500, 0] = BOMB
    session = Session(1, 6000, FIRST, LAST)
    engine = Engine(watched, cache_tokens=6000)
    (answer,) = await together(engine, [(session, hidden)])
    assert isinstance(answer, RuntimeError)
    assert len(watched.tokens) == 3 and engine.queued == 0


async def test_a_client_that_goes_away_is_forgotten_within_a_step(llama: Loaded, watched: Watched) -> None:
    """While a batch runs, one waiting client leaves: its step never runs, and its slots are free after that batch."""
    _, reference = llama
    token = torch.zeros(1, 1, reference.hidden_size)
    stays, leaves = sessions(2)
    engine = Engine(watched)
    engine.start()
    try:
        async with asyncio.timeout(30):
            await asyncio.gather(engine.step(stays, token), engine.step(leaves, token))
            assert leaves.place is not None
            before = len(watched.tokens)
            watched.open.clear()
            watched.reached.clear()
            busy = asyncio.create_task(engine.step(stays, token))
            assert await asyncio.to_thread(watched.reached.wait, 10)
            waiting = asyncio.create_task(engine.step(leaves, token))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            engine.close(leaves)
            watched.open.set()
            await busy
            await until(lambda: leaves.place is None, 5, "its slots are free")
            assert engine.queued == 0
    finally:
        engine.stop()
    assert watched.tokens[before:] == [1]


async def test_a_client_that_leaves_during_its_own_step(llama: Loaded, watched: Watched) -> None:
    _, reference = llama
    (session,) = sessions(1)
    engine = Engine(watched)
    engine.start()
    try:
        watched.open.clear()
        step = asyncio.create_task(engine.step(session, torch.zeros(1, 1, reference.hidden_size)))
        assert await asyncio.to_thread(watched.reached.wait, 10)
        step.cancel()
        engine.close(session)
        engine.close(session)
        watched.open.set()
        await until(lambda: session.place is None and engine.queued == 0, 5, "its slots are free")
        assert len(watched.tokens) == 1
    finally:
        engine.stop()


async def test_a_long_prompt_of_one_who_left_does_not_run_on(llama: Loaded, watched: Watched) -> None:
    _, reference = llama
    session = Session(1, 20_000, FIRST, LAST)
    engine = Engine(watched, cache_tokens=20_000)
    engine.start()
    try:
        watched.open.clear()
        step = asyncio.create_task(engine.step(session, torch.zeros(1, 20_000, reference.hidden_size)))
        assert await asyncio.to_thread(watched.reached.wait, 10)
        step.cancel()
        engine.close(session)
        watched.open.set()
        await until(lambda: session.place is None and engine.queued == 0, 10, "its slots are free")
    finally:
        engine.stop()
    assert len(watched.tokens) == 1


async def test_ranges_do_not_mix(llama: Loaded, watched: Watched) -> None:
    """Sessions over different blocks are answered each through its own ones."""
    _, reference = llama
    ranges = [(0, 5), (0, 2), (2, 5), (1, 2)]
    hidden = inputs(4, reference.hidden_size)
    steps = [
        (Session(1, 10, FIRST + start, FIRST + end), one)
        for (start, end), one in zip(ranges, hidden, strict=True)
    ]
    answers = await together(Engine(watched), steps)
    assert watched.tokens == [1, 1, 1, 1]
    for answer, one, (start, end) in zip(answers, hidden, ranges, strict=True):
        assert torch.allclose(answer, reference.view(start, end)(one), atol=1e-4)


async def test_no_room_for_a_session_is_its_own_error(llama: Loaded, watched: Watched) -> None:
    _, reference = llama
    token = torch.zeros(1, 1, reference.hidden_size)
    (good,) = sessions(1)
    absurd = Session(1, 2**50, FIRST, LAST)
    answers = await together(Engine(watched), [(good, token), (absurd, token)])
    assert isinstance(answers[0], torch.Tensor)
    assert isinstance(answers[1], RuntimeError) and absurd.place is None


async def test_an_engine_that_stops_ends_its_thread(watched: Watched) -> None:
    engine = Engine(watched)
    engine.start()
    engine.stop()
    assert not engine._thread.is_alive()


async def test_a_bug_in_the_engine_is_told(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its owner must know, since nothing is answered any more."""
    engine, died = Engine(watched), threading.Event()
    monkeypatch.setattr(engine._scheduler, "next", lambda now: 1 / 0)
    engine.start(on_death=died.set)
    assert await asyncio.to_thread(died.wait, 10)
    engine.stop()
    assert "ZeroDivisionError" in caplog.text
