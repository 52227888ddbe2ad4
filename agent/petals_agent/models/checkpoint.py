"""Weights on disk as torch tensors, read one at a time: only those asked for, and never two copies of one.

Bytes are read into fresh memory rather than mapped: a file that is cut or replaced while we serve must not end the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch

from petals_agent.errors import CheckpointError
from petals_agent.models.families import block_of, outer_name
from petals_agent.models.shard import ADVICE, TensorInfo, read_header
from petals_agent.models.source import INDEX, ModelSource, OnProgress

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard; `tensor[...]` reads it, which is how transformers' own loader materialises weights."""

    path: Path
    name: str
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.info.dtype]

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self.read()

    def read(self) -> torch.Tensor:
        """The tensor in its own dtype, in memory of its own; raises CheckpointError if the file no longer holds it."""
        raw = torch.empty(self.info.bytes, dtype=torch.uint8)
        buffer: Any = raw.numpy()
        try:
            with self.path.open("rb") as file:
                file.seek(self.info.start)
                count = file.readinto(buffer)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror}); check the disk"
            ) from error
        if count != self.info.bytes:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} has {count} of its {self.info.bytes} bytes; "
                f"the file was cut after it was opened: {ADVICE}"
            )
        return raw.view(self.dtype).view(self.shape)


class Checkpoint:
    """The shards of a source that hold some tensors, on disk and checked."""

    def __init__(self, source: ModelSource, tensors: dict[str, StoredTensor]) -> None:
        self.source, self.tensors = source, tensors

    @classmethod
    def open(
        cls, source: ModelSource, names: Iterable[str], progress: OnProgress | None = None
    ) -> Checkpoint:
        """Fetch the shards of `names` and check each tensor's place; raises CheckpointError naming file and tensor."""
        names = list(names)
        paths = source.fetch(names, progress)
        headers = {shard: read_header(path) for shard, path in paths.items()}
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            shard = source.weight_map[name]
            info = headers[shard].get(name)
            if info is None:
                raise CheckpointError(
                    f"{paths[shard]}: tensor {name} is not in it though {INDEX} says so; get both files again"
                )
            if info.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{paths[shard]}: tensor {name} has dtype {info.dtype}, expected one of {', '.join(_DTYPES)}; "
                    "quantized checkpoints are not served: use the original one"
                )
            tensors[name] = StoredTensor(paths[shard], name, info)
        return cls(source, tensors)

    def block(self, number: int) -> dict[str, StoredTensor]:
        """Tensors of one block by their names within it ("self_attn.q_proj.weight", …)."""
        places = ((block_of(name), tensor) for name, tensor in self.tensors.items())
        return {place[1]: tensor for place, tensor in places if place and place[0] == number}

    def outer(self) -> dict[str, StoredTensor]:
        """Embeddings, final norm and head by their names without prefix ("embed_tokens.weight", …)."""
        places = ((outer_name(name), tensor) for name, tensor in self.tensors.items())
        return {place: tensor for place, tensor in places if place}
