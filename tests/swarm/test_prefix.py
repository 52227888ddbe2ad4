"""Default prefixes equal those that Petals derives."""

from __future__ import annotations

import pytest

from petals_agent.swarm.prefix import default_prefix


@pytest.mark.parametrize(
    ("model_type", "repository", "prefix"),
    [
        ("bloom", "bigscience/bloom", "bigscience/bloom-petals"),
        ("bloom", "bigscience/bloom-petals", "bigscience/bloom-petals"),
        ("bloom", "other/bloom-7b1.5", "other/bloom-7b1-5-petals"),
        ("llama", "meta-llama/Llama-2-70b-hf", "Llama-2-70b-hf"),
        ("llama", "meta-llama/Meta-Llama-3.1-405B-Instruct", "Meta-Llama-3-1-405B-Instruct-hf"),
        ("falcon", "tiiuae/falcon-180B-chat", "falcon-180B-chat"),
        ("mixtral", "mistralai/Mixtral-8x22B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0-1"),
        ("qwen3", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0-6B"),
    ],
)
def test_default_prefix(model_type: str, repository: str, prefix: str) -> None:
    assert default_prefix(model_type, repository) == prefix


def test_a_name_that_cannot_be_a_prefix() -> None:
    with pytest.raises(ValueError, match="spaces"):
        default_prefix("llama", "my models/llama 2")
