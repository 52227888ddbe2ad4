"""Many sessions at once through a real engine, each compared with a plain forward over what it really said so far."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.waiting import until
from petals_agent.container.backends import SpanRequest, load_backend
from petals_agent.engine.backend import Backend
from petals_agent.engine.engine import Engine
from petals_agent.engine.packed import PackedBackend
from petals_agent.engine.padded import PaddedBackend
from petals_agent.engine.scheduler import Scheduler
from petals_agent.engine.session import Session, StepWork
from petals_agent.models.source import open_model
from petals_agent.models.span import SpanModel, load_span

FIRST, LAST = 1, 6  # blocks of the tiny model that are served
MAX_LENGTH = 40
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Action:
    """One step of a session; fractions choose within what is possible at that point."""

    tokens: int
    rollback: float | None = None  # to this fraction of the length
    reorder: int | None = None  # seed of hypo_ids
    prompt: float | None = None  # this fraction of the tokens gets deep prompts
    vanish: bool = False  # the client goes away while the step is under way, and comes back as a new session
    pause: int = 0  # turns of the event loop before it


@dataclass(frozen=True)
class Script:
    """What one client does."""

    rows: int
    start: int
    end: int
    actions: Sequence[Action]


def random_script(rng: random.Random) -> Script:
    """A client with a taste for everything."""
    start = rng.randrange(LAST - FIRST)
    end = rng.choice([LAST - FIRST, rng.randint(start + 1, LAST - FIRST)])

    def maybe(chance: float) -> float | None:
        return rng.random() if rng.random() < chance else None

    def action() -> Action:
        return Action(
            tokens=rng.choice([1, 1, 1, 1, 2, 5, 13]),
            rollback=maybe(0.2),
            reorder=None if rng.random() < 0.6 else rng.randrange(1000),
            prompt=maybe(0.15),
            vanish=rng.random() < 0.08,
            pause=rng.choice([0, 0, 1, 5]),
        )

    return Script(rng.choice([1, 1, 1, 2, 3]), start, end, [action() for _ in range(8)])


@dataclass
class Said:
    """What a session's cache should hold: its inputs, and the prompts that were added to them before each block."""

    reference: SpanModel
    hidden: torch.Tensor  # [rows, length, hidden_size]
    prompts: torch.Tensor  # [blocks, rows, length, hidden_size]

    def rollback(self, length: int) -> None:
        self.hidden, self.prompts = self.hidden[:, :length], self.prompts[:, :, :length]

    def reorder(self, rows: torch.Tensor) -> None:
        self.hidden, self.prompts = self.hidden[rows], self.prompts[:, rows]

    def say(self, hidden: torch.Tensor, prompts: torch.Tensor | None) -> None:
        added = self.prompts.new_zeros(self.prompts.shape[0], *hidden.shape)
        if prompts is not None:
            added[:, :, : prompts.shape[2]] = prompts
        self.hidden = torch.cat((self.hidden, hidden), dim=1)
        self.prompts = torch.cat((self.prompts, added), dim=2)

    def answer(self, count: int) -> torch.Tensor:
        """What the blocks make of the last `count` tokens."""
        return self.reference(self.hidden, self.prompts)[:, -count:]


@dataclass
class SaidInSteps(Said):
    """For rotary embeddings that depend on the length so far: a plain forward over all of it is another computation.

    Each step runs on a fresh copy of the modules, so that they remember nothing of others.
    """

    def __post_init__(self) -> None:
        self._cache = self.reference.new_cache()

    def rollback(self, length: int) -> None:
        dropped = self.hidden.shape[1] - length
        if dropped:
            self._cache.crop(-dropped)
        super().rollback(length)

    def reorder(self, rows: torch.Tensor) -> None:
        self._cache.reorder_cache(rows)
        super().reorder(rows)

    def answer(self, count: int) -> torch.Tensor:
        fresh = copy.deepcopy(self.reference)
        return fresh.step(self.hidden[:, -count:], self._cache, self.prompts[:, :, -count:])


async def play(script: Script, engine: Engine, reference: SpanModel, seed: int) -> float:
    """Largest difference from the reference, relative to the largest value; inf when anything is not finite."""
    generator = torch.Generator().manual_seed(seed)
    width, blocks = reference.hidden_size, script.end - script.start
    view = reference.view(script.start, script.end)
    kind = SaidInSteps if reference.rope_depends_on_length else Said

    def fresh() -> tuple[Session, Said]:
        session = Session(script.rows, MAX_LENGTH, FIRST + script.start, FIRST + script.end)
        nothing = torch.zeros(script.rows, 0, width)
        return session, kind(view, nothing, torch.zeros(blocks, script.rows, 0, width))

    session, said = fresh()
    worst = 0.0
    for action in script.actions:
        for _ in range(action.pause):
            await asyncio.sleep(0)
        length = said.hidden.shape[1]
        rollback = None if action.rollback is None or not length else int(action.rollback * (length + 1))
        kept = length if rollback is None else rollback
        count = min(action.tokens, MAX_LENGTH - kept)
        if count == 0:
            continue
        rows = None
        if action.reorder is not None and kept:
            rows = torch.randint(
                script.rows, (script.rows,), generator=torch.Generator().manual_seed(action.reorder)
            )
        prompts = None
        if action.prompt is not None:
            long = 1 + int(action.prompt * (count - 1))
            prompts = torch.randn(blocks, script.rows if seed % 2 else 1, long, width, generator=generator)
        hidden = torch.randn(script.rows, count, width, generator=generator)
        step = asyncio.create_task(
            engine.step(session, hidden, prompts=prompts, hypo_ids=rows, rollback_to=rollback)
        )
        if action.vanish:
            await asyncio.sleep(0)
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)
            engine.close(session)
            session, said = fresh()
            continue
        if rollback is not None:
            said.rollback(rollback)
        if rows is not None:
            said.reorder(rows)
        said.say(hidden, prompts)
        answer = await asyncio.wait_for(step, 60)
        with torch.inference_mode():
            expected = said.answer(count)
        error = ((answer - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, error) if error == error else float("inf")
    engine.close(session)
    return worst


async def churn(backend: Backend, reference: SpanModel, scripts: Sequence[Script]) -> float:
    """All scripts at once, in small batches so that prompts are cut; the worst difference."""
    engine = Engine(backend, Scheduler[StepWork](max_batch_tokens=24, min_chunk=4), cache_tokens=512)
    engine.start()
    try:
        async with asyncio.TaskGroup() as group:
            clients = [
                group.create_task(play(script, engine, reference, seed))
                for seed, script in enumerate(scripts)
            ]
        await until(lambda: engine.queued == 0, 10, "the steps of those that vanished are dropped")
    finally:
        engine.stop()
    return max(client.result() for client in clients)


def load(folder: Path) -> tuple[list[Backend], SpanModel]:
    """The backend that is chosen for these blocks, then those that would be chosen next; and the reference."""
    source = open_model(str(folder))
    request = SpanRequest(source, FIRST, LAST, torch.float32, CPU, lambda progress: None)
    backends = [load_backend(request, folder.parent / "verdicts.json")]
    span = load_span(source, FIRST, LAST, torch.float32, CPU)
    if backends[0].name == "lean":
        backends.append(PackedBackend(span))
    latent = "deepseek" in span.family.model_type  # what its modules put into a cache is no keys and values
    if backends[0].name != "padded" and not getattr(span.config, "sliding_window", None) and not latent:
        backends.append(PaddedBackend(span))
    reference = load_span(source, FIRST, LAST, torch.float32, CPU)
    reference.use_attention("eager")
    return backends, reference
