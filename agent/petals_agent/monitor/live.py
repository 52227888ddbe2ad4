"""Tells browsers that there is something new (server-sent events): a few bytes, never the state itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from petals_agent.errors import LimitExceeded
from petals_agent.monitor.callers import counted_as

HEARTBEAT_S = 15.0  # a comment so often, so that proxies do not take the line for dead
RETRY_MS = 3000


class Live:
    """`tell` what is new; each `listen` yields the newest, and skips what it was too slow for."""

    def __init__(self, max_listeners: int = 500, each: int = 250, heartbeat: float = HEARTBEAT_S) -> None:
        """At most so many listeners, `each` caller's among them."""
        self.max_listeners = max_listeners
        self._each = each
        self._by_caller = Counter[str]()
        self._heartbeat = heartbeat
        self._changed = asyncio.Event()  # replaced at each change
        self._serial = ""
        self._news: Mapping[str, object] = {}
        self._closed = False
        self.listeners = 0

    def tell(self, serial: str, news: Mapping[str, object]) -> None:
        """`serial` names what is new: who comes back with it as Last-Event-ID has missed nothing."""
        if serial != self._serial:
            self._serial, self._news = serial, news
            self._wake()

    def close(self) -> None:
        """End all streams, and those that come."""
        self._closed = True
        self._wake()

    def listen(self, seen: str = "", caller: str = "") -> AsyncIterator[bytes]:
        """A stream of events after the one called `seen`. Raises LimitExceeded when too many listen."""
        if refused := self._refused(caller):
            raise LimitExceeded(refused)
        return self._stream(seen, caller)

    def _refused(self, caller: str) -> str:
        if self._by_caller[counted_as(caller)] >= self._each:
            return f"{self._each} listeners at your address are all that are served; try again later"
        if self.listeners >= self.max_listeners:
            return f"{self.max_listeners} listeners are all that are served; try again later"
        return ""

    async def _stream(self, seen: str, caller: str) -> AsyncIterator[bytes]:
        if self._refused(caller):  # many were let in before the first of them began
            return
        name = counted_as(caller)
        self.listeners += 1
        self._by_caller[name] += 1
        try:
            yield b"retry: %d\n\n" % RETRY_MS
            while not self._closed:
                changed = self._changed
                if seen != self._serial:
                    seen = self._serial
                    text = json.dumps({**self._news, "now": time.time()})
                    yield f"event: state\nid: {seen}\ndata: {text}\n\n".encode()
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._heartbeat):
                        await changed.wait()
                    continue
                yield b": still here\n\n"
        finally:
            self.listeners -= 1
            self._by_caller[name] -= 1
            self._by_caller += Counter()  # without those at zero

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
