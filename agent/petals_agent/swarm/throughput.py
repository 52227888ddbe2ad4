"""What a span is worth to the swarm, from the rates of its host; the number that all servers are compared by."""

from __future__ import annotations

RELAY_SHARE = 0.2  # of a direct link, when all traffic goes through a relay


def span_throughput(network_rps: float, forward_rps: float, blocks: int, *, relayed: bool) -> float:
    """tokens/s of a server of `blocks` blocks (protocol.md §9.3): a request crosses half of them on average.

    `network_rps` and `forward_rps` are tokens/s of the link and of one block.
    """
    return min(forward_rps / ((blocks + 1) / 2), network_rps * (RELAY_SHARE if relayed else 1.0))
