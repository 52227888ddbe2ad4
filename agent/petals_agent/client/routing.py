"""Routes through a swarm: pure functions from spans and round-trip times to a chain of spans (protocol.md §7.2, §7.3)."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from petals_agent.errors import ClientError
from petals_agent.swarm.view import Span

OVERHEAD = 0.018  # seconds that a request costs a server beyond the blocks
UNKNOWN_DELAY = 0.15
MAX_DELAY = 5.0  # an unreachable server stays possible, as the last resort
NO_CACHE_DELAY = 10.0
DEFAULT_RPS = 300.0


@dataclass(frozen=True)
class _Visit:
    """The cheapest way found to have used a server up to the end of its span."""

    cost: float
    span: Span
    source: _Visit | None

    def route(self) -> list[Span]:
        return [*(self.source.route() if self.source else []), self.span]


def fastest_route(
    spans: Sequence[Span], start: int, end: int, rtts: Mapping[str, float], cache_tokens: int = 0
) -> list[Span]:
    """The chain of servers over blocks [start, end) with the least time per decoding step.

    `rtts` are ours to servers in seconds, `cache_tokens` is batch × max_length. The spans of the result are cut to what
    is asked of each server. A route may enter a span anywhere and leaves it at its end. Raises ClientError if a block
    has no server.
    """
    check_covered(spans, start, end)
    spans = sorted(spans, key=lambda span: span.peer_id)
    # every edge leads to a later block, so one pass over the blocks finds the shortest ways to leave at each
    left: dict[int, dict[str, _Visit]] = {}
    for block in range(start, end):
        before = left.pop(block, {})
        if not before and block > start:
            continue
        for span in spans:
            if not span.start <= block < span.end:
                continue
            if block == start:
                cost, source = _delay(rtts.get(span.peer_id)), None
            else:
                cost, source = min(
                    ((v.cost + _delay(_ping(v.span, span)), v) for v in before.values()),
                    key=lambda found: found[0],
                )
            leave = min(span.end, end)
            cost += OVERHEAD + _cache_delay(span, leave - block, cache_tokens) + (leave - block) / _rps(span)
            known = left.setdefault(leave, {}).get(span.peer_id)
            if known is None or cost < known.cost:
                left[leave][span.peer_id] = _Visit(cost, replace(span, start=block, end=leave), source)
    last = min(left[end].values(), key=lambda visit: visit.cost + _delay(rtts.get(visit.span.peer_id)))
    return last.route()


def widest_route(
    spans: Sequence[Span], start: int, end: int, rtts: Mapping[str, float], rng: random.Random
) -> list[Span]:
    """A chain of servers over blocks [start, end) for forward and backward.

    Each time one of the servers that hold the next block is drawn, in proportion to the length of its span (hardly ever
    one that does not answer pings), and used to its end. Raises ClientError if a block has no server.
    """
    check_covered(spans, start, end)
    route: list[Span] = []
    block = start
    while block < end:
        holders = sorted((s for s in spans if s.start <= block < s.end), key=lambda span: span.peer_id)
        weights = [1e-6 if rtts.get(s.peer_id) == math.inf else float(s.length) for s in holders]
        chosen = rng.choices(holders, weights)[0]
        route.append(replace(chosen, start=block, end=min(chosen.end, end)))
        block = chosen.end
    return route


def usable(spans: Sequence[Span], start: int, end: int, avoided: Collection[str]) -> list[Span]:
    """`spans` without the avoided peers, except where nobody else holds a block of [start, end)."""
    kept = [span for span in spans if span.peer_id not in avoided]
    alone = uncovered(kept, start, end)
    back = [s for s in spans if s.peer_id in avoided and any(s.start <= i < s.end for i in alone)]
    return kept + back


def uncovered(spans: Sequence[Span], start: int, end: int) -> list[int]:
    """The blocks of [start, end) that none of `spans` holds."""
    return [i for i in range(start, end) if not any(span.start <= i < span.end for span in spans)]


def check_covered(spans: Sequence[Span], start: int, end: int) -> None:
    """Raises ClientError that names the blocks of [start, end) without a server."""
    if not 0 <= start < end:
        raise ClientError(f"there is no route over blocks {start}:{end}")
    missing = uncovered(spans, start, end)
    if missing:
        raise ClientError(
            f"no ONLINE server holds block{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:10]))}"
            f"{' …' if len(missing) > 10 else ''}; wait for servers to join, or check the prefix and the initial peers"
        )


def _ping(source: Span, target: Span) -> float | None:
    return (source.info.next_pings or {}).get(target.peer_id)


def _delay(rtt: float | None) -> float:
    return UNKNOWN_DELAY if rtt is None else min(rtt / 2, MAX_DELAY)


def _cache_delay(span: Span, blocks: int, cache_tokens: int) -> float:
    """Stock clients demand room for the server's whole span; what a session takes is room for its own blocks."""
    left = span.info.cache_tokens_left
    return 0.0 if left is None or 2 * cache_tokens * blocks <= left else NO_CACHE_DELAY


def _rps(span: Span) -> float:
    return span.info.inference_rps or DEFAULT_RPS
