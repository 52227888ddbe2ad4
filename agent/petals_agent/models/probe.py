"""What a span's blocks ask of attention, found by running one token through them rather than by reading their code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

_PROBE = "petals_probe"
AttentionMaskInterface.register(_PROBE, eager_mask)  # for families that add the mask themselves


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block.

    What follows `head_dim` is known only for blocks that call the AttentionInterface; such a call must honour all of it.
    """

    heads: int
    kv_heads: int  # as cached: some families repeat their keys and values first
    head_dim: int  # of keys
    value_dim: int
    scaling: float | None = None
    sliding_window: int | None = None  # tokens seen, this one included
    softcap: float | None = None
    sinks: bool = False  # a learned logit per head that takes part in the softmax ("s_aux")

    @property
    def kv_width(self) -> int:
        """Elements of KV cache per token."""
        return self.kv_heads * (self.head_dim + self.value_dim)


def probe_attention(
    hf: PreTrainedModel, heads: int, hidden: torch.Tensor
) -> tuple[tuple[BlockAttention, ...], bool]:
    """The attention of each block of a base model, and whether all blocks call the AttentionInterface.

    `hidden` is one token, [1, 1, hidden_size]. Blocks must be numbered from 0 (`layer_idx`).
    """
    seen: dict[int, BlockAttention] = {}

    def observe(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        seen[int(module.layer_idx)] = BlockAttention(  # type: ignore[arg-type]
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=key.shape[-1],
            value_dim=value.shape[-1],
            scaling=kwargs.get("scaling"),
            sliding_window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux") is not None,
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    cache = DynamicCache()
    before = hf.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_PROBE] = observe
    hf.config._attn_implementation = _PROBE
    try:
        hf(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
    finally:
        hf.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[_PROBE]
    cached = [
        BlockAttention(heads, layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
        for layer in cache.layers
    ]
    return tuple(seen.get(i, block) for i, block in enumerate(cached)), len(seen) == len(cached)
