"""Tensors and metadata from strangers: every codec is read, and nothing absurd costs memory or the process."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.serving import wire

from hivemind.compression.serialization import serialize_torch_tensor  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip

USUAL = ((b"__T0", b"__T1", b"__T2"), {})
# how far a value of about 1 may be off after each codec
LOSS = {"NONE": 0, "FLOAT16": 2e-3, "MEANSTD_16BIT": 2e-3, "QUANTILE_8BIT": 0.2, "UNIFORM_8BIT": 0.2}


@pytest.mark.parametrize("codec", LOSS)
def test_every_codec_is_read_and_written(codec: str) -> None:
    tensor = torch.randn(2, 300, 4)
    for message in (
        serialize_torch_tensor(tensor, wire.COMPRESSIONS[codec]),
        wire.encode_tensor(tensor, wire.COMPRESSIONS[codec]),
    ):
        decoded = wire.decode_tensor(message, tensor.numel())
        assert decoded.dtype == torch.float32 and decoded.shape == tensor.shape
        assert (decoded - tensor).abs().mean() <= LOSS[codec]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (0,), (1, 0, 4), ()])
def test_every_dtype_is_read_as_hivemind_writes_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(dtype)
    decoded = wire.decode_tensor(serialize_torch_tensor(tensor), 1000)
    assert decoded.dtype == dtype and torch.equal(decoded, tensor)


def test_both_layouts_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(2, 3, 4).to(torch.bfloat16)
    messages = {}
    for legacy in (False, True):
        monkeypatch.setattr(wire.compression_base, "USE_LEGACY_BFLOAT16", legacy)
        messages[legacy] = serialize_torch_tensor(tensor)
    assert len(messages[True].buffer) == 2 * len(messages[False].buffer)
    for message in messages.values():
        assert torch.equal(wire.decode_tensor(message, 100), tensor)


def test_a_codec_that_cannot_hold_the_dtype_is_named() -> None:
    with pytest.raises(RequestError, match="FLOAT16 cannot carry bfloat16"):
        wire.encode_tensor(torch.zeros(2, dtype=torch.bfloat16), wire.COMPRESSIONS["FLOAT16"])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"size": [100_000, 100_000], "dtype": "float32", "buffer": b"x"}, "10000000000 elements .* limit here is 1000"),
        ({"size": [2**32 - 1] * 4, "dtype": "float32", "buffer": b"x", "compression": 4}, "the limit here is 1000"),
        ({"size": [1] * 1000, "dtype": "float32", "buffer": b"xxxx"}, "1000 dimensions; at most 4"),
        ({"size": [2], "dtype": "complex64", "buffer": b"x" * 16}, "'complex64' is not served"),
        ({"size": [2], "dtype": "__class__", "buffer": b"x" * 16}, "is not served"),
        ({"size": [2], "dtype": "float32", "buffer": b"xxx"}, "came with 3 bytes"),
        ({"size": [2], "dtype": "float32", "buffer": b"x" * 400}, "came with 400 bytes"),
        ({"size": [], "dtype": "float32", "buffer": b""}, "came with 0 bytes"),
        ({"size": [20], "dtype": "float32", "buffer": b"xxx", "compression": 4}, "could not be decompressed"),
        ({"size": [20], "dtype": "float32", "buffer": b"x" * 30, "compression": 2}, "could not be decompressed"),
        ({"size": [20], "dtype": "float32", "buffer": b"x" * 64, "compression": 5}, "could not be decompressed"),
    ],
)  # fmt: skip
def test_a_tensor_that_lies(message: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError, match=error):
        wire.decode_tensor(runtime_pb2.Tensor(**message), 1000)


@settings(max_examples=300, deadline=None)
@given(
    buffer=st.binary(max_size=2000),
    size=st.lists(st.integers(0, 20), max_size=5),
    dtype=st.sampled_from([*wire.DTYPES, "bool", ""]),
    codec=st.integers(0, 5),
)
def test_any_bytes_become_the_claimed_tensor_or_a_refusal(
    buffer: bytes, size: list[int], dtype: str, codec: int
) -> None:
    message = runtime_pb2.Tensor(buffer=buffer, size=size, dtype=dtype, compression=codec)
    try:
        tensor = wire.decode_tensor(message, 1000)
    except RequestError:
        return
    assert list(tensor.shape) == size and tensor.numel() <= 1000


def test_parts_are_joined_as_they_were_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    tensors = [torch.randn(n) for n in (0, 1, 16, 17, 100)]
    parts = [part for tensor in tensors for part in wire.split_tensor(wire.encode_tensor(tensor))]
    assert max(len(part.buffer) for part in parts) == 64
    joined = [wire.decode_tensor(message, 100) for message in wire.join_parts(parts)]
    assert all(torch.equal(a, b) for a, b in zip(joined, tensors, strict=True))


def test_metadata_is_read_as_petals_packs_it() -> None:
    facts = {"session_id": "a", "max_length": 5, "next_servers": [("p", "s", 0, 2)], "args_structure": USUAL}
    packed = MSGPackSerializer.dumps(facts)
    assert bytes.fromhex("c7184092c7134093c4045f5f5430c4045f5f5431c4045f5f543280") in packed
    assert wire.decode_metadata(packed, 1000) == facts
    assert wire.decode_metadata(b"", 1000) == {}
    # what is passed on to the next server
    assert wire.decode_metadata(wire.encode_metadata(wire.decode_metadata(packed, 1000)), 1000) == facts


def nested_tuples(depth: int) -> bytes:
    data = b"\xc0"
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + data))
    return b"\x81\xa1a" + data


def test_nested_tuples_do_not_end_the_process() -> None:
    """200 levels are 939 bytes, and the recursion of msgpack would overrun the C stack."""
    assert wire.decode_metadata(nested_tuples(4), 65536)
    for depth in (100, 200, 10_000):
        with pytest.raises(RequestError, match="nested"):
            wire.decode_metadata(nested_tuples(depth), 65536)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"\xc1", "not msgpack"),
        (b"\x81\xa1a", "not msgpack"),
        (b"\xdf" + struct.pack(">I", 2**32 - 1), "not msgpack"),
        (b"\x81\xa1a\xdd" + struct.pack(">I", 2**32 - 1), "not msgpack"),
        (b"\x81\xa1a\xc6" + struct.pack(">I", 2**32 - 1), "not msgpack"),
        (b"\x91" * 5000 + b"\xc0", "not msgpack"),
        (b"\x81\xa1a\xc7\x01\x40\x05", "not msgpack"),  # a tuple of something that is no array
        (b"\x93\x01\x02\x03", "must be a dict, not list"),
        (b"\x01", "must be a dict, not int"),
    ],
)
def test_metadata_that_is_none(raw: bytes, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        wire.decode_metadata(raw, 65536)


def test_metadata_has_a_limit() -> None:
    with pytest.raises(LimitExceeded, match="101 bytes; the limit here is 100"):
        wire.decode_metadata(b"x" * 101, 100)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_metadata(raw: bytes) -> None:
    try:
        assert isinstance(wire.decode_metadata(raw, 200), dict)
    except RequestError:
        pass


def test_order_of_tensors() -> None:
    tensors = ["hidden", "prompts", "ids"]
    assert wire.ordered(tensors, None) == tensors
    assert wire.ordered(tensors, USUAL) == tensors
    usual = wire.decode_metadata(wire.encode_metadata({"args_structure": USUAL}), 100)["args_structure"]
    assert wire.ordered(tensors, usual) == tensors
    swapped = ((b"__T2", b"__T0", b"__T0"), {"x": 1})
    assert wire.ordered(tensors, swapped) == ["ids", "hidden", "hidden"]


@pytest.mark.parametrize(
    "structure",
    [
        5, "x", (), ((b"__T0",),), ((b"__T3",), {}), ((b"__T-1",), {}), ((b"__T99999999999999999999",), {}), ((b"hello",), {}),
        ((5,), {}), (((b"__T0",),), {}), ({"a": b"__T0"}, {}), ((b"__T",), {}), (("__T0",), {}), ((b"__T\xb2",), {}),
    ],
)  # fmt: skip
def test_malicious_structures(structure: Any) -> None:
    with pytest.raises(RequestError, match="args_structure"):
        wire.ordered(["hidden", "prompts", "ids"], structure)


@pytest.mark.parametrize(
    "targets",
    [5, "abc", [5], [("p", "s", 0)], [("p", "s", 0, 0)], [("p", "s", 5, 2)], [("p", "s", -1, 2)], [("p", "s", True, 2)],
     [(b"p", "s", 0, 2)], [("p" * 200, "s", 0, 2)], [("p", "s" * 300, 0, 2)], [("p", "s", 0, 10**9)], [("p", "s", 0, 2)] * 9],
)  # fmt: skip
def test_malformed_push_targets(targets: Any) -> None:
    with pytest.raises(RequestError, match="next_servers"):
        wire.next_servers({"next_servers": targets}, limit=8)


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), -1, [], b"1"])
def test_a_number_must_be_one(value: Any) -> None:
    with pytest.raises(RequestError, match="alloc_timeout must be a finite number"):
        wire.number({"alloc_timeout": value}, "alloc_timeout", 0.0)
