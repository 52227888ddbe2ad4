"""Which of a peer's addresses may be dialled because a stranger asks for it: those of the open Internet."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address

MAX_ADDRESSES = 16
MAX_NAMES = 2
RESOLVE_S = 2.0
_NAMES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_resolver = ThreadPoolExecutor(4, thread_name_prefix="resolve")  # so that slow names hold up nothing else


def is_public(ip: IPv4Address | IPv6Address) -> bool:
    """Whether the address belongs to the Internet, and so does an IPv4 address that it stands for."""
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:
            return is_public(IPv4Address(int(ip) & 0xFFFFFFFF))
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(inner)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def public_only(maddrs: Iterable[str]) -> list[str]:
    """Those multiaddresses that lead into the Internet, at most 16; names are replaced by what they stand for now.

    For one through a relay the relay's own address counts. Takes at most 2 s for each of the first two names.
    """
    found: list[str] = []
    names = 0
    for maddr in list(maddrs)[:MAX_ADDRESSES]:
        _, protocol, host, rest = [*maddr.split("/", 3), "", "", ""][:4]
        ips: list[IPv4Address | IPv6Address] = []
        if protocol in ("ip4", "ip6"):
            try:
                ips = [ipaddress.ip_address(host)]
            except ValueError:
                continue
        elif protocol in _NAMES and names < MAX_NAMES:
            names += 1
            ips = await _resolve(host, _NAMES[protocol])
        found += [f"/ip{ip.version}/{ip}/{rest}" for ip in ips if is_public(ip)]
    return found[:MAX_ADDRESSES]


async def _resolve(name: str, family: int) -> list[IPv4Address | IPv6Address]:
    loop = asyncio.get_running_loop()
    ask = loop.run_in_executor(_resolver, lambda: socket.getaddrinfo(name, None, family, socket.SOCK_STREAM))
    try:
        async with asyncio.timeout(RESOLVE_S):
            answers = await ask
    except (OSError, UnicodeError, TimeoutError):
        return []
    return [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in answers]
