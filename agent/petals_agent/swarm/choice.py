"""Which blocks to serve: where the swarm is slowest, by Petals' rule, so that everyone who sees the same decides alike."""

from __future__ import annotations

from collections.abc import Sequence

from petals_agent.swarm.view import SwarmView


def choose_best_start(throughput: Sequence[float], length: int) -> int:
    """The first block of the best span of `length` blocks, given each block's summed throughput in tokens/s.

    Best is the span whose weakest block is weakest, then whose next weakest is …; ties go to the smallest start
    (protocol.md §9.4). Raises ValueError if the span does not fit the model.
    """
    if not 1 <= length <= len(throughput):
        raise ValueError(f"cannot place a span of {length} blocks in a model of {len(throughput)}")
    return min(
        range(len(throughput) - length + 1),
        key=lambda start: (sorted(throughput[start : start + length]), start),
    )


def choose_span(view: SwarmView, length: int, own_peer: str | None = None) -> tuple[int, int]:
    """The span [start, end) of `length` blocks to join with; servers that are JOINING count, an own record does not."""
    start = choose_best_start(view.throughput(without=own_peer), length)
    return start, start + length
