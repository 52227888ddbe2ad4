"""Checkpoints with packed weights: served widened, equal to the same weights written out in float32."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.tiny import edit_config, tiny_model
from petals_agent.errors import CheckpointError, UnsupportedModel
from petals_agent.models.client_parts import client_parts
from petals_agent.models.source import INDEX, open_model
from petals_agent.models.span import load_span

Tensors = dict[str, torch.Tensor]
# the 16 values of 4-bit floats (OCP Microscaling: sign, two bits of exponent, one of mantissa)
FP4 = torch.tensor([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
TILE = 10  # divides no size of the tiny models


def _unpack(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    return tensors


def _write_both(plain: Path, wide: Tensors, packed: Tensors, **quantization: Any) -> Path:
    """The checkpoint with the weights written out stays at `plain`; returns the packed one beside it."""
    folder = shutil.copytree(plain, plain.with_name("packed"))
    save_file(wide, plain / "model.safetensors")
    save_file(packed, folder / "model.safetensors")
    edit_config(folder, quantization_config=quantization)
    return folder


def _mxfp4(plain: Path) -> Path:
    """Experts of GPT-OSS as published: pairs of 4-bit values in a byte, one exponent for 32 of them, transposed."""
    generator = torch.Generator().manual_seed(0)
    wide = _unpack(plain)
    packed: Tensors = {}
    for name in list(wide):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = wide[name]
            continue
        experts, rows, columns = wide[name].shape
        blocks = torch.randint(
            0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        values = torch.stack((FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]), dim=-1).flatten(-2)
        values *= 2.0 ** (scales.float() - 127)[..., None]
        wide[name] = values.flatten(-2).transpose(1, 2).contiguous()
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _write_both(plain, wide, packed, quant_method="mxfp4", modules_to_not_convert=kept)


def _fp8(plain: Path, tile: int | None) -> Path:
    """Projections as in DeepSeek V3: float8, with a scale for each tile; or one scale for the whole."""
    generator = torch.Generator().manual_seed(0)
    wide = _unpack(plain)
    packed: Tensors = {}
    for name in list(wide):
        if not (".layers." in name and name.endswith("proj.weight")):
            packed[name] = wide[name]
            continue
        rows, columns = wide[name].shape
        narrow = wide[name].to(torch.float8_e4m3fn)
        size = (math.ceil(rows / tile), math.ceil(columns / tile)) if tile else ()
        scales = torch.rand(size, generator=generator) + 0.5
        per_weight = scales
        if tile:
            per_weight = scales.repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :columns]
        wide[name] = narrow.float() * per_weight
        packed[name], packed[f"{name}_scale_inv"] = narrow, scales
    block_size = [tile, tile] if tile else None
    return _write_both(plain, wide, packed, quant_method="fp8", weight_block_size=block_size)


@torch.no_grad()
@pytest.mark.parametrize(
    "packing", ["gpt_oss-mxfp4", "llama-fp8", "llama-fp8-whole", "qwen3_moe-fp8", "deepseek_v3-fp8"]
)
def test_equals_the_weights_written_out(packing: str, tmp_path: Path) -> None:
    variant = packing.split("-")[0]
    plain = tiny_model(
        variant, tmp_path / "plain", **({"intermediate_size": 64} if variant == "gpt_oss" else {})
    )
    if packing.endswith("mxfp4"):
        folder = _mxfp4(plain)
    else:
        folder = _fp8(plain, None if packing.endswith("whole") else TILE)
    ours, theirs = open_model(str(folder)), open_model(str(plain))
    assert ours.facts == theirs.facts
    hidden = torch.randn(1, 9, 32)
    packed, wide = (load_span(source, 1, 4, torch.float32, torch.device("cpu")) for source in (ours, theirs))
    assert {weight.dtype for weight in packed.parameters()} == {torch.float32}
    torch.testing.assert_close(packed(hidden), wide(hidden), atol=1e-5, rtol=0)
    assert torch.equal(
        client_parts(ours, torch.float32).logits(hidden), client_parts(theirs, torch.float32).logits(hidden)
    )


def test_scales_of_a_wrong_shape(tmp_path: Path) -> None:
    folder = _fp8(tiny_model("llama", tmp_path / "plain"), TILE)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    with pytest.raises(
        CheckpointError, match=r"_proj\.weight_scale_inv has shape \[4, 5\], expected \[2, 3\]"
    ):
        load_span(open_model(str(folder)), 1, 2, torch.float32, torch.device("cpu"))


def test_other_packings_are_refused_before_any_weight_is_asked_for(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "llama")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UnsupportedModel, match="quantized with 'gptq', only mxfp4 and fp8"):
        open_model(str(folder))


def test_packed_weights_without_a_word_in_the_config(tmp_path: Path) -> None:
    folder = _fp8(tiny_model("llama", tmp_path / "plain"), TILE)
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"tensor .* has dtype F8_E4M3, expected one of F64"):
        load_span(open_model(str(folder)), 1, 2, torch.float32, torch.device("cpu"))
