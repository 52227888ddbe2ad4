"""The header of one safetensors file, read and checked without torch.

A file is 8 bytes of header length (little endian), the header as JSON (name → dtype, shape, offsets) and the data.
Everything in it may be wrong: torn by an interrupted copy, or made by somebody else. A header that passes here describes
bytes that the file really has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals_agent.errors import CheckpointError

MAX_HEADER = 100 << 20  # bytes; the format's own limit
ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; `start` and `end` are offsets in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file on this host; raises CheckpointError naming the file and what is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(8), str(path))
            if 8 + length > size:
                raise CheckpointError(
                    f"{path}: the header should take {length} bytes but the file has {size}; it is truncated: {ADVICE}"
                )
            return parse_header(file.read(length), str(path), size)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and permissions"
        ) from error


ADVICE = "copy or download it again"


def header_length(first: bytes, name: str) -> int:
    """The length that the first 8 bytes of a file promise for its header."""
    if len(first) < 8:
        raise CheckpointError(f"{name}: {len(first)} bytes are not a safetensors file; {ADVICE}")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{name}: not a safetensors file (a header of {length} bytes, at most {MAX_HEADER} are allowed); {ADVICE}"
        )
    return length


def parse_header(raw: bytes, name: str, file_size: int | None) -> dict[str, TensorInfo]:
    """Tensors by name; offsets are checked against `file_size` where it is known."""
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{name}: the header is not JSON ({error}); {ADVICE}") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{name}: the header is a JSON {type(header).__name__}, not an object; {ADVICE}"
        )
    data = 8 + len(raw)
    tensors = {key: _tensor(name, key, entry, data) for key, entry in header.items() if key != "__metadata__"}
    for key, tensor in tensors.items():
        if file_size is not None and tensor.end > file_size:
            raise CheckpointError(
                f"{name}: tensor {key} ends at byte {tensor.end} but the file has {file_size}; it is truncated: {ADVICE}"
            )
    return tensors


def _tensor(name: str, key: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: tensor {key} has no usable header entry ({entry!r:.80}); {ADVICE}"
        ) from error
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{name}: tensor {key} has no usable header entry ({entry!r:.80}); {ADVICE}")
    tensor = TensorInfo(dtype, tuple(shape), data + start, data + end)
    item = ITEM_SIZE.get(dtype)
    if item is not None and tensor.bytes != tensor.elements * item:
        raise CheckpointError(
            f"{name}: the header lies about tensor {key}: {dtype} {list(shape)} needs {tensor.elements * item} bytes, "
            f"its offsets hold {tensor.bytes}; {ADVICE}"
        )
    return tensor


def to_json(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """For keeping headers on disk; `from_json` reads it back."""
    return {name: [t.dtype, list(t.shape), t.start, t.end] for name, t in tensors.items()}


def from_json(entries: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(dtype, tuple(shape), start, end)
        for name, (dtype, shape, start, end) in entries.items()
    }
