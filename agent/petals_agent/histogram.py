"""Counts of values by size, as Prometheus' histograms have them: the engine fills them in, the agent adds them up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# upper bounds of buckets; one more bucket holds what is above the last
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Histogram:
    """`counts` of each bucket alone, and the `total` of all values; neither ever shrinks."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
