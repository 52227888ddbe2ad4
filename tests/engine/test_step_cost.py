"""The fixed cost of a step is found from steps of different sizes, whatever the noise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_agent.engine.step_cost import StepCost


def test_intercept_of_a_line_with_noise() -> None:
    cost, rng = StepCost(), random.Random(1)
    for _ in range(400):
        rows = rng.randint(1, 64)
        cost.take(rows, (0.002 + 0.00025 * rows) * rng.uniform(0.95, 1.05))
    assert cost.fixed == pytest.approx(0.002, abs=0.0006)


def test_steps_all_alike_say_nothing_about_it() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.take(8, 0.01)
    assert cost.fixed == pytest.approx(0.005)


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(0, 10)), min_size=1, max_size=200))
def test_it_is_never_negative_nor_more_than_the_longest_step(steps: list[tuple[int, float]]) -> None:
    cost = StepCost()
    for rows, duration in steps:
        cost.take(rows, duration)
    assert 0.0 <= cost.fixed <= max(duration for _, duration in steps) + 1e-9
