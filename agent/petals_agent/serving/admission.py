"""How much KV cache is promised to whom: reserved when a session opens, waited for in order of arrival.

Units are Petals' (protocol.md §9.6): keys or values of one token in one block, so a session takes
2 × rows × max_length × blocks.
"""

from __future__ import annotations

import asyncio
from collections import deque

from petals_agent.errors import CacheFull


class CacheLedger:
    """`capacity` units in all; `reserve` waits, `release` wakes the first waiters that fit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def left(self) -> int:
        return self.capacity - self.used

    async def reserve(self, units: int, timeout: float) -> None:
        """Take `units`, waiting at most `timeout` seconds behind those that came before.

        Raises CacheFull when more is asked than there is in all, or when it did not become free in time.
        """
        if units > self.capacity:
            raise CacheFull(f"{units} cache units were asked for; this server has {self.capacity} in all")
        if not self._waiting and units <= self.left:
            self.used += units
            return
        if timeout <= 0:
            raise CacheFull(
                f"{units} cache units were asked for and {self.left} are free; try again or send alloc_timeout"
            )
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (units, granted)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.release(units)  # granted in the very moment we gave up
            elif entry in self._waiting:  # else `_grant` has found it cancelled
                self._waiting.remove(entry)
                self._grant()  # a smaller request behind us may fit
            if isinstance(error, TimeoutError):
                raise CacheFull(f"{units} cache units did not become free within {timeout:g} s") from None
            raise

    def resize(self, capacity: int) -> None:
        """Another capacity; what is taken stays so."""
        self.capacity = capacity
        self._grant()

    def release(self, units: int) -> None:
        """Give back what `reserve` took."""
        self.used -= units
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.left:
            units, granted = self._waiting.popleft()
            if not granted.done():
                self.used += units
                granted.set_result(None)
