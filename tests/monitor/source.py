"""A site with a state that the test chooses, served by the monitor's own server on a port of loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from petals_agent.monitor.broadcast import Broadcast
from petals_agent.monitor.history import History, Point
from petals_agent.monitor.live import Live
from petals_agent.monitor.patience import Patience
from petals_agent.monitor.service import listen, make_server
from petals_agent.monitor.site import Site
from petals_agent.monitor.state import SwarmState
from petals_agent.monitor.web import Limits, create_app
from petals_agent.swarm.uids import check_peer_id

T = TypeVar("T")


class Past(History):
    """A history with the same points for each model."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = list(points)

    async def coverage(self, prefix: str, since: float) -> list[Point]:
        return [point for point in self._points if point.at >= since]


class Given:
    """What a collector offers, with the state that it was given."""

    def __init__(self, state: SwarmState, history: History | None = None) -> None:
        self.state = state
        self.history = history
        self.is_fresh = True
        self.dialled: list[str] = []
        self.answer: tuple[bool, str] | Exception = (True, "")
        self._states = Broadcast[SwarmState]()

    def give(self, state: SwarmState) -> None:
        self.state = state
        self._states.send(state)

    def fresh(self, now: float) -> bool:
        return self.is_fresh

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[SwarmState]]:
        with self._states.subscribe() as states:
            yield states

    async def check(self, peer_id: str) -> tuple[bool, str]:
        self.dialled.append(check_peer_id(peer_id))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Served:
    """`with served(state) as served:`; everything runs in a thread with a loop of its own."""

    def __init__(
        self, given: Given, live: Live | None, limits: Limits | None, patience: Mapping[str, float]
    ) -> None:
        self.given = given
        self._patience = patience
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listener = listen("127.0.0.1:0")
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.site: Site = self.run(self._start(live, limits))

    async def _start(self, live: Live | None, limits: Limits | None) -> Site:
        site = Site(self.given, live or Live())
        await site.start()
        self._server = make_server(create_app(site, limits=limits))
        self._tasks = [
            asyncio.ensure_future(self._server.serve([self._listener])),
            asyncio.ensure_future(site.run()),
            asyncio.ensure_future(self._impatient().run()),
        ]
        return site

    def _impatient(self) -> Patience:
        return Patience(self._server.server_state.connections, **self._patience)  # type: ignore[arg-type]

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of `coroutine` in the site's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    @property
    def connections(self) -> set[Any]:
        return self._server.server_state.connections

    def give(self, state: SwarmState) -> None:
        """A new state, as if the swarm had just been read."""
        self._loop.call_soon_threadsafe(self.given.give, state)

    def close(self) -> None:
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._listener.close()

    async def _close(self) -> None:
        self.site.live.close()
        self._server.should_exit = True
        serving, *others = self._tasks
        await serving
        for task in others:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@contextmanager
def served(
    state: SwarmState,
    history: History | None = None,
    live: Live | None = None,
    limits: Limits | None = None,
    **patience: float,
) -> Iterator[Served]:
    """The monitor's pages and API with `state`, until the block ends; `patience`: other times than the usual ones."""
    one = Served(Given(state, history), live, limits, patience)
    try:
        yield one
    finally:
        one.close()
