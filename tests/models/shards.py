"""Small checkpoints written byte by byte, so that they can be wrong in any way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "max_position_embeddings": 64,
}
PER_BLOCK = {"self_attn.q_proj.weight": [16, 16], "mlp.up_proj.weight": [40, 16]}


def write_shard(path: Path, tensors: dict[str, list[int]], header: dict[str, Any] | None = None) -> None:
    """A safetensors file of float32 zeros with these shapes; `header` replaces entries of the true one."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps({"__metadata__": {"format": "pt"}} | entries | (header or {})).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))


def write_checkpoint(
    folder: Path, config: dict[str, Any] = LLAMA, per_block: dict[str, list[int]] = PER_BLOCK
) -> Path:
    """One shard per block, 00 … , and the embeddings and head in a last one; with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    blocks = config["num_hidden_layers"]
    weight_map: dict[str, str] = {}
    for block in range(blocks + 1):
        tensors = {f"model.layers.{block}.{name}": shape for name, shape in per_block.items()}
        if block == blocks:
            tensors = {
                "model.embed_tokens.weight": [100, 16],
                "model.norm.weight": [16],
                "lm_head.weight": [100, 16],
            }
        shard = f"model-{block:05}-of-{blocks + 1:05}.safetensors"
        write_shard(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shard_name(block: int, blocks: int = 4) -> str:
    return f"model-{block:05}-of-{blocks + 1:05}.safetensors"
