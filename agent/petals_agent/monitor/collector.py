"""Keeps one `SwarmState` fresh: reads the DHT, dials servers, asks history, and tells whoever listens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NoReturn

from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.errors import SwarmError  # noqa: E402
from petals_agent.monitor.broadcast import Broadcast  # noqa: E402
from petals_agent.monitor.checking import Checker  # noqa: E402
from petals_agent.monitor.decoding import read_records_only  # noqa: E402
from petals_agent.monitor.dialling import DIAL_S, Dialler, dial_entries  # noqa: E402
from petals_agent.monitor.history import History  # noqa: E402
from petals_agent.monitor.reading import read_swarm  # noqa: E402
from petals_agent.monitor.report import report  # noqa: E402
from petals_agent.monitor.state import Entry, SwarmState  # noqa: E402
from petals_agent.p2p import control  # noqa: E402
from petals_agent.p2p.daemon import for_calls  # noqa: E402
from petals_agent.supervisor.network import Connection, Network  # noqa: E402
from petals_agent.supervisor.states import Life  # noqa: E402
from petals_agent.supervisor.tasks import first  # noqa: E402

log = logging.getLogger("petals_agent.monitor")

NOT_READ = "not read yet"
JOINING = "still joining the swarm"
READ_S = 120.0  # for one refresh, beyond the sum of what its parts may take
RETRY_S = 5.0  # after a refresh that failed
_ANSWER_S = 5.0
_STEP_S = 3.0  # by which hivemind lets clocks differ, when it joins
_LATE_S = 60.0


class Collector:
    """`run()` as a task; `state` is always the newest, whose `taken_at` is 0 before the first reading."""

    def __init__(
        self,
        peers: Sequence[str],
        socket_dir: Path,
        *,
        prefixes: Sequence[str] = (),
        period: float = 30.0,
        history: History | None = None,
        allow_private: bool = False,
        startup_timeout: float = 60.0,
    ) -> None:
        """`peers` are the swarm's entry peers, `prefixes` models to watch that need not be in the registry.

        `period` s between readings; `allow_private`: `check` may dial addresses of a private network.
        """
        self.state = SwarmState(taken_at=0.0, duration_s=0.0, update_period_s=period, problem=NOT_READ)
        self.history = history
        self._peers = tuple(peers)
        self._prefixes = tuple(dict.fromkeys(prefixes))
        self._period = period
        options = for_calls(socket_dir, self._peers, startup_timeout=startup_timeout)
        self._network = Network(options, Life())
        self._dialler = Dialler()
        self._dialled_by: Connection | None = None
        self._clocks = _clocks()
        self._checker = Checker(socket_dir, allow_private)
        self._states = Broadcast[SwarmState]()

    async def run(self) -> NoReturn:
        """Refresh until cancelled; whatever fails on the way is in `state.problem`."""
        await first(self._network.run(), self._refresh())

    async def stop(self) -> None:
        """End our p2pd; after `run` was cancelled."""
        await self._checker.stop()
        await self._network.stop()

    def fresh(self, now: float) -> bool:
        """Whether the swarm was read lately; `now` is Unix time. For /healthz and the watchdog."""
        return abs(now - self.state.taken_at) <= 2 * self._period + _LATE_S  # abs: clocks are set back too

    def subscribe(self) -> AbstractContextManager[AsyncIterator[SwarmState]]:
        """`with collector.subscribe() as states: async for state in states:`: each new state; who is slow gets the newest only."""
        return self._states.subscribe()

    async def check(self, peer_id: str) -> tuple[bool, str]:
        """Whether a peer can be dialled now, and why not; takes at most 9 s.

        Raises ValueError for what is no peer id, LimitExceeded when too many checks run already, SwarmError when we are
        not in the swarm ourselves.
        """
        connection = self._network.connection
        if connection is None:
            raise SwarmError("the monitor has no connection to the swarm itself; ask again in a minute")
        return await self._checker.check(connection.daemon.maddr, peer_id)

    async def _refresh(self) -> NoReturn:
        task = asyncio.current_task()
        while True:
            if (
                task is not None and task.cancelling()
            ):  # swallowed on the way, as asyncio.wait_for does at times
                raise asyncio.CancelledError
            began = time.monotonic()
            try:
                async with asyncio.timeout(READ_S):
                    state = await self._read()
            except SwarmError as error:
                self._tell(str(error))
            except TimeoutError:
                self._tell(f"the swarm could not be read within {READ_S:g} s")
            except Exception as error:  # hivemind's own, e.g. when p2pd ends under its hands
                log.debug("a refresh failed", exc_info=True)
                self._tell(f"the swarm could not be read: {error or type(error).__name__}")
            else:
                self._publish(state)
                if self.history is not None:
                    await self.history.record(state)
                await asyncio.sleep(max(began + self._period - time.monotonic(), 0.0))
                continue
            await asyncio.sleep(min(RETRY_S, self._period))

    async def _read(self) -> SwarmState:
        """One refresh. Raises SwarmError when there is nothing that could be called a reading, and what hivemind raises."""
        connection = await self._connected()
        await self._check_footing(connection)
        if connection is not self._dialled_by:  # what failed when p2pd ended says nothing of servers
            self._dialler, self._dialled_by = Dialler(), connection
        began, taken_at = time.monotonic(), time.time()
        node = connection.node
        reader = read_records_only(node)
        reading = await read_swarm(node, self._prefixes, self.state)
        await self._check_footing(connection)
        (unreachable, late), entries = await asyncio.gather(
            self._dialler.dial(node.protocol.p2p, reading.claiming, DIAL_S),
            dial_entries(connection.daemon.maddr, self._peers),
        )
        await self._check_footing(connection)
        presence = await self.history.presence(reading.peers) if self.history is not None else {}
        problems = [
            reading.problem,
            "the DHT holds more records than are read" if reader.dropped else "",
            f"{late} servers were not dialled in time" if late else "",
        ]
        return await asyncio.to_thread(
            report,
            reading.models,
            taken_at=taken_at,
            duration_s=time.monotonic() - began,
            period_s=self._period,
            unreachable=unreachable,
            presence=presence,
            entries=entries,
            previous=self.state,
            problem="; ".join(filter(None, problems)),
        )

    async def _connected(self) -> Connection:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._network.connected()
        except TimeoutError:
            raise SwarmError(self._network.problem or JOINING) from None

    async def _check_footing(self, connection: Connection) -> None:
        """Raise SwarmError if what is read may be our own failure: p2pd is gone or hangs, nobody answers us, the clock was set.

        Then p2pd is replaced, which joins the swarm anew.
        """
        if connection.lost.is_set():
            raise SwarmError("p2pd has ended, and is started again")
        problem = ""
        step, self._clocks = _clocks() - self._clocks, _clocks()
        try:
            await control.identify(connection.daemon.maddr, _ANSWER_S)
        except SwarmError as error:
            problem = str(error)
        if not connection.node.protocol.routing_table.peer_id_to_uid:
            problem = "no peer of the DHT answers any more"
        if abs(step) > _STEP_S:  # with a wrong clock all records seem to have expired; who joins compares it
            problem = (
                f"the clock of this host was set by {step:+.0f} s, or it slept; the swarm is joined anew"
            )
        if problem:
            self._tell(problem)
            with suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_S):  # it goes on without us
                    await self._network.restart(problem)
            raise SwarmError(problem)

    def _publish(self, state: SwarmState) -> None:
        self.state = state
        self._states.send(state)

    def _tell(self, problem: str) -> None:
        """The state stays as old as it is, and says why."""
        if self._network.connection is None:
            entries = tuple(Entry(address=peer, reachable=False, reason=problem) for peer in self._peers)
        else:
            entries = self.state.entries
        if (problem, entries) != (self.state.problem, self.state.entries):
            log.warning("the monitor shows an old state: %s", problem)
            self._publish(self.state.model_copy(update={"problem": problem, "entries": entries}))


def _clocks() -> float:
    """By how much the clock is before one that nobody sets, in seconds."""
    return time.time() - time.monotonic()
