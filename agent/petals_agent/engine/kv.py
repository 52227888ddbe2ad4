"""The KV cache: slabs of equal-sized slots, so that sessions in neighbouring slots share one attention call.

A slab holds one tensor per block, [2, slots, kv_heads, capacity, head_dim] (keys, then values). Capacity is the
session's max_length rounded up to a half-octave; slabs of short sessions have many slots, long sessions get one of their
own. A slot is zeroed when it is freed: stale values must stay finite (masked positions are still multiplied by zero), and no
session may see another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petals_agent.engine.session import Session

SLAB_TOKENS = 8192  # slots × capacity that one slab aims at
MAX_SLOTS = 64
MIN_CAPACITY = 64
KEPT_SLABS = 2  # empty ones, of each size


@dataclass(frozen=True)
class LayerShape:
    """KV shape of one block."""

    kv_heads: int
    head_dim: int


def capacity_class(max_length: int) -> int:
    """Smallest of 64, 96, 128, 192, 256, 384, … that holds `max_length` tokens."""
    size = MIN_CAPACITY
    while size < max_length:
        if size * 3 // 2 >= max_length:
            return size * 3 // 2
        size *= 2
    return size


class Slab:
    """Slots of one capacity for one range of blocks."""

    def __init__(
        self, layers: Sequence[LayerShape], slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.capacity = slots, capacity
        self.kv = [
            torch.zeros(2, slots, layer.kv_heads, capacity, layer.head_dim, dtype=dtype, device=device)
            for layer in layers
        ]
        self._free = [True] * slots

    def take(self, count: int) -> int | None:
        """First of `count` neighbouring free slots, now taken; None when there are none."""
        run = 0
        for slot, free in enumerate(self._free):
            run = run + 1 if free else 0
            if run == count:
                first = slot - count + 1
                self._free[first : slot + 1] = [False] * count
                return first
        return None

    def give_back(self, first: int, count: int, used: int) -> None:
        """Zero the first `used` positions of the slots and free them."""
        for kv in self.kv:
            kv[:, first : first + count, :, :used].zero_()
        self._free[first : first + count] = [True] * count

    @property
    def empty(self) -> bool:
        return all(self._free)


@dataclass(eq=False, slots=True)
class Place:
    """Where a session's rows are: slots [first, first + rows) of `slab`."""

    slab: Slab
    first: int


class KVCache:
    """All slabs of a span. Memory is taken when a session takes its first step and returned when a slab is empty."""

    def __init__(self, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.dtype, self.device = list(layers), dtype, device
        self._slabs: dict[tuple[int, int, int], list[Slab]] = {}

    def open(self, session: Session) -> Place:
        """Find or make room for a session; raises torch's out-of-memory error when there is none."""
        capacity = capacity_class(session.max_length)
        slabs = self._slabs.setdefault((session.start, session.end, capacity), [])
        for slab in slabs:
            first = slab.take(session.rows)
            if first is not None:
                break
        else:
            slots = max(session.rows, min(MAX_SLOTS, SLAB_TOKENS // capacity), 1)
            slab = Slab(self.layers[session.start : session.end], slots, capacity, self.dtype, self.device)
            slabs.append(slab)
            taken = slab.take(session.rows)
            assert taken is not None
            first = taken
        session.place = Place(slab, first)
        return session.place

    def close(self, session: Session) -> None:
        """Free a session's slots; idempotent."""
        place: Place | None = session.place
        if place is None:
            return
        session.place = None
        place.slab.give_back(place.first, session.rows, session.written)
        if place.slab.empty:
            key = (session.start, session.end, place.slab.capacity)
            slabs = self._slabs.get(key, [])
            # keep a few: the next sessions of this size are likely, and fresh memory costs page faults
            if sum(slab.empty for slab in slabs) > KEPT_SLABS or place.slab.capacity > SLAB_TOKENS:
                slabs.remove(place.slab)

    def reorder(self, session: Session, hypo_ids: torch.Tensor) -> None:
        """Row i continues row hypo_ids[i] (beam search): copy the used part of the cache along the batch."""
        place: Place = session.place
        rows = hypo_ids.to(self.device)
        for kv in place.slab.kv:
            used = kv[:, place.first : place.first + session.rows, :, : session.length]
            used.copy_(used.index_select(1, rows))
