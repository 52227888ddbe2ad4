"""Looks at one server from outside while it is hurt: what is announced of it, and whether new sessions are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from harness.peer import Peer, chain
from harness.processes import wait_until

STATES = {None: "nothing", 0: "OFFLINE", 1: "JOINING", 2: "ONLINE"}
EVERY_S = 0.3  # a new session
PATIENCE_S = 3.0  # of whoever opens it
LOOK_S = 0.15
CALM = 5  # right answers in a row that end an outage


@dataclass(frozen=True)
class Attempt:
    """One new session: one step through all blocks. Unix seconds."""

    began: float
    ended: float
    right: bool
    wrong: bool = False  # it was answered, and the answer was another one


@dataclass
class Watch:
    """`with Watch(peer, peer_id, hidden, right) as watch:` opens a session each 0.3 s and reads the record meanwhile."""

    peer: Peer
    peer_id: str
    hidden: torch.Tensor
    right: torch.Tensor
    blocks: int = 8
    prefix: str = "tiny"
    attempts: list[Attempt] = field(default_factory=list)
    states: list[tuple[float, int | None]] = field(default_factory=list)  # changes

    def __enter__(self) -> Watch:
        self._over = asyncio.Event()
        self._runs = self.peer.begin(self._run(), timeout=3600)
        wait_until(lambda: self.states and self.attempts, 30, "a first look")
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.run(self._end())
        self._runs.result(30)

    async def _end(self) -> None:
        self._over.set()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read())
            opened = set()
            while not self._over.is_set():
                task = group.create_task(self._attempt())
                opened.add(task)
                task.add_done_callback(opened.discard)
                await asyncio.sleep(EVERY_S)
            for task in (reading, *opened):
                task.cancel()

    async def _attempt(self) -> None:
        began = time.time()
        answer: torch.Tensor | None = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self.peer.stepping(self.peer_id, chain(0, self.blocks), self.hidden)
        except Exception:  # whatever it is, it is no answer
            pass
        right = answer is not None and bool(torch.allclose(answer, self.right, atol=1e-3))
        self.attempts.append(Attempt(began, time.time(), right, answer is not None and not right))

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    found = await self.peer.node.get(f"{self.prefix}.0", latest=True)
                entry = found.value.get(self.peer_id) if found is not None else None
                state = int(entry.value[0]) if entry is not None else None
                if not self.states or self.states[-1][1] != state:
                    self.states.append((time.time(), state))
            except Exception:  # the swarm itself may be away
                pass
            await asyncio.sleep(LOOK_S)

    # --- what it saw

    @property
    def state(self) -> int | None:
        """As announced now."""
        return self.states[-1][1]

    def calm_since(self, moment: float) -> bool:
        """Whether the last sessions, all opened after `moment`, got the right answer."""
        last = self.attempts[-CALM:]
        return len(last) == CALM and all(one.right and one.began > moment for one in last)

    def answered_since(self, moment: float) -> bool:
        """Whether any session that was opened after `moment` got the right answer."""
        return any(one.right and one.began > moment for one in self.attempts)

    def outage(self, since: float) -> float:
        """Seconds from the first session in vain to the first answer after the last one in vain; 0 if all were answered.

        Infinite while there was no such answer.
        """
        after = sorted((one for one in self.attempts if one.ended > since), key=lambda one: one.began)
        vain = [one for one in after if not one.right]
        if not vain:
            return 0.0
        back = [one.ended for one in after if one.right and one.began > vain[-1].began]
        return min(back) - vain[0].began if back else float("inf")

    def vain(self, since: float) -> tuple[int, int]:
        """Sessions without the right answer, and all of them."""
        after = [one for one in self.attempts if one.ended > since]
        return sum(not one.right for one in after), len(after)

    def not_online_after(self, since: float) -> float | None:
        """Seconds from `since` until the record did not say ONLINE any more; None if it always did."""
        return next((at - since for at, state in self.states if at > since and state != 2), None)

    def story(self, since: float) -> str:
        """What was announced, with seconds: "ONLINE, JOINING 1.2 s, ONLINE 4.0 s"."""
        before = [state for at, state in self.states if at <= since]
        parts = [STATES[before[-1]]] if before else []
        parts += [f"{STATES[state]} {at - since:.1f} s" for at, state in self.states if at > since]
        return ", ".join(parts)

    def until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        """Wait for it; a failure tells what was seen."""
        try:
            wait_until(condition, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; announced: {self.story(0)}; last: {self.attempts[-5:]}") from None
