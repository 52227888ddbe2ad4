"""Facts are read without transformers, and assume the same as transformers where config.json is silent."""

from __future__ import annotations

from typing import Any

import pytest

from petals_agent.errors import CheckpointError
from petals_agent.models.facts import ModelFacts, model_facts
from petals_agent.models.families import FAMILIES
from petals_agent.models.hf import model_class

GIVEN = {"hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16}
# where the attention's own sizes are not in these three settings
OWN_RULES = {"deepseek_v2", "deepseek_v3", "falcon"}


def _facts(config: dict[str, Any]) -> ModelFacts:
    family = FAMILIES[config["model_type"]]
    return model_facts(config, family, [1, 1], "float32", "someone/model", "0" * 40)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - OWN_RULES))
def test_a_silent_config_means_what_transformers_assumes(model_type: str) -> None:
    family = FAMILIES[model_type]
    config = model_class(family, family.base_class).config_class(**GIVEN)
    facts = _facts({"model_type": model_type, **GIVEN})
    assert facts.num_kv_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    assert facts.head_dim == (getattr(config, "head_dim", None) or 2048 // 16)


def test_the_sparsest_config_in_use() -> None:
    """Gemma 3 4B as published says this much about its text part."""
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "model_type": "gemma3_text", "sliding_window": 1024}
    family = FAMILIES["gemma3_text"]
    config = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"}
    facts = model_facts(config, family, [1] * 34, "bfloat16", "google/gemma-3-4b-it", "0" * 40)
    assert (facts.num_blocks, facts.num_heads, facts.num_kv_heads, facts.head_dim) == (34, 8, 4, 256)
    assert facts.dht_prefix == "google/gemma-3-4b-it"


@pytest.mark.parametrize(
    ("changes", "kv_heads", "kv_width"),
    [
        ({}, 1, 2 * 64),  # Falcon 7B
        ({"multi_query": False}, 71, 2 * 71 * 64),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 8},
            8,
            2 * 71 * 64,
        ),  # 40B, which caches them repeated
    ],
)
def test_falcon(changes: dict[str, Any], kv_heads: int, kv_width: int) -> None:
    config = {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 2, "num_attention_heads": 71}
    facts = _facts(config | changes)
    assert (facts.num_kv_heads, facts.kv_width) == (kv_heads, kv_width)


def test_bloom_under_its_old_names() -> None:
    facts = _facts({"model_type": "bloom", "n_embed": 14336, "n_layer": 2, "n_head": 112})
    assert (facts.hidden_size, facts.num_heads, facts.num_kv_heads, facts.head_dim) == (14336, 112, 112, 128)


def test_an_unknown_dtype() -> None:
    facts = _facts({"model_type": "llama", **GIVEN})
    with pytest.raises(CheckpointError, match=r"'float8' is not known; choose one of float64"):
        facts.block_bytes("float8")
