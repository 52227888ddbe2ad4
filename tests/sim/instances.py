"""The swarms that benchmarks and tests start from: random lengths, rates and places, the same on every machine."""

from __future__ import annotations

import random

from petals_agent.balance.snapshot import Server


def random_size(rng: random.Random, blocks: int) -> tuple[int, float]:
    """Length in blocks and rate in tokens/s of a random server."""
    return rng.randint(1, blocks // 2), round(rng.lognormvariate(6.5, 0.8), 3)


def instance(servers: int, blocks: int, follows: bool = True) -> list[Server]:
    """Servers at random places; about half of them hold a quarter of the model or less."""
    sizes, places = random.Random(1), random.Random(2)
    made = []
    for i in range(servers):
        length, rate = random_size(sizes, blocks)
        start = places.randint(0, blocks - length)
        made.append(Server(f"peer{i:05d}", start, length, rate, follows=follows))
    return made
