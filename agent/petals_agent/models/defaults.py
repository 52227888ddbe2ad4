"""What "auto" stands for: Petals' defaults, which differ for models with and without grouped attention."""

from __future__ import annotations

from petals_agent.models.facts import ModelFacts

# protocol.md §9.6, §9.7
_GROUPED_CACHE_TOKENS, _CACHE_TOKENS = 16384, 4096
_GROUPED_LENGTH, _LENGTH = 8192, 2048


def cache_tokens(facts: ModelFacts) -> int:
    """KV cache in tokens per block."""
    return _GROUPED_CACHE_TOKENS if _grouped(facts) else _CACHE_TOKENS


def request_tokens(facts: ModelFacts) -> int:
    """Most tokens of one request, and the longest session."""
    return _GROUPED_LENGTH if _grouped(facts) else _LENGTH


def serving_dtype(configured: str, of_model: str, device: str) -> str:
    """As Petals: "auto" is the checkpoint's dtype, but bfloat16 for float32; float16 does not compute on a CPU."""
    if configured == "auto":
        return "float16" if of_model == "float16" and not device.startswith("cpu") else "bfloat16"
    return configured


def _grouped(facts: ModelFacts) -> bool:
    return facts.num_kv_heads < facts.num_heads
