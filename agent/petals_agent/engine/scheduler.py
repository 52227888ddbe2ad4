"""Which work runs next: decode rows of all ready sessions together, prefill in chunks beside them, training in between.

A plain object without torch, threads or clocks: the engine passes in the time. Rules, each with its reason:

- All ready decode steps of one block range run as one batch; a batch costs little more than one row.
- Running k rows now and n - k later costs the fixed part of a step twice, and while we compute, others can hardly be heard
  (docs/decisions/0004). So we wait for sessions of the last two steps that tend to be back soon, at most half a step.
- A long prompt runs in chunks sized so that a step stays near `target_step_s`: decode rows beside it wait that long.
- Forward/backward work is cut into slices by its owner; while steps are ready too, it gets `training_share` of the time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_PATIENCE = 0.5  # of a step
_STEP_MEMORY = 0.1  # weight of the newest step in the mean duration
_SLOWING = 1.25  # how much slower than before a session must come back to be believed slower at once
DECODE_TOKENS = 8  # a step of at most so many tokens a row rides along whole


class Schedulable(Protocol):
    """What the scheduler needs to know of a step."""

    @property
    def session(self) -> Hashable: ...
    @property
    def rows(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def group(self) -> Hashable: ...
    @property
    def whole(self) -> bool: ...


W = TypeVar("W", bound=Schedulable)


@dataclass(frozen=True)
class Batch(Generic[W]):
    """Run these together: each work with how many tokens per row of it."""

    items: list[tuple[W, int]]

    @property
    def tokens(self) -> int:
        return sum(work.rows * count for work, count in self.items)


@dataclass(frozen=True)
class TrainingSlice:
    """Run one slice of the oldest forward/backward work."""


@dataclass(frozen=True)
class WaitUntil:
    """Nothing to run yet; look again at this time, or when so many steps were added."""

    time: float
    steps: int


class Scheduler(Generic[W]):
    """Queue of steps, fair in order of arrival; one step per session at a time is the caller's duty."""

    def __init__(
        self,
        *,
        max_batch_tokens: int = 2048,
        target_step_s: float = 0.05,
        min_chunk: int = 32,
        training_share: float = 0.5,
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.target_step_s = target_step_s
        self.min_chunk = min_chunk
        self.training_share = training_share
        self._waiting: OrderedDict[int, W] = OrderedDict()  # by id(work), in order of arrival
        self._training = 0  # training works that are not finished
        # sessions of the last two decode steps → when they were answered
        self._answered: dict[Hashable, float] = {}
        self._last_decode: set[Hashable] = set()  # sessions of the last one
        self._away_s: dict[Hashable, float] = {}  # session → how soon it comes back after an answer
        self._step_s = 0.0  # running mean of the duration of decode steps
        self._waits_since: float | None = None  # since when the next batch is held back
        self._here: dict[Hashable, int] = {}  # sessions with a waiting step
        self._token_cost_s = 0.0  # running mean of seconds per token in steps with prefill
        self._credit = 0.0  # weighted seconds that training has coming while steps wait

    # --- what happened

    def add(self, work: W, now: float) -> None:
        """Queue a step that came at time `now` (before this call, when the engine was busy)."""
        self._waiting[id(work)] = work
        answered = self._answered.get(work.session)
        if answered is not None:
            away, usual = max(now - answered, 0.0), self._away_s.get(work.session)
            self._away_s[work.session] = away if usual is None else min(away, _SLOWING * usual)
        self._here[work.session] = self._here.get(work.session, 0) + 1

    def drop_session(self, session: Hashable) -> list[W]:
        """Forget a session that is gone; returns its waiting steps."""
        dropped = [work for work in self._waiting.values() if work.session is session]
        for work in dropped:
            self._remove(work)
        self._answered.pop(session, None)
        self._away_s.pop(session, None)
        return dropped

    def add_training(self) -> None:
        self._training += 1

    def training_done(self) -> None:
        self._training -= 1
        if not self._training:
            self._credit = 0.0

    def ran(self, batch: Batch[W], started: float, ended: float) -> None:
        """Tell how long a batch took; works with tokens left go behind all others (round robin), those done are removed."""
        decode: set[Hashable] = set()
        for work, count in batch.items:
            if count <= DECODE_TOKENS:
                decode.add(work.session)
            if work.remaining > 0:
                self._waiting.move_to_end(id(work))
            else:
                self._remove(work)
        duration = max(ended - started, 0.0)
        if decode:
            self._answered = {who: when for who, when in self._answered.items() if who in self._last_decode}
            self._answered.update(dict.fromkeys(decode, ended))
            self._last_decode = decode
            if len(decode) == len(batch.items):
                weight = _STEP_MEMORY if self._step_s else 1.0
                self._step_s += weight * (duration - self._step_s)
        if batch.tokens >= self.min_chunk:
            cost = duration / batch.tokens
            self._token_cost_s = cost if self._token_cost_s == 0 else 0.8 * self._token_cost_s + 0.2 * cost
        if self._training:
            self._credit += duration * self.training_share

    def ran_training(self, duration: float) -> None:
        """Tell how long a slice took; beside waiting steps it counts against training, else it only settles its credit."""
        floor = -math.inf if self._waiting else min(self._credit, 0.0)
        self._credit = max(self._credit - max(duration, 0.0) * (1 - self.training_share), floor)

    # --- what next

    @property
    def queued(self) -> int:
        """Steps and training works that wait or are being worked on."""
        return len(self._waiting) + self._training

    def next(self, now: float) -> Batch[W] | TrainingSlice | WaitUntil | None:
        """What to do at time `now` (seconds, monotonic); None when there is nothing at all."""
        if not self._waiting:
            return TrainingSlice() if self._training else None
        if self._training and self._credit > 0:
            return TrainingSlice()
        wait = self._wait_for_recent(now)
        if wait is not None:
            return wait  # no training slice: it may last longer than the wait, and was not due
        return self._batch()

    @property
    def patience(self) -> float:
        """Seconds that a step is held back at most."""
        return _PATIENCE * self._step_s

    def _wait_for_recent(self, now: float) -> WaitUntil | None:
        """Wait for sessions that were answered a moment ago and tend to be back before our patience ends."""
        since = now if self._waits_since is None else self._waits_since
        latest, due = since + self.patience, []
        for session, answered in self._answered.items():
            away = self._away_s.get(session, 0.0)
            until = min(latest, answered + away + self.patience)
            if session not in self._here and away <= self.patience and now < until:
                due.append(until)
        self._waits_since = since if due else None
        return WaitUntil(max(due), len(due)) if due else None

    def chunk_tokens(self, beside_decode: bool) -> int:
        """Prefill tokens for one step: as many as fit the target time; without decode rows the batch limit alone."""
        if not beside_decode and not self._answered:
            return self.max_batch_tokens
        if self._token_cost_s == 0:
            return max(self.min_chunk, 64)
        fit = int(self.target_step_s / self._token_cost_s)
        return max(self.min_chunk, min(fit, self.max_batch_tokens))

    def _batch(self) -> Batch[W]:
        oldest = next(iter(self._waiting.values()))
        if oldest.whole:
            return Batch([(oldest, oldest.remaining)])
        mates = [work for work in self._waiting.values() if work.group == oldest.group]
        decodes = [work for work in mates if work.remaining <= DECODE_TOKENS]
        chunks = [work for work in mates if work.remaining > DECODE_TOKENS]
        budget = self.max_batch_tokens
        prefill = min(budget, self.chunk_tokens(bool(decodes))) if chunks else 0
        items: list[tuple[W, int]] = []
        if chunks and chunks[0] is oldest:  # whoever waited longest advances, however wide it is
            del chunks[0]
            count = max(1, min(oldest.remaining, prefill // oldest.rows))
            items.append((oldest, count))
            budget -= count * oldest.rows
            prefill -= count * oldest.rows
        for work in decodes:
            size = work.rows * work.remaining
            if size <= budget or not items:
                items.append((work, work.remaining))
                budget -= size
        for work in chunks:
            count = min(work.remaining, min(budget, prefill) // work.rows)
            if count > 0:
                items.append((work, count))
                budget -= count * work.rows
                prefill -= count * work.rows
        return Batch(items)

    def _remove(self, work: W) -> None:
        del self._waiting[id(work)]
        left = self._here[work.session] - 1
        if left:
            self._here[work.session] = left
        else:
            del self._here[work.session]
