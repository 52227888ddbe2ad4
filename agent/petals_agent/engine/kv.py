"""The KV cache: slabs of equal-sized slots, so that sessions in neighbouring slots share one attention call.

A slab holds one tensor per block, [2, slots, kv_heads, capacity, head_dim] (keys, then values). Capacity is the
session's max_length rounded up to a half-octave; slabs of short sessions have many slots, long sessions get one of their
own. Shared slabs take at most the memory that sessions are promised altogether, whatever peers open and close; whoever
finds no room in them gets a slab of exactly its size, so that all of them take at most twice the promise. A slot is zeroed when it is freed: stale values must stay finite (masked positions are still multiplied by zero), and no
session may see another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from petals_agent.engine.session import Session

SLAB_TOKENS = 8192  # slots × capacity that one slab aims at
MAX_SLOTS = 64
MIN_CAPACITY = 64


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
        self,
        layers: Sequence[LayerShape],
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
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

    @property
    def size(self) -> int:
        """Tokens × blocks."""
        return self.slots * self.capacity * len(self.kv)


@dataclass(eq=False, slots=True)
class Place:
    """Where a session's rows are: slots [first, first + rows) of `slab`."""

    slab: Slab
    first: int


class KVCache:
    """All slabs of a span. Memory is taken when a session takes its first step; empty slabs are kept for the next ones."""

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        dtype: torch.dtype,
        device: torch.device,
        tokens: int = 16384,
    ) -> None:
        """`layers` by block number, as they are at any time; `tokens` of each is what open sessions are promised altogether."""
        self.layers, self.dtype, self.device = layers, dtype, device
        self.held = 0  # tokens × blocks in all slabs
        self._tokens = tokens
        self._shared_size = 0  # of it, in shared slabs
        self._slabs: dict[tuple[int, int, int], list[Slab]] = {}  # shared ones, by range and capacity

    def open(self, session: Session) -> Place:
        """Find or make room for a session; raises torch's out-of-memory error when there is none."""
        capacity = capacity_class(session.max_length)
        for slab in self._slabs.get((session.start, session.end, capacity), ()):
            first = slab.take(session.rows)
            if first is not None:
                break
        else:
            slab = self._shared(session, capacity) or self._make(
                session, session.rows, max(session.max_length, 1)
            )
            first = slab.take(session.rows)
            assert first is not None
        place = session.place = Place(slab, first)
        return place

    def close(self, session: Session) -> None:
        """Free a session's slots; idempotent."""
        place: Place | None = session.place
        if place is None:
            return
        session.place = None
        slab = place.slab
        key = (session.start, session.end, slab.capacity)
        if slab not in self._slabs.get(key, ()):  # its own one
            self.held -= slab.size
            return
        slab.give_back(place.first, session.rows, session.written)
        if slab.empty and slab.capacity > SLAB_TOKENS:
            self._drop(key, slab)

    def tidy(self) -> None:
        """Drop empty slabs for blocks that are here no more."""
        for key, slabs in list(self._slabs.items()):
            if not all(block in self.layers for block in range(key[0], key[1])):
                for slab in [slab for slab in slabs if slab.empty]:
                    self._drop(key, slab)

    def _shared(self, session: Session, capacity: int) -> Slab | None:
        """A new slab for sessions like this one, or None when there is no room for it."""
        slot = capacity * (session.end - session.start)
        while (room := self._tokens * len(self.layers) - self._shared_size) < slot * session.rows:
            empty = next(
                ((key, slab) for key, slabs in self._slabs.items() for slab in slabs if slab.empty), None
            )
            if empty is None:
                return None
            self._drop(*empty)
        # at most half of what is left: sessions of another size may come
        slots = min(MAX_SLOTS, SLAB_TOKENS // capacity, room // slot // 2)
        slab = self._make(session, max(slots, session.rows), capacity)
        self._slabs.setdefault((session.start, session.end, capacity), []).append(slab)
        self._shared_size += slab.size
        return slab

    def _make(self, session: Session, slots: int, capacity: int) -> Slab:
        layers = [self.layers[block] for block in range(session.start, session.end)]
        slab = Slab(layers, slots, capacity, self.dtype, self.device)
        self.held += slab.size
        return slab

    def _drop(self, key: tuple[int, int, int], slab: Slab) -> None:
        self._slabs[key].remove(slab)
        if not self._slabs[key]:
            del self._slabs[key]
        self._shared_size -= slab.size
        self.held -= slab.size

    def reorder(self, session: Session, hypo_ids: torch.Tensor) -> None:
        """Row i continues row hypo_ids[i] (beam search): copy the used part of the cache along the batch."""
        place: Place = session.place
        rows = hypo_ids.to(self.device)
        for kv in place.slab.kv:
            used = kv[:, place.first : place.first + session.rows, :, : session.length]
            used.copy_(used.index_select(1, rows))
