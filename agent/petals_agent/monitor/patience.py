"""Ends connections of callers that are too slow: who does not finish a request, or does not read its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn, Protocol

REQUEST_S = 10.0  # to send a request, or the next one on the same connection
ANSWER_S = 20.0  # to read anything at all of an answer
WHOLE_S = 300.0  # to read a whole answer
_LOOK_S = 1.0


class Cycle(Protocol):
    response_complete: bool


class Connection(Protocol):
    """What is used of uvicorn's protocol objects."""

    transport: asyncio.Transport
    cycle: Cycle | None


@dataclass(frozen=True)
class _Unread:
    """An answer of which `left` bytes wait to be read; `standing` seconds without progress, of `seconds` in all."""

    left: int
    standing: float
    seconds: float

    def after(self, left: int, passed: float) -> _Unread:
        return _Unread(left, self.standing + passed if left >= self.left else 0.0, self.seconds + passed)


@dataclass(frozen=True)
class _Idle:
    """Nothing asked for `seconds` since `last`: who asks anew begins anew, however short its request was."""

    last: Cycle | None
    seconds: float

    def after(self, cycle: Cycle | None, passed: float) -> _Idle:
        return _Idle(cycle, self.seconds + passed if cycle is self.last else 0.0)


class Patience:
    """`run()` as a task beside the server; time is measured in looks, so a busy loop ends nobody early."""

    def __init__(
        self, connections: Iterable[Connection], request: float = REQUEST_S, answer: float = ANSWER_S
    ) -> None:
        """`connections` is looked at again and again: the server's own, living set."""
        self._connections = connections
        self._request, self._answer = request, answer
        self._idle: dict[Connection, _Idle] = {}
        self._unread: dict[Connection, _Unread] = {}

    async def run(self) -> NoReturn:
        while True:
            await asyncio.sleep(_LOOK_S)
            for connection in self.look(_LOOK_S):
                connection.transport.abort()

    def look(self, passed: float) -> list[Connection]:
        """Those whose time is up, `passed` seconds after the last look."""
        idle: dict[Connection, _Idle] = {}
        unread: dict[Connection, _Unread] = {}
        for one in list(self._connections):
            left = one.transport.get_write_buffer_size()
            if left:
                unread[one] = self._unread.get(one, _Unread(left, 0.0, 0.0)).after(left, passed)
            elif one.cycle is None or one.cycle.response_complete:
                idle[one] = self._idle.get(one, _Idle(one.cycle, 0.0)).after(one.cycle, passed)
        self._idle, self._unread = idle, unread
        slow = [one for one, it in idle.items() if it.seconds > self._request]
        return slow + [
            one for one, it in unread.items() if it.standing > self._answer or it.seconds > WHOLE_S
        ]
