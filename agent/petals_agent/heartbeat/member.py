"""One member of a fleet: it gathers with the others, beats with them, says when that is over, and gathers anew."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from petals_agent.errors import AgentError, Refused
from petals_agent.heartbeat.fleet import Ask, Roll
from petals_agent.heartbeat.gathering import Gathering, Session, UnequalStart
from petals_agent.heartbeat.messages import MAX_REASON, Alarm, Answer, Request
from petals_agent.heartbeat.rounds import Rounds
from petals_agent.heartbeat.rules import Timing

log = logging.getLogger("petals_agent.heartbeat")

_ALARM_S = 2.0
_PAUSE_S = 1.0  # before a new start, so that those who still run have heard the alarm


@dataclass(frozen=True)
class Told:
    """What a member tells its owner: it beats with these members now, or it is over for this reason."""

    members: tuple[str, ...] = ()
    failure: str | None = None


class Member:
    """`run()` as a task, `answer()` for what comes; `tell` may raise, which ends `run`."""

    def __init__(
        self, me: str, roll: Roll, timing: Timing, ask: Ask, tell: Callable[[Told], None] = lambda told: None
    ) -> None:
        self._me, self._roll, self._timing, self._ask, self._tell = me, roll, timing, ask, tell
        self._phase: Gathering | Rounds | None = None
        self.failure: str | None = None  # the last fatal one, until a round succeeds after it
        self._time = asyncio.get_running_loop().time
        self._succeeded: float | None = None  # when a round did last, in this session or before

    async def run(self) -> NoReturn:
        """Until cancelled, or until `tell` raises."""
        known = asyncio.create_task(self._roll.keep_known(self._me), name="heartbeat: record")
        try:
            while True:
                try:
                    await self._live()
                except UnequalStart as error:
                    self._fail(f"unequal tokens at the start: {error}")
                await asyncio.sleep(_PAUSE_S * random.uniform(0.5, 1.0))
        finally:
            known.cancel()
            await asyncio.gather(known, return_exceptions=True)

    async def _live(self) -> None:
        """From one start to the end of its session."""
        self._phase = gathering = Gathering(self._me, self._roll, self._timing, self._ask)
        session = await gathering.run()
        beating = False

        def well() -> None:
            nonlocal beating
            self.failure = None
            self._succeeded = self._time()
            if not beating:
                beating = True
                self._tell(Told(members=session.fleet.members))

        self._phase = rounds = Rounds(self._roll.name, session, self._timing, self._ask, well)
        reason = await rounds.run()
        try:
            self._fail(reason)
        finally:  # our owner may end us for it
            await self._alarm(session, reason, rounds.accused)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._tell(Told(failure=reason))

    async def _alarm(self, session: Session, reason: str, accused: bool) -> None:
        """Fatal for one is fatal for all: a witness tells everybody, others tell the witnesses."""
        witnesses = session.fleet.witnesses
        if self._me in witnesses:
            others = session.fleet.members
        else:
            others = () if accused else witnesses
        alarm = Alarm(life=session.lives[self._me], reason=reason[:MAX_REASON])

        async def send(peer: str) -> None:
            try:
                await self._ask(peer, alarm, _ALARM_S)
            except AgentError as error:
                log.debug("…%s does not hear the alarm: %s", peer[-6:], error)

        await asyncio.gather(*(send(peer) for peer in others if peer != self._me))

    def admits(self, peer_id: str) -> bool:
        """Whether this peer may be a member of the fleet."""
        return self._roll.admits(peer_id)

    async def answer(self, peer_id: str, request: Request) -> Answer:
        """What libp2p says comes from `peer_id`. Raises Refused for whom or what we do not answer."""
        if not self.admits(peer_id):
            raise Refused(f"you are not among the members of this fleet ({self._roll.name})")
        if self._phase is None:
            raise Refused("this member is not there yet; ask again")
        return await self._phase.answer(peer_id, request)

    @property
    def problem(self) -> str | None:
        """Why it is not as well as it could be; None while all beat."""
        phase = self._phase
        if isinstance(phase, Rounds):
            if phase.standing.failures:
                return f"{phase.standing.failures} rounds in a row failed: {phase.why}"
            return self.failure
        problem = "not started" if phase is None else phase.problem
        return problem if self.failure is None else f"{self.failure}; {problem}"

    def to_dict(self) -> dict[str, Any]:
        """For `status`, as plain values; times in seconds. Names are stable. From any thread."""
        phase = self._phase
        rounds = phase if isinstance(phase, Rounds) else None
        succeeded = self._succeeded
        return {
            "state": "gathering" if rounds is None else "running",
            "fleet": self._roll.name,
            "peer_id": self._me,
            "members": list(rounds.session.fleet.members) if rounds is not None else [],
            "witnesses": list(rounds.session.fleet.witnesses) if rounds is not None else [],
            "round": rounds.standing.round if rounds is not None else None,
            "failures": rounds.standing.failures if rounds is not None else 0,
            "missing": rounds.missing if rounds is not None else [],
            "success_ago": self._time() - succeeded if succeeded is not None else None,
            "failure": self.failure,
            "problem": self.problem,
            "period": self._timing.period,
            "timeout": self._timing.timeout,
        }
