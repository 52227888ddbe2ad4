"""Weights that do not fit config.json are refused by file and tensor, by the lean backend as by transformers' modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.tiny import edit_config
from petals_agent.container.backends import SpanRequest, load_backend
from petals_agent.engine.backend import Backend
from petals_agent.errors import CheckpointError
from petals_agent.models.source import open_model

LAST = "model.layers.2."  # a block that the self-check does not run
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that the test may damage."""
    return shutil.copytree(tiny("llama"), tmp_path / "llama")


def _load(folder: Path) -> Backend:
    source = open_model(str(folder))
    request = SpanRequest(source, 0, 3, torch.float32, torch.device("cpu"), lambda progress: None)
    return load_backend(request, folder / "verdicts.json")


def _change(folder: Path, tensor: str, change: Change) -> Path:
    path = folder / open_model(str(folder)).weight_map[tensor]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("variant", ["llama", "mistral", "mistral-full", "qwen2", "qwen3"])
def test_what_fits_is_lean(tiny: Callable[[str], Path], variant: str) -> None:
    assert _load(tiny(variant)).name == "lean"


@pytest.mark.parametrize(
    "name", ["mlp.down_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"]
)
def test_a_wrong_shape(folder: Path, name: str) -> None:
    path = _change(folder, LAST + name, lambda t: t.update({LAST + name: t[LAST + name][:1].contiguous()}))
    with pytest.raises(CheckpointError, match=r"has shape \[1.* where config\.json asks for") as error:
        _load(folder)
    assert path.name in str(error.value) and LAST + name in str(error.value)


def test_a_config_of_another_model(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"has shape \[.*48.*\] where config\.json asks for \[.*64"):
        _load(folder)


def test_a_weight_that_is_not_finite(folder: Path) -> None:
    name = LAST + "mlp.up_proj.weight"
    path = _change(folder, name, lambda tensors: tensors[name][3, 4].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor {name} holds NaN or Inf"):
        _load(folder)


def test_a_missing_weight(folder: Path) -> None:
    """All weights in one file, so that no index promises what is gone."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    del tensors[LAST + "mlp.down_proj.weight"]
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weights of block 2: mlp\.down_proj\.weight are missing"):
        _load(folder)


def test_a_bias_that_config_json_does_not_ask_for(folder: Path) -> None:
    """transformers, and so the client's local model, leave it out."""
    _change(
        folder,
        LAST + "mlp.up_proj.weight",
        lambda t: t.update({LAST + "self_attn.q_proj.bias": torch.ones(48)}),
    )
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    shard = open_model(str(folder)).weight_map[LAST + "mlp.up_proj.weight"]
    index.write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{LAST}self_attn.q_proj.bias": "{shard}",')
    )
    assert _load(folder).name == "packed"
