"""Keeps one stranger's bytes under a DHT key from hiding what all others have stored there.

hivemind decodes all subkeys of a key in one go, and sorts them by when they expire: a value that is no msgpack, or two
subkeys of different kinds that expire at one moment, raise there, the search never finishes, and every server of that
block is hidden. So does a value without subkeys that expires late. Wherever this module is imported, hivemind's
dictionaries drop subkeys that are no text; and `RecordGuard` replaces values that do not decode by nil, which the
reader then refuses as that peer's record alone, and stores nothing that would hide others. Give it to every node:
`DHTNode.create(record_validator=RecordGuard())`.
"""

from __future__ import annotations

import math
from typing import Any

from petals_agent.p2p import light

light.install(without_torch=False)

from hivemind.dht.storage import DictionaryDHTValue  # noqa: E402
from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

from petals_agent.swarm.nesting import limit_depth  # noqa: E402
from petals_agent.swarm.uids import MAX_PREFIX  # noqa: E402

MAX_VALUE_BYTES = 256 * 1024
_NIL = b"\xc0"
_DICTIONARY = 0x50  # hivemind's code of msgpack's extension for a key with subkeys


class RecordGuard(RecordValidatorBase):
    """Stores only what cannot hide others, and lets a reader see only values that decode."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether a record has a subkey (all of a swarm's have) and time that hivemind can keep in order."""
        try:
            subkey = MSGPackSerializer.loads(record.subkey)
        except Exception:  # whatever strangers can make a decoder raise
            return False
        return is_orderly(subkey, record.value, record.expiration_time)

    def strip_value(self, record: DHTRecord) -> bytes:
        """The stored bytes, or msgpack's nil if they do not decode."""
        try:
            MSGPackSerializer.loads(record.value)
        except Exception:  # whatever strangers can make a decoder raise
            return _NIL
        return bytes(record.value)


def is_orderly(subkey: object, value: object, expires: object) -> bool:
    """Whether hivemind can keep this among others: a peer id or a prefix, a value of a bearable length, and a time."""
    return (
        type(subkey) is str
        and len(subkey) <= MAX_PREFIX
        and type(value) is bytes
        and len(value) <= MAX_VALUE_BYTES
        and type(expires) is float
        and math.isfinite(expires)
    )


class Subkeys(DictionaryDHTValue):
    """hivemind's dictionary, of which what a stranger made unreadable is left out instead of all."""

    @classmethod
    def unpackb(cls, raw: bytes) -> Subkeys:
        """What can be held of a packed dictionary, without its limit of size; empty if it is none."""
        found = cls()
        try:
            _, _, items = MSGPackSerializer.loads(raw)
            with found.freeze():
                for item in items:
                    found._take(item)
        except Exception:  # whatever strangers can make a decoder raise
            return found
        return found

    def _take(self, item: Any) -> None:
        if type(item) is list and len(item) == 3:
            subkey, value, expires = item
            if is_orderly(subkey, value, expires):
                self.store(subkey, value, expires)


def _install() -> None:
    """Put `Subkeys` in the place of hivemind's own, for the whole process."""
    limit_depth()
    MSGPackSerializer._ext_type_codes[_DICTIONARY] = Subkeys
    MSGPackSerializer._ext_types[Subkeys] = _DICTIONARY


_install()
