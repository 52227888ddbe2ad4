"""A swarm as one reading of the DHT shows it: who serves which blocks, how fast, and what was not readable.

A view is a value: building it from what the DHT returned is pure, and nothing that a peer wrote can do more than hide
that peer (`rejected`). Blocks are absolute indices of the model.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as show
from typing import Any, NamedTuple

from petals_agent.errors import SwarmError
from petals_agent.swarm.records import ModelRecord, ServerInfo, ServerState
from petals_agent.swarm.uids import MAX_PEER_ID, MODELS_KEY, block_uid, check_peer_id, check_prefix

MAX_REJECTED_KEPT = 100
MAX_RECORDS = 400_000  # of one model: ten thousand servers of forty blocks each; nobody waits longer for more


class Record(NamedTuple):
    """What one peer stored under one block's key."""

    peer_id: str
    block: int
    info: ServerInfo
    expires: float  # absolute DHT time, seconds

    @property
    def range(self) -> tuple[int, int] | None:
        """The whole span [start, end) that the record claims, if it claims one."""
        start, end = self.info.start_block, self.info.end_block
        return None if start is None or end is None else (start, end)


@dataclass(frozen=True)
class Span:
    """A run of blocks [start, end) that one server holds."""

    peer_id: str
    start: int
    end: int
    info: ServerInfo

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Rejected:
    """A record that is not shown, and why."""

    peer_id: str
    block: int
    reason: str


@dataclass(frozen=True)
class SwarmView:
    """One reading of all block keys of a model; `taken_at` is DHT time (seconds since 1970)."""

    prefix: str
    num_blocks: int
    records: tuple[Record, ...]
    rejected: tuple[Rejected, ...]  # the first hundred
    rejected_count: int
    unread: tuple[int, ...]  # blocks whose key did not answer in time
    taken_at: float

    @classmethod
    def from_dht(
        cls,
        prefix: str,
        num_blocks: int,
        found: Mapping[str, Any],
        now: float,
        unread: Iterable[int] = (),
    ) -> SwarmView:
        """Build a view from `DHTNode.get_many`'s result (uid → value with expiration, or None).

        A value may have been made a ServerInfo already.
        """
        by_peer: dict[str, list[Record]] = {}
        rejected: list[Rejected] = []
        # a server stores the same value under each of its keys
        read: dict[object, tuple[str, object, ServerInfo]] = {}
        taken = count = 0
        for block in range(num_blocks):
            for peer, value, expires in _subkeys(found.get(block_uid(prefix, block))):
                if taken + count >= MAX_RECORDS:
                    count += 1
                    continue
                try:
                    known = read.get(peer)
                    if known is None or (known[1] is not value and known[1] != value):
                        known = read[peer] = (check_peer_id(peer), value, _read(value))
                    peer_id, _, info = known
                    record = Record(peer_id, block, info, _check_expiration(expires))
                    start, end = info.start_block, info.end_block
                    if start is not None and end is not None and not start <= block < end:
                        raise ValueError(f"claims blocks {start}:{end} under the key of block {block}")
                except (ValueError, RecursionError) as error:  # the latter: bottomless fields that we ignore
                    count += 1
                    if len(rejected) < MAX_REJECTED_KEPT:
                        rejected.append(Rejected(_shown(peer), block, str(error)))
                    continue
                if record.expires > now:
                    by_peer.setdefault(peer_id, []).append(record)
                    taken += 1
        records = tuple(record for peer_id in sorted(by_peer) for record in by_peer[peer_id])
        return cls(prefix, num_blocks, records, tuple(rejected), count, tuple(unread), now)

    def age(self, now: float) -> float:
        """Seconds since the DHT was read."""
        return now - self.taken_at

    def spans(self, min_state: ServerState = ServerState.ONLINE) -> tuple[Span, ...]:
        """One span for each peer that is at least in `min_state`, ordered by peer id (protocol.md §1.3)."""
        by_peer: dict[str, list[Record]] = {}
        for record in self.records:
            by_peer.setdefault(record.peer_id, []).append(record)
        spans = (_span(records, min_state, self.num_blocks) for records in by_peer.values())
        return tuple(span for span in spans if span is not None)

    def span_of(self, peer_id: str, min_state: ServerState = ServerState.OFFLINE) -> Span | None:
        """The span of one peer, or None if the view does not show it."""
        return _span([r for r in self.records if r.peer_id == peer_id], min_state, self.num_blocks)

    def holders(self, block: int, min_state: ServerState = ServerState.ONLINE) -> tuple[Span, ...]:
        """The spans that contain `block`."""
        return tuple(span for span in self.spans(min_state) if span.start <= block < span.end)

    def coverage(self, min_state: ServerState = ServerState.ONLINE) -> list[int]:
        """For each block, how many servers hold it."""
        counts = [0] * self.num_blocks
        for span in self.spans(min_state):
            for block in range(span.start, span.end):
                counts[block] += 1
        return counts

    def throughput(
        self, min_state: ServerState = ServerState.JOINING, *, without: str | None = None
    ) -> list[float]:
        """For each block, the sum of its servers' throughput in tokens/s; the peer `without` is left out."""
        sums = [0.0] * self.num_blocks
        for span in self.spans(
            min_state
        ):  # in peer order, so that everyone gets the same sum to the last bit
            if span.peer_id != without:
                for block in range(span.start, span.end):
                    sums[block] += span.info.throughput
        return sums


def _span(records: list[Record], min_state: ServerState, num_blocks: int) -> Span | None:
    """What one peer serves, from its records ordered by block.

    A record with a range speaks for all its blocks, so one readable key shows the whole server; a fresher one also
    overrules what is left of older announcements inside its range. The highest state counts (a server that loads
    blocks beside those it serves is ONLINE with the latter).
    """
    first = records[0] if records else None
    if first and (claim := first.range) and all(record.info is first.info for record in records):
        if first.info.state < min_state:
            return None
        return Span(first.peer_id, claim[0], min(claim[1], num_blocks), first.info)
    ranged = [record for record in records if record.range is not None]
    newest = max(ranged, key=lambda r: r.expires, default=None)
    current = [r for r in records if r is newest or newest is None or not _overrules(newest, r)]
    current = [r for r in current if r.info.state >= min_state]
    if not current:
        return None
    state = max(r.info.state for r in current)
    current = [r for r in current if r.info.state is state]
    best = max((r for r in current if r.range is not None), key=lambda r: r.expires, default=None)
    if best is not None and best.range is not None:
        return Span(best.peer_id, best.range[0], min(best.range[1], num_blocks), best.info)
    return Span(current[0].peer_id, current[0].block, current[-1].block + 1, current[0].info)


def _overrules(newest: Record, other: Record) -> bool:
    assert newest.range is not None
    return newest.expires > other.expires and newest.range[0] <= other.block < newest.range[1]


def _subkeys(entry: Any) -> list[tuple[object, object, object]]:
    """(subkey, value, expiration) of a dictionary record; a plain value under the key counts as one bad subkey."""
    if entry is None:
        return []
    if not isinstance(entry.value, dict):
        return [("", entry.value, entry.expiration_time)]
    return [(key, item.value, item.expiration_time) for key, item in entry.value.items()]


def _read(value: object) -> ServerInfo:
    return value if isinstance(value, ServerInfo) else ServerInfo.from_value(value)


def _shown(peer: object) -> str:
    return peer if isinstance(peer, str) and len(peer) <= MAX_PEER_ID else show(peer)


def _check_expiration(expires: object) -> float:
    if not isinstance(expires, (int, float)) or math.isnan(expires):  # a union is ten times slower
        raise ValueError(f"its expiration must be a number, not {show(expires)}")
    return float(expires)


async def read_view(node: Any, prefix: str, num_blocks: int, timeout: float = 10.0) -> SwarmView:
    """Read the freshest record of every block through a hivemind `DHTNode`, in at most `timeout` seconds.

    Blocks that did not answer in time are listed in `unread`. The node should have a `RecordGuard`.
    """
    uids = [block_uid(prefix, i) for i in range(num_blocks)]
    found = await _get_many(node, uids, timeout)
    unread = [i for i, uid in enumerate(uids) if uid not in found]
    # with thousands of servers that takes seconds
    return await asyncio.to_thread(SwarmView.from_dht, prefix, num_blocks, found, time.time(), unread)


async def read_models(node: Any, timeout: float = 10.0) -> dict[str, ModelRecord]:
    """The public models of the registry by prefix, without invalid entries.

    Raises SwarmError if the DHT did not answer within `timeout` seconds.
    """
    found = await _get_many(node, [MODELS_KEY], timeout)
    if MODELS_KEY not in found:
        raise SwarmError(f"the DHT did not answer within {timeout:g} s; are the bootstrap peers reachable?")
    models = {}
    for prefix, value, _ in _subkeys(found[MODELS_KEY]):
        try:
            models[check_prefix(prefix)] = ModelRecord.from_value(value)
        except ValueError:
            continue
    return models


async def _get_many(node: Any, keys: list[str], timeout: float) -> dict[str, Any]:
    """`DHTNode.get_many(latest)` with a deadline; keys that failed or are late are missing from the result."""
    searches = await node.get_many(keys, sufficient_expiration_time=math.inf, return_futures=True)
    done, late = await asyncio.wait(searches.values(), timeout=timeout)
    for search in late:
        search.cancel()
    return {
        key: s.result()
        for key, s in searches.items()
        if s in done and not s.cancelled() and not s.exception()
    }
