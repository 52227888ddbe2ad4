"""Forward and backward through the swarm's blocks, as a function that autograd can differentiate (protocol.md §5)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from petals_agent.client import wire
from petals_agent.client.blame import Retry
from petals_agent.client.network import Network
from petals_agent.errors import ClientError
from petals_agent.swarm.view import Span

log = logging.getLogger("petals_agent.client")

MAX_CALL_TOKENS = 1024
_CALLS_AT_ONCE = 8

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


@dataclass(frozen=True)
class _Done:
    """A server's part of a forward pass: what it was given, so that it can be differentiated later."""

    span: Span
    inputs: torch.Tensor


@dataclass(frozen=True)
class ForwardPass:
    """The output [batch, n, hidden] of blocks, and what `RemoteBlocks.backward` needs."""

    output: torch.Tensor
    pieces: list[list[_Done]]  # rows in order, for each the servers in order


class RemoteBlocks:
    """Blocks [start, end) of a swarm's model, stateless.

    `forward` and `backward` are coroutines on the network's loop. Calling the object is for user code: it blocks in
    `run` (which executes a coroutine on that loop from another thread), and gradients flow to `hidden` and `prompts`.
    """

    def __init__(self, network: Network, start: int, end: int, run: Run[Any] | None = None) -> None:
        self._network = network
        self.start, self.end = start, end
        self._run = run

    def __call__(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [batch, n, hidden] → the same shape; `prompts` [blocks, batch or 1, p ≤ n, hidden].

        Raises ClientError when no servers can be found or all attempts failed.
        """
        output: torch.Tensor = _Remote.apply(self, hidden, prompts)
        return output

    async def forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> ForwardPass:
        """Run hidden states through all blocks, in pieces of at most 1024 tokens (or one row) at the same time."""
        hidden = hidden.detach()
        self._check(hidden, prompts)
        results = await self._each(
            [self._forward(self.start, self.end, rows, p) for rows, p in self._pieces(hidden, prompts)]
        )
        return ForwardPass(torch.cat([output for output, _ in results]), [done for _, done in results])

    async def backward(
        self, passed: ForwardPass, grad_output: torch.Tensor, prompts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients for the inputs [batch, n, hidden], and for the prompts if there were any (in their shape)."""
        pieces = self._pieces(grad_output.detach(), prompts)
        results = await self._each(
            [self._backward(done, g, p) for done, (g, p) in zip(passed.pieces, pieces, strict=True)]
        )
        grad_input = torch.cat([grad for grad, _ in results])
        if prompts is None:
            return grad_input, None
        grad_prompts = torch.cat([grad for _, grad in results if grad is not None], dim=1)
        return grad_input, grad_prompts if prompts.shape[1] > 1 else grad_prompts.sum(dim=1, keepdim=True)

    def run_forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None) -> ForwardPass:
        """`forward` from a thread outside the loop."""
        return self._runner()(self.forward(hidden, prompts))  # type: ignore[no-any-return]

    def run_backward(
        self, passed: ForwardPass, grad_output: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`backward` from a thread outside the loop."""
        return self._runner()(self.backward(passed, grad_output, prompts))  # type: ignore[no-any-return]

    def _runner(self) -> Run[Any]:
        if self._run is None:
            raise ClientError(
                "these RemoteBlocks have no loop to block on; await forward() and backward() instead"
            )
        return self._run

    def _check(self, hidden: torch.Tensor, prompts: torch.Tensor | None) -> None:
        if hidden.dim() != 3 or 0 in hidden.shape:
            raise ClientError(f"hidden states must be [batch, n, hidden], not {list(hidden.shape)}")
        batch, tokens, size = hidden.shape
        if prompts is not None and not (
            prompts.dim() == 4
            and prompts.shape[0] == self.end - self.start
            and prompts.shape[1] in (1, batch)
            and 0 < prompts.shape[2] <= tokens
            and prompts.shape[3] == size
        ):
            raise ClientError(
                f"prompts must be [{self.end - self.start}, 1 or {batch}, 1 … {tokens}, {size}], not {list(prompts.shape)}"
            )

    def _pieces(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Rows that are sent together, with prompts of as many rows."""
        rows = max(1, MAX_CALL_TOKENS // hidden.shape[1])
        if prompts is not None:
            prompts = prompts.detach().expand(-1, hidden.shape[0], -1, -1)
        return [
            (hidden[i : i + rows], None if prompts is None else prompts[:, i : i + rows])
            for i in range(0, hidden.shape[0], rows)
        ]

    @staticmethod
    async def _each(work: list[Coroutine[Any, Any, T]]) -> list[T]:
        """Run coroutines with a bound on how many at once; the first failure cancels the others."""
        slots = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def one(coroutine: Coroutine[Any, Any, T]) -> T:
            try:
                async with slots:
                    return await coroutine
            finally:
                coroutine.close()  # if it was cancelled while it waited for a slot

        tasks = [asyncio.create_task(one(coroutine)) for coroutine in work]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(
        self, start: int, end: int, hidden: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[_Done]]:
        """One piece through blocks [start, end); `prompts` are those of all blocks."""
        retry = Retry(
            self._network.bans, self._network.options.max_retries, f"forward of blocks {start}:{end}"
        )
        done: list[_Done] = []
        fresh = False
        while start < end:
            try:
                route = await self._network.route(
                    start, end, cache_tokens=None, avoid=retry.avoided, fresh=fresh
                )
                for span in route:
                    tensors = (hidden, self._prompts_of(span, prompts))
                    (output,) = await self._call(span, "rpc_forward", tensors, [tuple(hidden.shape)])
                    done.append(_Done(span, hidden))
                    hidden, start = output, span.end
            except ClientError as error:
                wait, fresh = retry.failed(error), True
                log.warning("%s; next attempt from block %d in %g s", error, start, wait)
                await asyncio.sleep(wait)
        return hidden, done

    async def _backward(
        self, done: list[_Done], grad: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One piece back through the servers of its forward pass, or through others if they fail."""
        retry = Retry(self._network.bans, self._network.options.max_retries, "backward")
        left = list(done)
        grad_prompts: list[torch.Tensor] = []
        while left:
            span, inputs = left[-1].span, left[-1].inputs
            shapes = [tuple(inputs.shape)]
            if prompts is not None:
                shapes.append((span.length, inputs.shape[0], prompts.shape[2], inputs.shape[2]))
            tensors = (inputs, grad, self._prompts_of(span, prompts))
            try:
                answer = await self._call(span, "rpc_backward", tensors, shapes)
            except ClientError as error:
                wait = retry.failed(error)
                log.warning("%s; computing blocks %d:%d elsewhere in %g s", error, span.start, span.end, wait)
                await asyncio.sleep(wait)
                _, again = await self._forward(span.start, span.end, inputs, prompts)
                left[-1:] = again
                continue
            grad = answer[0]
            grad_prompts[:0] = answer[1:]
            left.pop()
        return grad, torch.cat(grad_prompts) if grad_prompts else None

    async def _call(
        self, span: Span, method: str, tensors: wire.Tensors, shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        answer = await self._network.call(span.peer_id, method, (span.start, span.end), tensors, shapes)
        self._network.bans.succeeded(span.peer_id)
        return answer

    def _prompts_of(self, span: Span, prompts: torch.Tensor | None) -> torch.Tensor:
        return (
            wire.no_prompts() if prompts is None else prompts[span.start - self.start : span.end - self.start]
        )


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, blocks: RemoteBlocks, hidden: torch.Tensor, prompts: torch.Tensor | None
    ) -> torch.Tensor:
        passed = blocks.run_forward(hidden, prompts)
        ctx.blocks, ctx.passed = blocks, passed
        ctx.save_for_backward(*([] if prompts is None else [prompts]))
        return passed.output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor | None]:
        prompts = ctx.saved_tensors[0] if ctx.saved_tensors else None
        return None, *ctx.blocks.run_backward(ctx.passed, grads[0], prompts)
