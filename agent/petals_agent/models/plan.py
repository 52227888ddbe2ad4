"""What serving a model would take and what fits, before any weight is downloaded: pure arithmetic on its facts."""

from __future__ import annotations

from dataclasses import dataclass

from petals_agent.models import defaults
from petals_agent.models.facts import ModelFacts
from petals_agent.models.memory import BlockCost, max_blocks, max_cache_tokens


@dataclass(frozen=True)
class Room:
    """A device and the bytes that a span may take on it."""

    device: str  # "cpu", "cuda:0", …
    name: str
    free: int


@dataclass(frozen=True)
class Wishes:
    """What the configuration fixes; None is left to us."""

    dtype: str = "auto"
    blocks: int | None = None
    cache_tokens: int | None = None
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Fit:
    """What fits on one device; bytes, and tokens per block."""

    device: str
    name: str
    dtype: str
    free_bytes: int
    block_bytes: int
    kv_bytes_per_token: int
    cache_tokens: int  # that each block is to have
    batch_tokens: int  # of the largest request
    fit_blocks: int  # with that cache
    needed_bytes: int  # of the blocks asked for, or of one, with that cache
    blocks: int  # that would be served: those asked for, or all that fit
    max_cache_tokens: int  # beside that many blocks

    @property
    def fits(self) -> bool:
        return 0 < self.blocks <= self.fit_blocks


def fit(facts: ModelFacts, room: Room, wishes: Wishes) -> Fit:
    """How many blocks and cache tokens fit; raises CheckpointError for a dtype that cannot be served."""
    dtype = defaults.serving_dtype(wishes.dtype, facts.dtype, room.device)
    cost = BlockCost.of(facts, dtype)
    cache = wishes.cache_tokens or defaults.cache_tokens(facts)
    batch = wishes.batch_tokens or defaults.request_tokens(facts)
    fitting = max_blocks(room.free, cost, cache, batch, facts.num_blocks)
    blocks = min(wishes.blocks or fitting, facts.num_blocks)
    return Fit(
        device=room.device,
        name=room.name,
        dtype=dtype,
        free_bytes=room.free,
        block_bytes=cost.weights,
        kv_bytes_per_token=cost.cached_token,
        cache_tokens=cache,
        batch_tokens=batch,
        fit_blocks=fitting,
        needed_bytes=cost.span(blocks or 1, cache, batch),
        blocks=blocks,
        max_cache_tokens=max_cache_tokens(room.free, cost, blocks, batch) if blocks else 0,
    )
