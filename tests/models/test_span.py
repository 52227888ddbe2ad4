"""Loading a span: only its own shards and weights, and clear errors for weights that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import PreTrainedModel

from models.tiny import BLOCKS, edit_config
from petals_agent.errors import CheckpointError
from petals_agent.models.checkpoint import Checkpoint
from petals_agent.models.client_parts import client_parts
from petals_agent.models.source import INDEX, Progress, open_model
from petals_agent.models.span import SpanModel, load_span

CPU = torch.device("cpu")
Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that the test may damage."""
    return shutil.copytree(tiny("llama"), tmp_path / "llama")


def _load(folder: Path, start: int = 1, end: int = 4, dtype: torch.dtype = torch.float32) -> SpanModel:
    return load_span(open_model(str(folder)), start, end, dtype, CPU)


def _shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def _change(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = _shard_of(folder, tensor)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


# --- what is loaded


def test_loads_in_threads_leave_transformers_as_it_was(tiny: Callable[[str], Path]) -> None:
    """Its loader patches classes of the whole process for a while; two at a time would keep each other's patches."""
    tie = PreTrainedModel.tie_weights
    source = open_model(str(tiny("gemma2")))
    with ThreadPoolExecutor(8) as pool:
        for load in [pool.submit(client_parts, source, torch.float32) for _ in range(32)]:
            load.result(60)
    assert PreTrainedModel.tie_weights is tie
    assert client_parts(source, torch.float32).logits(torch.randn(1, 2, 32)).isfinite().all()


def test_other_shards_are_not_needed(folder: Path, tiny: Callable[[str], Path]) -> None:
    source = open_model(str(folder))
    span_shards = {source.weight_map[name] for name in source.block_tensors(2, 4)}
    outer_shards = {source.weight_map[name] for name in source.outer_tensors()}
    for shard in {path.name for path in folder.glob("*.safetensors")} - span_shards:
        (folder / shard).unlink()
    assert not span_shards >= outer_shards  # else this shows nothing
    span = load_span(source, 2, 4, torch.float32, CPU)
    hidden = torch.randn(1, 5, span.hidden_size)
    torch.testing.assert_close(span(hidden), _load(tiny("llama"), 2, 4)(hidden))
    with pytest.raises(CheckpointError, match="is missing"):
        client_parts(source, torch.float32)


def test_nothing_but_blocks_takes_memory(tiny: Callable[[str], Path]) -> None:
    span = _load(tiny("gemma2"))
    inside = sum(weight.numel() for weight in span.blocks.parameters())
    assert sum(weight.numel() for weight in span.hf.parameters()) - inside <= span.hidden_size
    assert not any(weight.requires_grad for weight in span.parameters())
    assert span.config.num_hidden_layers == len(span.blocks) == len(span.config.layer_types) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(tiny: Callable[[str], Path], dtype: torch.dtype) -> None:
    span = _load(tiny("llama"), dtype=dtype)
    assert {weight.dtype for weight in span.blocks.parameters()} == {span.dtype} == {dtype}
    output = span(torch.randn(1, 3, span.hidden_size, dtype=dtype))
    assert output.dtype == dtype and output.isfinite().all()


def test_progress_names_each_block(tiny: Callable[[str], Path]) -> None:
    seen: list[Progress] = []
    load_span(open_model(str(tiny("llama"))), 2, 5, torch.float32, CPU, seen.append)
    assert [(step.file, step.done, step.total) for step in seen] == [
        ("block 2", 1, 3),
        ("block 3", 2, 3),
        ("block 4", 3, 3),
    ]


def test_layers_are_numbered_within_the_span(tiny: Callable[[str], Path]) -> None:
    span = _load(tiny("qwen3_moe"), 3, 6)
    for index, block in enumerate(span.blocks):
        assert {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")} == {index}
    assert (span.start, span.end) == (3, 6)


def test_attention_can_be_exchanged(tiny: Callable[[str], Path]) -> None:
    """Views and blocks follow, and an unknown name is not silently ignored."""
    span = _load(tiny("llama"))
    hidden = torch.randn(2, 9, span.hidden_size)
    eager = span(hidden)
    span.use_attention("sdpa")
    torch.testing.assert_close(span(hidden), eager, atol=1e-4, rtol=0)
    span.use_attention("nonesuch")
    for part in (span, span.view(0, 1)):
        with pytest.raises(KeyError, match="nonesuch"):
            part(hidden)


def test_old_names_and_leftover_buffers(folder: Path) -> None:
    """Checkpoints from older transformers hold rotary frequencies per layer, and may lack the "model." prefix."""
    expected = _load(folder)(torch.ones(1, 3, 32))
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    renamed |= {f"layers.{block}.self_attn.rotary_emb.inv_freq": torch.ones(6) for block in range(BLOCKS)}
    save_file(renamed, folder / "model.safetensors")
    torch.testing.assert_close(_load(folder)(torch.ones(1, 3, 32)), expected)
    assert client_parts(open_model(str(folder)), torch.float32).embed(torch.tensor([[3]])).shape == (1, 1, 32)


def test_zero_tokens(tiny: Callable[[str], Path]) -> None:
    span = _load(tiny("llama"))
    assert span(torch.zeros(2, 0, 32)).shape == (2, 0, 32)


def test_views_and_prompts_are_checked(tiny: Callable[[str], Path]) -> None:
    span = _load(tiny("llama"))
    for start, end in ((-1, 1), (0, 4), (2, 2)):
        with pytest.raises(ValueError, match="of a span of 3"):
            span.view(start, end)
    with pytest.raises(ValueError, match="2 prompts for 3 blocks"):
        span(torch.zeros(1, 2, 32), torch.zeros(2, 1, 1, 32))


# --- what is refused


def test_a_wrong_shape(folder: Path) -> None:
    path = _change(folder, Q, lambda tensors: tensors.update({Q: torch.zeros(48, 31)}))
    with pytest.raises(CheckpointError) as error:
        _load(folder)
    for word in (path.name, Q, "[48, 31]", "[48, 32]"):
        assert word in str(error.value)


def test_a_wrong_dtype(folder: Path) -> None:
    path = _change(folder, Q, lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))
    with pytest.raises(CheckpointError) as error:
        _load(folder)
    for word in (path.name, Q, "I8", "F32"):
        assert word in str(error.value)


def test_a_tensor_that_only_the_index_has(folder: Path) -> None:
    path = _change(folder, Q, lambda tensors: tensors.pop(Q))
    with pytest.raises(CheckpointError) as error:
        _load(folder)
    for word in (path.name, Q, INDEX):
        assert word in str(error.value)


def test_a_weight_that_nobody_has(folder: Path) -> None:
    path = _change(folder, Q, lambda tensors: tensors.pop(Q))
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][Q]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"weights of block 2: self_attn\.q_proj\.weight are missing"
    ) as error:
        _load(folder)
    assert path.name in str(error.value)


def test_experts_of_a_wrong_shape(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts are fused on loading, so that the error comes from a conversion."""
    folder = shutil.copytree(tiny("qwen3_moe"), tmp_path / "moe")
    name = "model.layers.2.mlp.experts.1.gate_proj.weight"
    path = _change(folder, name, lambda tensors: tensors.update({name: torch.zeros(16, 31)}))
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor {name} of shape \[16, 31\]"):
        _load(folder)


def test_config_and_weights_of_different_models(folder: Path) -> None:
    edit_config(folder, hidden_size=64)
    with pytest.raises(CheckpointError, match=r"has shape .* where config\.json asks for .* same model"):
        _load(folder)


def test_config_that_transformers_refuses(folder: Path) -> None:
    edit_config(folder, rms_norm_eps="small")
    with pytest.raises(CheckpointError, match=r"config\.json is refused"):
        _load(folder)


def test_not_finite(folder: Path) -> None:
    _change(folder, Q, lambda tensors: tensors[Q].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="block 2 answers NaN"):
        _load(folder)


def test_remote_code_is_never_run(folder: Path) -> None:
    """A checkpoint that brings its own code is loaded with transformers' code, or not at all."""
    (folder / "modeling_evil.py").write_text("raise SystemExit('this must not run')")
    edit_config(
        folder, auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    )
    assert len(_load(folder).blocks) == 3


def test_a_shard_cut_after_it_was_opened(folder: Path) -> None:
    """Reading fails with a name; a mapped file would end the process."""
    source = open_model(str(folder))
    tensor = Checkpoint.open(source, source.block_tensors(2, 3)).block(2)["self_attn.q_proj.weight"]
    with tensor.path.open("r+b") as file:
        file.truncate(tensor.info.end - 4)
    with pytest.raises(CheckpointError, match=rf"{tensor.path.name}.*{Q}.* cut after it was opened"):
        tensor.read()


def test_tensors_are_read_exactly(folder: Path) -> None:
    source = open_model(str(folder))
    stored = Checkpoint.open(source, source.block_tensors(0, BLOCKS) + source.outer_tensors())
    expected: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        expected |= load_file(path)
    assert set(stored.tensors) == set(expected)
    for name, tensor in stored.tensors.items():
        assert torch.equal(tensor.read(), expected[name])


# --- multimodal checkpoints


@torch.no_grad()
def test_the_text_part_of_a_multimodal_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 3 from 4B on: the text config is nested, the text weights carry a prefix, a vision tower lies beside them."""
    folder = shutil.copytree(tiny("gemma3_text"), tmp_path / "gemma3")
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    wrapped["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.ones(2, 2)
    save_file(wrapped, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    )
    source, plain = open_model(str(folder)), open_model(str(tiny("gemma3_text")))
    assert source.facts == plain.facts
    hidden = torch.randn(1, 9, 32)
    assert torch.equal(_load(folder)(hidden), _load(tiny("gemma3_text"))(hidden))
    ids = torch.tensor([[4, 5]])
    ours, theirs = client_parts(source, torch.float32), client_parts(plain, torch.float32)
    assert torch.equal(ours.embed(ids), theirs.embed(ids))
    assert torch.equal(ours.logits(hidden), theirs.logits(hidden))
