"""When to look and how long to hesitate: random, so that servers that see the same do not act at the same moment."""

from __future__ import annotations

from random import Random


def random_wait(mean: float, rng: Random) -> float:
    """Seconds to wait, uniform in 0 … 2·mean: before a balance check, and before choosing blocks."""
    return rng.random() * 2 * mean
