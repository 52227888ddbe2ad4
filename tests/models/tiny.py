"""Tiny random models of every family, saved as transformers saves them; sizes are such that each rule of a family matters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from petals_agent.models.families import FAMILIES
from petals_agent.models.hf import model_class
from petals_agent.models.source import open_model

BLOCKS = 6
VOCABULARY = 96
_ABSENT = object()
WINDOW = 4  # shorter than the tests' sequences

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_PLAIN = {"head_dim": _ABSENT, "num_key_value_heads": _ABSENT}  # families that have no such settings
_LATENT: dict[str, Any] = {
    "head_dim": _ABSENT,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 8}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, **_ROPE, **more}}


# name of a variant → what its config changes; the part of the name before "-" is the model_type
VARIANTS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {**_PLAIN, "n_layer": BLOCKS, "n_head": 4},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"sliding_window": WINDOW, "layer_types": _MIXED, "logit_scale": 0.5},
    "cwm": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "ernie4_5": {},
    "exaone4": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "falcon": {**_PLAIN, "multi_query": True},
    "falcon-alibi": {**_PLAIN, "alibi": True, "multi_query": False, "bias": True},
    "falcon-new": {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        **_EXPERTS,
        "n_routed_experts": 4,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_neox": {**_PLAIN, "rotary_pct": 0.5},
    "gpt_oss": {**_EXPERTS, "sliding_window": WINDOW, "layer_types": _MIXED},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "granitemoe": {
        **_EXPERTS,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {},
    "llama": {},
    "llama-bias-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-linear": _rope("linear", factor=4.0),
    "llama-dynamic": {**_rope("dynamic", factor=4.0), "max_position_embeddings": 8},
    "llama-yarn": _rope("yarn", factor=4.0),
    "llama-llama3": _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "llama-longrope": _rope(
        "longrope",
        short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        factor=4.0,
    ),
    "minimax_m2": _EXPERTS,
    "ministral": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "ministral3": {**_rope("yarn", factor=4.0, llama_4_scaling_beta=0.5), "sliding_window": None},
    "mistral": {"sliding_window": WINDOW},
    "mistral-full": {"sliding_window": None},
    "mixtral": {**_EXPERTS, "sliding_window": WINDOW},
    "nemotron": {},
    "olmo": {"clip_qkv": 0.7},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "olmoe": {**_EXPERTS, "head_dim": _ABSENT},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": _EXPERTS,
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen2_moe": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0, 4]},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "stablelm": {"head_dim": _ABSENT, "use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": {"sliding_window": WINDOW},
}


def tiny_model(variant: str, folder: Path, shard_size: str = "40KB", **changes: Any) -> Path:
    """Save a random model of a variant in `folder`, float32, the same weights every time; `changes` go to its config."""
    model_type = variant.split("-")[0]
    family = FAMILIES[model_type]
    cls = model_class(family, family.causal_class)
    settings = {
        key: value for key, value in (_COMMON | VARIANTS[variant] | changes).items() if value is not _ABSENT
    }
    config = cls.config_class(**copy.deepcopy(settings))
    config._attn_implementation = "eager"
    model = cls(config)
    _randomise(model)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def full_model(folder: Path) -> PreTrainedModel:
    """transformers' own model of a checkpoint, all of it, with eager attention."""
    family = open_model(str(folder)).family
    model = model_class(family, family.causal_class).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()  # type: ignore[no-any-return]


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _randomise(model: PreTrainedModel) -> None:
    """Weights large enough for attention to be sharp, and no zero biases or unit norms, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.2)
