"""What the engine asks of a backend: run packed tokens through a range of blocks, and single blocks for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import torch

from petals_agent.engine.kv import LayerShape
from petals_agent.engine.plan import StepPlan

# (offset of the first token, tokens, prompt [p, hidden_size] per block): see StepWork.prompts
Prompts = list[tuple[int, list[torch.Tensor]]]


class Backend(Protocol):
    """Blocks on one device, known by their numbers in the model. Which they are changes only between two steps."""

    name: str
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    solo: bool  # sessions must not share a step

    @property
    def layers(self) -> Mapping[int, LayerShape]:
        """KV shape of each block that is here."""
        ...

    def join(self, other: Self) -> None:
        """Take the blocks of another backend of the same model, which is not used any more; none may be here already."""
        ...

    def keep(self, start: int, end: int) -> None:
        """Drop all blocks but [start, end)."""
        ...

    def step(
        self, hidden: torch.Tensor, plan: StepPlan, start: int, end: int, prompts: Prompts
    ) -> torch.Tensor:
        """Blocks [start, end) over packed tokens [tokens, hidden_size]; writes the KV cache through `plan`."""
        ...

    def block(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """One block over whole sequences [batch, n, hidden_size] from position 0; differentiable in `hidden`."""
        ...


def add_prompts(hidden: torch.Tensor, prompts: Prompts, block: int) -> None:
    """Add each prompt of `block` (counted within the range) to its tokens, in place."""
    for offset, per_block in prompts:
        prompt = per_block[block]
        hidden[offset : offset + prompt.shape[0]] += prompt
