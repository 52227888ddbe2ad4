"""The tiny model as plain transformers computes it, which every route through a swarm must equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The machine is shared with the servers under test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def local(tiny_llama: Path) -> LlamaForCausalLM:
    """The whole model on this process."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # random weights may emit it at any time
    model.generation_config.pad_token_id = 0
    return model
