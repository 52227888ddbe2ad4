"""rpc_info, rpc_forward and rpc_backward, unary and streamed (protocol.md §3, §5)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.p2p.streams import Stream
from petals_agent.serving import wire
from petals_agent.serving.inference import check_prompts
from petals_agent.serving.server import BlockServer, check_adapter

from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip
from hivemind.utils.tensor_descr import BatchTensorDescriptor  # isort: skip

_UNARY_LIMIT = 4 * 2**20 - 65536


def info(server: BlockServer, uid: str) -> bytes:
    """The answer to rpc_info; `uid` may be empty. Raises RequestError for a block that is not served."""
    facts: dict[str, Any] = {
        "version": server.version,
        "dht_client_mode": server.client_mode,
        "cache_tokens_available": server.ledger.left // 2,
    }
    if uid:
        server.chain(uid)
        backend = server.engine.backend
        hidden = BatchTensorDescriptor(
            1, 2048, backend.hidden_size, dtype=backend.dtype, compression=server.compression
        )
        prompts = BatchTensorDescriptor((), dtype=backend.dtype, compression=server.compression)
        hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
        facts.update(
            forward_schema=((hidden,), {}),
            outputs_schema=(hidden,),
            keyword_names=(),
            inference_schema=((hidden, prompts, hypo_ids), {}),
        )
    return bytes(runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(facts)).SerializeToString())


async def call(
    server: BlockServer, request: runtime_pb2.ExpertRequest, backward: bool
) -> list[runtime_pb2.Tensor]:
    """A whole forward or backward request, tensors in, tensors out."""
    limits, engine = server.limits, server.engine
    with server.calling():
        try:
            async with asyncio.timeout(limits.request_timeout):
                start, end = server.chain(request.uid)
                metadata = wire.decode_metadata(request.metadata, limits.max_metadata_bytes)
                check_adapter(wire.text(metadata, "active_adapter"))
                wire.number(metadata, "points", 0.0)
                tensors = wire.ordered(request.tensors, metadata.get("args_structure"))
                arguments = await asyncio.to_thread(_arguments, server, tensors, end - start, backward)
                with server.using(object(), (start, end)):
                    outputs = await engine.train(start, end, *arguments)
                codecs = _output_codecs(metadata, len(outputs), server.compression)
                return await asyncio.to_thread(
                    lambda: [wire.encode_tensor(t, codec) for t, codec in zip(outputs, codecs, strict=True)]
                )
        except TimeoutError:
            raise LimitExceeded(
                f"the request took longer than request_timeout ({limits.request_timeout:g} s)"
            ) from None


def _arguments(
    server: BlockServer, tensors: Sequence[runtime_pb2.Tensor], blocks: int, backward: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(hidden, prompts, grad) checked."""
    limits, width = server.limits, server.engine.backend.hidden_size
    names = ("inputs", "grad_outputs", "prompts") if backward else ("hidden_states", "prompts")
    if len(tensors) < len(names):
        raise RequestError(f"{len(names)} tensors are needed ({', '.join(names)}); {len(tensors)} came")
    room = limits.max_batch_tokens * width
    hidden = _sequences(wire.decode_tensor(tensors[0], room), names[0], width, limits.max_batch_tokens)
    grad = None
    if backward:
        grad = _sequences(wire.decode_tensor(tensors[1], room), names[1], width, limits.max_batch_tokens)
        if grad.shape != hidden.shape:
            raise RequestError(
                f"grad_outputs {list(grad.shape)} and inputs {list(hidden.shape)} differ in shape"
            )
    rows, count, _ = hidden.shape
    prompts = wire.decode_tensor(
        tensors[len(names) - 1], blocks * rows * min(count, limits.prompt_tokens) * width
    )
    if prompts.numel() == 0:
        return hidden, None, grad
    check_prompts(prompts, blocks, rows, count, width)
    return hidden, prompts, grad


def _sequences(tensor: torch.Tensor, name: str, width: int, max_tokens: int) -> torch.Tensor:
    if tensor.dim() != 3 or tensor.shape[2] != width or not tensor.is_floating_point():
        raise RequestError(f"{name} must be floating [batch, tokens, {width}], not {list(tensor.shape)}")
    if tensor.shape[0] == 0 or tensor.shape[1] == 0:
        raise RequestError(f"{name}: Batch should contain more than 0 samples")
    if tensor.shape[0] * tensor.shape[1] > max_tokens:
        raise LimitExceeded(
            f"{name} holds {tensor.shape[0] * tensor.shape[1]} tokens; max_batch_size here is {max_tokens}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise RequestError(f"{name} contains NaN or infinity")
    return tensor


def _output_codecs(metadata: dict[str, Any], count: int, default: int) -> list[int]:
    value = metadata.get("output_compression")
    if value is None:
        return [default] * count
    known = set(wire.COMPRESSIONS.values())
    if (
        not isinstance(value, (list, tuple))
        or len(value) != count
        or not all(type(codec) is int and codec in known for codec in value)
    ):
        raise RequestError(
            f"output_compression must be a list of {count} CompressionType numbers, not {str(value)[:64]}"
        )
    return list(value)


async def unary(server: BlockServer, body: bytes, caller: str, backward: bool) -> bytes:
    """rpc_forward or rpc_backward in one message each way."""
    with server.budget.hold(caller, len(body)):
        outputs = await call(server, wire.parse(runtime_pb2.ExpertRequest, body), backward)
    answer = runtime_pb2.ExpertResponse(tensors=outputs)
    if answer.ByteSize() > _UNARY_LIMIT:
        # hivemind would send nothing at all and leave the caller waiting
        raise LimitExceeded("the answer is larger than one message may be (4 MiB); use the streaming call")
    return bytes(answer.SerializeToString())


async def streamed(server: BlockServer, stream: Stream, backward: bool) -> None:
    """rpc_forward_stream or rpc_backward_stream: parts in, compute when the caller has ended, parts out."""
    limits = server.limits
    room = server.limits.message_bytes(server.engine.backend.hidden_size, server.blocks)
    parts: list[runtime_pb2.Tensor] = []
    first: runtime_pb2.ExpertRequest | None = None
    size = 0
    try:
        async with asyncio.timeout(limits.request_timeout):
            while (body := await stream.receive()) is not None:
                part = wire.parse(runtime_pb2.ExpertRequest, body)
                size += len(body)
                if size > room:
                    raise LimitExceeded(f"a streamed request of over {room} bytes; that is the limit here")
                if first is None:
                    first = part
                elif part.uid != first.uid:
                    raise RequestError("Block uids differ in one request")
                parts.extend(part.tensors)
    except TimeoutError:
        raise LimitExceeded(
            f"the request did not arrive within request_timeout ({limits.request_timeout:g} s)"
        ) from None
    if first is None:
        raise RequestError("the stream ended before a request came")
    request = runtime_pb2.ExpertRequest(
        uid=first.uid, metadata=first.metadata, tensors=wire.join_parts(parts)
    )
    for tensor in await call(server, request, backward):
        for piece in wire.split_tensor(tensor):
            await stream.send(runtime_pb2.ExpertResponse(tensors=[piece]).SerializeToString())
