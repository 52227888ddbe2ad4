"""The first of several things: its result, and nothing left of the others."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from petals_agent.supervisor.states import ALLOWED, Life, State
from petals_agent.supervisor.tasks import first


class Sleeper:
    """Sleeps for ever and tells that it was cancelled, however long its end takes."""

    ended = False

    async def sleep(self) -> NoReturn:
        try:
            await asyncio.Event().wait()
            raise AssertionError("it never comes")
        finally:
            await asyncio.sleep(0.01)
            self.ended = True


async def answer() -> int:
    await asyncio.sleep(0)
    return 7


async def fail() -> int:
    raise ValueError("no")


async def test_result_comes_when_the_others_have_ended() -> None:
    sleeper = Sleeper()
    assert await first(sleeper.sleep(), answer()) == 7
    assert sleeper.ended


async def test_error_of_the_first() -> None:
    sleeper = Sleeper()
    with pytest.raises(ValueError, match="no"):
        await first(sleeper.sleep(), fail())
    assert sleeper.ended


async def test_cancelled_from_outside() -> None:
    sleeper = Sleeper()
    waiting = asyncio.create_task(first(sleeper.sleep(), sleeper.sleep()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sleeper.ended


def test_life_goes_on_as_allowed_and_remembers_why() -> None:
    life = Life()
    for state in (State.JOINING, State.ONLINE, State.RECOVERING, State.ONLINE, State.STOPPING, State.OFFLINE):
        life.enter(state, f"to {state.value}")
        life.enter(state, "staying is no event")
    assert [event.text for event in life.events][:2] == [
        "starting → joining: to joining",
        "joining → online: to online",
    ]
    assert len(life.events) == 6
    with pytest.raises(ValueError, match="offline → online is no transition"):
        life.enter(State.ONLINE, "back")


def test_every_state_can_stop() -> None:
    for state, following in ALLOWED.items():
        assert State.STOPPING in following or state in (State.STOPPING, State.OFFLINE)
