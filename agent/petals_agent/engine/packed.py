"""transformers' own modules over packed tokens: their attention calls come to us through the AttentionInterface.

For families that call the interface for every block (SpanModel.uses_interface); others would silently compute something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from petals_agent.engine.backend import Prompts, add_prompts
from petals_agent.engine.kv import LayerShape
from petals_agent.engine.plan import AttentionRules, StepPlan
from petals_agent.models.span import SpanModel, join_spans

_numbers = itertools.count()


class SpanBackend:
    """What both backends on transformers' modules share: views of the span, prompts, whole sequences for training."""

    name = ""

    def __init__(self, span: SpanModel) -> None:
        self.spans = [span]  # in order, with gaps between them
        self.family = span.family
        self.hidden_size, self.dtype, self.device = span.hidden_size, span.dtype, span.device
        self.solo = span.rope_depends_on_length
        self.layers = _layers(self.spans)
        fused = span.uses_interface and all(a.softcap is None and not a.sinks for a in span.attention)
        self._whole = "sdpa" if fused else "eager"
        self._selected = ""
        self._views: dict[tuple[int, int], SpanModel] = {}

    def join(self, other: Self) -> None:
        self._hold(join_spans([*self.spans, *other.spans]))

    def keep(self, start: int, end: int) -> None:
        cut = [(max(span.start, start), min(span.end, end), span) for span in self.spans]
        self._hold(join_spans([s.view(a - s.start, b - s.start) for a, b, s in cut if a < b]))

    def _hold(self, spans: list[SpanModel]) -> None:
        self.spans = spans
        self.layers.clear()  # the cache looks into this very one
        self.layers.update(_layers(spans))
        self._selected = ""
        self._views.clear()

    def _select(self, attention: str) -> None:
        if attention != self._selected:
            for span in self.spans:
                span.use_attention(attention)
            self._selected = attention
            self._views.clear()  # a view copies the config it was made under

    def _view(self, start: int, end: int) -> SpanModel:
        view = self._views.get((start, end))
        if view is None:
            span = next((span for span in self.spans if span.start <= start and end <= span.end), None)
            if span is None:
                raise KeyError(f"blocks {start}:{end} are not here")
            view = self._views[start, end] = span.view(start - span.start, end - span.start)
        return view

    def forget_lengths(self) -> None:
        """Undo what dynamic rotary embeddings remember of earlier sequences: outputs must not depend on them."""
        if not self.solo:
            return
        for module in itertools.chain.from_iterable(span.hf.modules() for span in self.spans):
            if getattr(module, "rope_type", None) == "dynamic":
                module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)
                module.max_seq_len_cached = module.original_max_seq_len

    def block(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        self._select(self._whole)
        self.forget_lengths()
        output: torch.Tensor = self._view(layer, layer + 1)(hidden)
        return output


class PackedBackend(SpanBackend):
    """All tokens of a batch as one sequence [1, tokens, hidden]; only attention knows where sessions begin."""

    name = "packed"

    def __init__(self, span: SpanModel) -> None:
        super().__init__(span)
        self._interface = f"petals_packed_{next(_numbers)}"  # one table for the whole process
        ALL_ATTENTION_FUNCTIONS[self._interface] = self._attention
        self._plan: StepPlan | None = None
        self._base = 0

    def step(
        self, hidden: torch.Tensor, plan: StepPlan, start: int, end: int, prompts: Prompts
    ) -> torch.Tensor:
        self._select(self._interface)
        self.forget_lengths()
        view = self._view(start, end)
        self._plan, self._base = plan, view.base
        try:
            with prompted(view, prompts):
                output = view.hf(
                    inputs_embeds=hidden[None], position_ids=plan.positions[None], use_cache=False
                )
        finally:
            self._plan = None
        result: torch.Tensor = output.last_hidden_state[0]
        return result

    def _attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, None]:
        """The interface's function: query [1, heads, tokens, head_dim], key and value alike; gives [1, tokens, heads, dim]."""
        plan = self._plan
        assert plan is not None, "the packed attention was called outside a step"
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        if value_dim < head_dim:  # e.g. latent attention: keys carry a rotary part that values lack
            value = F.pad(value, (0, head_dim - value_dim))
        rules = AttentionRules(
            scale=head_dim**-0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        kv = torch.cat((key[0], value[0])).transpose(0, 1)
        layer = self._base + int(module.layer_idx)  # type: ignore[arg-type]
        out = plan.attend(layer, query[0].transpose(0, 1), kv, rules)
        return out.view(1, query.shape[2], query.shape[1], head_dim)[..., :value_dim], None


def _layers(spans: list[SpanModel]) -> dict[int, LayerShape]:
    return {
        span.start + index: LayerShape(a.kv_heads, max(a.head_dim, a.value_dim))
        for span in spans
        for index, a in enumerate(span.attention)
    }


@contextmanager
def prompted(view: SpanModel, prompts: Prompts, first_token: int = 0) -> Iterator[None]:
    """While open, each block of `view` adds its prompts to the tokens it is given; those count from `first_token`."""
    if not prompts:
        yield
        return
    shifted = [(offset - first_token, per_block) for offset, per_block in prompts]

    def before(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            flat = hidden.reshape(-1, hidden.shape[-1]).clone()
            add_prompts(flat, shifted, index)
            return (flat.view(hidden.shape), *rest), kwargs

        return hook

    hooks = [
        block.register_forward_pre_hook(before(index), with_kwargs=True)
        for index, block in enumerate(view.blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
