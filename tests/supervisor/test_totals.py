"""Counters go on where they were when a container is replaced, and never fall."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_agent.histogram import BATCH_ROWS, STEP_SECONDS, Histogram
from petals_agent.link import messages
from petals_agent.supervisor.totals import Totals


def beat(tokens: int, values: list[float]) -> messages.Beat:
    """What a container says that answered one request and step for each of these durations."""
    steps, rows = Histogram(STEP_SECONDS), Histogram(BATCH_ROWS)
    for value in values:
        steps.observe(value)
        rows.observe(1)
    return messages.Beat(
        loop_lag_s=0.0,
        tokens=tokens,
        requests=len(values),
        step_seconds=messages.Counted(counts=tuple(steps.counts), total=steps.total),
        batch_rows=messages.Counted(counts=tuple(rows.counts), total=rows.total),
    )


def test_buckets() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 1000.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2] and histogram.total == 1006.6


def test_mean() -> None:
    assert beat(0, []).step_seconds.mean == 0.0 == messages.Counted().mean
    assert beat(0, [1.0, 2.0]).step_seconds.mean == 1.5


@given(st.lists(st.lists(st.lists(st.floats(0, 100), max_size=3), min_size=1, max_size=4), max_size=4))
def test_sums_over_containers(lives: list[list[list[float]]]) -> None:
    """`lives`: of each container, what it did before each of its beats."""
    totals, everything, before = Totals(), Histogram(STEP_SECONDS), [0] * (len(STEP_SECONDS) + 1)
    for life in lives:
        take, done = totals.follow(), []
        take(messages.Beat(loop_lag_s=0.0))  # before anything is loaded
        for new in life:
            done += new
            for value in new:
                everything.observe(value)
            take(beat(10 * len(done), done))
            assert all(now >= then for now, then in zip(totals.step_seconds.counts, before, strict=True))
            before = list(totals.step_seconds.counts)
    count = sum(everything.counts)
    assert totals.step_seconds.counts == everything.counts
    assert totals.batch_rows.counts[0] == totals.requests == count and totals.tokens == 10 * count
    assert abs(totals.step_seconds.total - everything.total) <= 1e-9 * max(1.0, everything.total)
