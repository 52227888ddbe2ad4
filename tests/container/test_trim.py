"""Freed memory goes back to the system in a pause, and only then."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from petals_agent.container.trim import Trimmer

# small pieces, freed but for the last one, which keeps the heap as large as it was
FREED = """
import ctypes, psutil
from petals_agent.models.memory import return_freed_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [c.malloc(1000) for _ in range(100_000)]
for piece in pieces:
    ctypes.memset(piece, 1, 1000)
for piece in pieces[:-1]:
    c.free(piece)
before = psutil.Process().memory_info().rss
return_freed_memory()
print((before - psutil.Process().memory_info().rss) // 2**20)
"""


def test_freed_memory_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREED], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > 80, "of 95 MiB"


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans())))
def test_only_in_a_pause_and_once(beats: list[tuple[int, bool]]) -> None:
    """Beats as (steps since the last one, whether something is in work)."""
    trimmer, progress, pending, first = Trimmer(), 0, True, True
    for steps, busy in beats:
        progress += steps
        pending = pending or steps > 0
        expected = pending and not busy and steps == 0 and not first
        assert trimmer.due(progress, busy) == expected
        pending, first = pending and not expected, False
