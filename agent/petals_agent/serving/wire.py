"""Tensors and metadata as they come from strangers: checked before they cost memory, then turned into torch tensors.

protocol.md §0, §4.2–4.4, §5, §6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from petals_agent.codecs import QUANTIZED, dequantize
from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.p2p import light

light.install(without_torch=False)

import hivemind.compression.base as compression_base  # noqa: E402
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: E402
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor  # noqa: E402
from hivemind.proto import runtime_pb2  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

compression_base.USE_LEGACY_BFLOAT16 = False  # as Petals does: 2 bytes a value on the wire
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

NONE = runtime_pb2.CompressionType.NONE
COMPRESSIONS: dict[str, int] = dict(runtime_pb2.CompressionType.items())
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
}
MAX_RANK = 4
PART_BYTES = 4 * 2**20  # Petals splits streamed tensors into parts of this size
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse(kind: Any, body: bytes) -> Any:
    """`body` as a protobuf message of class `kind`; raises RequestError when it is none."""
    try:
        return kind.FromString(body)
    except DecodeError:
        raise RequestError(f"{len(body)} bytes came that are no {kind.DESCRIPTOR.name}") from None


def decode_tensor(message: runtime_pb2.Tensor, max_elements: int) -> torch.Tensor:
    """The tensor that `message` holds; floating or int64, on the CPU.

    Raises LimitExceeded when it claims more than `max_elements`, RequestError when it is not what it claims to be.
    """
    shape = tuple(message.size)
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise RequestError(
            f"tensor dtype {message.dtype[:32]!r} is not served; use one of {', '.join(DTYPES)}"
        )
    if len(shape) > MAX_RANK:
        raise RequestError(f"a tensor has {len(shape)} dimensions; at most {MAX_RANK} are allowed")
    elements = math.prod(shape)
    if elements > max_elements:
        raise LimitExceeded(f"a tensor of {elements} elements was claimed; the limit here is {max_elements}")
    if message.compression == NONE:
        return _plain(message.buffer, dtype, shape, elements)
    try:
        if message.compression in QUANTIZED:
            values = dequantize(message.buffer, message.compression, elements)
            return torch.from_numpy(values).to(dtype).view(shape)
        tensor: torch.Tensor = deserialize_torch_tensor(message).detach()
    except Exception as error:
        raise RequestError(f"a tensor could not be decompressed: {error!r}") from error
    if tuple(tensor.shape) != shape:
        raise RequestError(f"a tensor of shape {list(shape)} was claimed, {list(tensor.shape)} came out")
    return tensor


def _plain(buffer: bytes, dtype: torch.dtype, shape: tuple[int, ...], elements: int) -> torch.Tensor:
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    size = len(buffer)
    if size == elements * dtype.itemsize:
        return torch.frombuffer(buffer, dtype=dtype).view(shape)
    if dtype == torch.bfloat16 and size == elements * 4:  # hivemind's older layout: float32 values
        return torch.frombuffer(buffer, dtype=torch.float32).view(shape).to(torch.bfloat16)
    raise RequestError(f"a tensor of {elements} {_NAMES[dtype]} values came with {size} bytes")


def encode_tensor(tensor: torch.Tensor, compression: int = NONE) -> runtime_pb2.Tensor:
    """`tensor` on the CPU, detached, as a message.

    Raises RequestError when the codec cannot hold its dtype (FLOAT16 and MEANSTD_16BIT refuse bfloat16).
    """
    if compression == NONE:
        flat = tensor.contiguous()
        raw = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat
        return runtime_pb2.Tensor(
            buffer=raw.numpy().tobytes(), size=tensor.shape, dtype=_NAMES[tensor.dtype], compression=NONE
        )
    try:
        return serialize_torch_tensor(tensor.detach(), compression)
    except Exception as error:
        name = runtime_pb2.CompressionType.Name(compression)
        raise RequestError(f"{name} cannot carry {_NAMES[tensor.dtype]}: {error}") from error


def split_tensor(message: runtime_pb2.Tensor) -> Iterable[runtime_pb2.Tensor]:
    """Parts of at most PART_BYTES; the first carries the description, the others only bytes."""
    buffer = message.buffer
    chunks = -(-len(buffer) // PART_BYTES)
    yield runtime_pb2.Tensor(
        buffer=buffer[:PART_BYTES],
        chunks=chunks,
        size=message.size,
        dtype=message.dtype,
        compression=message.compression,
        requires_grad=message.requires_grad,
    )
    for start in range(PART_BYTES, len(buffer), PART_BYTES):
        yield runtime_pb2.Tensor(buffer=buffer[start : start + PART_BYTES])


def join_parts(parts: Sequence[runtime_pb2.Tensor]) -> list[runtime_pb2.Tensor]:
    """The reverse: a part with a dtype starts the next tensor."""
    groups: list[list[runtime_pb2.Tensor]] = []
    for part in parts:
        if part.dtype or not groups:
            groups.append([part])
        else:
            groups[-1].append(part)
    joined = []
    for group in groups:
        if len(group) > 1:
            whole = runtime_pb2.Tensor()
            whole.CopyFrom(group[0])
            whole.buffer = b"".join(part.buffer for part in group)
            joined.append(whole)
        else:
            joined.append(group[0])
    return joined


# --- metadata

_TUPLE = 0x40
_INFERENCE_ARGS = bytes.fromhex("92c7134093c4045f5f5430c4045f5f5431c4045f5f543280")
_USUAL_ORDER: Any = (
    (b"__T0", b"__T1", b"__T2"),
    {},
)  # what practically everyone sends, recognised by identity
_MAX_NESTING = 8


def _unpack(data: bytes, depth: int = 0) -> Any:
    """Like hivemind's serializer, which some 200 nested tuples (1 KB) drive over the end of the C stack."""

    def extension(code: int, payload: bytes) -> Any:
        if code != _TUPLE:
            return payload
        if payload == _INFERENCE_ARGS:
            return _USUAL_ORDER
        if depth == _MAX_NESTING:
            raise RequestError(
                f"metadata with tuples nested more than {_MAX_NESTING} deep; that is the limit here"
            )
        return tuple(_unpack(payload, depth + 1))

    return msgpack.unpackb(data, ext_hook=extension, raw=False)


def decode_metadata(raw: bytes, limit: int) -> dict[str, Any]:
    """The metadata dict; empty bytes are an empty dict. Raises LimitExceeded or RequestError."""
    if not raw:
        return {}
    if len(raw) > limit:
        raise LimitExceeded(f"metadata of {len(raw)} bytes; the limit here is {limit}")
    try:
        metadata = _unpack(raw)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"metadata is not msgpack: {type(error).__name__}") from None
    if not isinstance(metadata, dict):
        raise RequestError(f"metadata must be a dict, not {type(metadata).__name__}")
    return metadata


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    return bytes(MSGPackSerializer.dumps(metadata))


def ordered(tensors: Sequence[Any], structure: Any) -> list[Any]:
    """Tensors in the order that `args_structure` gives; as they came when it is absent.

    The structure is (args, kwargs) with b"__T<index>" in place of tensors; kwargs are ignored, as Petals does.
    Raises RequestError when it names a tensor that is not there or is no such structure.
    """
    if structure is None or structure is _USUAL_ORDER:
        return list(tensors)
    if (
        not isinstance(structure, (tuple, list))
        or len(structure) != 2
        or not isinstance(structure[0], (tuple, list))
    ):
        raise RequestError("args_structure must be a pair of positional and named arguments")
    picked = []
    for marker in structure[0]:
        if not isinstance(marker, bytes) or not marker.startswith(b"__T") or not marker[3:].isdigit():
            raise RequestError("args_structure may hold only tensor markers")
        if len(marker) > 8 or int(marker[3:]) >= len(tensors):
            raise RequestError(f"args_structure names tensor {marker[:16]!r}; {len(tensors)} came")
        picked.append(tensors[int(marker[3:])])
    return picked


@dataclass(frozen=True)
class NextServer:
    """Where a step's output is pushed to: a session at a peer, and the blocks [start, end) it will run."""

    peer_id: str
    session_id: str
    start: int
    end: int


def text(metadata: dict[str, Any], key: str, limit: int = 256) -> str | None:
    """An optional string."""
    value = metadata.get(key)
    if value is not None and (not isinstance(value, str) or len(value) > limit):
        raise RequestError(f"{key} must be a string of at most {limit} characters")
    return value


def number(metadata: dict[str, Any], key: str, default: float) -> float:
    """An optional finite number that is not negative."""
    value = metadata.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise RequestError(f"{key} must be a finite number that is not negative, not {str(value)[:32]!r}")
    return float(value)


def next_servers(metadata: dict[str, Any], limit: int) -> list[NextServer]:
    """The push targets of a step, first one next. Raises RequestError when malformed."""
    value = metadata.get("next_servers")
    if not value:
        return []
    if not isinstance(value, (list, tuple)) or len(value) > limit:
        raise RequestError(f"next_servers must be a list of at most {limit} entries")
    found = []
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) != 4:
            raise RequestError("each of next_servers must be (peer id, session id, start, end)")
        peer, session, start, end = entry
        if not (
            isinstance(peer, str) and isinstance(session, str) and len(peer) <= 128 and len(session) <= 256
        ):
            raise RequestError("next_servers: peer id and session id must be short strings")
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= 100_000:
            raise RequestError("next_servers: start and end must be block numbers with start < end")
        found.append(NextServer(peer, session, start, end))
    return found
