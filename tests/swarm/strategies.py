"""What tests of the swarm share: anything that msgpack can carry, and peer ids."""

from __future__ import annotations

import hashlib

from hypothesis import strategies as st

from petals_agent.swarm.uids import check_peer_id

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


def peer_id(seed: int) -> str:
    """A valid peer id; the same for the same seed."""
    number = int.from_bytes(b"\x12\x20" + hashlib.sha256(str(seed).encode()).digest(), "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return check_peer_id(text)
