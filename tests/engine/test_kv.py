"""Places in the KV cache: nobody's overlap, what is left behind is zero, and memory stays within twice what was promised."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.engine.kv import KVCache, LayerShape, Place, Slab, capacity_class
from petals_agent.engine.session import Session

BLOCKS = 3
LAYERS = dict.fromkeys(range(BLOCKS), LayerShape(kv_heads=1, head_dim=2))
TOKENS = 1024  # promised, per block
CPU = torch.device("cpu")


def new_cache() -> KVCache:
    return KVCache(LAYERS, torch.float32, CPU, tokens=TOKENS)


def rows_of(session: Session) -> list[torch.Tensor]:
    """The session's part of each block's cache, [2, rows, kv_heads, capacity, head_dim]."""
    place: Place = session.place
    return [kv[:, place.first : place.first + session.rows] for kv in place.slab.kv]


def held(sessions: Iterable[Session]) -> int:
    """Tokens × blocks in all slabs that these sessions use."""
    slabs = {id(session.place.slab): session.place.slab for session in sessions}
    return sum(slab.slots * slab.capacity * len(slab.kv) for slab in slabs.values())


@pytest.mark.parametrize(
    ("length", "capacity"),
    [(0, 64), (1, 64), (64, 64), (65, 96), (96, 96), (97, 128), (129, 192), (8192, 8192)],
)
def test_capacity_classes(length: int, capacity: int) -> None:
    assert capacity_class(length) == capacity


@given(st.integers(65, 200_000))
def test_a_class_wastes_at_most_a_third(length: int) -> None:
    assert length <= capacity_class(length) <= length * 1.5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.integers(-50, -1)), max_size=60))
def test_slots_of_a_slab_never_overlap(operations: list[int]) -> None:
    """A positive number takes so many slots, a negative one gives back one of those that are taken."""
    slab = Slab([LAYERS[0]], 16, 64, torch.float32, CPU)
    taken: list[tuple[int, int]] = []
    for operation in operations:
        if operation > 0:
            first = slab.take(operation)
            free = set(range(16)) - {slot for start, count in taken for slot in range(start, start + count)}
            if first is None:
                assert not any(set(range(start, start + operation)) <= free for start in range(16))
            else:
                assert set(range(first, first + operation)) <= free
                taken.append((first, operation))
        elif taken:
            start, count = taken.pop(operation % len(taken))
            slab.give_back(start, count, 64)
        assert slab.empty == (not taken)


_SESSION = st.tuples(
    st.sampled_from([1, 1, 2, 5, 64, 100]),
    st.sampled_from([1, 2, 60, 64, 65, 200, 1024]),
    st.sampled_from([(0, 3), (0, 3), (0, 1), (1, 3), (2, 3)]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_SESSION, st.integers(0, 50)), max_size=50))
def test_sessions_come_and_go(operations: list[tuple[int, int, tuple[int, int]] | int]) -> None:
    """A tuple opens a session if the promise still holds, a number closes one. Every session finds zeros, then its own mark."""
    cache = new_cache()
    marks: dict[Session, float] = {}
    promised = 0
    for number, operation in enumerate(operations, 1):
        if isinstance(operation, tuple):
            rows, length, (start, end) = operation
            size = rows * length * (end - start)
            if promised + size > TOKENS * BLOCKS:
                continue
            promised += size
            session = Session(rows, length, start, end)
            cache.open(session)
            assert len(session.place.slab.kv) == end - start
            for kv in rows_of(session):
                assert kv.shape[:2] == (2, rows) and kv.shape[3] >= length
                assert not kv.any(), "another session's keys are still there"
                kv[:, :, :, :length] = float(number)
            session.written = length
            marks[session] = float(number)
        elif marks:
            session = list(marks)[operation % len(marks)]
            cache.close(session)
            cache.close(session)
            assert session.place is None
            promised -= session.rows * session.max_length * (session.end - session.start)
            del marks[session]
        for session, mark in marks.items():
            assert all((kv[:, :, :, : session.max_length] == mark).all() for kv in rows_of(session))
        assert held(marks) <= cache.held <= 2 * TOKENS * BLOCKS
    for session in marks:
        cache.close(session)
    assert cache.held <= TOKENS * BLOCKS


def test_memory_does_not_grow_with_the_ranges_and_sizes_that_came() -> None:
    """Each range and each size has slabs of its own, and a peer can ask for all of them one after another."""
    cache = new_cache()
    for start in range(BLOCKS):
        for end in range(start + 1, BLOCKS + 1):
            for length in (1, 65, 100, 130, 200, 300, 400, 600, 800, 1024):
                session = Session(1, length, start, end)
                cache.open(session)
                cache.close(session)
    assert cache.held <= TOKENS * BLOCKS


def test_equal_sessions_are_neighbours() -> None:
    cache = new_cache()
    sessions = [Session(1, 60, 0, 3) for _ in range(4)]
    for session in sessions:
        cache.open(session)
    assert len({id(session.place.slab) for session in sessions}) == 1
    assert [session.place.first for session in sessions] == [0, 1, 2, 3]


def test_a_freed_slab_serves_the_next_session() -> None:
    cache = new_cache()
    first = Session(1, 60, 0, 3)
    slab = cache.open(first).slab
    cache.close(first)
    assert cache.open(Session(1, 50, 0, 3)).slab is slab


def test_reorder_copies_what_is_used() -> None:
    cache = new_cache()
    session = Session(3, 10, 0, 3)
    cache.open(session)
    for kv in rows_of(session):
        kv[:, :, :, :6] = torch.arange(3.0).view(1, 3, 1, 1, 1)
    session.length = session.written = 6
    cache.reorder(session, torch.tensor([2, 0, 0]))
    for kv in rows_of(session):
        assert kv[0, :, 0, 0, 0].tolist() == [2, 0, 0] and kv[1, :, 0, 5, 1].tolist() == [2, 0, 0]
