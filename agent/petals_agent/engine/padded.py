"""transformers' modules as they are, for families that do not call the AttentionInterface (Falcon, Bloom).

Decode rows of one slab run as a padded batch with a mask, prefill chunks one session at a time; a cache object in between
reads and writes our slabs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from petals_agent.engine.backend import Prompts
from petals_agent.engine.packed import SpanBackend, prompted
from petals_agent.engine.plan import Chunk, Decode, StepPlan


class _StepCache(DynamicCache):
    """transformers' view of our KV cache during one step; `past` tokens a row come before it."""

    def __init__(self, part: Decode | Chunk, first_layer: int, past: int) -> None:
        super().__init__()
        self._part, self._first_layer, self._past = part, first_layer, past

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes [rows, kv_heads, n, head_dim], gives all keys and values so far."""
        part, index = self._part, layer_idx - self._first_layer
        key_dim, value_dim = key_states.shape[-1], value_states.shape[-1]
        width = part.cache(index).shape[-1]
        kv = torch.cat((_widen(key_states, width), _widen(value_states, width)), dim=1).transpose(1, 2)
        if isinstance(part, Decode):
            part.write(index, kv[:, 0])
            keys, values = part.cache(index)[:, part.slots, :, : part.longest]
        else:
            keys, values = part.write(index, kv)[:, :, :, : part.start + part.count]
        return keys[..., :key_dim], values[..., :value_dim]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._past + query_length, 0


class PaddedBackend(SpanBackend):
    """One call of the modules per slab of decode rows and per chunk."""

    name = "padded"

    def step(
        self, hidden: torch.Tensor, plan: StepPlan, start: int, end: int, prompts: Prompts
    ) -> torch.Tensor:
        self._select("eager")
        self.forget_lengths()
        output = torch.empty_like(hidden)
        first = plan.first_layer - self._view(start, end).base
        for decode in plan.decodes:
            seen = torch.arange(decode.longest, device=self.device)[None] <= decode.positions[:, None]
            cache = _StepCache(decode, first, decode.longest - 1)
            rows = hidden[decode.tokens][:, None]
            output[decode.tokens] = self._run(
                start, end, rows, decode.tokens, prompts, cache, seen.long(), decode.positions[:, None]
            )
        for chunk in plan.chunks:
            cache = _StepCache(chunk, first, chunk.start)
            rows = hidden[chunk.tokens].view(chunk.rows, chunk.count, -1)
            seen = torch.ones(chunk.rows, chunk.start + chunk.count, dtype=torch.long, device=self.device)
            positions = torch.arange(chunk.start, chunk.start + chunk.count, device=self.device)
            output[chunk.tokens] = self._run(
                start, end, rows, chunk.tokens, prompts, cache, seen, positions[None].expand(chunk.rows, -1)
            )
        return output

    def _run(
        self,
        start: int,
        end: int,
        rows: torch.Tensor,
        tokens: slice,
        prompts: Prompts,
        cache: _StepCache,
        seen: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        view = self._view(start, end)
        own = [prompt for prompt in prompts if tokens.start <= prompt[0] < tokens.stop]
        options: dict[str, Any] = {} if self.family.model_type == "bloom" else {"position_ids": positions}
        with prompted(view, own, tokens.start):
            output = view.hf(
                inputs_embeds=rows, attention_mask=seen, past_key_values=cache, use_cache=True, **options
            )
        result: torch.Tensor = output.last_hidden_state.reshape(-1, self.hidden_size)
        return result


def _widen(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))
