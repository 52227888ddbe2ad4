"""Views of a swarm as the DHT would give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from petals_agent.swarm.records import ServerInfo, ServerState
from petals_agent.swarm.uids import block_uid
from petals_agent.swarm.view import SwarmView
from swarm.strategies import peer_id

A, B, C, D = (peer_id(i) for i in range(4))
NOW = 1000.0


@dataclass
class Stored:
    """What hivemind returns: a value and when it expires."""

    value: Any
    expiration_time: float


def info(state: ServerState = ServerState.ONLINE, rps: float = 1.0, **fields: Any) -> ServerInfo:
    return ServerInfo(state, rps, **fields)


def view(*rows: tuple[str, range, ServerInfo], blocks: int = 8, unread: tuple[int, ...] = ()) -> SwarmView:
    found: dict[str, Any] = {}
    for peer, keys, server in rows:
        for block in keys:
            entry = found.setdefault(block_uid("m", block), Stored({}, NOW + 60))
            entry.value[peer] = Stored(server.to_value(), NOW + 60)
    return SwarmView.from_dht("m", blocks, found, NOW, unread)
