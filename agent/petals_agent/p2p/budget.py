"""How many bytes of unanswered requests a process holds for its peers, and how many for one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from petals_agent.errors import LimitExceeded

FREE_BYTES = 2**16  # of each request that count for nothing: a decode step is always taken


class ByteBudget:
    """`limit` bytes for all, half of it for each peer, so that one alone cannot shut out the others."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._of: Counter[str] = Counter()

    def take(self, peer: str, size: int) -> None:
        """Count `size` bytes more of `peer`; raises LimitExceeded when they are too many."""
        if self._of[peer] + size > self.limit // 2:
            raise LimitExceeded(
                f"your requests that wait here would exceed {self.limit // 2} bytes, the limit for one peer; "
                "wait for answers"
            )
        if self.used + size > self.limit:
            raise LimitExceeded(
                f"requests that wait here would exceed {self.limit} bytes, the limit for all peers; try again"
            )
        self.used += size
        self._of[peer] += size

    def give_back(self, peer: str, size: int) -> None:
        """Undo `take`."""
        self.used -= size
        self._of[peer] -= size
        if not self._of[peer]:
            del self._of[peer]

    @contextmanager
    def hold(self, peer: str, size: int) -> Iterator[None]:
        """Count a request of `size` bytes for the time of a block."""
        charged = max(size - FREE_BYTES, 0)
        self.take(peer, charged)
        try:
            yield
        finally:
            self.give_back(peer, charged)
