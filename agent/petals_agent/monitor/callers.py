"""Who calls: their address, also behind a reverse proxy that we trust, and how much each may ask for."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from petals_agent.errors import LimitExceeded

Address = IPv4Address | IPv6Address
_MAX_HOPS = 20
_MAX_CALLERS = 10_000


class Proxies:
    """The networks whose X-Forwarded-For is believed; loopback always is."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        """`trusted`: addresses or networks, such as 10.0.0.0/8. Raises ValueError for what is neither."""
        self._networks = [ip_network(one, strict=False) for one in trusted]

    def caller(self, peer: str, forwarded: Sequence[str]) -> str:
        """The address of who asks, given who connects and the X-Forwarded-For lines: the last one that is no proxy of ours.

        What is no address in them ends the search: a proxy of ours would not have written it.
        """
        caller = _address(peer)
        if caller is None:
            return peer
        hops = [hop.strip() for line in forwarded for hop in line.split(",")][-_MAX_HOPS:]
        while hops and self._trusts(caller):
            before = _address(hops.pop())
            if before is None:
                break
            caller = before
        return str(caller)

    def _trusts(self, address: Address) -> bool:
        return address.is_loopback or any(address in network for network in self._networks)


class Allowance:
    """A token bucket for each caller and one for all: `rate` a second, `burst` at once."""

    def __init__(
        self,
        rate: float,
        burst: int,
        all_rate: float,
        all_burst: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._burst = rate, burst
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._all = _Bucket(all_rate, all_burst, clock())

    def wait(self, caller: str) -> float:
        """0 if `caller` may ask now, which is counted; else the seconds until it may."""
        now = self._clock()
        name = counted_as(caller)
        bucket = self._buckets.pop(name, None) or _Bucket(self._rate, self._burst, now)
        self._buckets[name] = bucket
        if len(self._buckets) > _MAX_CALLERS:
            self._buckets.popitem(last=False)
        wait = max(bucket.wait(now), self._all.wait(now))
        if wait == 0:
            bucket.take()
            self._all.take()
        return wait


class Places:
    """How much each caller may have under way at once: `with places.taken(caller)`."""

    def __init__(self, each: int, what: str) -> None:
        self._each, self._what = each, what
        self._taken = Counter[str]()

    @contextmanager
    def taken(self, caller: str) -> Iterator[None]:
        """Raises LimitExceeded when the caller has all that it may have."""
        name = counted_as(caller)
        if self._taken[name] >= self._each:
            raise LimitExceeded(f"{self._each} {self._what} run for you already; ask again in some seconds")
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]


class _Bucket:
    def __init__(self, rate: float, burst: int, now: float) -> None:
        self._rate, self._burst, self._left, self._at = rate, burst, float(burst), now

    def wait(self, now: float) -> float:
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return 0.0 if self._left >= 1 else (1 - self._left) / self._rate

    def take(self) -> None:
        self._left -= 1


def _address(text: str) -> Address | None:
    """From 1.2.3.4, 1.2.3.4:80, ::1, [::1]:80; an IPv4 address in IPv6's clothes is that IPv4 address."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def counted_as(caller: str) -> str:
    """Who is counted as one: an IPv4 address, or a /64 of IPv6, which one customer has."""
    address = _address(caller)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address) >> 64 << 64, 64)))
    return caller
