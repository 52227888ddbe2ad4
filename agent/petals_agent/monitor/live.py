"""Tells browsers that there is something new (server-sent events): a few bytes, never the state itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from petals_agent.errors import LimitExceeded

HEARTBEAT_S = 15.0  # a comment so often, so that proxies do not take the line for dead
RETRY_MS = 3000


class Live:
    """`tell` what is new; each `listen` yields the newest, and skips what it was too slow for."""

    def __init__(self, max_listeners: int = 500, heartbeat: float = HEARTBEAT_S) -> None:
        self.max_listeners = max_listeners
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

    def listen(self, seen: str = "") -> AsyncIterator[bytes]:
        """A stream of events after the one called `seen`. Raises LimitExceeded when too many listen."""
        if self.listeners >= self.max_listeners:
            raise LimitExceeded(f"{self.max_listeners} listeners are all that are served; try again later")
        return self._stream(seen)

    async def _stream(self, seen: str) -> AsyncIterator[bytes]:
        if self.listeners >= self.max_listeners:  # many were let in before the first of them began
            return
        self.listeners += 1
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

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
