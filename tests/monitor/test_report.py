"""The report: each block counted right, each verdict with its reason, and nothing that a server says breaks it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_agent.monitor.history import Presence
from petals_agent.monitor.report import GONE_S, MAX_RATE, MAX_SERVERS, Reading
from petals_agent.monitor.state import SwarmState
from petals_agent.swarm.records import ServerState

from .swarms import NOW, model, peer, reading, readings, records, reported

OFFLINE, JOINING, ONLINE = ServerState


def test_all_blocks_served_is_healthy() -> None:
    found = model(4, records(1, 0, 2), records(2, 2, 4))
    assert (found.state, found.reason) == ("healthy", "")
    assert found.online == (1, 1, 1, 1) and found.throughput == (10.0,) * 4


def test_a_gap_is_broken_and_named() -> None:
    found = model(9, records(1, 0, 2), records(2, 3, 6))
    assert found.state == "broken"
    assert found.reason == "blocks 2 and 6:9 have no server online"


def test_a_gap_with_a_server_to_come() -> None:
    found = model(4, records(1, 0, 3), records(2, 3, 4, JOINING))
    assert found.reason == "block 3 has no server online; servers are joining there"
    assert found.joining == (0, 0, 0, 1)


def test_an_unreachable_server_serves_nobody() -> None:
    found = model(4, records(1, 0, 4), unreachable={peer(1): "refused"})
    assert found.state == "broken" and "1 server is unreachable there" in found.reason
    assert found.servers[0].state == "unreachable" and found.servers[0].reason == "refused"
    assert found.throughput == (0.0,) * 4


def test_only_who_claims_to_be_online_can_be_unreachable() -> None:
    found = model(
        4,
        records(1, 0, 4, JOINING),
        records(2, 0, 4, OFFLINE),
        unreachable=dict.fromkeys((peer(1), peer(2)), "x"),
    )
    assert {(server.state, server.reason) for server in found.servers} == {("joining", ""), ("offline", "")}


def test_keys_that_did_not_answer_degrade() -> None:
    found = model(4, records(1, 0, 4), unread=[2, 3])
    assert found.state == "degraded" and "did not answer for blocks 2:4" in found.reason
    assert found.unread_blocks == 2


def test_a_gap_that_may_be_none_says_so() -> None:
    found = model(4, records(1, 0, 2), unread=[2, 3])
    assert found.state == "broken" and found.reason.endswith("the DHT did not answer for blocks 2:4")


def test_blocks_on_their_last_server_degrade() -> None:
    servers = records(1, 0, 4), records(2, 0, 4), records(3, 2, 4)
    assert model(4, *servers).state == "healthy"
    found = model(4, *servers, unreachable={peer(2): "refused"})
    assert found.state == "degraded"
    assert found.reason == "blocks 0:2 hang on one server, while 1 server is unreachable"


def test_many_unreachable_servers_degrade() -> None:
    servers = [records(seed, 0, 4) for seed in range(6)]
    assert model(4, *servers, unreachable={peer(0): "x"}).state == "healthy"
    found = model(4, *servers, unreachable={peer(0): "x", peer(1): "x"})
    assert found.reason == "2 of 6 servers cannot be reached"


def test_a_bottleneck_degrades() -> None:
    found = model(4, records(1, 0, 3, rps=100.0), records(2, 3, 4, rps=10.0))
    assert found.state == "degraded"
    assert found.reason == "block 3 limits it to 10 tokens/s, where the mean is 77.5"
    found = model(8, records(1, 0, 6, rps=100.0), records(2, 6, 8, rps=10.0))
    assert found.reason == "blocks 6:8 limit it to 10 tokens/s, where the mean is 77.5"


def test_a_model_that_nobody_announces() -> None:
    found = model(0)
    assert found.state == "broken" and "not known" in found.reason


def test_a_lost_server_is_offline_for_a_while_and_then_gone() -> None:
    before = reported(reading(4, records(1, 0, 4, expires=NOW + 10)))
    later = reported(reading(4), now=NOW + 20, previous=before)
    (server,) = later.models[0].servers
    assert server.state == "offline" and server.reason
    still = reported(reading(4), now=NOW + 9 + GONE_S, previous=later)
    assert still.models[0].servers
    assert not reported(reading(4), now=NOW + 11 + GONE_S, previous=still).models[0].servers


@pytest.mark.parametrize("expires", [math.inf, 1e300, NOW + 86400])
def test_a_record_that_never_expires_keeps_nobody_for_ever(expires: float) -> None:
    before = reported(reading(4, records(1, 0, 4, expires=expires)))
    assert SwarmState.model_validate_json(before.model_dump_json()) == before
    later = reported(reading(4), now=NOW + 20, previous=before)
    assert later.models[0].servers[0].state == "offline"
    still = reported(reading(4), now=NOW + 19 + GONE_S, previous=later)
    assert still.models[0].servers
    assert not reported(reading(4), now=NOW + 21 + GONE_S, previous=still).models[0].servers


def test_a_model_that_was_not_read_keeps_servers_while_their_records_hold() -> None:
    before = reported(reading(4, records(1, 0, 4, expires=NOW + 60)))
    assert reported(now=NOW + 30, previous=before).models[0].servers[0].state == "online"
    assert reported(now=NOW + 61, previous=before).models[0].servers[0].state == "offline"


def test_a_lost_model_goes_with_its_servers() -> None:
    before = reported(reading(4, records(1, 0, 4, expires=NOW + 10)))
    later = reported(now=NOW + 20, previous=before)
    assert later.models[0].state == "broken" and later.models[0].repository == before.models[0].repository
    assert reported(now=NOW + 11 + GONE_S, previous=later).models == ()


def test_a_server_whose_keys_do_not_answer_stays_while_its_record_holds() -> None:
    before = reported(reading(4, records(1, 0, 2, expires=NOW + 60)))
    view = replace(reading(4, unread=[0, 1]).view, taken_at=NOW + 30)
    assert reported(Reading(view), now=NOW + 30, previous=before).models[0].servers[0].state == "online"
    assert reported(Reading(view), now=NOW + 61, previous=before).models[0].servers[0].state == "offline"


def test_a_server_that_comes_back_is_not_there_twice() -> None:
    before = reported(reading(4, records(1, 0, 2)))
    (server,) = reported(reading(4, records(1, 2, 4)), previous=before).models[0].servers
    assert (server.start, server.end, server.state) == (2, 4, "online")


def test_fields() -> None:
    found = model(
        4,
        records(
            1, 0, 4, cache_tokens_left=801, next_pings={peer(2): 0.5, peer(9): 0.1}, torch_dtype="bfloat16"
        ),
        records(2, 0, 4, next_pings={peer(1): math.inf}, version="1" * 999, public_name="n"),
        presence={peer(1): Presence(5.0, 0.25)},
    )
    one, two = sorted(found.servers, key=lambda server: server.peer_id != peer(1))
    assert one.cache_tokens_left == 100 and one.dtype == "bfloat16"
    assert (one.first_seen, one.uptime) == (5.0, 0.25) and two.first_seen is None
    assert one.pings == {peer(2): 0.5} and one.pings_to_me == {peer(2): None}
    assert two.pings == {peer(1): None} and two.pings_to_me == {peer(1): 0.5}
    assert two.version is not None and len(two.version) == 40


def test_figures_have_as_many_digits_as_mean_something() -> None:
    found = model(
        2,
        records(1, 0, 2, rps=20263.73478449467, inference_rps=0.00412345678, expires=NOW + 9.87654),
        records(2, 0, 2, rps=1e-7, next_pings={peer(1): 0.04512345678}),
        presence={peer(1): Presence(5.123456, 0.99999999)},
    )
    one, two = sorted(found.servers, key=lambda server: server.peer_id != peer(1))
    assert (one.throughput, one.inference_rps, two.throughput) == (20264.0, 0.0041235, 1e-7)
    assert (one.expires, one.first_seen, one.uptime) == (NOW + 9.9, 5.1, 0.9999), "no rounding up to always"
    assert two.pings == {peer(1): 0.045123} and one.pings_to_me == {peer(2): 0.045123}


def test_an_absurd_rate_spoils_no_sum() -> None:
    found = model(2, *(records(seed, 0, 2, rps=1.7e308) for seed in range(3)))
    assert found.throughput == (3 * MAX_RATE,) * 2


def test_a_flood_hides_nobody_who_was_there_before() -> None:
    flood = [records(seed, 0, 1) for seed in range(MAX_SERVERS + 5)]
    oldest = peer(MAX_SERVERS + 4)
    found = model(1, *flood, presence={oldest: Presence(1.0, 1.0)})
    assert len(found.servers) == MAX_SERVERS and found.rejected == 5
    assert oldest in {server.peer_id for server in found.servers}


@given(readings())
def test_any_swarm(drawn: tuple[Reading, dict[str, str]]) -> None:
    read, unreachable = drawn
    state = reported(read, unreachable=unreachable)
    (found,) = state.models
    for block in range(read.view.num_blocks):
        here = [server for server in found.servers if server.start <= block < server.end]
        online = [server for server in here if server.state == "online"]
        assert found.online[block] == len(online)
        assert found.joining[block] == sum(server.state == "joining" for server in here)
        assert found.throughput[block] == pytest.approx(sum(server.throughput for server in online))
    assert (found.state == "broken") == (0 in found.online)
    assert (found.state == "healthy") == (not found.reason)
    assert {server.peer_id for server in found.servers} == {record.peer_id for record in read.view.records}
    assert all((server.state == "unreachable") <= (server.peer_id in unreachable) for server in found.servers)
    assert SwarmState.model_validate_json(state.model_dump_json()) == state


@given(readings(), readings(), st.floats(0, 600))
def test_any_two_swarms_after_each_other(
    first: tuple[Reading, dict[str, str]], then: tuple[Reading, dict[str, str]], pause: float
) -> None:
    before = reported(first[0], unreachable=first[1])
    state = reported(then[0], now=NOW + pause, previous=before, unreachable=then[1])
    (found,) = state.models
    ids = [server.peer_id for server in found.servers]
    assert len(ids) == len(set(ids)) and len(found.online) == found.num_blocks
    present = {record.peer_id for record in then[0].view.records}
    for server in found.servers:
        if server.peer_id not in present:
            assert server.expires > NOW + pause - GONE_S
            assert server.state == "offline" or server.expires > NOW + pause
