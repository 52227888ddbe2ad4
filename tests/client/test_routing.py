"""Routes on fixed views: the weights of the protocol, and the optimum by brute force."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.client.routing import fastest_route, usable, widest_route
from petals_agent.errors import ClientError
from petals_agent.swarm.records import ServerInfo, ServerState
from petals_agent.swarm.view import Span


def span(peer: str, start: int, end: int, **fields: Any) -> Span:
    return Span(peer, start, end, ServerInfo(ServerState.ONLINE, 1.0, start, end, **fields))


def chain(route: list[Span]) -> list[tuple[str, int, int]]:
    return [(hop.peer_id, hop.start, hop.end) for hop in route]


def test_one_server_beats_two_when_equally_fast() -> None:
    spans = [span("a", 0, 4), span("b", 4, 8), span("c", 0, 8)]
    assert chain(fastest_route(spans, 0, 8, {})) == [("c", 0, 8)]


def test_speed_of_blocks_counts() -> None:
    # two hops cost one more overhead and delay, 0.168 s; c's blocks cost 8/rps instead of 8/300
    slow = 8 / (0.168 + 8 / 300)
    for factor, expected in ((1.02, [("c", 0, 8)]), (0.98, [("a", 0, 4), ("b", 4, 8)])):
        spans = [span("a", 0, 4), span("b", 4, 8), span("c", 0, 8, inference_rps=slow * factor)]
        assert chain(fastest_route(spans, 0, 8, {})) == expected


def test_unknown_rtt_is_150_ms_one_way() -> None:
    spans = [span("a", 0, 8), span("b", 0, 8)]
    assert chain(fastest_route(spans, 0, 8, {"b": 0.29}))[0][0] == "b"
    assert chain(fastest_route(spans, 0, 8, {"b": 0.31}))[0][0] == "a"


def test_an_unreachable_server_costs_5_s_each_way() -> None:
    fast, slow = span("a", 0, 8), span("b", 0, 8, inference_rps=8 / (2 * 4.84))
    assert chain(fastest_route([fast, slow], 0, 8, {"a": math.inf}))[0][0] == "b"
    slower = span("b", 0, 8, inference_rps=8 / (2 * 4.88))
    assert chain(fastest_route([fast, slower], 0, 8, {"a": math.inf}))[0][0] == "a"
    assert chain(fastest_route([fast], 0, 8, {"a": math.inf})) == [("a", 0, 8)]


def test_pings_between_servers_choose_the_second() -> None:
    first = span("a", 0, 4, next_pings={"b": 0.5, "c": 0.01})
    assert chain(fastest_route([first, span("b", 4, 8), span("c", 4, 8)], 0, 8, {})) == [
        ("a", 0, 4),
        ("c", 4, 8),
    ]


def test_a_server_without_room_is_the_last_choice() -> None:
    full, far = span("a", 0, 8, cache_tokens_left=2 * 100 * 8 - 1), span("b", 0, 8)
    rtts = {"a": 0.0, "b": 9.0}
    assert chain(fastest_route([full, far], 0, 8, rtts, cache_tokens=100))[0][0] == "b"
    assert chain(fastest_route([full, far], 0, 8, rtts, cache_tokens=99))[0][0] == "a"
    assert (
        chain(fastest_route([full, far], 4, 8, rtts, cache_tokens=100))[0][0] == "a"
    )  # room for our blocks is enough
    assert chain(fastest_route([full], 0, 8, rtts, cache_tokens=100))[0][0] == "a"


def test_a_route_leaves_a_server_only_at_its_end() -> None:
    spans = [span("a", 0, 5), span("b", 3, 8, inference_rps=1e6)]
    assert chain(fastest_route(spans, 0, 8, {})) == [("a", 0, 5), ("b", 5, 8)]


def test_a_part_of_the_model() -> None:
    assert chain(fastest_route([span("a", 0, 8)], 3, 5, {})) == [("a", 3, 5)]


@pytest.mark.parametrize("route", [fastest_route, lambda *args: widest_route(*args, random.Random(0))])
def test_blocks_without_a_server_are_named(route: Any) -> None:
    with pytest.raises(ClientError, match="blocks 2, 3; "):
        route([span("a", 0, 2), span("b", 4, 8)], 0, 8, {})


def cost(route: list[Span], end: int, rtts: dict[str, float], tokens: int) -> float:
    """The protocol's weights, added up for a given route."""

    def delay(rtt: float | None) -> float:
        return 0.15 if rtt is None else min(rtt / 2, 5.0)

    total, before = 0.0, None
    for hop in route:
        rtt = rtts.get(hop.peer_id) if before is None else (before.info.next_pings or {}).get(hop.peer_id)
        total += delay(rtt) + 0.018 + (hop.end - hop.start) / (hop.info.inference_rps or 300.0)
        if (
            hop.info.cache_tokens_left is not None
            and 2 * tokens * (hop.end - hop.start) > hop.info.cache_tokens_left
        ):
            total += 10
        before = hop
    return total + delay(rtts.get(route[-1].peer_id))


def all_routes(spans: list[Span], start: int, end: int) -> list[list[Span]]:
    if start >= end:
        return [[]]
    return [
        [Span(s.peer_id, start, min(s.end, end), s.info), *rest]
        for s in spans
        if s.start <= start < s.end
        for rest in all_routes(spans, s.end, end)
    ]


rtt = st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 3.0, math.inf]))


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[Span], dict[str, float]]:
    names = "abcde"[: draw(st.integers(1, 5))]
    spans = []
    for name in names:
        start = draw(st.integers(0, 5))
        pings = {other: value for other in names if (value := draw(rtt)) is not None}
        spans.append(
            span(
                name, start, draw(st.integers(start + 1, 6)), next_pings=pings,
                inference_rps=draw(st.sampled_from([None, 1.0, 50.0, 1000.0])),
                cache_tokens_left=draw(st.sampled_from([None, 0, 50, 1000])),
            )
        )  # fmt: skip
    return spans, {name: value for name in names if (value := draw(rtt)) is not None}


@settings(max_examples=300, deadline=None)
@given(swarms(), st.integers(0, 2), st.integers(3, 6), st.integers(0, 40))
def test_no_route_is_faster(
    swarm: tuple[list[Span], dict[str, float]], start: int, end: int, tokens: int
) -> None:
    spans, rtts = swarm
    routes = all_routes(spans, start, end)
    if not routes:
        with pytest.raises(ClientError):
            fastest_route(spans, start, end, rtts, tokens)
        return
    found = fastest_route(spans, start, end, rtts, tokens)
    assert found[0].start == start and found[-1].end == end
    assert all(a.end == b.start for a, b in itertools.pairwise(found))
    assert math.isclose(
        cost(found, end, rtts, tokens), min(cost(r, end, rtts, tokens) for r in routes), rel_tol=1e-9
    )


def test_forward_routes_prefer_long_spans() -> None:
    spans = [span("a", 0, 6), span("b", 0, 2), span("c", 2, 8), span("d", 0, 8)]
    rng = random.Random(1)
    first = Counter(widest_route(spans, 0, 8, {"d": math.inf}, rng)[0].peer_id for _ in range(2000))
    assert first["d"] == 0
    assert abs(first["a"] / 2000 - 6 / 8) < 0.05
    assert chain(widest_route(spans[:1] + spans[2:3], 0, 8, {}, rng)) == [("a", 0, 6), ("c", 6, 8)]


def test_avoided_peers_come_back_where_nobody_else_is() -> None:
    a, b, c = span("a", 0, 4), span("b", 2, 8), span("c", 0, 6)
    assert usable([a, b, c], 0, 8, {"c"}) == [a, b]
    assert usable([a, b, c], 0, 8, {"b"}) == [a, c, b]
    assert usable([a, b, c], 0, 6, {"b"}) == [a, c]
    assert usable([a, b, c], 0, 8, {"a", "b", "c"}) == [a, b, c]


def test_routing_needs_no_torch() -> None:
    code = "import sys, petals_agent.client.routing, petals_agent.client.blame; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
