"""Stateless forward and backward over a range of blocks, cut at block boundaries so that decoding can go between.

A backward recomputes the forward chain first, keeping each block's graph (about 13 hidden states per block) or, where
memory is short, only each block's input, which costs one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from petals_agent.engine.backend import Backend

_GRAPH_FACTOR = 13  # saved activations of a block, in units of its hidden state (measured, docs/decisions)


@dataclass(eq=False, slots=True)
class TrainingWork:
    """`hidden` [b, n, h] through blocks [start, end); with `grad`, back again. `prompts` is [blocks, b or 1, p, h].

    `done` gets [output] for a forward, [grad_input] or [grad_input, grad_prompts] for a backward, or the error.
    """

    start: int
    end: int
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    grad: torch.Tensor | None
    done: Callable[[list[torch.Tensor] | BaseException], None]
    cancelled: bool = False
    counted: bool = True  # among what was done for users

    @property
    def tokens(self) -> int:
        return int(self.hidden.shape[0] * self.hidden.shape[1])

    def graph_bytes(self, dtype: torch.dtype) -> int:
        """What keeping the graphs of all blocks takes."""
        if self.grad is None:
            return 0
        return self.hidden.numel() * dtype.itemsize * _GRAPH_FACTOR * (self.end - self.start)


def run_training(work: TrainingWork, backend: Backend, keep: bool) -> Iterator[list[torch.Tensor] | None]:
    """Yields None after each block, and the result at the end; with `keep`, a backward keeps the graphs of its blocks."""
    hidden = work.hidden.to(backend.device, backend.dtype)
    prompts = None if work.prompts is None else work.prompts.to(backend.device, backend.dtype)
    if work.grad is None:
        for layer in range(work.start, work.end):
            with torch.inference_mode():
                hidden = backend.block(layer, _prompted(hidden, prompts, layer - work.start))
            yield None
        yield [hidden]
        return
    grad = work.grad.to(backend.device, backend.dtype)
    saved: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for layer in range(work.start, work.end):
        inputs = _prompted(hidden, prompts, layer - work.start).detach()
        if keep:
            inputs.requires_grad_(True)
            with torch.enable_grad():
                output = backend.block(layer, inputs)
            saved.append((inputs, output))
            hidden = output.detach()
        else:
            saved.append((inputs, None))
            if layer + 1 < work.end:  # the last block's output is not needed
                with torch.no_grad():
                    hidden = backend.block(layer, inputs)
        yield None
    prompt_grads: list[torch.Tensor] = []
    for layer in reversed(range(work.start, work.end)):
        inputs, kept = saved.pop()
        with torch.enable_grad():
            if kept is None:
                inputs.requires_grad_(True)
                kept = backend.block(layer, inputs)
            (grad,) = torch.autograd.grad(kept, inputs, grad)
        del inputs, kept  # others may run before we go on
        if prompts is not None:
            prompt_grads.append(grad[:, : prompts.shape[2]])
        yield None
    yield [grad] if prompts is None else [grad, torch.stack(prompt_grads[::-1])]


def _prompted(hidden: torch.Tensor, prompts: torch.Tensor | None, block: int) -> torch.Tensor:
    if prompts is None:
        return hidden
    hidden = hidden.clone()
    hidden[:, : prompts.shape[2]] += prompts[block]
    return hidden
