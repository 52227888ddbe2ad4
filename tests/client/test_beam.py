"""Our beam search returns what transformers' returns, for models that end early and models that do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from petals_agent.client.beam import BeamSearch

VOCABULARY = 24
NEW, PAD = 8, 1


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ours(
    model: LlamaForCausalLM, ids: torch.Tensor, beams: int, eos: list[int], count: int, penalty: float
) -> list[list[int]]:
    search = BeamSearch(len(ids), beams, eos, count, penalty)
    rows = ids.repeat_interleave(beams, 0)
    with torch.inference_mode():
        while True:
            tokens, sources = search.advance(model(rows).logits[:, -1])
            if search.done:
                return search.best()
            rows = torch.cat([rows[sources], tokens[:, None]], 1)


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(seed))


# transformers takes one beam for greedy search, which knows no length penalty
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), *itertools.product([2, 4], [1.0, 0.0, 2.0])])
@pytest.mark.parametrize("ends", [0, 1, 4])
def test_equals_transformers(model: LlamaForCausalLM, beams: int, ends: int, penalty: float) -> None:
    usual = [ours(model, prompt(seed), 2, [], NEW, 1.0)[0][3] for seed in range(4)]
    eos = list(dict.fromkeys(usual))[:ends]  # tokens that this model likes as its fourth
    lengths = set()
    for seed in range(4):
        ids = prompt(seed)
        found = ours(model, ids, beams, eos, NEW, penalty)
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, num_beams=beams, do_sample=False,
            eos_token_id=eos or None, pad_token_id=PAD, length_penalty=penalty,
        )[:, 5:]  # fmt: skip
        for row, reference in zip(found, expected.tolist(), strict=True):
            assert row == reference[: len(row)]
            assert all(token == PAD for token in reference[len(row) :])
            lengths.add(len(row))
    assert bool(lengths - {NEW}) == bool(eos)  # some did end early
