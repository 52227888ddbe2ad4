"""Does a backend compute what the plain modules compute? Asked at every load, since some families silently do not.

Two sessions are mixed: one starts while the other decodes, prompts come in chunks, and a rollback is made. The outputs
must equal a plain forward over each session's whole input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from petals_agent.engine.backend import Backend
from petals_agent.engine.kv import KVCache
from petals_agent.engine.plan import StepPlan
from petals_agent.engine.session import Session, StepWork

# Relative to the largest output; rounding of a few blocks, not a wrong mask, which is off by 0.1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_LONG, _SHORT = 21, 9

Plain = Callable[[torch.Tensor], torch.Tensor]  # [1, n, hidden] from position 0 → the same shape


def error_of(backend: Backend, plain: Plain, start: int, end: int) -> float:
    """Largest difference of blocks [start, end) from `plain`, relative to the largest plain output; NaN counts as inf."""
    generator = torch.Generator().manual_seed(0)
    width = backend.hidden_size

    def sequence(length: int) -> torch.Tensor:
        return torch.randn(1, length, width, generator=generator).to(backend.device, backend.dtype)

    inputs = [sequence(_LONG), sequence(_SHORT)]
    sessions = [Session(1, length, start, end, solo=backend.solo) for length in (_LONG, _SHORT)]
    cache = KVCache(backend.layers, backend.dtype, backend.device)
    for session in sessions:
        cache.open(session)
    outputs: list[list[torch.Tensor]] = [[], []]

    def run(*counts: int) -> None:
        items = []
        for session, hidden, count in zip(sessions, inputs, counts, strict=True):
            if count:
                part = hidden[:, session.length : session.length + count]
                items.append((StepWork(session, part, lambda result: None), count))
        for group in [[item] for item in items] if backend.solo else [items]:
            plan = StepPlan(group, backend.dtype, backend.device)
            packed = torch.cat([work.hidden[0] for work, _ in plan.order])
            output = backend.step(packed, plan, start, end, [])
            token = 0
            for work, count in plan.order:
                outputs[sessions.index(work.session)].append(output[token : token + count])
                work.session.length += count
                token += count

    with torch.inference_mode():
        if backend.solo:  # what a step gives depends on its length, so only whole sequences can be compared
            run(_LONG, _SHORT)
        else:
            run(10, 0)
            run(1, 5)
            run(6, 1)
            run(1, 1)
            sessions[0].length -= 2  # a rollback into an earlier step
            sessions[1].length -= 1
            del outputs[0][-1], outputs[1][-1]
            outputs[0][-1] = outputs[0][-1][:-1]
            run(2, 1)
            run(_LONG - sessions[0].length, _SHORT - sessions[1].length)
        worst = 0.0
        for hidden, parts in zip(inputs, outputs, strict=True):
            expected = plain(hidden)[0].float()
            difference = (torch.cat(parts).float() - expected).abs().max() / expected.abs().max()
            worst = max(worst, difference.item() if torch.isfinite(difference) else float("inf"))
    return worst
