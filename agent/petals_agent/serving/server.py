"""The span that is served: which blocks, with which engine, limits and cache; what all RPC handlers share.

While a span moves, the blocks of both are here: those that leave are answered for until `leave` refuses them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from petals_agent.engine.engine import Engine
from petals_agent.errors import LimitExceeded, Refused, RequestError
from petals_agent.p2p.budget import ByteBudget
from petals_agent.serving.admission import CacheLedger
from petals_agent.serving.limits import Limits
from petals_agent.serving.wire import NONE
from petals_agent.swarm.uids import block_uid, parse_chain

if TYPE_CHECKING:
    from petals_agent.p2p.attachment import Attachment
    from petals_agent.serving.push import PushTable


@dataclass(eq=False)
class BlockServer:
    """Blocks [start, end) of the model `prefix`, and for a while those that a move has left behind."""

    engine: Engine
    prefix: str
    start: int
    end: int
    ledger: CacheLedger
    pushes: PushTable
    limits: Limits = field(default_factory=Limits)
    compression: int = NONE
    version: str = ""
    client_mode: bool = False
    attachment: Attachment | None = None
    sessions: int = 0
    requests: int = 0  # answered, all kinds
    in_flight: int = 0  # steps and calls that are being worked on
    calls: int = 0  # forwards and backwards among them
    closed: bool = False  # to new sessions and calls
    budget: ByteBudget = field(init=False)  # for requests that wait
    _open: dict[object, tuple[int, int]] = field(default_factory=dict)  # sessions and calls, and their blocks
    _draining: bool = False
    _left: bool = False  # blocks outside of [start, end) are refused
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.budget = ByteBudget(self.limits.waiting_bytes(self.engine.backend.hidden_size, self.blocks))

    @property
    def blocks(self) -> int:
        return self.end - self.start

    @property
    def message_bytes(self) -> int:
        """Largest single message on a stream."""
        return self.limits.message_bytes(self.engine.backend.hidden_size, len(self.engine.backend.layers))

    def chain(self, uid: str) -> tuple[int, int]:
        """The blocks [first, end) that a chain of uids names.

        Raises RequestError when a block is not served here or they are not adjacent and ascending.
        """
        here = self.engine.backend.layers
        blocks = parse_chain(uid, self.prefix, len(here))
        for block in blocks:
            if block not in here or (self._left and not self.start <= block < self.end):
                raise RequestError(
                    f"Remote peer does not serve {block_uid(self.prefix, block)}; it serves blocks {self.start}:{self.end}"
                )
        first, last = blocks[0], blocks[-1]
        if blocks != tuple(range(first, last + 1)):
            raise RequestError(
                f"the chain {list(blocks)[:8]}… jumps; send adjacent blocks in ascending order"
            )
        return first, last + 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around each step and call: counted, so that a drain can wait; refused while draining."""
        if self._draining:
            raise Refused("this server is leaving: open a new session at another one")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.requests += 1
            if self.in_flight == 0:
                self._idle.set()

    @contextmanager
    def using(self, who: object, blocks: tuple[int, int]) -> Iterator[None]:
        """Around each session and call: blocks that are in use are not taken away."""
        self._open[who] = blocks
        try:
            yield
        finally:
            del self._open[who]
            self._ended.set()

    def offer(self, start: int, end: int, cache_units: int) -> None:
        """From now on our span is [start, end); other blocks that are here are still answered for."""
        self.start, self.end, self._left = start, end, False
        self.ledger.resize(cache_units)
        self.budget.limit = self.limits.waiting_bytes(self.engine.backend.hidden_size, self.blocks)

    async def leave(self, timeout: float) -> list[object]:
        """Refuse new sessions and calls on blocks outside of our span, and wait for the end of those that are open.

        Returns who still uses such blocks after `timeout` seconds.
        """
        self._left = True
        try:
            async with asyncio.timeout(timeout):
                while self._staying():
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            pass
        return self._staying()

    def _staying(self) -> list[object]:
        return [who for who, (a, b) in self._open.items() if a < self.start or b > self.end]

    def check_open(self) -> None:
        """Raise Refused to whoever is new while our doors are closed."""
        if self.closed:
            raise Refused("this server is leaving: open a new session at another one")

    @contextmanager
    def calling(self) -> Iterator[None]:
        """`working` around a forward or backward, of which only so many may wait."""
        self.check_open()
        if self.calls >= self.limits.max_waiting_requests:
            raise LimitExceeded(
                f"{self.calls} forwards and backwards wait, which is the limit here; try again"
            )
        self.calls += 1
        try:
            with self.working():
                yield
        finally:
            self.calls -= 1

    async def drain(self, timeout: float | None) -> int:
        """Refuse what is new and wait for what is in flight; returns how many are still unanswered after `timeout` s."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                while self.in_flight:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            pass
        return self.in_flight


def check_adapter(name: str | None) -> None:
    """Adapters are not loaded by this version; say so rather than compute without."""
    if name:
        raise RequestError(f"adapter {name!r} not found: this server has loaded no adapters")
