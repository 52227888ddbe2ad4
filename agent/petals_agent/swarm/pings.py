"""Round-trip times to other servers: measured through the DHT's ping, smoothed, and forgotten after five minutes."""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from petals_agent.swarm.records import ServerState
from petals_agent.swarm.view import SwarmView

SMOOTHING = 0.2  # weight of a new sample
LIFETIME = 300.0  # seconds


class PingBook:
    """Smoothed round-trip times by peer id in seconds; inf: the last ping got no answer (protocol.md §9.2)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, tuple[float, float]] = {}  # peer → (seconds, when it is forgotten)

    def record(self, peer_id: str, rtt: float) -> None:
        """Take in one sample (seconds, inf for a failure)."""
        old = self.get(peer_id)
        if old is not None and math.isfinite(old):
            rtt = SMOOTHING * rtt + (1 - SMOOTHING) * old
        self._entries[peer_id] = (rtt, self._clock() + LIFETIME)

    def get(self, peer_id: str) -> float | None:
        """The smoothed value, or None if nothing is known."""
        entry = self._entries.get(peer_id)
        return entry[0] if entry is not None and entry[1] > self._clock() else None

    def as_dict(self) -> dict[str, float]:
        """Everything known now; what a server publishes as `next_pings`."""
        now = self._clock()
        self._entries = {peer: entry for peer, entry in self._entries.items() if entry[1] > now}
        return {peer: rtt for peer, (rtt, _) in self._entries.items()}


def ping_targets(
    view: SwarmView, own_peer: str, start: int, end: int, rng: random.Random, limit: int = 5
) -> set[str]:
    """Whom the server of [start, end) pings: up to `limit` holders of its inner blocks, up to `limit` of block `end`."""
    spans = [span for span in view.spans(ServerState.OFFLINE) if span.peer_id != own_peer]
    inner = [span.peer_id for span in spans if span.start < end and span.end > start + 1]
    following = [span.peer_id for span in spans if span.start <= end < span.end]
    return {*sample(inner, limit, rng), *sample(following, limit, rng)}


def sample(peers: Collection[str], limit: int, rng: random.Random) -> list[str]:
    """At most `limit` of `peers`, at random."""
    return rng.sample(sorted(peers), min(limit, len(peers)))


def is_unsupported_protocol(error: BaseException) -> bool:
    """Whether the peer was reached and has no such handler; the text depends on the version of p2pd."""
    return re.search(r"\bprotocols? not supported\b", str(error)) is not None


async def ping(node: Any, peer_id: str, timeout: float) -> float:
    """Round-trip time to a peer in seconds through a hivemind `DHTNode`; inf if it did not answer within `timeout`.

    A peer without DHT handlers (in client mode behind a relay) refuses the protocol, which is an answer.
    """
    from hivemind.p2p import PeerID
    from hivemind.proto import dht_pb2

    started = time.perf_counter()
    try:
        stub = node.protocol.get_stub(PeerID.from_base58(peer_id))
        await stub.rpc_ping(dht_pb2.PingRequest(peer=node.protocol.node_info), timeout=timeout)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        if not is_unsupported_protocol(error):
            return math.inf
    return time.perf_counter() - started


async def ping_all(node: Any, peer_ids: Iterable[str], book: PingBook, timeout: float = 5.0) -> None:
    """Ping peers at the same time and record the results; takes at most `timeout` seconds."""
    peers = list(peer_ids)
    for peer, rtt in zip(peers, await asyncio.gather(*(ping(node, p, timeout) for p in peers)), strict=True):
        book.record(peer, rtt)
