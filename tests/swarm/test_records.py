"""Records: exact bytes, strict types, and nothing but ValueError whatever a peer wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.swarm import peer_python
from petals_agent.p2p import light
from petals_agent.swarm.records import MAX_TEXT, ModelRecord, ServerInfo, ServerState

from .strategies import anything

light.install(without_torch=False)

from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

FULL = ServerInfo(
    state=ServerState.ONLINE,
    throughput=12.5,
    start_block=0,
    end_block=8,
    public_name="büro",
    version="2.3.0",
    network_rps=100.0,
    forward_rps=50.5,
    inference_rps=7.25,
    adapters=("a", "b"),
    torch_dtype="bfloat16",
    quant_type="none",
    using_relay=False,
    cache_tokens_left=65536,
    next_pings={"QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N": 0.02, "other": math.inf},
)
BARE: tuple[int, float] = (2, 1.0)


def with_extra(**extra: Any) -> tuple[Any, ...]:
    return (*BARE, extra)


def test_bytes_of_a_record_are_those_of_the_wire() -> None:
    info = ServerInfo(ServerState.JOINING, 3.0, start_block=1, end_block=2, adapters=("x",))
    nil = "c0"
    expected = (
        "01" + "cb4008000000000000" + "8d"  # state, float64, 13 keys
        + "ab73746172745f626c6f636b" + "01"
        + "a9656e645f626c6f636b" + "02"
        + "ab7075626c69635f6e616d65" + nil
        + "a776657273696f6e" + nil
        + "ab6e6574776f726b5f727073" + nil
        + "ab666f72776172645f727073" + nil
        + "ad696e666572656e63655f727073" + nil
        + "a86164617074657273" + "c7034091a178"  # a tuple is ext 0x40 around an array
        + "ab746f7263685f6474797065" + nil
        + "aa7175616e745f74797065" + nil
        + "ab7573696e675f72656c6179" + nil
        + "b163616368655f746f6b656e735f6c656674" + nil
        + "aa6e6578745f70696e6773" + nil
    )  # fmt: skip
    body = bytes.fromhex("93" + expected)
    raw = MSGPackSerializer.dumps(info.to_value())
    assert raw == b"\xc7" + bytes([len(body)]) + b"\x40" + body
    assert ServerInfo.from_value(MSGPackSerializer.loads(raw)) == info


def test_a_full_record_survives_the_wire() -> None:
    assert ServerInfo.from_value(MSGPackSerializer.loads(MSGPackSerializer.dumps(FULL.to_value()))) == FULL


def test_key_id_is_the_sha1_of_the_packed_key() -> None:
    from hivemind.dht.routing import DHTID

    packed = msgpack.packb("a.0")
    assert packed.hex() == "a3612e30"
    assert hashlib.sha1(packed).hexdigest() == "fc8f0b49605d001a31660a9a8e1b7f12900edfdc"
    assert DHTID.generate("a.0").to_bytes().hex() == "fc8f0b49605d001a31660a9a8e1b7f12900edfdc"


ACCEPTED: dict[str, Any] = {
    "2-tuple": BARE,
    "list": [2, 1.0, {}],
    "unknown keys": with_extra(some_key=[1, 2], other=None),
    "inf ping": with_extra(next_pings={"a": math.inf}),
    "start without end": with_extra(start_block=3),
    "zero throughput": (0, 0.0, {}),
    "full": FULL.to_value(),
    "adapters as list": with_extra(adapters=["a"]),
}
REJECTED: dict[str, Any] = {
    "int throughput": (2, 300, {}),
    "NaN throughput": (2, math.nan, {}),
    "infinite throughput": (2, math.inf, {}),
    "negative throughput": (2, -1.0, {}),
    "int ping": with_extra(next_pings={"a": 1}),
    "NaN ping": with_extra(next_pings={"a": math.nan}),
    "negative ping": with_extra(next_pings={"a": -0.1}),
    "negative cache": with_extra(cache_tokens_left=-1),
    "float cache": with_extra(cache_tokens_left=1.0),
    "bool block": with_extra(start_block=True, end_block=4),
    "negative block": with_extra(start_block=-1, end_block=4),
    "state 9": (9, 1.0, {}),
    "infinite rps": with_extra(network_rps=math.inf),
    "int rps": with_extra(inference_rps=5),
    "empty": (),
    "nil": None,
    "text": "online",
    "number": 5,
}
STRICTER_THAN_PETALS: dict[str, Any] = {
    "bool state": (True, 1.0, {}),
    "a block no model has": with_extra(start_block=0, end_block=10**9),
    "a name of a megabyte": with_extra(public_name="x" * 2**20),
    "control characters": with_extra(public_name="\x1b[2J"),
    "a million adapters": with_extra(adapters=["a"] * 10**6),
    "number as name": with_extra(public_name=5),
    "dict": {0: 2, 1: 1.0},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    info = ServerInfo.from_value(ACCEPTED[name])
    assert info.to_value()[:2] == tuple(ACCEPTED[name][:2])


@pytest.mark.parametrize("name", [*REJECTED, *STRICTER_THAN_PETALS])
def test_rejected(name: str) -> None:
    with pytest.raises(ValueError):
        ServerInfo.from_value((REJECTED | STRICTER_THAN_PETALS)[name])


@pytest.mark.interop
def test_published_petals_agrees() -> None:
    python = peer_python()
    if python is None:
        pytest.skip("the published Petals is not installed: make peer-venv (or set PETALS_PEER_PYTHON)")
    names = [*ACCEPTED, *REJECTED]
    values = [MSGPackSerializer.dumps((ACCEPTED | REJECTED)[name]).hex() for name in names]
    script = Path(__file__).with_name("petals_validation.py")
    done = subprocess.run(
        [python, str(script)],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    verdicts = dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert {name for name, verdict in verdicts.items() if isinstance(verdict, str)} == set(ACCEPTED)
    assert verdicts["full"] == MSGPackSerializer.dumps(FULL.to_value()).hex()  # written back byte for byte


field_names = [f.name for f in dataclasses.fields(ServerInfo)[2:]]
almost = st.tuples(
    st.one_of(st.integers(0, 2), anything),
    st.one_of(st.floats(0, 1e6), anything),
    st.dictionaries(st.sampled_from(field_names), anything, max_size=6),
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(anything, almost))
def test_whatever_is_read_is_valid_or_a_value_error(value: Any) -> None:
    try:
        info = ServerInfo.from_value(value)
    except ValueError as error:
        assert len(str(error)) < 4 * MAX_TEXT
        return
    assert info.throughput >= 0 and info.state in (0, 1, 2)
    assert ServerInfo.from_value(
        dataclasses.replace(info, inference_rps=None).to_value()
    ) == dataclasses.replace(info, inference_rps=None)


def test_a_bottomless_value_is_only_a_value_error() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    for bad in (
        value,
        (2, value),
        (2, 1.0, value),
        with_extra(next_pings=value),
        with_extra(adapters=(value,)),
    ):
        with pytest.raises(ValueError):
            ServerInfo.from_value(bad)
        with pytest.raises(ValueError):
            ModelRecord.from_value(bad)
    while value:  # the interpreter would free it recursively
        value = value.pop()


def test_own_mistakes_are_refused_before_they_are_published() -> None:
    with pytest.raises(ValueError, match="throughput"):
        ServerInfo(ServerState.ONLINE, 300)  # an int would make the whole record invisible
    with pytest.raises(ValueError, match="clients divide"):
        ServerInfo(ServerState.ONLINE, 1.0, inference_rps=0.0).to_value()


@pytest.mark.parametrize(
    "value",
    [None, {}, {"num_blocks": 0}, {"num_blocks": True}, {"num_blocks": 2.0}, {"num_blocks": 2, "repository": 5}, [2],
     {"num_blocks": 2, "x": 1}],
)  # fmt: skip
def test_bad_model_records(value: Any) -> None:
    with pytest.raises(ValueError):
        ModelRecord.from_value(value)


def test_model_record_round_trip() -> None:
    record = ModelRecord(32, "https://hub.example/owner/name")
    assert (
        ModelRecord.from_value(MSGPackSerializer.loads(MSGPackSerializer.dumps(record.to_value()))) == record
    )
    assert ModelRecord.from_value({"num_blocks": 4}) == ModelRecord(4)
