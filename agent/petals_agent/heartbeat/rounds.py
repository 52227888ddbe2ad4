"""The rounds of one session: every member tells all witnesses of itself, and a witness answers once it has heard of all.

So a round is over for everybody at the same time, whatever their clocks say: the answers that end it are sent in one go. Whom
a witness has not heard of by then it learns from those who ask again, so one slow link changes nobody's view.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

from petals_agent.errors import AgentError, Refused, SwarmError
from petals_agent.heartbeat.fleet import Ask
from petals_agent.heartbeat.gathering import Session
from petals_agent.heartbeat.messages import (
    Alarm,
    Answer,
    Beat,
    Heard,
    Join,
    Known,
    Request,
    Unequal,
    Who,
    packed,
    unpacked,
)
from petals_agent.heartbeat.rules import Ledger, Standing, Timing, now, shown

log = logging.getLogger("petals_agent.heartbeat")

_FIRST_PAUSE_S = 0.05
_MAX_PAUSE_S = 1.0


class Rounds:
    """`run()` until it is over; `answer()` what others are told meanwhile."""

    def __init__(
        self, name: str, session: Session, timing: Timing, ask: Ask, on_success: Callable[[], None]
    ) -> None:
        """`name` of the fleet, as its members compare it."""
        self._name, self.session, self._timing, self._ask = name, session, timing, ask
        self._on_success = on_success
        self._me = session.me
        self._ledger = Ledger(session.fleet)
        self.standing = Standing()
        self.missing: list[str] = []  # in the last round, if it failed
        self.why = ""  # it failed
        self.accused = False  # somebody else raised the alarm
        self._busy = False  # a round is in progress; else the next one is waited for
        self._due = now()  # when it starts, by our own clock
        self._ahead: dict[int, float] = {}  # round → when it starts, as witnesses told in this round
        self._called = asyncio.Event()  # a member has started the next round
        self._complete: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._over = asyncio.Event()
        self._telling: set[asyncio.Task[None]] = set()
        self._doubted: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> str:
        """Until a fatal failure; returns what it was."""
        beat = asyncio.create_task(self._beat(), name="heartbeat: rounds")
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait((beat, over), return_when=asyncio.FIRST_COMPLETED)
            if beat.done():
                beat.result()
            assert self.standing.fatal is not None
            return self.standing.fatal
        finally:
            tasks = [beat, over, *self._telling, *self._doubted.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _beat(self) -> NoReturn:
        while True:
            try:
                async with asyncio.timeout(max(self._due - now(), 0.0)):
                    await self._called.wait()
            except TimeoutError:
                pass
            await self._round(self.standing.round)

    async def _round(self, number: int) -> None:
        began = now()
        self._busy = True
        self._called.clear()
        self._ahead.clear()
        self._take(number, self.session.fleet.bit(self._me))
        witnesses = [peer for peer in self.session.fleet.witnesses if peer != self._me]
        deadline = now() + self._timing.timeout
        telling = [asyncio.create_task(self._tell(peer, number, deadline)) for peer in witnesses]
        for task in telling:  # they go on when we know all, until the witness does
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
        await self._until_told(number, telling, deadline)
        if self._ledger.complete(number):
            self._succeed(began)
        else:
            await self._fail(number)

    async def _until_told(self, number: int, telling: list[asyncio.Task[None]], deadline: float) -> None:
        """Until all members are known, or no witness says more about this round."""
        complete = asyncio.create_task(self._complete[number].wait())
        left: set[asyncio.Task[Any]] = set(telling)
        try:
            while left and not complete.done() and now() < deadline:
                done, _ = await asyncio.wait(
                    {complete, *left}, timeout=deadline - now(), return_when=asyncio.FIRST_COMPLETED
                )
                left -= done
                for task in done:
                    task.result()
        finally:
            complete.cancel()
            await asyncio.gather(complete, return_exceptions=True)

    def _succeed(self, began: float) -> None:
        before = self.standing
        self._go_on(before.succeeded())
        self.missing = []
        self._on_success()
        if before.failures:
            log.info("round %d succeeded after %d failures", before.round, before.failures)
        log.debug("round %d took %.3f s", before.round, now() - began)

    async def _fail(self, number: int) -> None:
        self.missing = list(self.session.fleet.without(self._ledger.known(number)))
        self.why = f"round {number} ended without {shown(self.missing)} after {self._timing.timeout:g} s"
        self._go_on(self.standing.failed(self.why))
        log.warning("failure %d in a row: %s", self.standing.failures, self.why)
        if self.standing.fatal is None:
            await self._look_where_others_are()

    def _go_on(self, standing: Standing) -> None:
        """What a round, or what others have done without us, makes of our standing."""
        self.standing = standing
        self._ledger.go_to(standing.round)
        for number in [number for number in self._complete if number < standing.round]:
            del self._complete[number]
        self._busy = False
        self._due = now() + self._timing.period
        if self._ledger.known(standing.round):
            self._called.set()  # while we were busy with the one before
        if standing.fatal is not None:
            self._over.set()

    async def _look_where_others_are(self) -> None:
        """After a failure: the others may have waited for us, and be at another round or at another time by now."""
        ahead = dict(self._ahead)

        async def look(peer: str) -> None:
            try:
                answer = await self._ask(peer, Who(fleet=self._name), min(self._timing.timeout / 2, 1.0))
            except AgentError:
                return
            if isinstance(answer, Known) and self._is_right(peer, answer.life, answer.token):
                ahead.setdefault(answer.round, now() + answer.next_in)

        peers = [peer for peer in self.session.fleet.witnesses if peer != self._me]
        await asyncio.gather(*map(look, peers))
        if ahead and (last := max(ahead)) >= self.standing.round:
            self._skip_to(last)
            self._due = min(self._due, ahead[last])

    def _skip_to(self, number: int) -> None:
        """Others are at round `number`: those that they had without us have failed for us, too."""
        rounds = number - self.standing.round
        if rounds > 0:
            self.why = f"the others had {rounds} rounds without us"
            self._go_on(self.standing.failed(self.why, rounds))

    # --- telling the witnesses

    async def _tell(self, peer: str, number: int, deadline: float) -> None:
        """Until this witness knows all members of the round, or is at a later one."""
        pause = _FIRST_PAUSE_S
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    beat = Beat(
                        life=self.session.lives[self._me],
                        token=self.session.token,
                        round=number,
                        known=packed(self._known(number)),
                    )
                    asked = now()
                    try:
                        limit = 1.5 * self._timing.hold  # which leaves time for another try
                        if self._is_final(peer, number, await self._ask(peer, beat, limit)):
                            return
                    except AgentError as error:
                        log.debug("round %d: …%s: %s", number, peer[-6:], error)
                    if now() - asked < self._timing.hold / 2:  # it does not take part yet, or is not there
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, _MAX_PAUSE_S)
        except TimeoutError:
            pass

    def _known(self, number: int) -> int:
        """What can still be said of round `number`: we may have ended it while a witness has not."""
        return self._ledger.known(number) or self.session.fleet.bit(self._me)

    def _is_final(self, peer: str, number: int, answer: Answer) -> bool:
        if not isinstance(answer, Known) or not self._is_right(peer, answer.life, answer.token):
            raise SwarmError("it does not take part yet")
        known = unpacked(answer.known)
        self._take(number, known)
        if answer.round > number and known != self.session.fleet.everyone:
            self._ahead.setdefault(answer.round, now() + answer.next_in)
        return answer.round > number or known == self.session.fleet.everyone

    def _take(self, number: int, known: int) -> None:
        if self._ledger.add(number, known):
            self._complete[number].set()

    def _is_right(self, peer: str, life: bytes, token: int | None) -> bool:
        """Whether a member that answers us is in our session; it is over if it is not."""
        if life != self.session.lives[peer]:
            self._end(f"{shown([peer])} was started again and has no part in our token")
        elif token is not None and token != self.session.token:
            self._end(f"{shown([peer])} has token {token}, ours is {self.session.token}")
        else:
            return token is not None  # else it has not heard yet that all are there
        return False

    def _end(self, why: str) -> None:
        self.standing = self.standing.wrong(why)
        self._over.set()

    # --- answering

    async def answer(self, peer_id: str, request: Request) -> Answer:
        """Raises Refused for whom or what we do not answer."""
        lives = self.session.lives
        if isinstance(request, Who) and request.fleet == self._name:
            return self._here()
        if peer_id not in lives:
            raise Refused(f"{self._name} runs without you; it takes you in at its next start")
        if self.standing.fatal is not None and not isinstance(request, Alarm):
            raise Refused(f"{self._name} is about to start anew")
        match request:
            case Join(life=life):
                if life == lives[peer_id]:
                    return self.session.start
                self._doubt(peer_id)
                return Unequal(reason=f"{shown([self._me])} runs with a token that was agreed without you")
            case Beat():
                if (request.life, request.token) != (lives[peer_id], self.session.token):
                    self._doubt(peer_id)
                    return self._here()
                return await self._hear(peer_id, request)
            case Alarm(life=life, reason=reason):
                if life == lives[peer_id]:
                    self.accused = True
                    self._end(f"{shown([peer_id])} raised the alarm: {reason}")
                return Heard()
            case _:
                raise Refused(f"this is a member of another fleet ({self._name})")

    async def _hear(self, peer_id: str, beat: Beat) -> Answer:
        number = beat.round
        if not self._busy and number > self.standing.round:
            self._skip_to(number)  # they had rounds while we could not
        self._take(number, unpacked(beat.known) | self.session.fleet.bit(peer_id))
        if not self._busy and number == self.standing.round:
            self._called.set()
        soon = (self.standing.round, self.standing.round + 1)
        if number in soon and not self._ledger.complete(number):
            try:
                async with asyncio.timeout(self._timing.hold):
                    await self._complete[number].wait()
            except TimeoutError:
                pass
        return self._here(self._ledger.known(number))

    def _here(self, known: int = 0) -> Known:
        return Known(
            life=self.session.lives[self._me],
            token=self.session.token,
            round=self.standing.round,
            known=packed(known),
            next_in=0.0 if self._busy else max(self._due - now(), 0.0),
        )

    def _doubt(self, peer_id: str) -> None:
        """A request came from another life, or with another token: ask who it is now, for it may be late or come twice."""
        if peer_id not in self._doubted:
            task = asyncio.create_task(self._find_out(peer_id), name="heartbeat: doubt")
            self._doubted[peer_id] = task
            task.add_done_callback(lambda _: self._doubted.pop(peer_id, None))

    async def _find_out(self, peer_id: str) -> None:
        try:
            answer = await self._ask(peer_id, Who(fleet=self._name), self._timing.patience)
        except AgentError as error:
            log.debug("…%s does not say who it is: %s", peer_id[-6:], error)
            return
        if isinstance(answer, Known):
            self._is_right(peer_id, answer.life, answer.token)
