"""The tiny model as plain transformers computes it."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM


def generated(local: LlamaForCausalLM, ids: list[list[int]], count: int, **how: object) -> list[list[int]]:
    """`count` new tokens for each row of `ids`, greedy unless `how` says otherwise."""
    tensor = torch.tensor(ids)
    out = local.generate(
        tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=count, do_sample=False, **how
    )
    return out[:, tensor.shape[1] :].tolist()


def logits_with_prompts(
    local: LlamaForCausalLM, embedded: torch.Tensor, prompts: torch.Tensor
) -> torch.Tensor:
    """Logits for embeddings [batch, n, hidden]; `prompts` [blocks, 1, p, hidden] are added before each block."""

    def adding(prompt: torch.Tensor):
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, p = args[0], prompt.shape[1]
            return torch.cat([hidden[:, :p] + prompt, hidden[:, p:]], dim=1), *args[1:]

        return hook

    layers = zip(local.model.layers, prompts, strict=True)
    hooks = [layer.register_forward_pre_hook(adding(prompt)) for layer, prompt in layers]
    try:
        return local(inputs_embeds=embedded, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
