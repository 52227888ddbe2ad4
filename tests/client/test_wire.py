"""Messages: the bytes of the protocol's vectors, and answers that are not what was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from petals_agent.client import wire
from petals_agent.client.wire import MSGPackSerializer, runtime_pb2
from petals_agent.codecs import BLOCKWISE_8BIT

X = torch.randn(2, 3, 8)


def answer(*tensors: torch.Tensor, **changes: Any) -> Any:
    message = runtime_pb2.ExpertResponse(tensors=[wire.encode(t) for t in tensors])
    for key, value in changes.items():
        if key == "size":
            del message.tensors[0].size[:]
            message.tensors[0].size.extend(value)
        else:
            setattr(message.tensors[0], key, value)
    return message


def test_args_structure_is_the_vector_of_the_protocol() -> None:
    packed = MSGPackSerializer.dumps(wire.structure(3))
    assert packed.hex() == "c7184092c7134093c4045f5f5430c4045f5f5431c4045f5f543280"


def test_bfloat16_takes_two_bytes() -> None:
    assert len(wire.encode(X.bfloat16()).buffer) == 2 * X.numel()
    assert wire.encode(torch.empty(0, dtype=torch.bfloat16)).buffer == b""


def test_dummies() -> None:
    assert (list(wire.encode(wire.no_prompts()).size), wire.encode(wire.no_prompts()).dtype) == (
        [0],
        "float32",
    )
    assert (list(wire.encode(wire.no_hypo_ids()).size), wire.encode(wire.no_hypo_ids()).dtype) == (
        [0],
        "int64",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_answer_gets_our_dtype(dtype: torch.dtype) -> None:
    (out,) = wire.response([answer(X.to(dtype))], [(2, 3, 8)], X)
    assert out.dtype == torch.float32 and torch.equal(out, X.to(dtype).float())


@pytest.mark.parametrize("megabytes", [1, 4, 5, 9])
def test_streams_are_cut_and_joined(megabytes: int) -> None:
    x, y = torch.randn(1, megabytes * 2**18 // 1024, 1024), torch.empty(0)
    messages = wire.streamed_request("m.0", [x, y], {"a": 1})
    assert all(m.uid == "m.0" and MSGPackSerializer.loads(m.metadata) == {"a": 1} for m in messages)
    assert len(messages) == -(-megabytes // 4) + 1
    assert [bool(m.tensors[0].dtype) for m in messages] == [True] + [False] * (len(messages) - 2) + [True]
    bodies = [runtime_pb2.ExpertResponse(tensors=m.tensors) for m in messages]
    joined, empty = wire.response(bodies, [tuple(x.shape), (0,)], x)
    assert torch.equal(joined, x) and empty.numel() == 0


@pytest.mark.parametrize(
    "body",
    [
        runtime_pb2.ExpertResponse(),
        answer(X, X),
        answer(X[:1]),
        answer(X.long()),
        answer(X, size=(2, 3, 9)),
        answer(X, size=(2**31, 2**31)),
        answer(X, buffer=b"123"),
        answer(X, buffer=b"0" * 10_000),
        answer(X, dtype="object"),
        answer(X, dtype="float128000"),
        answer(X, compression=5, buffer=b"\x00" * 40),
        answer(X, compression=3, buffer=b"\xff" * 40),
        answer(X * float("nan")),
        answer(X / 0),
    ],
)
def test_bad_answers(body: Any) -> None:
    with pytest.raises(ValueError, match="answered"):
        wire.response([body], [(2, 3, 8)], X)


def blockwise(x: torch.Tensor) -> Any:
    """BLOCKWISE_8BIT as protocol.md §5 has it: sizes, scales, codebook, one byte a value."""
    codebook = np.linspace(-1, 1, 256, dtype=np.float32)
    values = x.numpy().ravel()
    blocks = [values[at : at + 4096] for at in range(0, len(values), 4096)]
    scales = np.array([np.abs(block).max() for block in blocks], np.float32)
    indices = [
        np.abs(codebook[None] - (b / s)[:, None]).argmin(1) for b, s in zip(blocks, scales, strict=True)
    ]
    sizes = np.array([len(scales), 256], np.int64)
    buffer = b"".join(
        part.tobytes() for part in (sizes, scales, codebook, np.concatenate(indices).astype(np.uint8))
    )
    tensor = runtime_pb2.Tensor(buffer=buffer, size=x.shape, dtype="float32", compression=BLOCKWISE_8BIT)
    return runtime_pb2.ExpertResponse(tensors=[tensor])


def test_an_8_bit_answer_is_read() -> None:
    x = torch.randn(2, 3, 1000)
    (out,) = wire.response([blockwise(x)], [(2, 3, 1000)], x)
    assert torch.allclose(out, x, atol=0.02 * float(x.abs().max())) and not torch.equal(out, x)


@pytest.mark.parametrize("cut", [0, 8, 15, 40, 1100, -1])
def test_an_8_bit_answer_that_is_cut_is_refused(cut: int) -> None:
    x = torch.randn(2, 3, 1000)
    message = blockwise(x)
    message.tensors[0].buffer = message.tensors[0].buffer[:cut]
    with pytest.raises(ValueError, match="does not decode"):
        wire.response([message], [(2, 3, 1000)], x)
