"""The scheduler against a simulated engine: nothing is lost or run twice, budgets hold, and everybody's turn comes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.engine.scheduler import DECODE_TOKENS, Batch, Scheduler, TrainingSlice, WaitUntil


@dataclass(eq=False)
class Work:
    """A step as the scheduler sees it."""

    session: Hashable
    rows: int
    tokens: int
    group: Hashable = 0
    whole: bool = False
    done: int = 0

    @property
    def remaining(self) -> int:
        return self.tokens - self.done


def run(scheduler: Scheduler[Work], batch: Batch[Work], started: float, duration: float) -> None:
    """What the engine does with a batch."""
    for work, count in batch.items:
        work.done += count
    scheduler.ran(batch, started, started + duration)


def batches(scheduler: Scheduler[Work], now: float = 0.0, duration: float = 0.01) -> list[Batch[Work]]:
    """Run until nothing waits; fails after as many decisions as there are tokens."""
    found: list[Batch[Work]] = []
    for _ in range(10_000):
        decision = scheduler.next(now)
        if decision is None:
            return found
        assert not isinstance(decision, TrainingSlice)
        if isinstance(decision, WaitUntil):
            now = decision.time
            continue
        found.append(decision)
        run(scheduler, decision, now, duration)
        now += duration
    raise AssertionError("the work does not come to an end")


def check_batch(batch: Batch[Work], scheduler: Scheduler[Work]) -> None:
    """What holds for every batch, whatever came before."""
    assert batch.items
    assert all(0 < count <= work.remaining for work, count in batch.items)
    assert max(Counter(id(work) for work, _ in batch.items).values()) == 1, "a work twice in one batch"
    assert len({work.group for work, _ in batch.items}) == 1, "groups were mixed"
    if any(work.whole for work, _ in batch.items):
        ((work, count),) = batch.items
        assert count == work.remaining
    elif batch.tokens > scheduler.max_batch_tokens:
        ((work, count),) = batch.items  # does not fit at all, and still must advance
        assert count == 1 or count == work.remaining <= DECODE_TOKENS


class Traffic:
    """Sessions step and go, forwards come; the engine runs what it is told, in times of its own."""

    def __init__(self) -> None:
        self.scheduler: Scheduler[Work] = Scheduler(max_batch_tokens=64, min_chunk=8)
        self.now = 100.0
        self.waiting: list[Work] = []
        self.training = 0
        self.passed_over: dict[Work, int] = {}  # batches since it was added or last ran
        self.allowance: dict[Work, int] = {}  # how many of those are fair: one for each that stood before it
        self.last_end = 0.0
        self.last_duration = 0.0

    def step(self, session: tuple[int, str, bool], tokens: int) -> None:
        rows, group, whole = session
        if any(work.session == session for work in self.waiting):
            return  # one step at a time
        work = Work(session, rows, tokens, session if whole else group, whole)
        self.scheduler.add(work, self.now)
        self.waiting.append(work)
        self._stands_last(work)

    def leave(self, session: tuple[int, str, bool]) -> None:
        dropped = self.scheduler.drop_session(session)
        assert dropped == [work for work in self.waiting if work.session == session]
        self.waiting = [work for work in self.waiting if work not in dropped]

    def train(self) -> None:
        self.scheduler.add_training()
        self.training += 1

    def decide(self, duration: float, training_done: bool = True) -> None:
        decision = self.scheduler.next(self.now)
        if decision is None:
            assert not self.waiting and not self.training
            self.now += duration
        elif isinstance(decision, TrainingSlice):
            assert self.training
            self.scheduler.ran_training(duration)
            self.now += duration
            if training_done:
                self.scheduler.training_done()
                self.training -= 1
        elif isinstance(decision, WaitUntil):
            assert self.waiting
            assert self.now < decision.time <= self.now + self.scheduler.patience + 1e-9
            self.now = decision.time
            assert not isinstance(self.scheduler.next(self.now), WaitUntil)
        else:
            self._ran(decision, duration)
        assert self.scheduler.queued == len(self.waiting) + self.training

    def _ran(self, batch: Batch[Work], duration: float) -> None:
        check_batch(batch, self.scheduler)
        ran = [work for work, _ in batch.items]
        assert all(work in self.waiting for work in ran)
        run(self.scheduler, batch, self.now, duration)
        self.now += duration
        self.last_end, self.last_duration = self.now, duration
        for work in self.waiting:
            if work not in ran:
                self.passed_over[work] += 1
                assert self.passed_over[work] <= self.allowance[work], "others overtook it again and again"
        self.waiting = [work for work in self.waiting if work.remaining]
        for work in ran:
            if work.remaining:
                self._stands_last(work)

    def _stands_last(self, work: Work) -> None:
        self.passed_over[work] = 0
        self.allowance[work] = len(self.waiting)


# rows, group, whole
_SESSION = st.sampled_from(
    [
        *((rows, "a", False) for rows in (1, 2, 3, 40, 100)),
        *((rows, "b", False) for rows in (1, 4)),
        *((rows, f"alone {rows}", True) for rows in (1, 2, 90)),
    ]
)
_DURATION = st.floats(0.0, 1.0)
_OPERATION = st.one_of(
    st.tuples(
        st.just("step"), _SESSION, st.sampled_from([1, 1, 1, 2, DECODE_TOKENS, DECODE_TOKENS + 1, 30, 200])
    ),
    st.tuples(st.just("step"), _SESSION, st.just(1)),
    st.tuples(st.just("decide"), _DURATION, st.booleans()),
    st.tuples(st.just("decide"), _DURATION),
    st.tuples(st.just("leave"), _SESSION),
    st.tuples(st.just("train")),
)


@settings(max_examples=150, deadline=None)
@given(operations=st.lists(_OPERATION, min_size=20, max_size=120))
def test_any_traffic(operations: list[tuple[Any, ...]]) -> None:
    traffic = Traffic()
    for name, *arguments in operations:
        getattr(traffic, name)(*arguments)
    everything = list(traffic.waiting)
    for _ in range(10_000):
        if not traffic.waiting and not traffic.training:
            break
        traffic.decide(0.01)
    assert all(work.remaining == 0 for work in everything)
    assert traffic.scheduler.next(traffic.now) is None


def test_torch_is_not_needed() -> None:
    code = "import sys, petals_agent.engine.scheduler; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_ready_sessions_share_one_batch() -> None:
    scheduler: Scheduler[Work] = Scheduler()
    works = [Work(i, 1, 1) for i in range(20)]
    for work in works:
        scheduler.add(work, 0.0)
    (batch,) = batches(scheduler)
    assert [work for work, _ in batch.items] == works


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    """The prompt advances in every step, and no step is longer than the target asks for."""
    scheduler: Scheduler[Work] = Scheduler(target_step_s=0.05)
    prompt = Work("long", 1, 2000)
    scheduler.add(prompt, 0.0)
    now, sizes = 0.0, []
    for _ in range(60):
        scheduler.add(Work("chat", 1, 1), now)
        decision = scheduler.next(now)
        while isinstance(decision, WaitUntil):
            now = decision.time
            decision = scheduler.next(now)
        assert isinstance(decision, Batch)
        assert "chat" in {work.session for work, _ in decision.items}
        sizes.append(decision.tokens)
        run(scheduler, decision, now, 0.001 * decision.tokens)
        now += 0.001 * decision.tokens
        if not prompt.remaining:
            break
    assert prompt.remaining == 0
    assert max(sizes[len(sizes) // 2 :]) <= 60


def test_a_wide_prompt_is_not_starved_by_decoding() -> None:
    """Even when one token of each of its rows is more than the share of prefill beside decoding."""
    scheduler: Scheduler[Work] = Scheduler(min_chunk=8, target_step_s=0.0)
    wide = Work("wide", 100, 20)
    scheduler.add(wide, 0.0)
    now = 0.0
    for _ in range(40):
        if not any(work.session == "chat" for work in scheduler._waiting.values()):
            scheduler.add(Work("chat", 1, 1), now)
        decision = scheduler.next(now)
        if isinstance(decision, Batch):
            run(scheduler, decision, now, 0.01)
        now += 0.01
    assert wide.remaining == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("slice_s", [0.002, 0.1])
@pytest.mark.parametrize("pause_s", [0.0005, 0.004])
def test_training_gets_its_share_and_no_more(share: float, slice_s: float, pause_s: float) -> None:
    """Two chats that answer after `pause_s`; a step takes 10 ms."""
    scheduler: Scheduler[Work] = Scheduler(training_share=share)
    scheduler.add_training()
    now, step_time, training_time, beside_steps = 0.0, 0.0, 0.0, 0.0
    arrivals = [(0.0, "a"), (pause_s, "b"), (2 * pause_s, "c")]
    for _ in range(3000):
        for time, name in [arrival for arrival in arrivals if arrival[0] <= now]:
            arrivals.remove((time, name))
            scheduler.add(Work(name, 1, 1), now)
        decision = scheduler.next(now)
        if isinstance(decision, TrainingSlice):
            waiting = scheduler.queued > 1
            scheduler.ran_training(slice_s)
            now += slice_s
            training_time += slice_s
            beside_steps += slice_s if waiting else 0.0
        elif isinstance(decision, WaitUntil):
            now = min([decision.time, *(time for time, _ in arrivals)])
        else:
            assert isinstance(decision, Batch)
            run(scheduler, decision, now, 0.01)
            now, step_time = now + 0.01, step_time + 0.01
            arrivals += [
                (now + pause_s * (1 + i), str(work.session)) for i, (work, _) in enumerate(decision.items)
            ]
    fair = share / (1 - share) * step_time
    assert beside_steps <= fair + slice_s + 0.02
    assert training_time >= fair - slice_s - 0.02


def test_a_step_does_not_wait_for_more_than_the_slice_that_runs() -> None:
    scheduler: Scheduler[Work] = Scheduler()
    scheduler.add_training()
    assert isinstance(scheduler.next(0.0), TrainingSlice)
    scheduler.ran_training(1.0)
    scheduler.add(Work("a", 1, 1), 1.0)
    assert isinstance(scheduler.next(1.0), Batch)


def two_steps_together(pause_s: float) -> Scheduler[Work]:
    """Sessions "a" and "b" were answered at 2 s, after a step of 1 s, and came back after `pause_s` before."""
    scheduler: Scheduler[Work] = Scheduler()
    for started in (-pause_s, 1.0):
        for name in "ab":
            scheduler.add(Work(name, 1, 1), started)
        decision = scheduler.next(started)
        assert isinstance(decision, Batch)
        run(scheduler, decision, started, 1.0)
    return scheduler


def test_a_session_that_is_due_is_waited_for() -> None:
    scheduler = two_steps_together(pause_s=0.1)
    scheduler.add(Work("a", 1, 1), 2.05)
    decision = scheduler.next(2.05)
    assert isinstance(decision, WaitUntil)
    assert (decision.time, decision.steps) == (pytest.approx(2.55), 1)
    scheduler.add(Work("b", 1, 1), 2.1)
    batch = scheduler.next(2.1)
    assert isinstance(batch, Batch) and len(batch.items) == 2


def test_a_session_that_tends_to_take_longer_than_half_a_step_is_not_waited_for() -> None:
    scheduler = two_steps_together(pause_s=0.9)
    scheduler.add(Work("a", 1, 1), 2.1)
    assert isinstance(scheduler.next(2.1), Batch)


def test_a_session_that_is_late_is_not_waited_for() -> None:
    scheduler = two_steps_together(pause_s=0.1)
    scheduler.add(Work("a", 1, 1), 3.0)
    assert isinstance(scheduler.next(3.0), Batch)


def test_a_step_that_came_while_the_engine_was_busy_counts_from_its_coming() -> None:
    """Else two groups that take turns would each look slow, and never merge."""
    scheduler: Scheduler[Work] = Scheduler()
    works = {"a": 0.0, "b": 0.0}
    now, together = 0.0, 0
    for name in works:  # one after the other at first
        scheduler.add(Work(name, 1, 1), now)
        decision = scheduler.next(now)
        if isinstance(decision, WaitUntil):
            now = decision.time
            decision = scheduler.next(now)
        assert isinstance(decision, Batch)
        run(scheduler, decision, now, 1.0)
        now += 1.0
        works[name] = now + 0.1
    for _ in range(20):
        for name, comes in works.items():
            if comes <= now:
                scheduler.add(Work(name, 1, 1), comes)
                works[name] = math.inf
        decision = scheduler.next(now)
        if isinstance(decision, Batch):
            run(scheduler, decision, now, 1.0)
            now += 1.0
            together += len(decision.items) == 2
            works.update({str(work.session): now + 0.1 for work, _ in decision.items})
        else:
            ends = decision.time if isinstance(decision, WaitUntil) else math.inf
            now = min(ends, *works.values())
    assert together >= 5


def test_a_session_that_became_slow_is_soon_not_waited_for() -> None:
    scheduler = two_steps_together(pause_s=0.1)
    now, waits = 2.0, 0
    for _ in range(30):
        for name, pause in (("a", 0.1), ("b", 3.0)):
            if not any(work.session == name for work in scheduler._waiting.values()):
                scheduler.add(Work(name, 1, 1), now + pause)
        now += 3.0
        decision = scheduler.next(now)
        assert isinstance(decision, Batch)
        run(scheduler, decision, now, 1.0)
        now += 1.0
        scheduler.add(Work("a", 1, 1), now + 0.1)
        if isinstance(scheduler.next(now + 0.1), WaitUntil):
            waits += 1
    assert waits < 10


def test_a_lone_session_waits_for_nobody() -> None:
    scheduler: Scheduler[Work] = Scheduler()
    now = 0.0
    for _ in range(10):
        scheduler.add(Work("alone", 1, 1), now)
        decision = scheduler.next(now)
        assert isinstance(decision, Batch)
        run(scheduler, decision, now, 0.01)
        now += 0.02


def test_a_session_that_left_is_not_waited_for() -> None:
    scheduler = two_steps_together(pause_s=0.1)
    scheduler.add(Work("a", 1, 1), 2.05)
    assert isinstance(scheduler.next(2.05), WaitUntil)
    scheduler.drop_session("b")
    assert isinstance(scheduler.next(2.05), Batch)
