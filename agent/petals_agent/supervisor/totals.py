"""What containers have done since the agent started: counters that go on when one of them is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from petals_agent.histogram import BATCH_ROWS, STEP_SECONDS, Histogram
from petals_agent.link import messages


@dataclass
class Totals:
    """Sums over the lives of all containers; what one did after its last beat is lost with it."""

    tokens: int = 0
    requests: int = 0
    batch_rows: Histogram = field(default_factory=lambda: Histogram(BATCH_ROWS))
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))

    def follow(self) -> Callable[[messages.Beat], None]:
        """For a new container, whose counters begin at 0: a function to be called with each of its beats."""
        last = messages.Beat(loop_lag_s=0.0)

        def take(beat: messages.Beat) -> None:
            nonlocal last
            self.tokens += beat.tokens - last.tokens
            self.requests += beat.requests - last.requests
            _add(self.batch_rows, beat.batch_rows, last.batch_rows)
            _add(self.step_seconds, beat.step_seconds, last.step_seconds)
            last = beat

        return take


def _add(sums: Histogram, now: messages.Counted, before: messages.Counted) -> None:
    for bucket, (count, counted) in enumerate(zip_longest(now.counts, before.counts, fillvalue=0)):
        sums.counts[bucket] += count - counted
    sums.total += now.total - before.total
