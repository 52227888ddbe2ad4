"""The untrained model and its loss."""

import math

import torch
from corpus import Corpus
from folder import END_OF_TEXT_ID
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512
ROPE_THETA = 10000.0


def build(vocabulary: int) -> LlamaForCausalLM:
    """Make the untrained model; the output projections start smaller, since 16 of them add up in the residual stream."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of predicting [n, length + 1] token ids; bfloat16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, corpus: Corpus) -> float:
    """Mean loss over all of a held-out corpus, in windows of 256 tokens."""
    windows = corpus.windows(256)
    parts = torch.split(windows, 16)
    return float(sum(loss_of(model, part).item() * len(part) for part in parts)) / len(windows)
