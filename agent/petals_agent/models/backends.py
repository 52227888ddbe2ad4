"""Which backend serves a span: the fastest whose outputs pass the self-check at load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from petals_agent.engine.backend import Backend
from petals_agent.engine.lean import LeanBackend, LeanConfig, tensor_names
from petals_agent.errors import UnsupportedModel
from petals_agent.models.source import ModelSource, Progress


def load_backend(
    source: ModelSource,
    start: int,
    end: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[Progress], None],
    state_dir: Path,
) -> Backend:
    """Blocks [start, end) ready to run. Raises ModelError."""
    config = LeanConfig.read(source.config)
    if config is None:
        raise UnsupportedModel(f"{source.name}: only Llama-like models are served yet")
    names = source.block_tensors(start, end)
    paths = source.fetch(names, progress)
    known = [tensor_names(layer) for layer in range(start, end)]
    wanted = {name for layer in known for name in layer.values()}
    tensors: dict[str, torch.Tensor] = {}
    for path in paths.values():
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():
                if name in wanted:
                    tensors[name] = shard.get_tensor(name)
    blocks: list[Mapping[str, torch.Tensor]] = [
        {short: tensors[name] for short, name in layer.items() if name in tensors} for layer in known
    ]
    with torch.inference_mode(False):
        return LeanBackend(config, blocks, start, dtype, device)
