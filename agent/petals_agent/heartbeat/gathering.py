"""The start: each member tells the first one that it is there, and gets the token when all are.

The first member takes only those whose question is open at that moment, so nobody who is gone by then is waited for later.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from petals_agent.errors import AgentError, Refused, SwarmError
from petals_agent.heartbeat.fleet import Ask, Roll
from petals_agent.heartbeat.messages import (
    Alarm,
    Answer,
    Elsewhere,
    Heard,
    Join,
    Known,
    Request,
    Start,
    Unequal,
    Wait,
    Who,
)
from petals_agent.heartbeat.rules import MAX_MEMBERS, Fleet, Timing, draw_life, draw_token, now, shown

log = logging.getLogger("petals_agent.heartbeat")

_FIRST_PAUSE_S = 0.1


@dataclass(frozen=True)
class Session:
    """What all members agreed on at the start; it ends with the first of them that fails."""

    me: str
    fleet: Fleet
    lives: Mapping[str, bytes]
    token: int

    @property
    def start(self) -> Start:
        """As the first member tells it."""
        return Start(token=self.token, lives=dict(self.lives))


class UnequalStart(Exception):
    """The others run already: we were started again, or too late."""


@dataclass(eq=False)
class _Guest:
    """A member whose question is open, until `answered`."""

    life: bytes
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Gathering:
    """One start of one member: `run()` gives the session, `answer()` what others are told meanwhile."""

    def __init__(self, me: str, roll: Roll, timing: Timing, ask: Ask) -> None:
        self._me, self._roll, self._timing, self._ask = me, roll, timing, ask
        self.life = draw_life()
        self.problem = "looking for the first member"
        self._leading = False
        self._guests: dict[str, _Guest] = {}
        self._met: dict[str, bytes] = {}  # in which life, to tell a newcomer from one who asks again
        self._newest = now()
        self._session: Session | None = None
        self._begun = asyncio.Event()

    async def run(self) -> Session:
        """Until all are there. Raises UnequalStart when the others run without us."""
        seek = asyncio.create_task(self._seek(), name="heartbeat: seek the first member")
        begun = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait((seek, begun), return_when=asyncio.FIRST_COMPLETED)
            if self._session is None:
                seek.result()
            assert self._session is not None
            return self._session
        finally:
            seek.cancel()
            begun.cancel()
            await asyncio.gather(seek, begun, return_exceptions=True)

    async def _seek(self) -> NoReturn:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                limit = min(self._timing.patience, self._timing.settle / 8)
                first, coming = await self._roll.look(self._me, self._ask, limit)
                self._leading = first == self._me
                if self._leading:
                    if coming - self._guests.keys():
                        self._newest = now()
                    await self._lead()
                else:
                    self._answer_all()  # that it is elsewhere
                    if await self._join(first):
                        pause = _FIRST_PAUSE_S
                        continue
            except AgentError as error:
                self.problem = str(error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._timing.patience)

    def _begin(self, session: Session) -> None:
        self._session = session
        self._begun.set()
        self._answer_all()

    # --- as the first member

    async def _lead(self) -> None:
        """Wait for the others, not so long that we would not look whether somebody is before us."""
        deadline = now() + min(self._timing.patience, self._timing.settle / 8)
        while now() < deadline:
            self._begin_if_all_are_here()
            self.problem = self._count(len(self._guests) + 1)
            await asyncio.sleep(min(self._timing.settle / 4, self._timing.patience))

    def _answer_all(self) -> None:
        for guest in self._guests.values():
            guest.answered.set()

    def _count(self, here: int) -> str:
        return f"{here} of {self._roll.size or 'an unknown number of'} members are here"

    def _begin_if_all_are_here(self) -> None:
        here = len(self._guests) + 1
        settled = now() - self._newest >= self._timing.settle
        if here < 2 or (here != self._roll.size if self._roll.size is not None else not settled):
            return
        lives = {peer: guest.life for peer, guest in self._guests.items()} | {self._me: self.life}
        self._begin(Session(self._me, Fleet(tuple(lives)), lives, draw_token()))

    async def _welcome(self, peer_id: str, join: Join) -> Answer:
        if join.fleet != self._roll.name:
            raise Refused(
                f"this is the first member of another fleet ({self._roll.name}), not of {join.fleet}"
            )
        if self._session is not None:
            known = self._session.lives.get(peer_id) == join.life
            return self._session.start if known else Elsewhere()
        if not self._leading:
            return Elsewhere()
        if peer_id not in self._guests and len(self._guests) + 1 >= (self._roll.size or MAX_MEMBERS):
            raise Refused(f"all {len(self._guests) + 1} places of {self._roll.name} are taken")
        if self._met.get(peer_id) != join.life:
            if len(self._met) >= 10 * MAX_MEMBERS:  # strangers who come and go
                self._met.clear()
            self._met[peer_id] = join.life
            self._newest = now()
        if (before := self._guests.get(peer_id)) is not None:
            before.answered.set()  # nobody has two questions open
        guest = self._guests[peer_id] = _Guest(join.life)
        try:
            self._begin_if_all_are_here()
            async with asyncio.timeout(self._timing.visit * random.uniform(0.5, 1.0)):  # not all at one time
                await guest.answered.wait()
        except TimeoutError:
            pass
        finally:
            here = len(self._guests) + 1
            if self._guests.get(peer_id) is guest:
                del self._guests[peer_id]
        return self._farewell(peer_id, here)

    def _farewell(self, peer_id: str, here: int) -> Answer:
        session = self._session
        if session is not None and peer_id in session.lives:
            return session.start
        return Wait(here=here) if self._leading else Elsewhere()

    # --- as any other

    async def _join(self, first: str) -> bool:
        """Whether it makes sense to ask again at once. Raises UnequalStart, or SwarmError when there is no answer."""
        limit = self._timing.visit + self._timing.patience
        answer = await self._ask(first, Join(fleet=self._roll.name, life=self.life), limit)
        match answer:
            case Start(token=token, lives=lives):
                if self._is_right(first, lives):
                    self._begin(Session(self._me, Fleet(tuple(lives)), lives, token))
                    return True
                raise SwarmError(
                    f"…{first[-6:]} started without us, or with others than those who may be members"
                )
            case Wait(here=here):
                self.problem = self._count(here)
                return True
            case Unequal(reason=reason):
                raise UnequalStart(reason)
            case _:
                self.problem = f"{shown([first])} is not the first member (any more)"
                return False

    def _is_right(self, first: str, lives: Mapping[str, bytes]) -> bool:
        """Whether these can be the members, ourselves among them as we are now: not in an earlier life."""
        if lives.get(self._me) != self.life or first not in lives or not all(map(self._roll.admits, lives)):
            return False
        return self._roll.size in (None, len(lives))

    async def answer(self, peer_id: str, request: Request) -> Answer:
        """Raises Refused for whom or what we do not answer."""
        match request:
            case Join():
                return await self._welcome(peer_id, request)
            case Who(fleet=fleet) if fleet != self._roll.name:
                raise Refused(f"this is a member of another fleet ({self._roll.name})")
            case Alarm():
                return Heard()  # of a session that we have left
            case _:
                token = self._session.token if self._session is not None else None
                return Known(life=self.life, token=token)
