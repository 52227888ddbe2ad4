"""A fixed input through each served block gives what it gave after the load: weights, kernels and the engine's thread are sound."""

from __future__ import annotations

import torch

from petals_agent.engine.engine import Engine
from petals_agent.engine.selfcheck import TOLERANCE
from petals_agent.errors import ContainerError

_TOKENS = 4
_DRIFT = 10.0  # times the self-check's tolerance: the order of summation may differ between two runs, no more


class Canary:
    """`record` once after the load, then `check` now and then; each block is one short slice of the engine's time."""

    def __init__(self, engine: Engine, blocks: int) -> None:
        self._engine, self._blocks = engine, blocks
        hidden = engine.backend.hidden_size
        generator = torch.Generator().manual_seed(0)
        self._input = torch.randn(1, _TOKENS, hidden, generator=generator).to(engine.backend.dtype)
        self._expected: list[torch.Tensor] = []

    async def record(self) -> None:
        """Raises ContainerError when a block answers NaN or infinity."""
        outputs = [await self._run(block) for block in range(self._blocks)]
        for block, output in enumerate(outputs):
            if not bool(torch.isfinite(output).all()):
                raise ContainerError(
                    f"block {block} of the span computes NaN or infinity right after the load; check the weights and the dtype"
                )
        self._expected = outputs

    async def check(self) -> str | None:
        """None if every block still computes what it did; else what is wrong with the first that does not."""
        limit = _DRIFT * TOLERANCE[self._engine.backend.dtype]
        for block, expected in enumerate(self._expected):
            try:
                output = await self._run(block)
            except Exception as error:  # what the backend raised, e.g. a CUDA error
                return f"block {block} of the span fails: {type(error).__name__}: {error!s:.300}"
            if not bool(torch.isfinite(output).all()):
                return f"block {block} of the span computes NaN or infinity"
            error_size = float((output.float() - expected.float()).abs().max() / expected.float().abs().max())
            if error_size > limit:
                return f"block {block} of the span computes something else than after the load (relative error {error_size:.1e})"
        return None

    async def _run(self, block: int) -> torch.Tensor:
        (output,) = await self._engine.train(block, block + 1, self._input, counted=False)
        return output
