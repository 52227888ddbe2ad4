"""Values nested without end are refused wherever hivemind decodes; in a process of its own, which they would end."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import msgpack, sys
from petals_agent.p2p import light
light.install(without_torch=True)
import petals_agent.swarm.guard
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.serializer import MSGPackSerializer

def nested(code, depth):
    data = msgpack.packb("inside")
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(code, b"\\x91" + data if code == 0x40 else data))
    return data

value = "inside"
for _ in range(10):
    value = (value,)
assert MSGPackSerializer.loads(nested(0x40, 10)) == value
whole = DictionaryDHTValue()
whole.store("a", MSGPackSerializer.dumps((1, (2, (3,)))), 2e10)
assert MSGPackSerializer.loads(MSGPackSerializer.dumps(whole)).latest_expiration_time == 2e10
for depth in (17, 300, 3000):
    try:
        found = MSGPackSerializer.loads(nested(int(sys.argv[1]), depth))
    except ValueError as error:
        assert "nested more than 16 deep" in str(error)
    else:  # of a dictionary nothing remains
        assert isinstance(found, DictionaryDHTValue) and not dict(found.items()), "it was decoded"
assert MSGPackSerializer.loads(nested(0x40, 2)) == (("inside",),)
"""


@pytest.mark.parametrize("code", [0x40, 0x50], ids=["tuple", "dictionary"])
def test_endless_nesting_is_refused(code: int) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
