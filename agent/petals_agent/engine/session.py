"""An inference session as the engine sees it, and the work that is queued for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_numbers = itertools.count(1)


@dataclass(eq=False, slots=True)
class Session:
    """`rows` sequences (batch or beams) of at most `max_length` tokens over blocks [start, end) of the model."""

    rows: int
    max_length: int
    start: int
    end: int
    number: int = field(default_factory=lambda: next(_numbers))
    length: int = 0  # tokens in the KV cache, per row
    written: int = 0  # positions of the cache that were ever written (a rollback lowers only `length`)
    closed: bool = False
    counted: bool = True  # among what was done for users
    solo: bool = False  # must not share a step with other sessions, nor be cut into chunks
    place: Any = None  # where the KV cache put it (kv.Place); None until the first step

    @property
    def group(self) -> tuple[int, ...]:
        """Sessions of one group can share a step."""
        return (self.start, self.end, self.number) if self.solo else (self.start, self.end)


@dataclass(eq=False, slots=True)
class StepWork:
    """One client step: `hidden` [rows, n, hidden_size] enters block `session.start` at the session's length.

    `done` is called once, from the engine's thread, with the output [rows, n, hidden_size] or the error.
    """

    session: Session
    hidden: torch.Tensor
    done: Callable[[torch.Tensor | BaseException], None]
    prompts: torch.Tensor | None = None  # [blocks, rows or 1, p, hidden_size], added to the first p tokens
    hypo_ids: torch.Tensor | None = None  # [rows] int64: which row each row continues
    rollback_to: int | None = None  # KV length to keep before this step
    offset: int = 0  # tokens of this step that are already done (long steps run in chunks)
    parts: list[torch.Tensor] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """Tokens per row in the whole step."""
        return int(self.hidden.shape[1])

    @property
    def remaining(self) -> int:
        """Tokens per row still to be computed."""
        return self.tokens - self.offset

    @property
    def rows(self) -> int:
        return self.session.rows

    @property
    def group(self) -> tuple[int, ...]:
        return self.session.group

    @property
    def whole(self) -> bool:
        return self.session.solo
