"""What a client computes itself: embeddings before block 0, and after the last block the final norm and the head.

Both come from transformers' own model with no blocks in it, so that scales, soft caps and tied weights are as they should be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petals_agent.errors import CheckpointError
from petals_agent.models.checkpoint import Checkpoint
from petals_agent.models.families import Family
from petals_agent.models.hf import build, files_of, full_config, model_class, neutralise, slice_config
from petals_agent.models.source import ModelSource, OnProgress


class ClientParts(nn.Module):
    """Embeddings and head of a model, frozen; both differentiable in what they are given where that makes sense."""

    def __init__(self, family: Family, model: Any) -> None:
        super().__init__()
        self.model = model
        base = model.base_model
        self.embed_norm = getattr(base, family.embed_norm) if family.embed_norm else nn.Identity()
        self.multiplier = float(getattr(base, family.embed_multiplier)) if family.embed_multiplier else 1.0
        neutralise(base, family)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states for block 0, [batch, n, hidden_size], of token ids [batch, n]."""
        return self.embed_norm(self.model.get_input_embeddings()(ids)) * self.multiplier  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, [batch, n, vocabulary], of the last block's output [batch, n, hidden_size]."""
        return self.model(inputs_embeds=hidden, use_cache=False).logits  # type: ignore[no-any-return]


def client_parts(source: ModelSource, dtype: torch.dtype, progress: OnProgress | None = None) -> ClientParts:
    """Load them on the CPU, from only the shards that hold them. Raises UnsupportedModel or CheckpointError."""
    family, config = source.family, full_config(source)
    empty = slice_config(config, 0, 0)
    empty.vocab_size, empty.pad_token_id = config.vocab_size, config.pad_token_id
    cls = model_class(family, family.causal_class)
    tensors = Checkpoint.open(source, source.outer_tensors(), progress).outer()
    heads = ("lm_head.", "embed_out.")
    named = {
        name if name.startswith(heads) else f"{cls.base_model_prefix}.{name}": tensor
        for name, tensor in tensors.items()
    }
    with torch.inference_mode(False):
        model, missing = build(cls, empty, named, dtype)
    if missing:
        raise CheckpointError(
            f"{files_of(tensors)}: {', '.join(sorted(missing))} missing; get the whole checkpoint"
        )
    return ClientParts(family, model.requires_grad_(False))
