"""Opening a model from a folder: what is read, and what each kind of damage is answered with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.shards import LLAMA, shard_name, write_checkpoint, write_shard
from petals_agent.errors import CheckpointError, UnsupportedModel
from petals_agent.models.facts import default_prefix
from petals_agent.models.source import open_model


def test_facts_of_a_folder(tmp_path: Path) -> None:
    facts = open_model(str(write_checkpoint(tmp_path / "m"))).facts
    assert (facts.model_type, facts.num_blocks, facts.hidden_size) == ("llama", 4, 16)
    assert (facts.num_heads, facts.num_kv_heads, facts.head_dim, facts.kv_width) == (4, 2, 4, 16)
    assert facts.block_parameters == (16 * 16 + 40 * 16,) * 4
    assert facts.block_bytes("bfloat16") == 2 * 896 and facts.span_bytes(1, 3, "float32") == 2 * 4 * 896
    assert facts.kv_bytes_per_token("float32") == 64
    assert (facts.dtype, facts.max_positions) == ("float32", 64)
    assert (facts.repository, facts.revision, facts.dht_prefix) == (None, None, None)


def test_blocks_of_different_sizes_and_layers_beyond_the_last(tmp_path: Path) -> None:
    """A mixture-of-experts model has small first blocks, and some checkpoints hold extra prediction layers."""
    folder = write_checkpoint(tmp_path / "m")
    write_shard(folder / shard_name(0), {"model.layers.0.mlp.up_proj.weight": [3]})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: shard
        for name, shard in index["weight_map"].items()
        if not name.startswith("model.layers.0.self")
    } | {"model.layers.4.mlp.up_proj.weight": shard_name(3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = open_model(str(folder)).facts
    assert facts.block_parameters == (3, 896, 896, 896)
    assert facts.block_bytes("float32") == 4 * 896


def test_names_of_tensors_and_their_shards(tmp_path: Path) -> None:
    source = open_model(str(write_checkpoint(tmp_path / "m")))
    assert source.block_tensors(1, 3) == [
        f"model.layers.{block}.{name}"
        for block in (1, 2)
        for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight")
    ]
    assert sorted(source.fetch(source.block_tensors(1, 3))) == [shard_name(1), shard_name(2)]
    assert source.outer_tensors() == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert (
        source.file("config.json") == (tmp_path / "m/config.json").resolve()
        and source.file("absent.json") is None
    )
    for start, end in ((0, 5), (-1, 2), (2, 2), (3, 1)):
        with pytest.raises(CheckpointError, match="blocks 0:4"):
            source.block_tensors(start, end)


def test_one_file_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1, "torch_dtype": None}))
    write_shard(tmp_path / "model.safetensors", {"layers.0.mlp.up_proj.weight": [2, 2]})
    assert open_model(str(tmp_path)).facts.block_parameters == (4,)


def test_reads_without_torch_or_transformers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    code = (
        "import sys; from petals_agent.models.source import open_model; import petals_agent.models.memory;"
        "open_model(sys.argv[1]).facts;"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


def _truncated(folder: Path) -> None:
    path = folder / shard_name(2)
    path.write_bytes(path.read_bytes()[:-10])


def _torn_header(folder: Path) -> None:
    path = folder / shard_name(2)
    path.write_bytes(path.read_bytes()[:40])


def _missing(folder: Path) -> None:
    (folder / shard_name(2)).unlink()


def _not_safetensors(folder: Path) -> None:
    (folder / shard_name(2)).write_bytes(b"<!DOCTYPE html><html>")


def _lying(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [99, 16], "data_offsets": [0, 1024]}
    write_shard(folder / shard_name(2), {"model.layers.2.a": [16, 16]}, {"model.layers.2.a": entry})


def _nonsense_entry(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [-1, 16], "data_offsets": [0, 64]}
    write_shard(folder / shard_name(2), {"model.layers.2.a": [16]}, {"model.layers.2.a": entry})


def _header_is_a_list(folder: Path) -> None:
    (folder / shard_name(2)).write_bytes((2).to_bytes(8, "little") + b"[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncated, ["truncated", "tensor model.layers.2."]),
        (_torn_header, ["truncated"]),
        (_missing, ["is missing"]),
        (_not_safetensors, ["not a safetensors file"]),
        (_lying, ["lies about tensor model.layers.2.a", "[99, 16]", "6336 bytes", "1024"]),
        (_nonsense_entry, ["model.layers.2.a", "no usable header entry"]),
        (_header_is_a_list, ["not an object"]),
    ],
)
def test_damaged_shards_name_the_file(tmp_path: Path, damage: object, words: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "m")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError) as error:
        _ = open_model(str(folder)).facts
    for word in (shard_name(2), *words):
        assert word in str(error.value)


def test_blocks_that_no_shard_has(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 7}))
    with pytest.raises(CheckpointError, match=r"promises 7 blocks .* no tensors of block 4"):
        _ = open_model(str(folder)).facts


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", "[]", "not an object"),
        ("config.json", json.dumps(LLAMA | {"hidden_size": "16"}), "hidden_size is '16'"),
        ("config.json", json.dumps({"model_type": "llama"}), "no num_hidden_layers"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}', "not a shard"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}', "not a shard"),
    ],
)
def test_damaged_json(tmp_path: Path, name: str, text: str, words: str) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        _ = open_model(str(folder)).facts


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin but no safetensors.*save_pretrained"):
        open_model(str(tmp_path))


def test_no_config_no_weights_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(CheckpointError, match="get the whole checkpoint"):
        open_model(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_model(str(tmp_path / "absent"))


def test_unsupported_family_lists_the_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedModel, match=r"'mamba' is not served.*bloom.*llama.*qwen3_moe"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("repo", "model_type", "prefix"),
    [
        ("bigscience/bloom", "bloom", "bigscience/bloom-petals"),
        ("bigscience/bloom-petals", "bloom", "bigscience/bloom-petals"),
        ("bigscience/bloom-7b1", "bloom", "bigscience/bloom-7b1-petals"),
        ("meta-llama/Llama-2-70b-hf", "llama", "Llama-2-70b-hf"),
        ("meta-llama/Meta-Llama-3.1-405B-Instruct", "llama", "Meta-Llama-3-1-405B-Instruct-hf"),
        ("tiiuae/falcon-180B-chat", "falcon", "falcon-180B-chat"),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral", "mistralai/Mixtral-8x22B-Instruct-v0-1"),
        ("Qwen/Qwen2.5-7B", "qwen2", "Qwen/Qwen2-5-7B"),
    ],
)
def test_default_prefixes(repo: str, model_type: str, prefix: str) -> None:
    assert default_prefix(repo, model_type) == prefix
