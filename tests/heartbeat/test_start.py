"""How a fleet begins, or does not: in one process, on a clock that jumps."""

from __future__ import annotations

import asyncio
import random

import pytest

from harness import clock
from petals_agent.heartbeat.messages import Answer, Join, Request, Start
from petals_agent.heartbeat.rules import Timing

from .room import SLACK_S, Room, failed


def test_members_may_start_long_after_each_other() -> None:
    async def main() -> None:
        room = Room(4)
        for name in reversed(room.names):
            room.start(name)
            await asyncio.sleep(1200)
        await room.begun()
        assert not failed(room)
        await room.close()

    clock.run(main())


@pytest.mark.parametrize(("count", "latency"), [(16, 0.3), (50, 0.1), (100, 0.1)])
def test_a_large_fleet_begins_though_the_way_is_long(count: int, latency: float) -> None:
    """They come one by one, so their questions to the first member are not in step; all must be open at one moment."""

    async def main() -> None:
        room = Room(count, Timing.of(3.0))
        luck = random.Random(5)
        room.delay = lambda a, b: latency * luck.uniform(0.8, 1.2)
        for name in room.names:
            room.start(name)
            await asyncio.sleep(luck.uniform(0, 0.6))
        await room.begun()
        assert not failed(room)
        await room.close()

    clock.run(main())


def test_who_waits_asks_seldom() -> None:
    """For hours, if one of them is not started."""

    async def main() -> None:
        room = Room(50, Timing.of(3.0))
        room.start(*room.names[:-1])
        await asyncio.sleep(60)
        room.messages = 0
        await asyncio.sleep(600)
        assert room.messages < 49 * 2 * 600 / 10
        await room.close()

    clock.run(main())


def test_nobody_begins_without_all() -> None:
    async def main() -> None:
        room = Room(4)
        room.start(*room.names[:3])
        await asyncio.sleep(100)
        assert not any(room.reached(0, seat) for seat in room.seats.values())
        waiting = room.seats[room.names[1]].member
        await room.until(lambda: "3 of 4 members are here" in (waiting.problem or ""), 100, "it says so")
        await room.kill(room.names[1])
        room.start(room.names[3])
        await asyncio.sleep(100)
        assert not any(room.reached(0, seat) for seat in room.seats.values()), "one who left does not count"
        room.start(room.names[1])
        await room.begun()
        assert not failed(room)
        await room.close()

    clock.run(main())


@pytest.mark.parametrize("lives", [{}, {"peer000": 1}, {"peer000": 1, "peer001": 1, "x": 1}, {"peer001": 1}])
def test_a_start_with_others_than_the_members_is_none(lives: dict[str, int]) -> None:
    """What the first member says is checked, too."""

    async def main() -> None:
        room = Room(3)

        async def ask(peer: str, request: Request, timeout: float) -> Answer:
            assert isinstance(request, Join)
            return Start(token=5, lives=dict.fromkeys(lives, request.life))

        room._asker = lambda me: ask  # type: ignore[assignment,method-assign]
        room.start(room.names[1])
        seat = room.seats[room.names[1]]
        await asyncio.sleep(30)
        assert "with others than those who may be members" in (seat.member.problem or "")
        await room.close()

    clock.run(main())


def test_an_unequal_merge_at_the_start_is_fatal() -> None:
    """The first member gives another token to one of them."""

    async def main() -> None:
        room = Room(4)
        first = room.names[0]
        room.start(*room.names)
        original = room._answer
        lied = asyncio.Event()

        async def answer(peer: str, asker: str, body: bytes) -> bytes:
            from petals_agent.heartbeat.messages import encode, read_answer

            found = await original(peer, asker, body)
            said = read_answer(found)
            if isinstance(said, Start) and asker == room.names[2] and not lied.is_set():
                lied.set()
                return encode(said.model_copy(update={"token": (said.token + 1) % 65535}))
            return found

        room._answer = answer  # type: ignore[method-assign]
        took = await room.until(lambda: len(failed(room)) == 4, 30, "all of them")
        assert lied.is_set() and took < room.timing.period + SLACK_S, "in the first round"
        await room.begun()
        assert first in room.seats
        await room.close()

    clock.run(main())
