"""Strangers' subkeys: what hivemind cannot sort or hold is not stored by us, and hides nobody from us where others store it."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from harness.processes import Processes
from harness.swarm import start_entry
from petals_agent.swarm.guard import RecordGuard
from petals_agent.swarm.records import ServerInfo, ServerState
from petals_agent.swarm.uids import block_uid
from petals_agent.swarm.view import read_view

from hivemind.dht.node import DHTNode  # isort: skip
from hivemind.dht.protocol import DHTProtocol  # isort: skip
from hivemind.dht.routing import DHTID  # isort: skip
from hivemind.dht.storage import DictionaryDHTValue  # isort: skip
from hivemind.dht.validation import DHTRecord  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip

A = "QmTP9ReYV5o94uLSMZ6CCcbsMAQHxozKv4kXHGLyBv5QQj"
INFO = ServerInfo(ServerState.ONLINE, 5.0, start_block=0, end_block=1)
RAW = MSGPackSerializer.dumps(INFO.to_value())
KEY = DHTID.generate(block_uid("m", 0))


async def join(entry: str) -> DHTNode:
    return await DHTNode.create(initial_peers=[entry], client_mode=True, record_validator=RecordGuard())


@pytest.fixture
async def stock(bootstrap: str) -> AsyncIterator[Any]:
    """A client of a published node, which stores everything."""
    node = await join(bootstrap)
    yield node
    await node.shutdown()


@pytest.fixture
async def ours(processes: Processes, tmp_path: Path) -> AsyncIterator[Any]:
    """A client of an entry node of ours."""
    node = await join(start_entry(processes, tmp_path))
    yield node
    await node.shutdown()


async def put(node: Any, subkey: object, expires: float, value: bytes = RAW) -> bool | None:
    """As a stranger sends it: a subkey of any kind, or hivemind's mark of a value without subkeys."""
    remote = next(peer for _, peer in node.protocol.routing_table.get_nearest_neighbors(KEY, 1))
    if subkey == DHTProtocol.IS_REGULAR_VALUE:
        subkey = None
    stored = await node.protocol.call_store(remote, [KEY], [value], expires, subkeys=[subkey])
    return None if stored is None else bool(stored[0])


async def test_subkeys_that_cannot_be_compared_hide_nobody(stock: Any) -> None:
    """Where they expire at one moment, hivemind's own decoder raises."""
    now = time.time()
    assert await put(stock, A, now + 60)
    early, late = now + 150, now + 200
    for subkey, expires in ((7, late), ("x", early), ("y", early), ("x", late), ("y", late), (("z",), late)):
        await put(stock, subkey, expires)
    seen = await read_view(stock, "m", 1, timeout=20)
    assert [record.peer_id for record in seen.records] == [A] and seen.unread == ()


async def test_a_value_without_subkeys_hides_nobody(stock: Any) -> None:
    now = time.time()
    assert await put(stock, DHTProtocol.IS_REGULAR_VALUE, now + 1)
    seen = await read_view(stock, "m", 1, timeout=20)
    assert seen.records == () and seen.unread == () and seen.rejected_count == 0


@pytest.mark.parametrize(
    "subkey", [7, None, b"x", ("x",), "x" * 999, DHTProtocol.IS_REGULAR_VALUE], ids=lambda one: repr(one)[:20]
)
async def test_our_nodes_do_not_store_what_hides_others(ours: Any, subkey: object) -> None:
    now = time.time()
    assert await put(ours, subkey, now + 1000) is False
    assert await put(ours, A, now + 60) is True
    assert await put(ours, A + "x", math.nan) is False
    assert await put(ours, A + "x", math.inf) is False
    seen = await read_view(ours, "m", 1, timeout=20)
    assert [record.peer_id for record in seen.records] == [A]


def dictionary(*items: object, maxsize: object = None) -> bytes:
    """As any node may answer it."""
    return msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([maxsize, 2e9, list(items)])))


@pytest.mark.parametrize("maxsize", [None, 1, -5, "x", [1], 2**63])
def test_of_a_dictionary_remains_what_can_be_held(maxsize: object) -> None:
    soon = time.time() + 60
    bad = [[7, RAW, soon], [None, RAW, soon], [["x"], RAW, soon], ["b" * 999, RAW, soon], ["c", RAW, "2"]]
    bad += [["d", RAW, math.nan], ["e", 5, soon], ["f", [[]] * 9, soon], ["g", RAW, math.inf], ["h"], 5]
    found = MSGPackSerializer.loads(dictionary(["a", RAW, soon], *bad, ["b", RAW, soon], maxsize=maxsize))
    assert isinstance(found, DictionaryDHTValue)
    assert {key: tuple(item) for key, item in found.items()} == {"a": (RAW, soon), "b": (RAW, soon)}
    assert found.latest_expiration_time == soon
    again = MSGPackSerializer.loads(MSGPackSerializer.dumps(found))
    assert dict(again.items()) == dict(found.items())


def test_what_is_no_dictionary_at_all_is_an_empty_one() -> None:
    for inside in (b"\xc1", b"", msgpack.packb(5), msgpack.packb([1, 2]), msgpack.packb([None, 2e9, 7])):
        assert not dict(MSGPackSerializer.loads(msgpack.packb(msgpack.ExtType(0x50, inside))).items())


def test_what_a_node_of_ours_stores() -> None:
    guard, soon = RecordGuard(), time.time() + 60
    for tag in (MSGPackSerializer.dumps(A), DHTProtocol.IS_DICTIONARY):
        assert guard.validate(DHTRecord(b"k", tag, RAW, soon)) == (tag != DHTProtocol.IS_DICTIONARY)
    assert not guard.validate(DHTRecord(b"k", b"\xc1", RAW, soon))
