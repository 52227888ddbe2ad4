"""Decodes what servers announce once each, and nothing else that strangers put under the keys we read.

hivemind decodes a server's value twice under each of its blocks (swarm/guard.py says what else). Here a value is decoded as
soon as it is seen first, and all copies of it, under each block and from each node, share the result. Nothing raises, and
what is no record becomes None before it can take memory: a list of a million empty lists is a megabyte on the wire, and 60
decoded.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from petals_agent.p2p import light

light.install(without_torch=True)

from hivemind.dht.storage import DictionaryDHTValue  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

from petals_agent.swarm.nesting import limit_depth  # noqa: E402
from petals_agent.swarm.records import ModelRecord, ServerInfo  # noqa: E402
from petals_agent.swarm.uids import MAX_PREFIX  # noqa: E402

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

MAX_VALUE_BYTES = 64 * 1024
MAX_KNOWN_BYTES = 32 * 2**20
MAX_RECORDS = (
    2_000_000  # of one refresh, as answered: each key by several nodes, each record under several keys
)
_WORKERS = 32  # calls of one search at a time; hivemind's own number is for a few keys
# how msgpack's extension of type 0x50 begins, a key's subkeys with a value each: fixext, or with a length of 1, 2 or 4 bytes
_DICTIONARY = re.compile(rb"[\xd4-\xd8]P|\xc7.P|\xc8..P|\xc9....P", re.DOTALL)

limit_depth()


class Item(NamedTuple):
    """A value, decoded, and when it expires, as hivemind names the two."""

    value: object
    expiration_time: float


_item = partial(tuple.__new__, Item)  # Item(*pair), for a pair, a million times a refresh


class Subkeys(DictionaryDHTValue):
    """The subkeys of a key, the freshest value of each; without hivemind's queue of what expires next."""

    data: dict[str, Item]

    def __init__(self, data: dict[str, Item]) -> None:
        super().__init__()
        self.data = data

    def store(self, key: str, value: object, expiration_time: float) -> bool:
        """What hivemind's search merges the answers of several nodes by."""
        known = self.data.get(key)
        if known is not None and known[1] >= expiration_time:
            return False
        self.data[key] = Item(value, expiration_time)
        return True

    def items(self) -> ItemsView[str, Item]:
        """Expired ones too: the view leaves them out."""
        return self.data.items()


class RecordReader:
    """Takes the place of a node's serializer. A server's record becomes a `ServerInfo`, a model's a map, else None."""

    def __init__(self) -> None:
        self._known = _Known()
        self._records = 0
        self.dropped = (
            0  # answers of this refresh that were not looked at, since the others were too many already
        )

    dumps = staticmethod(MSGPackSerializer.dumps)

    def loads(self, raw: object) -> object:
        """Never raises: of a broken answer there remain no subkeys. What is decoded already stays as it is."""
        if type(raw) is not bytes:
            return raw
        dictionary = _DICTIONARY.match(raw)
        return self._subkeys(memoryview(raw)[dictionary.end() :]) if dictionary else self._known[raw]

    def begin(self) -> None:
        """A new refresh."""
        self._records = self.dropped = 0

    def _subkeys(self, packed: memoryview) -> Subkeys:
        if self._records > MAX_RECORDS:
            self.dropped += 1
            return Subkeys({})
        try:
            _, _, items = MSGPackSerializer.loads(packed)
            self._records += len(items)
            return Subkeys(self._all(items) or self._fitting(items))
        except Exception:  # whatever strangers can make a decoder raise
            return Subkeys({})

    def _all(self, items: list[Any]) -> dict[str, Item]:
        """The same as `_fitting`, in a third of the time, where no item is a stranger's nonsense; else nothing."""
        keys, values, expirations = zip(*items, strict=True) if items else ((), (), ())
        kinds = set(map(type, keys)), set(map(type, values)), set(map(type, expirations))
        if kinds != ({str}, {bytes}, {float}) or max(map(len, keys)) > MAX_PREFIX:
            return {}
        decoded = map(self._known.__getitem__, values)
        return dict(zip(keys, map(_item, zip(decoded, expirations, strict=True)), strict=True))

    def _fitting(self, items: list[Any]) -> dict[str, Item]:
        return {
            key: Item(self._known[value] if type(value) is bytes else None, expires)
            for key, value, expires in items
            if type(key) is str and len(key) <= MAX_PREFIX and type(expires) is float
        }


class _Known(dict[bytes, object]):
    """What values decode to, as long as they are not too many."""

    def __init__(self) -> None:
        self.bytes = 0

    def __missing__(self, raw: bytes) -> object:
        # a value that is a dictionary itself would be another way to send a million of them
        if len(raw) > MAX_VALUE_BYTES or _DICTIONARY.match(raw):
            return None
        if self.bytes > MAX_KNOWN_BYTES:
            self.clear()
            self.bytes = 0
        value = self[raw] = _record(raw)
        self.bytes += len(raw)
        return value


def read_records_only(node: DHTNode) -> RecordReader:
    """From now on this node, which must be a mere client of the DHT, understands nothing but servers and models.

    Call it before each refresh.
    """
    protocol = node.protocol
    reader = protocol.serializer
    if not isinstance(reader, RecordReader):
        reader = protocol.serializer = RecordReader()
        protocol.record_validator = None  # whose part `loads` has
        node.cache_locally, node.cache_nearest = False, 0  # each refresh asks those who hold the records
        node.num_workers = _WORKERS
    reader.begin()
    return reader


def _record(raw: bytes) -> Any:
    try:
        value = MSGPackSerializer.loads(raw)
        if isinstance(value, dict):
            ModelRecord.from_value(value)
            return value
        return ServerInfo.from_value(value)
    except Exception:  # whatever strangers can make a decoder raise
        return None
