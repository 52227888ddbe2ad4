"""The messages a client sends and reads: tensors, metadata, chains (protocol.md §3 to §6)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from petals_agent.codecs import QUANTIZED, dequantize
from petals_agent.p2p import light

light.install(without_torch=False)

import hivemind.compression.base as hivemind_compression  # noqa: E402
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor  # noqa: E402
from hivemind.proto import runtime_pb2  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

if "USE_LEGACY_BFLOAT16" not in os.environ:
    hivemind_compression.USE_LEGACY_BFLOAT16 = False  # two bytes a value, as all of Petals sends them

HANDLER = "TransformerConnectionHandler"
STREAM_PART_BYTES = 4 * 2**20
MAX_UNARY_BYTES = 2**20  # of raw tensors; above it calls are streamed

Tensors = Sequence[torch.Tensor]


def no_prompts() -> torch.Tensor:
    """The empty tensor that stands for no prompts."""
    return torch.empty(0)


def no_hypo_ids() -> torch.Tensor:
    """The empty tensor that stands for no reordering."""
    return torch.empty(0, dtype=torch.int64)


def structure(count: int) -> tuple[tuple[bytes, ...], dict[str, Any]]:
    """`args_structure` of `count` positional tensors."""
    return tuple(b"__T%d" % i for i in range(count)), {}


def raw_bytes(tensors: Tensors) -> int:
    """Size of the tensors before compression."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(tensor: torch.Tensor) -> runtime_pb2.Tensor:
    """A tensor from any device as it goes on the wire."""
    return serialize_torch_tensor(tensor.detach().to("cpu").contiguous())


def request(uid: str, tensors: Tensors, metadata: Mapping[str, Any]) -> runtime_pb2.ExpertRequest:
    """One request in one message."""
    packed = MSGPackSerializer.dumps(dict(metadata))
    return runtime_pb2.ExpertRequest(uid=uid, tensors=[encode(t) for t in tensors], metadata=packed)


def empty_request() -> runtime_pb2.ExpertRequest:
    """The request that ends an inference session."""
    return runtime_pb2.ExpertRequest()


def streamed_request(
    uid: str, tensors: Tensors, metadata: Mapping[str, Any]
) -> list[runtime_pb2.ExpertRequest]:
    """The messages of one `_stream` call: tensors in parts of 4 MiB, uid and metadata in each."""
    packed = MSGPackSerializer.dumps(dict(metadata))
    parts = (part for tensor in tensors for part in _split(encode(tensor)))
    return [runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=packed) for part in parts]


def _split(tensor: runtime_pb2.Tensor) -> list[runtime_pb2.Tensor]:
    buffer = tensor.buffer
    chunks = range(0, len(buffer), STREAM_PART_BYTES)
    first = runtime_pb2.Tensor(
        compression=tensor.compression,
        buffer=buffer[:STREAM_PART_BYTES],
        chunks=len(chunks),
        size=tensor.size,
        dtype=tensor.dtype,
        requires_grad=tensor.requires_grad,
    )
    return [first, *(runtime_pb2.Tensor(buffer=buffer[i : i + STREAM_PART_BYTES]) for i in chunks[1:])]


def response(
    messages: Sequence[runtime_pb2.ExpertResponse], shapes: Sequence[tuple[int, ...]], like: torch.Tensor
) -> list[torch.Tensor]:
    """Decode one answer (in one message or in parts) that must hold tensors of exactly these `shapes`.

    They get the dtype and the device of `like`. Raises ValueError that says what is wrong with the answer.
    """
    tensors: list[runtime_pb2.Tensor] = []
    for part in (tensor for message in messages for tensor in message.tensors):
        if part.dtype or not tensors:
            tensors.append(part)
        else:
            tensors[-1].buffer += part.buffer
    if len(tensors) != len(shapes):
        raise ValueError(f"answered {len(tensors)} tensors instead of {len(shapes)}")
    return [_decode(tensor, shape, like) for tensor, shape in zip(tensors, shapes, strict=True)]


def answer_limit(shapes: Sequence[tuple[int, ...]]) -> int:
    """More bytes than an honest answer with tensors of these shapes has, in any codec."""
    return sum(16 * math.prod(shape) + 4096 for shape in shapes)


def _decode(tensor: runtime_pb2.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.size) != shape:
        raise ValueError(f"answered a tensor of shape {tuple(tensor.size)!s:.80} instead of {shape}")
    if len(tensor.buffer) > answer_limit([shape]):
        raise ValueError(f"answered {len(tensor.buffer)} bytes for a tensor of shape {shape}")
    try:
        if tensor.compression in QUANTIZED:  # hivemind's own reading fails with numpy 2.4
            values = dequantize(tensor.buffer, tensor.compression, math.prod(shape))
            decoded = torch.from_numpy(values).view(shape)
        else:
            decoded = deserialize_torch_tensor(tensor)
    except Exception as error:
        raise ValueError(f"answered a tensor that does not decode ({error})") from error
    if decoded.shape != shape or not decoded.is_floating_point():
        raise ValueError(f"answered a tensor of dtype {tensor.dtype!r:.40} that is not {shape} floats")
    if not bool(torch.isfinite(decoded).all()):
        raise ValueError("answered NaN or Inf")
    return decoded.detach().to(device=like.device, dtype=like.dtype)
