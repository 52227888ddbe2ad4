"""What a fleet does when members die, stop, are cut off, come again: in one process, on a clock that jumps."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from harness import clock
from petals_agent.errors import SwarmError
from petals_agent.heartbeat.messages import Alarm, Beat, Join, Known, Start, packed
from petals_agent.heartbeat.rules import Timing, now

from .room import LATENCY_S, SLACK_S, Room, failed

Play = Callable[[Room], Coroutine[Any, Any, None]]


def play(count: int, scene: Play, timing: Timing | None = None) -> None:
    """Start `count` members and let `scene` happen to them once they have had a round together."""

    async def main() -> None:
        room = Room(count, timing or Timing.of(3.0))
        room.start()
        try:
            await room.begun()
            await scene(room)
        finally:
            await room.close()

    clock.run(main())


@pytest.mark.parametrize("count", [2, 3, 5, 16, 100])
def test_all_have_one_token_and_no_round_fails(count: int) -> None:
    async def scene(room: Room) -> None:
        await asyncio.sleep(20 * room.timing.period)
        assert len({seat.rounds.session.token for seat in room.seats.values()}) == 1
        assert {seat.rounds.standing.failures for seat in room.seats.values()} == {0}
        assert {seat.rounds.standing.round for seat in room.seats.values()} <= {20, 21}
        assert not failed(room)

    play(count, scene)


@pytest.mark.parametrize(
    ("count", "which"), [(100, 0), *((count, which) for count in (2, 3, 5, 16) for which in (0, 1, -1))]
)
def test_a_dead_member_is_noticed_by_all_in_time(count: int, which: int) -> None:
    async def scene(room: Room) -> None:
        victim = room.names[which]
        await room.kill(victim)
        bound = room.timing.bound
        took = await room.until(lambda: len(failed(room)) == count - 1, bound, "all have noticed")
        assert took > 2 * room.timing.period, "not before three rounds"
        for seat in room.seats.values():
            assert "in a row failed" in seat.failures[0] or "raised the alarm" in seat.failures[0]

    play(count, scene)


@pytest.mark.parametrize("when", [0.0, 0.005, 0.015, 0.025, 0.5, 2.9, 2.995, 3.001])
def test_whenever_it_dies_in_a_round(when: float) -> None:
    async def scene(room: Room) -> None:
        await asyncio.sleep(when)
        await room.kill(room.names[0])
        await room.until(lambda: len(failed(room)) == 15, room.timing.bound, "all have noticed")

    play(16, scene)


@pytest.mark.parametrize("which", [0, 2, 4])
def test_a_member_that_was_started_again_is_fatal_at_once(which: int) -> None:
    async def scene(room: Room) -> None:
        victim = room.names[which]
        tokens = {name: seat.rounds.session.token for name, seat in room.seats.items()}
        await room.kill(victim)
        room.start(victim)
        took = await room.until(lambda: len(failed(room)) >= 4, 10, "the others have noticed")
        assert took < room.timing.period + 3 * room.timing.patience
        assert any("was started again" in seat.failures[0] for seat in failed(room))
        await room.until(
            lambda: all(room.reached(1, seat) for seat in room.seats.values()), 60, "a new start"
        )
        assert len({seat.rounds.session.token for seat in room.seats.values()}) == 1
        assert set(tokens) == set(room.seats)
        assert all(seat.member.failure is None for seat in room.seats.values()), "a success makes it good"

    play(5, scene)


def test_without_its_traffic_for_one_round_nothing_is_fatal() -> None:
    async def scene(room: Room) -> None:
        victim = room.seats[room.names[4]]
        number = victim.rounds.standing.round
        with room.cut(victim.name):
            await room.until(
                lambda: all(seat.rounds.standing.failures == 1 for seat in room.seats.values()),
                2 * room.timing.bound,
                "each has counted one failure",
            )
        await room.until(
            lambda: all(room.reached(number + 4, s) for s in room.seats.values()), 60, "rounds go on"
        )
        assert {seat.rounds.standing.failures for seat in room.seats.values()} == {0}
        assert not failed(room)

    play(5, scene)


@pytest.mark.parametrize("count", [3, 4, 5, 16])
@pytest.mark.parametrize("delay", [None, 1.5, 30.0])
def test_one_slow_link_changes_nobodys_view(count: int, delay: float | None) -> None:
    for a, b in ((0, 1), (0, count - 1), (1, 2)):

        async def scene(room: Room, a: int = a, b: int = b) -> None:
            slow = {room.names[a], room.names[b]}
            room.delay = lambda x, y: delay if {x, y} == slow else LATENCY_S
            number = next(iter(room.seats.values())).rounds.standing.round
            await room.until(
                lambda: all(room.reached(number + 8, s) for s in room.seats.values()), 99, "rounds"
            )
            assert {seat.rounds.standing.failures for seat in room.seats.values()} == {0}, (a, b)
            assert not failed(room)

        play(count, scene)


def test_a_member_cut_off_for_good_is_noticed_by_all_and_by_itself() -> None:
    async def scene(room: Room) -> None:
        with room.cut(room.names[3]):
            await room.until(lambda: len(failed(room)) == 5, room.timing.bound, "all five")

    play(5, scene)


def test_two_cut_links_of_different_members() -> None:
    async def scene(room: Room) -> None:
        cut = [
            {room.names[0], room.names[10]},
            {room.names[1], room.names[11]},
            {room.names[2], room.names[12]},
        ]
        room.delay = lambda a, b: None if {a, b} in cut else LATENCY_S
        await asyncio.sleep(30 * room.timing.period)
        assert not failed(room)

    play(16, scene)


@pytest.mark.parametrize("count", [4, 5, 16])
def test_a_witness_that_no_other_witness_can_reach(count: int) -> None:
    """The other members know more than any witness, and tell them."""

    async def scene(room: Room) -> None:
        witnesses = set(room.seats[room.names[0]].rounds.session.fleet.witnesses)
        lonely = room.names[0]
        room.delay = lambda a, b: None if lonely in (a, b) and {a, b} <= witnesses else LATENCY_S
        await asyncio.sleep(20 * (room.timing.period + room.timing.timeout))
        assert {seat.rounds.standing.failures for seat in room.seats.values()} == {0}
        assert not failed(room)

    play(count, scene)


@pytest.mark.parametrize("count", [2, 3, 8, 16, 100])
def test_traffic_grows_with_members_times_their_logarithm(count: int) -> None:
    async def scene(room: Room) -> None:
        await asyncio.sleep(room.timing.period / 2)
        room.messages = room.bytes = 0
        await asyncio.sleep(10 * (room.timing.period + 0.1))
        rounds = 10
        scale = count * max(math.log2(count), 1.0)
        assert room.messages / rounds <= 3.5 * scale
        assert room.bytes / rounds <= 350 * scale

    play(count, scene)


def test_traffic_of_failing_rounds_is_bounded_too() -> None:
    async def scene(room: Room) -> None:
        await room.kill(room.names[0])
        room.messages = 0
        await room.until(lambda: bool(failed(room)), room.timing.bound, "noticed")
        # refused connections are tried again, with pauses that grow
        assert room.messages < 3 * 20 * 64 * math.log2(64)

    play(64, scene)


def test_a_clock_that_runs_fast_or_slow_does_not_matter() -> None:
    """Periods of different length stand for clocks of different speed; each start of a round waits for the slowest."""

    async def main() -> None:
        room = Room(5)
        for number, name in enumerate(room.names):
            drift = 1 + (number - 2) / 20
            room.timing = Timing(3.0 * drift, 2.0, 1.0)
            room.start(name)
            room.seats[name].member._roll.name = "the same"
        await room.begun()
        await asyncio.sleep(300)
        assert not failed(room)
        assert {seat.rounds.standing.failures for seat in room.seats.values()} == {0}
        await room.close()

    clock.run(main())


@pytest.mark.parametrize(("late", "failures"), [("a witness", 0), ("another", 1)])
def test_who_is_late_is_in_step_again(late: str, failures: int) -> None:
    """Its pause is longer by more than a time-out. A witness is called; another finds out where the others are."""

    async def scene(room: Room) -> None:
        victim = room.seats[room.names[0 if late == "a witness" else 4]]
        victim.rounds._timing = replace(room.timing, period=room.timing.period + 4.5)
        await room.until(lambda: room.reached(2, victim), 10, "its longer pause has begun")
        victim.rounds._timing = room.timing
        number, most = victim.rounds.standing.round, 0
        while victim.rounds.standing.round < number + 6:
            await asyncio.sleep(0.1)
            most = max(most, *(seat.rounds.standing.failures for seat in room.seats.values()))
        assert most == failures and not failed(room)

    play(5, scene)


def test_an_alarm_is_heard_in_a_pause() -> None:
    """A member that is started again is found out at once, not in the next round."""

    async def scene(room: Room) -> None:
        await asyncio.sleep(10)
        await room.kill(room.names[3])
        room.start(room.names[3])
        took = await room.until(lambda: len(failed(room)) == 5, 30, "all have heard")
        assert took < 10

    play(5, scene, Timing.of(60.0))


def test_a_stranger_is_refused() -> None:
    async def scene(room: Room) -> None:
        ask = room._asker("stranger")
        session = room.seats[room.names[0]].rounds.session
        for request in (
            Join(fleet="4 listed members, period 3 s", life=b"x" * 8),
            Beat(life=session.lives[room.names[1]], token=session.token, round=1, known=packed(31)),
            Alarm(life=session.lives[room.names[1]], reason="just so"),
        ):
            with pytest.raises(SwarmError, match="not among the members"):
                await ask(room.names[0], request, 5.0)
        await asyncio.sleep(30)
        assert not failed(room)

    play(4, scene)


def test_late_and_repeated_messages_count_for_nothing() -> None:
    """Of an earlier round, an earlier life, with another token: the member in whose name they come is asked first."""

    async def scene(room: Room) -> None:
        target, sender = room.names[0], room.names[3]
        ask = room._asker(sender)
        session = room.seats[sender].rounds.session
        life = session.lives[sender]
        await asyncio.sleep(10)
        before = room.seats[target].rounds.standing.round
        old = Beat(life=life, token=session.token, round=0, known=packed(31))
        answer = await ask(target, old, 5.0)
        assert isinstance(answer, Known) and answer.round == before and answer.known == packed(0)
        await ask(target, Beat(life=b"x" * 8, token=session.token, round=before, known=packed(31)), 5.0)
        await ask(
            target, Beat(life=life, token=(session.token + 1) % 65535, round=before, known=packed(0)), 5.0
        )
        await ask(target, Alarm(life=b"x" * 8, reason="of another time"), 5.0)
        await ask(target, Join(fleet="5 listed members, period 3 s", life=b"x" * 8), 5.0)
        again = await ask(target, Join(fleet="5 listed members, period 3 s", life=life), 5.0)
        assert isinstance(again, Start) and again.token == session.token
        await asyncio.sleep(30)
        assert not failed(room)

    play(5, scene)


def test_a_wrong_token_is_fatal_at_once_for_all() -> None:
    async def scene(room: Room) -> None:
        victim = room.seats[room.names[4]]
        object.__setattr__(victim.rounds.session, "token", (victim.rounds.session.token + 1) % 65535)
        took = await room.until(lambda: len(failed(room)) == 5, 10, "all have noticed")
        assert took < room.timing.period + SLACK_S
        assert any("has token" in seat.failures[0] for seat in failed(room))

    play(5, scene)


def test_a_short_stop_costs_no_more_than_it_lasts() -> None:
    """Cut off for a time and back: never fatal while it is shorter than a round and its time-out."""

    async def scene(room: Room) -> None:
        luck = random.Random(1)
        for _ in range(60):
            victim = luck.choice(room.names)
            await asyncio.sleep(luck.uniform(0, 9))
            with room.cut(victim):
                await asyncio.sleep(luck.uniform(0, room.timing.period + room.timing.timeout))
            await room.until(
                lambda: all(not seat.rounds.standing.failures for seat in room.seats.values()),
                60,
                "well again",
            )
        assert not failed(room)

    play(7, scene)


def test_many_rounds_with_lost_and_late_messages() -> None:
    """One message in a hundred is lost, others take up to half a second: never three rounds in a row."""

    async def scene(room: Room) -> None:
        luck = random.Random(7)
        room.delay = lambda a, b: None if luck.random() < 0.01 else luck.expovariate(1 / 0.05)
        seat = room.seats[room.names[0]]
        began = now()
        await room.until(lambda: room.reached(200, seat), 2000, "two hundred rounds")
        assert not failed(room)
        print(f"{now() - began:.0f} s")

    play(5, scene)
