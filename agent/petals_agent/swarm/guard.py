"""Keeps one peer's undecodable bytes from making a whole DHT key unreadable.

hivemind decodes all subkeys of a key in one go: a value that is no msgpack raises there, the search never finishes, and
every other server of that block is hidden. This plugs into its record validation and replaces such a value by nil,
which the reader then refuses as that peer's record alone. Give it to every node that reads:
`DHTNode.create(record_validator=RecordGuard())`.
"""

from __future__ import annotations

from petals_agent.p2p import light

light.install(without_torch=False)

from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

from petals_agent.swarm.nesting import limit_depth  # noqa: E402

limit_depth()
MAX_VALUE_BYTES = 256 * 1024
_NIL = b"\xc0"


class RecordGuard(RecordValidatorBase):
    """Stores and accepts everything, but lets a reader see only values that decode."""

    def validate(self, record: DHTRecord) -> bool:
        return True  # refusing here would refuse the whole key

    def strip_value(self, record: DHTRecord) -> bytes:
        """The stored bytes, or msgpack's nil if they are too long or do not decode."""
        value = record.value
        if not isinstance(value, bytes) or len(value) > MAX_VALUE_BYTES:
            return _NIL
        try:
            MSGPackSerializer.loads(value)
        except Exception:  # whatever strangers can make a decoder raise
            return _NIL
        return value
