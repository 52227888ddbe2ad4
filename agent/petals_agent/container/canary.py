"""A fixed input gives what it gave after the load, through each block alone and as a session's step through all of them:
weights, kernels, cache and the engine's thread are sound.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import torch

from petals_agent.engine.engine import Engine
from petals_agent.engine.selfcheck import TOLERANCE
from petals_agent.engine.session import Session
from petals_agent.errors import ContainerError

_TOKENS = 4
_DRIFT = 10.0  # times the self-check's tolerance: the order of summation may differ between two runs, no more


class Canary:
    """`record` once after each load, then `check` now and then; each part of it is a short slice of the engine's time."""

    def __init__(self, engine: Engine, start: int, end: int, before: Canary | None = None) -> None:
        """Of blocks [start, end); what `before` has recorded of some of them still counts."""
        self._engine = engine
        self._start, self._end = start, end
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, _TOKENS, engine.backend.hidden_size, generator=generator)
        self._input = hidden.to(engine.backend.dtype)
        known: dict[str, torch.Tensor] = before._expected if before is not None else {}
        self._expected: dict[str, torch.Tensor] = {
            name: known[name] for name in map(_name, range(start, end)) if name in known
        }

    async def record(self) -> None:
        """Raises ContainerError when something answers NaN or infinity."""
        for name, run in self._parts():
            if name in self._expected:
                continue
            output = await run()
            if not bool(torch.isfinite(output).all()):
                raise ContainerError(
                    f"{name} computes NaN or infinity right after the load; check the weights and the dtype"
                )
            self._expected[name] = output

    async def check(self) -> str | None:
        """None if everything still computes what it did; else what is wrong with the first part that does not."""
        limit = _DRIFT * TOLERANCE[self._engine.backend.dtype]
        for name, run in self._parts():
            expected = self._expected[name]
            try:
                output = await run()
            except Exception as error:  # what the backend raised, e.g. a CUDA error
                return f"{name} fails: {type(error).__name__}: {error!s:.300}"
            if not bool(torch.isfinite(output).all()):
                return f"{name} computes NaN or infinity"
            drift = float((output.float() - expected.float()).abs().max() / expected.float().abs().max())
            if drift > limit:
                return f"{name} computes something else than after the load (relative error {drift:.1e})"
        return None

    def _parts(self) -> list[tuple[str, Callable[[], Awaitable[torch.Tensor]]]]:
        alone = [
            (_name(block), partial(self._through_block, block)) for block in range(self._start, self._end)
        ]
        return [*alone, ("a step through the span", self._as_step)]

    async def _through_block(self, block: int) -> torch.Tensor:
        (output,) = await self._engine.train(block, block + 1, self._input, counted=False)
        return output

    async def _as_step(self) -> torch.Tensor:
        session = Session(1, _TOKENS, self._start, self._end, counted=False)
        try:
            return await self._engine.step(session, self._input)
        finally:
            self._engine.close(session)


def _name(block: int) -> str:
    return f"block {block}"
