"""Decodes what servers announce once each, and nothing else that strangers put under the keys we read.

hivemind decodes a server's value twice under each of its blocks (swarm/guard.py says what else). Here the second look at a
value finds it decoded, nothing raises, and what is no record becomes nil before it can take memory: a list of a million
empty lists is a megabyte on the wire, and 60 decoded.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

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
_NIL = b"\xc0"
_UNKNOWN = object()

limit_depth()


class Item(NamedTuple):
    """A value and when it expires, as hivemind names the two."""

    value: bytes
    expiration_time: float


class Subkeys(DictionaryDHTValue):
    """The subkeys of a key, the freshest value of each; without hivemind's queue of what expires next."""

    data: dict[str, Item]

    def __init__(self, data: dict[str, Item]) -> None:
        super().__init__()
        self.data = data

    def store(self, key: str, value: bytes, expiration_time: float) -> bool:
        """What hivemind's search merges the answers of several nodes by."""
        known = self.data.get(key)
        if known is not None and known.expiration_time >= expiration_time:
            return False
        self.data[key] = Item(value, expiration_time)
        return True

    def items(self) -> ItemsView[str, Item]:
        """Expired ones too: the view leaves them out."""
        return self.data.items()


class RecordReader:
    """Takes the place of a node's serializer. A server's record becomes a `ServerInfo`, a model's a map, else None."""

    def __init__(self) -> None:
        self._known: dict[bytes, object] = {}
        self._bytes = 0
        self._records = 0
        self.dropped = (
            0  # answers of this refresh that were not looked at, since the others were too many already
        )

    dumps = staticmethod(MSGPackSerializer.dumps)

    def loads(self, raw: bytes) -> object:
        """Never raises: of a broken answer there remain no subkeys."""
        known = self._known.get(raw, _UNKNOWN)
        if known is not _UNKNOWN:
            return known
        if _DICTIONARY.match(raw):
            return self._subkeys(raw)
        if len(raw) > MAX_VALUE_BYTES:
            return None
        value = _record(raw)
        if self._bytes > MAX_KNOWN_BYTES:
            self._known.clear()
            self._bytes = 0
        self._known[raw] = value
        self._bytes += len(raw)
        return value

    def begin(self) -> None:
        """A new refresh."""
        self._records = self.dropped = 0

    def _subkeys(self, raw: bytes) -> Subkeys:
        if self._records > MAX_RECORDS:
            self.dropped += 1
            return Subkeys({})
        try:
            _, _, items = MSGPackSerializer.loads(msgpack.unpackb(raw, ext_hook=_content))
            self._records += len(items)
            return Subkeys(
                {
                    key: Item(value if _may_be_record(value) else _NIL, expires)
                    for key, value, expires in items
                    if type(key) is str and len(key) <= MAX_PREFIX and type(expires) is float
                }
            )
        except Exception:  # whatever strangers can make a decoder raise
            return Subkeys({})


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


def _content(code: int, data: bytes) -> bytes:
    return data


def _may_be_record(value: object) -> bool:
    """A value that is a dictionary itself would be another way to send a million of them."""
    return type(value) is bytes and len(value) <= MAX_VALUE_BYTES and not _DICTIONARY.match(value)


def _record(raw: bytes) -> Any:
    try:
        value = MSGPackSerializer.loads(raw)
        if isinstance(value, dict):
            ModelRecord.from_value(value)
            return value
        return ServerInfo.from_value(value)
    except Exception:  # whatever strangers can make a decoder raise
        return None
