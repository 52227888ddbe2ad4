"""How rpc_inference sessions end: by their client, by a limit, by time; and that nothing of them stays."""

from __future__ import annotations

import dataclasses

import pytest

from harness.waiting import until
from serving.caller import Caller, P2PHandlerError, Request, Session
from serving.conftest import Swarm
from serving.expect import WIDTH, closed_quietly, normal, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


def session(swarm: Swarm, start: int = 0, end: int = 4) -> Session:
    return swarm.caller.session(swarm.first.peer_id, start, end)


async def test_an_empty_request_ends_the_session(swarm: Swarm) -> None:
    one = session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=5)
    await one.send(Request())
    await until(lambda: swarm.first.idle, 1, "its cache is free")
    await closed_quietly(one)


async def test_the_end_of_the_clients_side_ends_the_session(swarm: Swarm) -> None:
    one = session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=5)
    await closed_quietly(one)


@pytest.mark.parametrize("busy", [False, True])
async def test_the_cache_of_a_client_that_vanishes_is_free_within_a_second(swarm: Swarm, busy: bool) -> None:
    ledger = swarm.first.server.ledger
    before = ledger.left
    one = session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=500)
    assert ledger.left < before
    if busy:
        await one.send(one.step_request(normal(1, 400, WIDTH)))
    await one.vanish()
    await until(lambda: ledger.left == before and swarm.first.idle, 1, "its cache is free")


async def test_a_client_whose_p2pd_dies(swarm: Swarm) -> None:
    ledger = swarm.first.server.ledger
    before = ledger.left
    doomed = await Caller.start(swarm.first.maddrs)
    one = doomed.session(swarm.first.peer_id, 0, 4)
    await one.step(normal(1, 1, WIDTH), max_length=500)
    assert ledger.left < before
    doomed.p2p._child.kill()
    await until(lambda: ledger.left == before and swarm.first.idle, 1, "its cache is free")
    await doomed.stop()


async def test_waiting_too_long_for_a_step_closes_quietly(swarm: Swarm) -> None:
    swarm.first.server.limits = dataclasses.replace(swarm.first.server.limits, step_timeout=0.2)
    one = session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=5)
    await until(lambda: swarm.first.idle, 5, "the session is over")
    await closed_quietly(one)


async def test_a_stream_that_says_nothing_closes_quietly(swarm: Swarm) -> None:
    swarm.first.server.limits = dataclasses.replace(swarm.first.server.limits, step_timeout=0.2)
    peer = swarm.caller.stub(swarm.first.peer_id)._peer
    _, reader, writer = await swarm.caller.p2p.call_binary_stream_handler(
        peer, "TransformerConnectionHandler.rpc_inference"
    )
    assert await reader.read() == b""
    writer.close()


async def test_a_session_that_lasts_too_long_is_told(swarm: Swarm) -> None:
    swarm.first.server.limits = dataclasses.replace(swarm.first.server.limits, session_timeout=0.2)
    one = session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=5)
    with pytest.raises(P2PHandlerError, match=r"longer than session_timeout \(0.2 s\)"):
        await one.receive(timeout=5)


async def test_more_sessions_than_the_limit(swarm: Swarm) -> None:
    swarm.first.server.limits = dataclasses.replace(swarm.first.server.limits, max_sessions=2)
    first, second, third = (session(swarm) for _ in range(3))
    await first.step(normal(1, 1, WIDTH), max_length=5)
    await second.step(normal(1, 1, WIDTH), max_length=5)
    await refused(
        third, third.step_request(normal(1, 1, WIDTH), max_length=5), "2 open sessions, which is its limit"
    )
    await first.close()
    await until(lambda: swarm.first.server.sessions == 1, 1, "its place is free")
    fourth = session(swarm)
    await fourth.step(normal(1, 1, WIDTH), max_length=5)
    await fourth.close()
    await second.close()


async def test_a_server_that_drains_finishes_what_runs_and_refuses_more(swarm: Swarm) -> None:
    server = swarm.first.server
    one = session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=5)
    assert await server.drain(1.0) == 0
    try:
        await refused(one, one.step_request(normal(1, 1, WIDTH)), "leaving")
    finally:
        server._draining = False
