"""Names: what a chain, a prefix and a peer id may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.swarm.uids import block_uid, chain_uid, check_peer_id, check_prefix, is_private, parse_chain

RSA_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
ED25519_ID = "12D3KooWGRUfyZ2w4Y1aMd3YQ6zBXZd2Y4ZxjWvxs3LtRkLxU8d4"


def test_uids_are_those_of_the_wire() -> None:
    assert block_uid("bigscience/bloom-petals", 3) == "bigscience/bloom-petals.3"
    assert chain_uid("tiny", 2, 5) == "tiny.2 tiny.3 tiny.4"


@given(st.lists(st.integers(0, 99_999), min_size=1, max_size=20))
def test_a_chain_keeps_its_order(blocks: list[int]) -> None:
    assert parse_chain(" ".join(block_uid("m", i) for i in blocks), "m", limit=20) == tuple(blocks)


@pytest.mark.parametrize(
    "uid",
    ["", " ", "m", "m.", ".0", "m.0 ", " m.0", "m.0  m.1", "n.0", "m.00", "m.-1", "m.+1", "m.1_0", "m.٣", "m.1.0", "m.0\n",
     "m.9999999", None, 5, b"m.0"],
)  # fmt: skip
def test_what_is_not_a_chain_of_ours(uid: object) -> None:
    with pytest.raises(RequestError):
        parse_chain(uid, "m", limit=8)


def test_a_chain_is_bounded_before_it_is_split() -> None:
    with pytest.raises(LimitExceeded, match="8 blocks"):
        parse_chain("m.0 " * 10**6 + "m.0", "m", limit=8)


def test_prefixes() -> None:
    assert check_prefix("bigscience/bloom-petals") == "bigscience/bloom-petals"
    assert is_private("_mine") and not is_private("mine")
    for bad in ("", "a.b", "a b", "a\n", "x" * 1000, None, 5):
        with pytest.raises(ValueError, match="prefix"):
            check_prefix(bad)


@pytest.mark.parametrize("peer", [RSA_ID, ED25519_ID])
def test_peer_ids(peer: str) -> None:
    assert check_peer_id(peer) == peer


@pytest.mark.parametrize(
    "peer", ["", "me", RSA_ID[:-1], RSA_ID + "1", RSA_ID.replace("Y", "0"), "1" * 64, "Q" * 5000, None, 7]
)
def test_what_is_no_peer_id(peer: object) -> None:
    with pytest.raises(ValueError, match="peer id"):
        check_peer_id(peer)
