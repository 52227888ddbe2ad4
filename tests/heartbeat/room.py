"""Members of a fleet in one process on a clock that jumps: their links can be slow, cut, and their processes stopped.

Between them is nothing but function calls that take time, so a thousand rounds of a hundred members take seconds, and each run is
the same. What libp2p adds is tested with real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from petals_agent.errors import AgentError, SwarmError
from petals_agent.heartbeat.fleet import Listed
from petals_agent.heartbeat.member import Member, Told
from petals_agent.heartbeat.messages import Answer, Request, encode, read_answer, read_request
from petals_agent.heartbeat.rounds import Rounds
from petals_agent.heartbeat.rules import Timing, now

PERIOD_S = 3.0
LATENCY_S = 0.01
SLACK_S = 1.0


def names(count: int) -> list[str]:
    return [f"peer{number:03d}" for number in range(count)]


@dataclass(eq=False)
class Seat:
    """A member's process: it can be ended, and started again with nothing of what it knew."""

    name: str
    member: Member
    task: asyncio.Task[None]
    told: list[tuple[float, Told]] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [told.failure for _, told in self.told if told.failure is not None]

    @property
    def rounds(self) -> Rounds:
        phase = self.member._phase
        assert isinstance(phase, Rounds), "it has not started"
        return phase


@dataclass
class Room:
    """`delay(a, b)` is how long a message takes from a to b, None for ever."""

    count: int
    timing: Timing = field(default_factory=lambda: Timing.of(PERIOD_S))
    seats: dict[str, Seat] = field(default_factory=dict)
    delay: Callable[[str, str], float | None] = lambda a, b: LATENCY_S
    messages: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self.names = names(self.count)

    def start(self, *chosen: str) -> None:
        for name in chosen or self.names:
            roll = Listed(self.names, self.timing.period)
            told: list[tuple[float, Told]] = []

            def tell(one: Told, told: list[tuple[float, Told]] = told) -> None:
                told.append((now(), one))

            member = Member(name, roll, self.timing, self._asker(name), tell)
            task: asyncio.Task[None] = asyncio.create_task(member.run())
            self.seats[name] = Seat(name, member, task, told)

    async def kill(self, name: str) -> None:
        seat = self.seats.pop(name)
        seat.task.cancel()
        await asyncio.gather(seat.task, return_exceptions=True)

    async def close(self) -> None:
        for name in list(self.seats):
            await self.kill(name)

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Everything from and to `name` is lost meanwhile."""
        before = self.delay
        self.delay = lambda a, b: None if name in (a, b) else before(a, b)
        try:
            yield
        finally:
            self.delay = before

    def _asker(self, me: str) -> Callable[[str, Request, float], asyncio.Future[Answer]]:
        async def ask(peer: str, request: Request, timeout: float) -> Answer:
            body = encode(request)
            self.messages += 1
            self.bytes += len(body)
            try:
                async with asyncio.timeout(timeout):
                    await self._travel(me, peer)
                    if peer not in self.seats:
                        raise SwarmError("connection refused")
                    answering = asyncio.ensure_future(self._answer(peer, me, body))
                    try:
                        answer = await answering
                    finally:
                        answering.cancel()
                    await self._travel(peer, me)
            except TimeoutError:
                raise SwarmError(f"no answer within {timeout:g} s") from None
            self.messages += 1
            self.bytes += len(answer)
            return read_answer(answer)

        return ask  # type: ignore[return-value]

    async def _answer(self, peer: str, asker: str, body: bytes) -> bytes:
        seat = self.seats[peer]
        try:
            return encode(await seat.member.answer(asker, read_request(body)))
        except AgentError as error:
            raise SwarmError(f"it refuses: {error}") from None

    async def _travel(self, a: str, b: str) -> None:
        delay = self.delay(a, b)
        if delay is None:
            await asyncio.Event().wait()
        assert delay is not None
        await asyncio.sleep(delay)

    # --- waiting

    async def until(self, condition: Callable[[], bool], limit: float, what: str) -> float:
        """Seconds until it is so; fails after `limit`."""
        began = now()
        while not condition():
            assert now() - began < limit, f"waited {limit:g} s in vain: {what}"
            await asyncio.sleep(LATENCY_S)
        return now() - began

    async def begun(self) -> None:
        """All have had their first round together."""
        await self.until(lambda: all(self.reached(1, seat) for seat in self.seats.values()), 60, "the start")

    def reached(self, number: int, seat: Seat) -> bool:
        phase = seat.member._phase
        return isinstance(phase, Rounds) and phase.standing.round >= number


def failed(room: Room) -> list[Seat]:
    return [seat for seat in room.seats.values() if seat.failures]
