"""The reader of records: what is one comes through once decoded, all else becomes nil, and nothing is kept for long."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_agent.monitor import decoding
from petals_agent.monitor.decoding import MAX_VALUE_BYTES, Item, RecordReader, Subkeys
from petals_agent.swarm.records import ModelRecord, ServerInfo, ServerState
from petals_agent.swarm.view import SwarmView

from hivemind.dht.storage import DictionaryDHTValue  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip

INFO = ServerInfo(ServerState.ONLINE, 5.0, 0, 2, public_name="n")
RAW = MSGPackSerializer.dumps(INFO.to_value())


def decoded(raw: bytes) -> Subkeys:
    """A node's answer for a key."""
    value = RecordReader().loads(raw)
    assert isinstance(value, Subkeys)
    return value


def test_records_come_through() -> None:
    reader = RecordReader()
    assert reader.loads(RAW) == INFO
    assert reader.loads(bytes(bytearray(RAW))) is reader.loads(RAW)
    value = ModelRecord(4, "https://huggingface.co/a/b").to_value()
    assert reader.loads(MSGPackSerializer.dumps(value)) == value
    assert reader.dumps(INFO.to_value()) == RAW


@given(st.binary(max_size=200))
def test_anything_else_is_nil(raw: bytes) -> None:
    reader = RecordReader()
    assert isinstance(reader.loads(raw), ServerInfo | Subkeys | dict | None)


def test_too_long_is_nil() -> None:
    long = MSGPackSerializer.dumps((2, 1.0, {"x": "y" * MAX_VALUE_BYTES}))
    assert RecordReader().loads(long) is None


def subkeys(*items: object) -> bytes:
    """A dictionary as any node may send it."""
    return msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([None, 2e9, list(items)])))


def test_a_dictionary_is_decoded_and_of_a_broken_one_nothing_remains() -> None:
    for count in (1, 3, 500):
        stored = DictionaryDHTValue()
        for number in range(count):
            stored.store(f"peer{number}", RAW, 2e9)
        raw = MSGPackSerializer.dumps(stored)
        assert dict(decoded(raw).items()) == {f"peer{number}": (INFO, 2e9) for number in range(count)}
        assert not decoded(raw[:-3]).items()


@given(st.binary(max_size=100))
def test_any_dictionary_at_all(inside: bytes) -> None:
    for raw in (msgpack.packb(msgpack.ExtType(0x50, inside)), b"\xc9\xff\xff\xff\xff\x50" + inside):
        assert not decoded(raw).items()


def test_subkeys_that_cannot_be_compared_hide_nobody() -> None:
    """hivemind's own decoder raises here, and loses the whole key."""
    raw = subkeys(
        ["a", RAW, 2e9],
        [7, RAW, 2e9],
        [None, RAW, 2e9],
        [["x"], RAW, 2e9],
        ["b" * 999, RAW, 2e9],
        ["c", RAW, "2"],
    )
    assert decoded(raw).items() == {"a": (INFO, 2e9)}.items()
    with pytest.raises(TypeError):
        DictionaryDHTValue.unpackb(msgpack.unpackb(raw).data)
    assert not decoded(subkeys(["a", RAW])).items()


def test_values_that_are_no_records_count_but_take_no_room() -> None:
    raw = subkeys(
        ["a", subkeys(["x", RAW, 2e9]), 2e9],
        ["b", [[]] * 999, 2e9],
        ["c", b"\x00" * MAX_VALUE_BYTES + b"\x00", 2e9],
        ["d", RAW, 2e9],
    )
    assert [item.value for item in decoded(raw).data.values()] == [None, None, None, INFO]


def test_copies_of_a_value_share_one_record() -> None:
    reader = RecordReader()
    first, second = (reader.loads(subkeys([name, RAW, 2e9], ["c", b"", 2e9])) for name in "ab")
    assert first.data["a"].value is second.data["b"].value == INFO  # type: ignore[attr-defined]
    assert reader.loads(first.data["a"].value) is first.data["a"].value  # type: ignore[attr-defined]


def test_answers_are_merged_to_the_freshest() -> None:
    found = Subkeys({name: Item(b"1", 5.0) for name in "ab"})
    for subkey, expires, taken in (("a", 6.0, True), ("b", 4.0, False), ("c", 1.0, True)):
        assert found.store(subkey, b"2", expires) is taken
    assert {key: item.value for key, item in found.items()} == {"a": b"2", "b": b"1", "c": b"2"}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_KNOWN_BYTES", 1000)
    reader = RecordReader()
    for number in range(500):
        reader.loads(MSGPackSerializer.dumps((2, float(number))))
        assert reader._known.bytes <= 1000 + len(RAW)
    assert len(reader._known) < 120


def test_a_flood_ends_where_the_budget_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_RECORDS", 1000)
    reader, seen = RecordReader(), 0
    for turn in range(20):
        stored = DictionaryDHTValue()
        for number in range(300):
            stored.store(f"{turn}-{number}", RAW, 2e9)
        seen += len(reader.loads(MSGPackSerializer.dumps(stored)).data)  # type: ignore[attr-defined]
    assert seen == 1200 and reader.dropped == 16
    reader.begin()
    assert len(reader.loads(MSGPackSerializer.dumps(stored)).data) == 300  # type: ignore[attr-defined]
    assert not reader.dropped


def test_a_view_takes_both_forms() -> None:
    from swarm.test_view import NOW, Stored

    def entry(value: object) -> Stored:
        return Stored({"QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY": Stored(value, NOW + 9)}, NOW + 9)

    for value in (INFO, INFO.to_value()):
        view = SwarmView.from_dht("m", 2, {"m.0": entry(value), "m.1": entry(value)}, NOW)
        assert [record.info for record in view.records] == [INFO, INFO] and not view.rejected
