"""A Llama-like block as the papers write it: no fusion, no cache, no packing; what the lean backend is checked against.

RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), SwiGLU
(Shazeer 2020), with the residual order of Llama (Touvron et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from petals_agent.engine.lean import LeanConfig


def textbook_block(
    config: LeanConfig, tensors: Mapping[str, torch.Tensor], layer: int, hidden: torch.Tensor
) -> torch.Tensor:
    """`hidden` [1, n, hidden_size] through one block, computed in float64; tensors by lean's short names."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x = hidden[0].cpu().double()
    n = x.shape[0]

    def norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return values / torch.sqrt((values**2).mean(-1, keepdim=True) + config.eps) * weight

    def project(values: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        out = values @ weights[name].T + weights.get(f"{name}_bias", torch.zeros(()))
        out = out.view(n, heads, config.head_dim)
        return norm(out, weights[f"{name}_norm"]) if f"{name}_norm" in weights else out

    angle = torch.outer(torch.arange(n), config.inverse_frequencies.double())[:, None]
    cos, sin = torch.cos(angle), torch.sin(angle)

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    normed = norm(x, weights["input_norm"])
    q = rotate(project(normed, "q", config.heads))
    k = rotate(project(normed, "k", config.kv_heads))
    v = project(normed, "v", config.kv_heads)
    window = config.windows[layer] or n
    attended = torch.empty_like(q)
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        for position in range(n):
            first_seen = max(0, position + 1 - window)
            scores = k[first_seen : position + 1, shared] @ q[position, head] / config.head_dim**0.5
            attended[position, head] = torch.softmax(scores, 0) @ v[first_seen : position + 1, shared]
    x = x + attended.reshape(n, -1) @ weights["o"].T + weights.get("o_bias", torch.zeros(()))
    normed = norm(x, weights["post_norm"])
    gate = normed @ weights["gate"].T
    x = x + (gate * torch.sigmoid(gate) * (normed @ weights["up"].T)) @ weights["down"].T
    return x[None].to(hidden)
