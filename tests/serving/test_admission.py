"""The ledger of promised cache: never more than there is, first come first served, and nothing is lost when waiters give up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import clock
from harness.waiting import until
from petals_agent.errors import CacheFull
from petals_agent.serving.admission import CacheLedger
from serving.caller import P2PHandlerError
from serving.conftest import Swarm

CAPACITY = 10


class Client:
    """Reserves, holds for a while, releases; may be cancelled at any time."""

    def __init__(self, ledger: CacheLedger, units: int, timeout: float, hold: float) -> None:
        self.ledger, self.units, self.timeout, self.hold = ledger, units, timeout, hold
        self.arrived = self.granted = self.refused = -1.0
        self.error = ""
        self.task: asyncio.Task[None] = asyncio.create_task(self._live())

    async def _live(self) -> None:
        now = asyncio.get_running_loop().time
        self.arrived = now()
        try:
            await self.ledger.reserve(self.units, self.timeout)
        except CacheFull as error:
            self.refused, self.error = now(), str(error)
            return
        self.granted = now()
        try:
            await asyncio.sleep(self.hold)
        finally:
            self.ledger.release(self.units)


_TIME = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0, 5.0])
_ARRIVAL = st.tuples(_TIME, st.integers(0, CAPACITY + 2), _TIME, _TIME, st.none() | _TIME)


@settings(max_examples=400, deadline=None)
@given(st.lists(_ARRIVAL, max_size=15))
def test_any_traffic(arrivals: list[tuple[float, int, float, float, float | None]]) -> None:
    """Each arrival: pause before it, units, how long it waits at most, how long it holds, when it is cancelled."""
    ledger = CacheLedger(CAPACITY)
    clients: list[Client] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for pause, units, timeout, hold, cancelled in arrivals:
            await asyncio.sleep(pause)
            clients.append(Client(ledger, units, timeout, hold))
            if cancelled is not None:
                loop.call_later(cancelled, clients[-1].task.cancel)
            assert 0 <= ledger.used <= CAPACITY
        outcomes = await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
        for outcome in outcomes:
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)

    clock.run(main())
    assert ledger.used == 0 and ledger.left == CAPACITY and not ledger._waiting
    for client in clients:
        if client.refused >= 0:
            assert client.units > CAPACITY or client.refused - client.arrived == client.timeout
        if client.granted >= 0:
            assert client.units <= CAPACITY and client.granted - client.arrived <= client.timeout
    waited = [client for client in clients if client.granted > client.arrived]
    for client in waited:
        for later in clients[clients.index(client) + 1 :]:
            if 0 <= later.granted:
                assert later.granted >= client.granted, "overtaken"


def in_no_time(main: Callable[[CacheLedger], Awaitable[None]]) -> CacheLedger:
    ledger = CacheLedger(CAPACITY)

    async def call() -> None:
        await main(ledger)

    clock.run(call())
    return ledger


def test_refusals_name_what_there_is() -> None:
    async def main(ledger: CacheLedger) -> None:
        with pytest.raises(CacheFull, match="11 cache units were asked for; this server has 10 in all"):
            await ledger.reserve(11, 100)
        await ledger.reserve(8, 0)
        with pytest.raises(CacheFull, match="3 cache units were asked for and 2 are free"):
            await ledger.reserve(3, 0)
        with pytest.raises(CacheFull, match="3 cache units did not become free within 5 s"):
            await ledger.reserve(3, 5)

    assert in_no_time(main).used == 8


def test_a_waiter_gets_what_is_freed_in_time() -> None:
    async def main(ledger: CacheLedger) -> None:
        await ledger.reserve(8, 0)
        asyncio.get_running_loop().call_later(4, ledger.release, 8)
        await ledger.reserve(5, 5)

    assert in_no_time(main).used == 5


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    async def main(ledger: CacheLedger) -> None:
        await ledger.reserve(8, 0)
        large = asyncio.create_task(ledger.reserve(9, 10))
        await asyncio.sleep(0)
        with pytest.raises(CacheFull, match="2 are free"):
            await ledger.reserve(1, 0)
        small = asyncio.create_task(ledger.reserve(1, 10))
        await asyncio.sleep(1)
        ledger.release(8)
        await asyncio.gather(large, small)

    assert in_no_time(main).used == 10


@pytest.mark.parametrize("late", [False, True])
def test_whoever_stood_behind_one_that_gave_up_moves_on(late: bool) -> None:
    """It leaves just before, or in the very moment that it would have been served."""

    async def main(ledger: CacheLedger) -> None:
        await ledger.reserve(8, 0)
        leaves = asyncio.create_task(ledger.reserve(9, 10))
        stays = asyncio.create_task(ledger.reserve(2, 10))
        await asyncio.sleep(0)
        if late:
            ledger.release(8)
            leaves.cancel()
        else:
            leaves.cancel()
            ledger.release(8)
        with pytest.raises(asyncio.CancelledError):
            await leaves
        await stays

    assert in_no_time(main).used == 2


# --- over the wire


@pytest.mark.asyncio(loop_scope="module")
async def test_a_full_cache_refuses_at_once(swarm: Swarm) -> None:
    swarm.first.server.ledger = CacheLedger(2 * 50 * 4)
    one, two = (swarm.caller.session(swarm.first.peer_id, 0, 4) for _ in range(2))
    await one.step(torch.zeros(1, 1, 32), max_length=40)
    await two.send(two.step_request(torch.zeros(1, 1, 32), max_length=20))
    with pytest.raises(P2PHandlerError, match="160 cache units were asked for and 80 are free"):
        await two.receive()
    three = swarm.caller.session(swarm.first.peer_id, 0, 4)
    await three.send(three.step_request(torch.zeros(1, 1, 32), max_length=51, alloc_timeout=5.0))
    with pytest.raises(P2PHandlerError, match="408 cache units were asked for; this server has 400 in all"):
        await three.receive()
    await one.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_alloc_timeout_waits_for_space(swarm: Swarm) -> None:
    ledger = swarm.first.server.ledger = CacheLedger(2 * 50 * 4)
    one, two = (swarm.caller.session(swarm.first.peer_id, 0, 4) for _ in range(2))
    await one.step(torch.zeros(1, 1, 32), max_length=40)
    await two.send(two.step_request(torch.zeros(1, 1, 32), max_length=20, alloc_timeout=5.0))
    await until(lambda: ledger._waiting, 5, "the second waits")
    await one.close()
    assert (await two.receive()).shape == (1, 1, 32)
    await two.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_alloc_timeout_runs_out(swarm: Swarm) -> None:
    swarm.first.server.ledger = CacheLedger(2 * 50 * 4)
    one, two = (swarm.caller.session(swarm.first.peer_id, 0, 4) for _ in range(2))
    await one.step(torch.zeros(1, 1, 32), max_length=40)
    await two.send(two.step_request(torch.zeros(1, 1, 32), max_length=20, alloc_timeout=0.2))
    with pytest.raises(P2PHandlerError, match=r"160 cache units did not become free within 0\.2 s"):
        await two.receive()
    await one.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_waiter_that_vanishes_makes_room(swarm: Swarm) -> None:
    ledger = swarm.first.server.ledger = CacheLedger(2 * 50 * 4)
    one, two, three = (swarm.caller.session(swarm.first.peer_id, 0, 4) for _ in range(3))
    await one.step(torch.zeros(1, 1, 32), max_length=40)
    await two.send(two.step_request(torch.zeros(1, 1, 32), max_length=20, alloc_timeout=60))
    await until(lambda: len(ledger._waiting) == 1, 5, "the second waits")
    await three.send(three.step_request(torch.zeros(1, 1, 32), max_length=10, alloc_timeout=60))
    await until(lambda: len(ledger._waiting) == 2, 5, "the third waits")
    await two.vanish()
    assert (await three.receive()).shape == (1, 1, 32)
    await one.close()
    await three.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("value", ["5", -1, float("nan"), True, [1]])
async def test_alloc_timeout_that_cannot_be(swarm: Swarm, value: Any) -> None:
    one = swarm.caller.session(swarm.first.peer_id, 0, 4)
    await one.send(one.step_request(torch.zeros(1, 1, 32), max_length=20, alloc_timeout=value))
    with pytest.raises(P2PHandlerError, match="alloc_timeout must be a finite number"):
        await one.receive()
