"""What a snapshot believes: what cannot be true is dropped and counted, what is absurd is capped."""

from __future__ import annotations

import random

import pytest
from hypothesis import given

from petals_agent.balance.doubt import Memory
from petals_agent.balance.snapshot import FOLLOWER, RATE_CAP, Server, Snapshot
from petals_agent.balance.timing import random_wait
from petals_agent.swarm.records import ServerState

from .swarms import swarms
from .views import NOW, A, B, C, D, info, view


def test_from_a_view() -> None:
    seen = view(
        (A, range(0, 4), info(ServerState.JOINING, 2.0)),
        (B, range(4, 6), info(using_relay=True, version=f"{FOLLOWER} 1.0", rps=3.0)),
        (C, range(6, 8), info(ServerState.OFFLINE)),
        (D, range(2, 3), info(start_block=0, end_block=60_000)),
        unread=(7,),
    )
    snapshot = Snapshot.from_view(seen)
    assert {snapshot.server(row) for row in range(len(snapshot))} == {
        Server(A, 0, 4, 2.0, joining=True),
        Server(B, 4, 2, 3.0, relayed=True, follows=True),
    }
    assert (snapshot.left, snapshot.unread, snapshot.taken_at) == ({C}, 1, NOW)
    assert snapshot.dropped == 1, "a span beyond the model is a lie"
    assert snapshot.throughput.tolist() == [2, 2, 2, 2, 3, 3, 0, 0]


@pytest.mark.parametrize(
    "bad",
    [
        Server("x", -1, 3, 5.0),
        Server("x", 0, 9, 5.0),
        Server("x", 0, 10**9, 5.0),
        Server("x", 3, 0, 5.0),
        Server("x", 0, 3, 0.0),
        Server("x", 0, 3, -5.0),
        Server("x", 0, 3, float("nan")),
        Server("x", 0, 3, float("inf")),
        Server("x", 0, 3, 1e-9),
    ],
)
def test_what_cannot_be_true_is_dropped(bad: Server) -> None:
    snapshot = Snapshot.of(8, [Server("a", 0, 8, 5.0), bad, Server("y", 0, 4, 7.0)])
    assert snapshot.peers == ("a", "y") and snapshot.dropped == 1


def test_one_liar_counts_for_a_few_servers_at_most() -> None:
    honest = [Server(f"p{i}", 0, 8, 10.0) for i in range(5)]
    snapshot = Snapshot.of(8, [*honest, Server("z", 0, 4, 1e30)])
    assert snapshot.throughput.max() == 50 + RATE_CAP * 10


def test_of_itself_a_server_knows_better() -> None:
    snapshot = Snapshot.of(8, [Server("a", 0, 4, 1.0), Server("b", 4, 4, 1.0)])
    assert snapshot.having(snapshot.server(0)) is snapshot
    moved = snapshot.having(Server("a", 2, 4, 1.0))
    assert moved.throughput.tolist() == [0, 0, 1, 1, 2, 2, 1, 1]
    assert snapshot.having(Server("c", 0, 8, 1.0)).peers == ("a", "b", "c")
    assert snapshot.without("a").throughput.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@given(swarms())
def test_any_order_of_records_is_the_same_snapshot(swarm: tuple[int, list[Server]]) -> None:
    blocks, servers = swarm
    shuffled = random.Random(1).sample(servers, len(servers))
    one, two = Snapshot.of(blocks, servers), Snapshot.of(blocks, shuffled)
    assert one.peers == two.peers and one.throughput.tolist() == two.throughput.tolist()
    assert 0 <= one.quality <= 1 + 1e-9
    assert len(one) + one.dropped == len(servers)


def still(*peers: str, at: float, left: tuple[str, ...] = (), unread: int = 0) -> Snapshot:
    servers = [Server(peer, 0, 8, 1.0) for peer in peers]
    return Snapshot.of(8, servers, taken_at=at, left=left, unread=unread)


def test_many_that_vanish_together_are_doubted_for_a_while() -> None:
    memory = Memory("me", remembered=600)
    assert memory.doubt(still("me", "a", "b", "c", "d", at=0)) is None
    assert "2 of 5" in (memory.doubt(still("a", "b", at=100)) or ""), "the own record may be missing"
    assert memory.doubt(still("me", "a", "b", at=590)) is not None
    assert memory.doubt(still("me", "a", "b", at=601)) is None, "gone for good"
    assert memory.doubt(still("me", "a", "b", "c", "d", at=700)) is None


def test_one_that_dies_and_many_that_say_goodbye_are_believed() -> None:
    memory = Memory("me")
    assert memory.doubt(still("me", "a", "b", "c", at=0)) is None
    assert memory.doubt(still("me", "b", "c", at=10)) is None
    memory = Memory("me")
    assert memory.doubt(still("me", "a", "b", "c", at=0)) is None
    assert memory.doubt(still("me", at=10, left=("a", "b", "c"))) is None


def test_blocks_without_an_answer_are_doubted() -> None:
    assert "3 of 8 blocks" in (Memory().doubt(still("a", at=0, unread=3)) or "")


def test_waits_are_uniform_up_to_twice_the_mean() -> None:
    rng = random.Random(7)
    waits = sorted(random_wait(120, rng) for _ in range(4000))
    assert waits[0] >= 0 and waits[-1] <= 240
    for share in (0.1, 0.5, 0.9):
        assert abs(waits[int(share * 4000)] - share * 240) < 8
    assert random_wait(0.0, rng) == 0
