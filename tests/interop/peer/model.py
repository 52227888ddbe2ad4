"""Write a tiny random Llama folder that old (4.3x) and new (5.x) transformers read alike, the same bytes every time.

The weights come from a seeded generator, not from any transformers version. Needs torch and safetensors only, and
runs in either environment; tests import `write_model`.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def config(shape, dtype, rope_theta):
    """config.json with both spellings of what changed its name between the versions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pretraining_tp": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # 4.34 knows only the first two (without rope_theta it silently takes 10000) and refuses other rope_scaling
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "transformers_version": "4.34.1",
    }


def tensors(shape, dtype, seed, scale):
    """Yield (name, tensor) in the order of the checkpoint; `scale` is the standard deviation of the weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inter = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def weight(*size):
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    def norm():
        return (1 + torch.randn(hidden, generator=generator) * scale).to(dtype)

    yield "model.embed_tokens.weight", weight(shape["vocab_size"], hidden)
    for i in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "self_attn.q_proj.weight", weight(hidden, hidden)
        yield layer + "self_attn.k_proj.weight", weight(kv, hidden)
        yield layer + "self_attn.v_proj.weight", weight(kv, hidden)
        yield layer + "self_attn.o_proj.weight", weight(hidden, hidden)
        yield layer + "mlp.gate_proj.weight", weight(inter, hidden)
        yield layer + "mlp.up_proj.weight", weight(inter, hidden)
        yield layer + "mlp.down_proj.weight", weight(hidden, inter)
        yield layer + "input_layernorm.weight", norm()
        yield layer + "post_attention_layernorm.weight", norm()
    yield "model.norm.weight", norm()
    yield "lm_head.weight", weight(shape["vocab_size"], hidden)


def write_model(folder, *, dtype="float32", seed=0, scale=0.05, rope_theta=10000.0, shard_mb=4.0, **shape):
    """Write the folder in shards of at most `shard_mb` MB; keyword arguments named as in config.json change the shape."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = {**SHAPE, **shape}
    (folder / "config.json").write_text(json.dumps(config(shape, dtype, rope_theta), indent=1))
    parts, size = [{}], 0
    for name, tensor in tensors(shape, getattr(torch, dtype), seed, scale):
        if parts[-1] and size + tensor.nbytes > shard_mb * 1e6:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})  # 4.34 refuses a file without this metadata
        weight_map.update(dict.fromkeys(part, file))
    if len(parts) > 1:
        total = sum(tensor.nbytes for part in parts for tensor in part.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    for name, value in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    arguments = vars(parser.parse_args())
    print(write_model(arguments.pop("folder"), **arguments))


if __name__ == "__main__":
    main()
