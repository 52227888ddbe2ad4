"""Checks multiaddresses as text, for the protocols that p2pd speaks; needs neither hivemind nor torch."""

from __future__ import annotations

import ipaddress
import re
from enum import Enum

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DNS_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


class Purpose(Enum):
    """What an address is for, which decides what it may and must hold."""

    LISTEN = "listen on"
    ANNOUNCE = "announce"
    DIAL = "dial"


def check_multiaddr(text: str, purpose: Purpose) -> str:
    """Return `text` if it is a multiaddress fit for `purpose`; raise ValueError with the part that is wrong.

    Understood: /ip4 /ip6 /dns /dns4 /dns6, then /tcp/PORT or /udp/PORT/quic-v1, then /p2p/PEER and /p2p-circuit.
    """
    parts = text.split("/")
    if len(text) > 512 or parts[0] != "" or len(parts) < 2:
        raise ValueError("it is no multiaddress: one begins with /ip4/ or the like")
    rest = parts[1:]
    unspecified = _take_host(rest)
    port = _take_port(rest)
    has_peer = _take_peer(rest)
    if rest and rest[0] == "p2p-circuit":
        if not has_peer or purpose is Purpose.LISTEN:
            raise ValueError("/p2p-circuit needs the relay's /p2p/PEER before it, and cannot be listened on")
        del rest[0]
        has_peer = _take_peer(rest)
    elif has_peer and purpose is not Purpose.DIAL:
        raise ValueError("/p2p/PEER does not belong here: our own peer id is added by itself")
    if rest:
        raise ValueError(f"/{rest[0]} is not understood at its place")
    if purpose is not Purpose.LISTEN and port == 0:
        raise ValueError(f"port 0 means a random port, which nobody can dial; {purpose.value} a fixed one")
    if purpose is not Purpose.LISTEN and unspecified:
        raise ValueError("this address means every interface, and nobody can dial it")
    if purpose is Purpose.DIAL and not has_peer:
        raise ValueError("it must end in /p2p/PEER, so that we know whom we reached")
    return text


def check_peer_id(text: str) -> str:
    """Return `text` if it is a peer id in base58 ("Qm…", "12D3Koo…"); raise ValueError otherwise."""
    number = 0
    for letter in text if 8 <= len(text) <= 128 else "":
        digit = _BASE58.find(letter)
        if digit < 0:
            raise ValueError(f"{letter!r} cannot occur in a peer id")
        number = number * 58 + digit
    raw = b"\0" * (len(text) - len(text.lstrip("1"))) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    is_sha256 = raw[:2] == b"\x12\x20" and len(raw) == 34
    is_inline_key = raw[:1] == b"\0" and 2 < len(raw) == 2 + raw[1]
    if not (is_sha256 or is_inline_key):
        raise ValueError("no complete peer id (base58, such as Qm… or 12D3Koo…)")
    return text


def _take_host(rest: list[str]) -> bool:
    """Remove the host; True if it stands for every interface."""
    protocol, value = _take_pair(rest, _HOSTS)
    if protocol not in ("ip4", "ip6"):
        if not _DNS_NAME.fullmatch(value):
            raise ValueError(f"{value!r} is no host name")
        return False
    try:
        address = ipaddress.IPv4Address(value) if protocol == "ip4" else ipaddress.IPv6Address(value)
    except ValueError:
        raise ValueError(f"{value!r} is no {'IPv4' if protocol == 'ip4' else 'IPv6'} address") from None
    return address.is_unspecified


def _take_port(rest: list[str]) -> int:
    protocol, value = _take_pair(rest, ("tcp", "udp"))
    if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) > 65535:
        raise ValueError(f"{value!r} is no port (0 to 65535)")
    if protocol == "udp":
        if rest[:1] != ["quic-v1"]:
            raise ValueError("/quic-v1 must follow /udp/PORT")
        del rest[0]
    return int(value)


def _take_peer(rest: list[str]) -> bool:
    if rest[:1] != ["p2p"]:
        return False
    _, value = _take_pair(rest, ("p2p",))
    check_peer_id(value)
    return True


def _take_pair(rest: list[str], protocols: tuple[str, ...]) -> tuple[str, str]:
    if not rest or rest[0] not in protocols:
        raise ValueError(
            "/" + " or /".join(protocols) + f" is missing{f' before /{rest[0]}' if rest else ''}"
        )
    if len(rest) < 2:
        raise ValueError(f"nothing follows /{rest[0]}")
    protocol, value = rest[:2]
    del rest[:2]
    return protocol, value
