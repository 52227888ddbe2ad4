"""Pings: smoothing by the protocol's rule, and three kinds of real peers."""

from __future__ import annotations

import math
import random
from contextlib import AsyncExitStack

from petals_agent.swarm.guard import RecordGuard
from petals_agent.swarm.pings import LIFETIME, PingBook, ping, ping_all, ping_targets

from .strategies import peer_id
from .test_view import A, B, C, info, view


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_smoothing() -> None:
    book = PingBook(Clock())
    book.record("a", 1.0)
    assert book.get("a") == 1.0
    book.record("a", 2.0)
    assert book.get("a") == 0.2 * 2.0 + 0.8 * 1.0
    book.record("a", math.inf)
    assert book.get("a") == math.inf
    book.record("a", 3.0)  # after a failure the next sample counts alone
    assert book.get("a") == 3.0
    assert book.get("b") is None and book.as_dict() == {"a": 3.0}


def test_old_pings_are_forgotten() -> None:
    clock = Clock()
    book = PingBook(clock)
    book.record("a", 1.0)
    clock.now = LIFETIME - 1
    assert book.as_dict() == {"a": 1.0}
    clock.now = LIFETIME
    assert book.get("a") is None and book.as_dict() == {}
    book.record("a", 5.0)
    assert book.get("a") == 5.0


def test_targets_are_the_next_servers() -> None:
    me = peer_id(9)
    seen = view(
        (me, range(0, 4), info()),
        (A, range(0, 1), info()),
        (B, range(1, 3), info()),
        (C, range(4, 8), info()),
    )
    assert ping_targets(seen, me, 0, 4, random.Random(0)) == {B, C}  # A holds nothing that could follow
    assert ping_targets(seen, me, 4, 8, random.Random(0)) == {C}
    crowd = view(*((peer_id(i), range(0, 8), info()) for i in range(40)))
    assert 5 <= len(ping_targets(crowd, me, 0, 4, random.Random(0))) <= 10


async def test_real_peers(bootstrap: str) -> None:
    from hivemind.dht.node import DHTNode

    async with AsyncExitStack() as stack:

        async def start() -> DHTNode:
            node = await DHTNode.create(
                initial_peers=[bootstrap], client_mode=True, record_validator=RecordGuard()
            )
            stack.push_async_callback(node.shutdown)
            return node

        node, without_handlers = await start(), await start()
        dht_peer, client_peer = bootstrap.rsplit("/", 1)[1], str(without_handlers.peer_id)
        nobody = peer_id(1)
        book = PingBook()
        await ping_all(node, [dht_peer, client_peer, nobody], book, timeout=5.0)
        rtts = book.as_dict()
        assert 0 < rtts[dht_peer] < 5
        assert 0 < rtts[client_peer] < 5  # "protocol not supported" is an answer
        assert rtts[nobody] == math.inf
        assert await ping(node, "not a peer id", 1.0) == math.inf
