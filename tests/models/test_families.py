"""Every family: spans chained one after another are the whole model of transformers, in every mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from models.tiny import BLOCKS, VARIANTS, VOCABULARY, edit_config, full_model
from petals_agent.models.client_parts import ClientParts, client_parts
from petals_agent.models.facts import ModelFacts
from petals_agent.models.families import FAMILIES
from petals_agent.models.source import open_model
from petals_agent.models.span import SpanModel, load_span

CUTS = (
    (0, 1),
    (1, 4),
    (4, BLOCKS),
)  # the middle one starts at an odd block, where every pattern of two differs
CPU = torch.device("cpu")
CLOSE = {"atol": 2e-4, "rtol": 0.0}  # outputs are of order 5
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Loaded:
    """One tiny model: whole, and in spans."""

    facts: ModelFacts
    full: Any
    spans: list[SpanModel]
    parts: ClientParts

    def chain(self, hidden: torch.Tensor) -> torch.Tensor:
        for span in self.spans:
            hidden = span(hidden)
        return hidden


def load(folder: Path) -> Loaded:
    source = open_model(str(folder))
    spans = [load_span(source, start, end, torch.float32, CPU) for start, end in CUTS]
    return Loaded(source.facts, full_model(folder), spans, client_parts(source, torch.float32))


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Loaded:
    return load(tiny(request.param))


def test_every_family_has_a_tiny_model() -> None:
    assert {variant.split("-")[0] for variant in VARIANTS} == set(FAMILIES)


@torch.no_grad()
def test_prefill(model: Loaded) -> None:
    logits = model.parts.logits(model.chain(model.parts.embed(IDS)))
    torch.testing.assert_close(logits, model.full(IDS).logits, **CLOSE)


@torch.no_grad()
def test_decode_token_by_token(model: Loaded) -> None:
    """Against transformers' own cache, which differs by family (it crops to the sliding window)."""
    caches, past = [span.new_cache() for span in model.spans], None
    for ids in (IDS[:, :5], *IDS[:, 5:].split(1, dim=1)):
        hidden = model.parts.embed(ids)
        for span, cache in zip(model.spans, caches, strict=True):
            hidden = span.step(hidden, cache)
        whole = model.full(ids, past_key_values=past, use_cache=True)
        past = whole.past_key_values
        torch.testing.assert_close(model.parts.logits(hidden), whole.logits, **CLOSE)


def test_backward(model: Loaded) -> None:
    """The gradient where hidden states enter block 0."""
    entering: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        entering.append(hidden)
        return (hidden, *args[1:]), {key: value for key, value in kwargs.items() if key != "hidden_states"}

    family = model.spans[0].family
    hook = getattr(model.full.base_model, family.layers)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        logits = model.full(IDS, use_cache=False).logits
    finally:
        hook.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(weights)
    hidden = model.parts.embed(IDS)
    torch.testing.assert_close(hidden, entering[0].detach(), **CLOSE)
    hidden = hidden.detach().requires_grad_()
    model.parts.logits(model.chain(hidden)).backward(weights)
    assert hidden.grad is not None and entering[0].grad is not None
    scale = entering[0].grad.abs().max()
    torch.testing.assert_close(hidden.grad / scale, entering[0].grad / scale, **CLOSE)


def test_prompts_are_added_before_each_block(model: Loaded) -> None:
    span = model.spans[1]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 6, span.hidden_size, generator=generator)
    prompts = torch.randn(3, 1, 4, span.hidden_size, generator=generator, requires_grad=True)
    output = span(hidden, prompts)
    by_hand = prompts.detach().clone().requires_grad_()
    expected = hidden
    for block in range(3):
        expected = torch.cat((expected[:, :4] + by_hand[block], expected[:, 4:]), dim=1)
        expected = span.view(block, block + 1)(expected)
    torch.testing.assert_close(output, expected, **CLOSE)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert prompts.grad is not None and by_hand.grad is not None
    scale = by_hand.grad.abs().max()
    torch.testing.assert_close(prompts.grad / scale, by_hand.grad / scale, **CLOSE)


@torch.no_grad()
def test_views_decode_with_their_own_cache(model: Loaded) -> None:
    """Blocks 2:4 of the middle span, whose cache knows nothing of the blocks before."""
    view = model.spans[1].view(1, 3)
    assert (view.start, view.end) == (2, 4)
    hidden = torch.randn(2, 7, view.hidden_size, generator=torch.Generator().manual_seed(4))
    cache, past = view.new_cache(), []
    for piece in hidden.split((4, 1, 2), dim=1):
        past.append(view.step(piece, cache))
        expected = view(hidden[:, : sum(step.shape[1] for step in past)])[:, -piece.shape[1] :]
        if not view.rope_depends_on_length:
            torch.testing.assert_close(past[-1], expected, **CLOSE)


def test_facts_agree_with_the_blocks(model: Loaded) -> None:
    facts, spans = model.facts, model.spans
    assert facts.num_blocks == BLOCKS and facts.hidden_size == spans[0].hidden_size
    for span in spans:
        assert len(span.attention) == len(span.blocks) == span.end - span.start
        for attention in span.attention:
            assert attention.kv_width == facts.kv_width
            assert attention.heads == facts.num_heads
        stored = facts.block_parameters[span.start : span.end]
        for block, parameters in zip(span.blocks, stored, strict=True):
            assert parameters == sum(weight.numel() for weight in block.parameters()) + sum(
                buffer.numel() for name, buffer in block.named_buffers() if name in block.state_dict()
            )


def test_sliding_windows_are_those_of_the_whole_model(model: Loaded) -> None:
    """What the blocks tell the attention function, against the config of the whole model."""
    config = model.full.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    found = [attention.sliding_window for span in model.spans for attention in span.attention]
    if kinds:
        assert found == [window if kind == "sliding_attention" else None for kind in kinds]
    else:
        assert found == [window] * BLOCKS


def test_who_calls_the_attention_interface(model: Loaded) -> None:
    for span in model.spans:
        assert span.uses_interface == (span.family.model_type not in ("bloom", "falcon"))


# --- controls: what the tests above would not notice if it did not matter at these sizes

WITHOUT: list[tuple[str, dict[str, Any]]] = [
    ("cohere2", {"sliding_window": 64}),
    ("exaone4", {"sliding_window": 64}),
    ("falcon-alibi", {"alibi": False}),
    ("gemma2", {"sliding_window": 64}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 256}),
    ("gemma3_text", {"sliding_window": 64}),
    (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ),
    ("gpt_oss", {"sliding_window": 64}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("cohere", {"logit_scale": 1.0}),
    ("llama-dynamic", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama-longrope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "llama_4_scaling_beta": 0.0,
            }
            | {"original_max_position_embeddings": 8}
        },
    ),
    ("ministral", {"sliding_window": 64}),
    ("cwm", {"sliding_window": 64}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"sliding_window": None}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("olmo", {"clip_qkv": None}),
    ("olmo3", {"sliding_window": 64}),
    ("phi3", {"sliding_window": None}),
    ("qwen2-sliding", {"sliding_window": 64}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 1, 1]}),  # the pattern, shifted by one
    ("starcoder2", {"sliding_window": None}),
]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "changes"), WITHOUT, ids=[f"{v}-{next(iter(c))}" for v, c in WITHOUT])
def test_control(variant: str, changes: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(variant), tmp_path / "changed")
    edit_config(folder, **changes)
    source = open_model(str(folder))
    parts = client_parts(source, torch.float32)
    hidden = load_span(source, 0, BLOCKS, torch.float32, CPU)(parts.embed(IDS))
    difference = (parts.logits(hidden) - full_model(tiny(variant))(IDS).logits).abs().max()
    assert difference > 100 * CLOSE["atol"]


@torch.no_grad()
def test_control_of_layer_patterns(tiny: Callable[[str], Path]) -> None:
    """A span that took its pattern from block 0 on instead of its own place would be wrong."""
    source = open_model(str(tiny("gemma2")))
    span = load_span(source, 1, 4, torch.float32, CPU)
    hidden = torch.randn(1, 12, span.hidden_size, generator=torch.Generator().manual_seed(5))
    right = span(hidden)
    span.config.layer_types = span.config.layer_types[1:] + span.config.layer_types[:1]
    assert (span(hidden) - right).abs().max() > 100 * CLOSE["atol"]
