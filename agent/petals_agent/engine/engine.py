"""The engine's thread: takes work from the event loop, runs batches the scheduler chooses, hands results back together.

All tensors of the KV cache belong to this thread. Sessions are opened, stepped and closed from the event loop's thread;
what they need here travels in a queue.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from petals_agent.engine.backend import Backend, Prompts
from petals_agent.engine.inbox import Change, Inbox
from petals_agent.engine.kv import KVCache
from petals_agent.engine.plan import StepPlan
from petals_agent.engine.scheduler import Batch, Scheduler, TrainingSlice
from petals_agent.engine.session import Session, StepWork
from petals_agent.engine.training import TrainingWork, run_training
from petals_agent.errors import RequestError
from petals_agent.histogram import BATCH_ROWS, STEP_SECONDS, Histogram
from petals_agent.log import event

log = logging.getLogger("petals_agent.engine")

_TRAINING_AT_ONCE = 4  # forwards and backwards that are under way; each holds tensors of its own


@dataclass
class EngineStats:
    """Counters, written by the engine's thread alone."""

    progress: int = 0  # grows with every batch and training slice: stands still only when stalled or idle
    tokens: int = 0  # tokens × rows that passed the span in steps and forwards
    batch_rows: Histogram = field(default_factory=lambda: Histogram(BATCH_ROWS))
    step_seconds: Histogram = field(
        default_factory=lambda: Histogram(STEP_SECONDS)
    )  # answered ones, the wait included


@dataclass(eq=False)
class _Training:
    work: TrainingWork
    slices: Iterator[list[torch.Tensor] | None]
    kept_bytes: int


class Engine:
    """Runs a backend. Public methods are called from the event loop's thread."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler[StepWork] | None = None,
        *,
        cache_tokens: int = 16384,
        keep_bytes: int = 2**30,
        parallel_tokens: int = 256,
    ) -> None:
        """A batch of `parallel_tokens` or more runs on all of torch's threads, smaller ones on one; backwards keep
        activations of up to `keep_bytes` rather than compute them twice. `cache_tokens` of each block are what open
        sessions are promised altogether.
        """
        self.backend = backend
        self.stats = EngineStats()
        self._scheduler = scheduler if scheduler is not None else Scheduler[StepWork]()
        self._keep_bytes = keep_bytes  # that are left
        self._parallel_tokens = parallel_tokens
        self._all_threads = torch.get_num_threads()
        self._threads = 0
        self._cache = KVCache(backend.layers, backend.dtype, backend.device, cache_tokens)
        self._inbox = Inbox()
        self._training: deque[_Training] = deque()  # under way, in turns
        self._training_waits: deque[TrainingWork] = deque()
        self._results: list[tuple[Callable[[Any], None], Any]] = []
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    # --- event loop's side

    def start(self, on_death: Callable[[], None] = lambda: None) -> None:
        """Start the thread; results are delivered to the running event loop. `on_death` is called, in that thread,
        should a bug end it: nothing would be answered any more.
        """
        self._loop, self._on_death = asyncio.get_running_loop(), on_death
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Finish the batch that runs, then end; works that wait are dropped without an answer."""
        self._stopping = True
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def queued(self) -> int:
        """Works that wait or run; with `stats.progress` it tells a stall from idleness."""
        return self._scheduler.queued + len(self._inbox.items)

    async def step(
        self,
        session: Session,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        rollback_to: int | None = None,
    ) -> torch.Tensor:
        """One step of a session: [rows, n, hidden_size] → the same shape, on the CPU. After a cancellation only `close` makes sense.

        Raises RequestError for input that is not finite, and whatever the backend raised for this session alone.
        """
        answer = asyncio.get_running_loop().create_future()
        self._inbox.put(StepWork(session, hidden, _setter(answer), prompts, hypo_ids, rollback_to))
        result: torch.Tensor = await answer
        return result

    async def train(
        self,
        start: int,
        end: int,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        grad: torch.Tensor | None = None,
        counted: bool = True,
    ) -> list[torch.Tensor]:
        """Forward, or with `grad` backward, through blocks [start, end); see TrainingWork."""
        answer = asyncio.get_running_loop().create_future()
        work = TrainingWork(start, end, hidden, prompts, grad, _setter(answer), counted=counted)
        self._inbox.put(work)
        try:
            result: list[torch.Tensor] = await answer
        finally:
            work.cancelled = True
        return result

    async def change(self, do: Callable[[], None]) -> None:
        """Call `do`, which changes the backend's blocks, between two steps; raises what it raises."""
        answer = asyncio.get_running_loop().create_future()
        self._inbox.put(Change(do, _setter(answer)))
        await answer

    def close(self, session: Session) -> None:
        """Give up a session: waiting steps are dropped, its cache is free at the next step boundary."""
        if not session.closed:
            session.closed = True
            self._inbox.put(session)

    # --- engine's side

    def _live(self) -> None:
        try:
            self._run()
        except BaseException:
            log.critical("the engine died, which is a bug in it", exc_info=True, extra=event("engine_died"))
            self._on_death()

    def _run(self) -> None:
        while not self._stopping:
            self._take()
            decision = self._scheduler.next(time.monotonic())
            if isinstance(decision, Batch):
                self._run_batch(decision)
            elif isinstance(decision, TrainingSlice):
                self._run_training_slice()
            else:
                self._deliver()
                if decision is None:
                    self._inbox.wait(1, None)
                else:
                    self._inbox.wait(decision.steps, max(decision.time - time.monotonic(), 0.0))
            if self._results:
                self._deliver()

    def _take(self) -> None:
        items = self._inbox.items
        while items:
            item = items.popleft()
            if isinstance(item, Session):
                self._scheduler.drop_session(item)
                self._cache.close(item)
            elif isinstance(item, TrainingWork):
                self._training_waits.append(item)
                self._scheduler.add_training()
            elif isinstance(item, Change):
                try:
                    item.do()
                    self._cache.tidy()
                except Exception as error:
                    self._results.append((item.done, error))
                else:
                    self._results.append((item.done, None))
            elif not item.session.closed:
                try:
                    self._begin(item)
                except Exception as error:
                    self._results.append((item.done, error))
                else:
                    self._scheduler.add(item, item.arrived)

    def _begin(self, work: StepWork) -> None:
        """What must happen once before the first token of a step: a place, the rollback, the reorder of rows."""
        session = work.session
        if session.place is None:
            session.solo = self.backend.solo
            self._cache.open(session)
        if work.rollback_to is not None:
            session.length = work.rollback_to
        if work.hypo_ids is not None:
            with torch.inference_mode():
                self._cache.reorder(session, work.hypo_ids)

    def _run_batch(self, batch: Batch[StepWork]) -> None:
        started = time.monotonic()
        self._use_threads_for(batch.tokens)
        try:
            self._forward(batch.items)
        except Exception as error:
            self._blame(batch, error)
        self._scheduler.ran(batch, started, time.monotonic())
        self.stats.progress += 1
        self.stats.batch_rows.observe(sum(work.rows for work, _ in batch.items))

    def _use_threads_for(self, tokens: int) -> None:
        """Small products lose more to the hand-over between threads than they gain (docs/decisions/0007)."""
        threads = self._all_threads if tokens >= self._parallel_tokens else 1
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    def _blame(self, batch: Batch[StepWork], error: Exception) -> None:
        """A batch failed: run each work alone, so that only those fail that must."""
        if len(batch.items) == 1:
            self._fail(batch.items[0][0], error)
            return
        level = logging.DEBUG if isinstance(error, RequestError) else logging.WARNING
        log.log(level, "a batch of %d works failed (%s); running them one by one", len(batch.items), error)
        for work, count in batch.items:
            try:
                self._forward([(work, count)])
            except Exception as own:
                self._fail(work, own)

    def _fail(self, work: StepWork, error: Exception) -> None:
        work.offset = work.tokens
        self._results.append((work.done, error))

    def _forward(self, items: list[tuple[StepWork, int]]) -> None:
        with torch.inference_mode():
            plan = StepPlan(items, self.backend.dtype, self.backend.device)
            for work, count in items:
                session = work.session
                session.written = max(session.written, session.length + count)
            parts = [
                work.hidden[:, work.offset : work.offset + count].reshape(-1, self.backend.hidden_size)
                for work, count in plan.order
            ]
            packed = (
                parts[0] if len(parts) == 1 else torch.cat([part.to(self.backend.dtype) for part in parts])
            )
            packed = packed.to(self.backend.device, self.backend.dtype)
            if not torch.isfinite(packed).all():
                self._refuse_not_finite(items)
            start, end = items[0][0].session.start, items[0][0].session.end
            output = self.backend.step(packed, plan, start, end, self._prompts(plan.order)).to("cpu")
        token = 0
        for work, count in plan.order:
            size = work.rows * count
            self._advance(work, count, output[token : token + size])
            token += size

    def _refuse_not_finite(self, items: list[tuple[StepWork, int]]) -> None:
        for work, count in items:
            part = work.hidden[:, work.offset : work.offset + count].to(self.backend.dtype)
            if len(items) == 1 and not torch.isfinite(part).all():
                raise RequestError("hidden_states contain NaN or infinity (or do not fit the served dtype)")
        raise RequestError("hidden_states of one session in the batch contain NaN or infinity")

    def _prompts(self, order: list[tuple[StepWork, int]]) -> Prompts:
        """Prompts apply to the first p tokens of the message; a chunk takes the part that falls into it."""
        found: Prompts = []
        token = 0
        for work, count in order:
            if work.prompts is not None:
                prompts = work.prompts.to(self.backend.device, self.backend.dtype)
                part = prompts[:, :, work.offset : work.offset + count]
                if part.shape[2]:
                    for row in range(work.rows):
                        of_row = part[:, row if part.shape[1] > 1 else 0]
                        found.append((token + row * count, list(of_row)))
            token += work.rows * count
        return found

    def _advance(self, work: StepWork, count: int, output: torch.Tensor) -> None:
        """Bookkeeping after `count` tokens per row of `work` are in the cache."""
        work.session.length += count
        work.offset += count
        rows = output.view(work.rows, count, self.backend.hidden_size)
        self.stats.tokens += work.rows * count if work.session.counted else 0
        if work.remaining > 0:
            work.parts.append(rows)
            return
        result = torch.cat((*work.parts, rows), dim=1) if work.parts else rows
        work.parts = []
        if work.session.counted:
            self.stats.step_seconds.observe(time.monotonic() - work.arrived)
        self._results.append((work.done, result))

    def _begin_training(self) -> None:
        while self._training_waits and len(self._training) < _TRAINING_AT_ONCE:
            work = self._training_waits.popleft()
            size = work.graph_bytes(self.backend.dtype)
            kept = size if size <= self._keep_bytes else 0
            self._keep_bytes -= kept
            self._training.append(_Training(work, run_training(work, self.backend, kept == size), kept))

    def _run_training_slice(self) -> None:
        self._begin_training()
        job = self._training[0]
        started = time.monotonic()
        result: list[torch.Tensor] | BaseException | None = None
        if job.work.cancelled:
            result = RequestError("cancelled")
        else:
            self._use_threads_for(job.work.tokens)
            try:
                result = next(job.slices)
            except Exception as error:
                result = error
        self._scheduler.ran_training(time.monotonic() - started)
        self.stats.progress += 1
        if result is not None:
            self._training.popleft()
            self._keep_bytes += job.kept_bytes
            self._scheduler.training_done()
            self.stats.tokens += job.work.tokens if job.work.counted else 0
            if isinstance(result, list):
                result = [tensor.detach().to("cpu") for tensor in result]
            self._results.append((job.work.done, result))
        elif len(self._training) > 1:
            self._training.rotate(-1)  # a short request is not held up by a long one

    def _deliver(self) -> None:
        """Hand all results over with one wake-up of the event loop."""
        if self._results:
            results, self._results = self._results, []
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(_give, results)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._stopping = True


def _give(results: list[tuple[Callable[[Any], None], Any]]) -> None:
    for done, result in results:
        done(result)


def _setter(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    def done(result: Any) -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    return done
