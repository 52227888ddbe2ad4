"""Whole swarms in the simulator: they come to rest, nobody rushes, and what is lost is repaired."""

from __future__ import annotations

from dataclasses import replace

import pytest

from petals_agent.balance.decision import Settings
from petals_agent.balance.snapshot import Server, Snapshot
from sim import stock
from sim.instances import instance
from sim.rounds import ours, play, published
from sim.simulator import Simulator

HOUR = 3600.0


@pytest.mark.parametrize(("servers", "blocks", "quality"), [(8, 32, 0.78), (50, 80, 0.92), (200, 80, 0.97)])
def test_a_random_swarm_becomes_good_with_few_moves(servers: int, blocks: int, quality: float) -> None:
    rule = ours()
    rounds = 60
    end = play(instance(servers, blocks), blocks, lambda _: rule, rounds)
    assert end.snapshot.quality >= quality
    assert end.moves <= 1.2 * servers
    assert end.rounds < rounds, "it came to rest"
    again = play([end.snapshot.server(row) for row in range(servers)], blocks, lambda _: rule, 2, seed=5)
    assert again.moves == 0, "and stays so"


@pytest.mark.parametrize(("servers", "blocks"), [(8, 32), (50, 80), (64, 48)])
def test_with_stale_views_it_comes_to_rest_and_stays_there(servers: int, blocks: int) -> None:
    swarm = Simulator(blocks, instance(servers, blocks))
    start = swarm.truth().quality
    swarm.run(2 * HOUR)
    moves = len(swarm.moves)
    assert moves <= 1.2 * servers
    assert swarm.truth().quality > max(0.75, start)
    swarm.run(HOUR)
    assert len(swarm.moves) == moves


def test_ten_thousand_servers() -> None:
    """Each server's check must be cheap enough that a few minutes of such a swarm are seconds."""
    swarm = Simulator(64, [replace(s, follows=i % 250 == 0) for i, s in enumerate(instance(10_000, 64))])
    before = swarm.truth().quality
    servers = [node for node in swarm.nodes.values() if not node.ours]
    for node in servers:  # the others are pinned
        del swarm.nodes[node.server.peer]
    swarm.run(120)
    after = Snapshot.of(64, swarm._records.values()).quality
    assert after > before


def even(copies: int, follows: bool = True, blocks: int = 16, length: int = 4) -> list[Server]:
    """Servers that cover each block `copies` times."""
    starts = range(0, blocks, length)
    return [Server(f"e{s:02d}{c}", s, length, 100.0, follows=follows) for s in starts for c in range(copies)]


def test_nobody_moves_in_a_balanced_swarm() -> None:
    swarm = Simulator(16, even(3))
    swarm.run(2 * HOUR)
    assert swarm.moves == []


def test_a_gap_that_all_see_at_once_draws_as_many_as_it_needs() -> None:
    swarm = Simulator(16, even(5))
    for copy in range(5):
        swarm.leave(f"e08{copy}")
    swarm.run(HOUR)
    assert swarm.truth().holders().min() >= 3
    assert len(swarm.moves) <= 8, "15 saw it"


def test_killed_coverage_is_repaired() -> None:
    swarm = Simulator(16, even(3))
    swarm.run(60)
    for copy in range(3):
        swarm.kill(f"e04{copy}")
    assert swarm.truth().holders().min() == 0
    swarm.run(HOUR)  # records live on for some minutes, and a sudden loss is doubted for ten
    assert swarm.truth().holders().min() >= 2
    assert len(swarm.moves) <= 6


def test_records_that_vanish_together_move_nobody_of_ours() -> None:
    swarm = Simulator(16, even(3))
    swarm.run(600)
    swarm.hide([peer for peer in swarm.nodes if peer.startswith(("e04", "e08"))])
    swarm.run(400)
    swarm.hide(())
    swarm.run(HOUR)
    assert swarm.moves == []


def test_a_published_server_moves_into_such_a_hole() -> None:
    """What the rule above is good for, and that the simulator's hole is one."""
    swarm = Simulator(16, even(3, follows=False))
    swarm.run(600)
    swarm.hide([peer for peer in swarm.nodes if peer.startswith(("e04", "e08"))])
    swarm.run(400)
    assert swarm.moves


def test_liars_do_not_stop_the_others() -> None:
    liars = [Server("liar0", 0, 4, 1e12), Server("liar1", 2, 6, 1e-9), Server("liar2", 3, 10**9, 5.0)]
    honest = [Server(f"h{i}", 0, 4, 100.0, follows=True) for i in range(12)]
    swarm = Simulator(16, [*honest, *liars])
    for liar in liars:
        del swarm.nodes[liar.peer]  # there are only their records
    swarm.run(2 * HOUR)
    assert swarm.truth().holders()[4:].min() >= 3  # that 0:4 is held by a liar alone, no record shows
    moves = len(swarm.moves)
    swarm.run(HOUR)
    assert len(swarm.moves) == moves


@pytest.mark.parametrize("share", [2, 5])
def test_a_mixed_swarm_comes_to_rest(share: int) -> None:
    servers = [replace(server, follows=i % share == 0) for i, server in enumerate(instance(12, 24))]
    swarm = Simulator(24, servers)
    swarm.run(2 * HOUR)
    moves = len(swarm.moves)
    assert swarm.truth().quality >= 0.6
    swarm.run(HOUR)
    assert len(swarm.moves) == moves


@pytest.mark.parametrize("seed", [0, 1])
def test_one_of_ours_in_a_published_swarm_does_no_harm(seed: int) -> None:
    """Against one more published server of the same size: as good at least, and no more moves of the others."""
    rested = play(instance(10, 16, follows=False), 16, lambda _: published(), 6).snapshot
    servers = [rested.server(row) for row in range(len(rested))]
    ends = {}
    for mine in (False, True):
        swarm = Simulator(16, servers, seed=seed)
        swarm.join("newcomer", 5, 700.0, ours=mine)
        swarm.run(HOUR)
        ends[mine] = swarm.truth().quality, sum(not move.ours for move in swarm.moves)
    assert ends[True][0] >= rested.quality - 1e-9 and ends[True][0] >= ends[False][0] - 1e-9
    assert ends[True][1] <= ends[False][1]


def test_churn_is_lived_with() -> None:
    swarm = Simulator(80, instance(40, 32), churn_per_minute=0.01)
    swarm.run(HOUR)
    assert sum(swarm.qualities[30:]) / len(swarm.qualities[30:]) > 0.6


def test_the_published_rule_by_hand() -> None:
    servers = [Server("a", 0, 4, 1.0), Server("b", 0, 4, 1.0), Server("c", 0, 4, 1.0), Server("d", 4, 4, 1.0)]
    rule = published()
    assert rule(servers[0], Snapshot.of(8, servers)) == 4
    assert rule(servers[3], Snapshot.of(8, servers)) is None, "it would leave a gap"
    assert stock.best_start(stock.throughput(servers[:2], 8), 3) == 4
    assert published(quality=0.0)(servers[0], Snapshot.of(8, servers)) is None


def test_our_settings_can_stop_all_moves() -> None:
    rule = ours(Settings(balance_quality=0.0))
    assert play(instance(8, 32), 32, lambda _: rule, 3).moves == 0
