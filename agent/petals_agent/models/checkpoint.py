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
from petals_agent.models.families import block_of, outer_name, quantization, text_config
from petals_agent.models.shard import ADVICE, TensorInfo, read_header
from petals_agent.models.source import INDEX, ModelSource, OnProgress

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKED = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}  # only in checkpoints that say how they are quantized
SCALES = "_scale_inv"  # suffix of the tensor with the scales of a float8 weight


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
        return (_DTYPES | _PACKED)[self.info.dtype]

    def get_dtype(self) -> str:
        """The name of the stored dtype, as transformers asks a safetensors slice for it."""
        return self.info.dtype

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


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A float8 weight that is read with its scales applied, one for each tile of `tile` (rows, columns), as float32."""

    scales: StoredTensor
    tile: tuple[int, int]

    def read(self) -> torch.Tensor:
        weight, scales = super().read().float(), self.scales.read().float()
        if scales.numel() == 1:
            return weight.mul_(scales.reshape(()))
        tiles = tuple(-(-length // step) for length, step in zip(weight.shape, self.tile, strict=False))
        if tuple(scales.shape) != tiles:
            raise CheckpointError(
                f"{self.path}: tensor {self.scales.name} has shape {list(scales.shape)}, expected {list(tiles)} for tiles "
                f"of {list(self.tile)}; get the file and config.json again"
            )
        for row in range(
            tiles[0]
        ):  # a row of tiles at a time: the scales as large as the weight would be a second copy
            part = weight[row * self.tile[0] : (row + 1) * self.tile[0]]
            part.mul_(scales[row].repeat_interleave(self.tile[1])[: weight.shape[1]])
        return weight


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
        known = _DTYPES | (_PACKED if quantization(source.config) else {})
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            shard = source.weight_map[name]
            info = headers[shard].get(name)
            if info is None:
                raise CheckpointError(
                    f"{paths[shard]}: tensor {name} is not in it though {INDEX} says so; get both files again"
                )
            if info.dtype not in known:
                raise CheckpointError(
                    f"{paths[shard]}: tensor {name} has dtype {info.dtype}, expected one of {', '.join(known)}; "
                    "use the original checkpoint, not a quantized one"
                )
            tensors[name] = StoredTensor(paths[shard], name, info)
        return cls(source, tensors)

    def block(self, number: int) -> dict[str, StoredTensor]:
        """Tensors of one block by their names within it ("self_attn.q_proj.weight", …)."""
        places = ((block_of(name), tensor) for name, tensor in self.tensors.items())
        tensors = {place[1]: tensor for place, tensor in places if place and place[0] == number}
        if quantization(self.source.config) != "fp8":
            return tensors
        settings = text_config(self.source.config)["quantization_config"]
        rows, columns = settings.get("weight_block_size") or (128, 128)
        return {
            name: ScaledTensor(tensor.path, tensor.name, tensor.info, scales, (rows, columns))
            if scales
            else tensor
            for name, tensor in tensors.items()
            for scales in [tensors.get(name + SCALES)]
            if not name.endswith(SCALES)
        }

    def outer(self) -> dict[str, StoredTensor]:
        """Embeddings, final norm and head by their names without prefix ("embed_tokens.weight", …)."""
        places = ((outer_name(name), tensor) for name, tensor in self.tensors.items())
        return {place: tensor for place, tensor in places if place}
