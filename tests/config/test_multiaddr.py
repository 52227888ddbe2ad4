"""Multiaddresses: those that p2pd takes pass, others are refused with the part that is wrong."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.config import PUBLIC_INITIAL_PEERS
from petals_agent.config.multiaddr import Purpose, check_multiaddr, check_peer_id

RSA_PEER = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
ED25519_PEER = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


@pytest.mark.parametrize("address", [*PUBLIC_INITIAL_PEERS, f"/ip6/::1/udp/4001/quic-v1/p2p/{ED25519_PEER}"])
def test_peers_to_dial(address: str) -> None:
    assert check_multiaddr(address, Purpose.DIAL) == address


@pytest.mark.parametrize(
    "address",
    ["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/31330", "/ip4/127.0.0.1/udp/0/quic-v1", "/dns4/host.example./tcp/1"],
)
def test_addresses_to_listen_on(address: str) -> None:
    assert check_multiaddr(address, Purpose.LISTEN) == address


@pytest.mark.parametrize(
    "address", ["/ip4/203.0.113.7/tcp/31330", f"/dns/r.example/tcp/1/p2p/{RSA_PEER}/p2p-circuit"]
)
def test_addresses_to_announce(address: str) -> None:
    assert check_multiaddr(address, Purpose.ANNOUNCE) == address


@pytest.mark.parametrize(
    ("address", "purpose", "reason"),
    [
        ("", Purpose.LISTEN, "begins with"),
        ("127.0.0.1:31330", Purpose.LISTEN, "begins with"),
        ("/", Purpose.LISTEN, "missing before"),
        ("/ip4", Purpose.LISTEN, "nothing follows /ip4"),
        ("/ip4/127.0.0.1", Purpose.LISTEN, "/tcp or /udp is missing"),
        ("/ip4/127.0.0.256/tcp/1", Purpose.LISTEN, "no IPv4"),
        ("/ip4/::1/tcp/1", Purpose.LISTEN, "no IPv4"),
        ("/ip6/127.0.0.1/tcp/1", Purpose.LISTEN, "no IPv6"),
        ("/ip4/1.2.3.4/tcp/65536", Purpose.LISTEN, "no port"),
        ("/ip4/1.2.3.4/tcp/http", Purpose.LISTEN, "no port"),
        ("/ip4/1.2.3.4/tcp/٣", Purpose.LISTEN, "no port"),
        ("/ip4/1.2.3.4/udp/1", Purpose.LISTEN, "quic-v1 must follow"),
        ("/ip4/1.2.3.4/tcp/1/ws", Purpose.LISTEN, "/ws is not understood"),
        ("/ip4/1.2.3.4/tcp/1/", Purpose.LISTEN, "not understood"),
        ("/dns4/bad_host!/tcp/1", Purpose.DIAL, "no host name"),
        ("/dns4/" + "a." * 126 + "!/tcp/1", Purpose.DIAL, "no host name"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{RSA_PEER}", Purpose.LISTEN, "added by itself"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{RSA_PEER}", Purpose.ANNOUNCE, "added by itself"),
        ("/ip4/1.2.3.4/tcp/0", Purpose.ANNOUNCE, "random port"),
        ("/ip4/0.0.0.0/tcp/1", Purpose.ANNOUNCE, "every interface"),
        ("/ip4/1.2.3.4/tcp/1", Purpose.DIAL, "must end in /p2p/PEER"),
        ("/ip4/1.2.3.4/tcp/1/p2p-circuit", Purpose.DIAL, "needs the relay"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{RSA_PEER}/p2p-circuit", Purpose.DIAL, "must end in /p2p/PEER"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{RSA_PEER[:-3]}", Purpose.DIAL, "no complete peer id"),
        ("/ip4/1.2.3.4/tcp/1/p2p/Qm…", Purpose.DIAL, "no complete peer id"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{RSA_PEER[:-1]}0", Purpose.DIAL, "'0' cannot occur"),
        ("/ip4/1.2.3.4/tcp/1" * 40, Purpose.DIAL, "begins with"),
    ],
)
def test_what_is_wrong(address: str, purpose: Purpose, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_multiaddr(address, purpose)
    assert reason in str(caught.value)


def test_peer_ids_that_hivemind_makes() -> None:
    from petals_agent.p2p import light

    light.install(without_torch=True)
    from hivemind.p2p import PeerID

    for _ in range(50):
        assert check_peer_id(PeerID(b"\x12\x20" + secrets.token_bytes(32)).to_base58())
        assert check_peer_id(PeerID(b"\x00\x24\x08\x01\x12\x20" + secrets.token_bytes(32)).to_base58())


@settings(deadline=None)
@given(
    st.text(max_size=80)
    | st.lists(st.sampled_from([*"ip4 ip6 tcp p2p 1 :: 1.2.3.4".split(), RSA_PEER])).map("/".join)
)
def test_any_text_passes_or_is_refused(text: str) -> None:
    for purpose in Purpose:
        try:
            assert check_multiaddr(text, purpose) == text
        except ValueError as error:
            assert str(error)
