"""Whether servers can be reached, as a client would: rpc_info from a peer that nobody can dial (protocol.md §10.1)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from petals_agent.errors import DaemonError
from petals_agent.monitor.state import Entry
from petals_agent.p2p import control
from petals_agent.printable import printable
from petals_agent.swarm.pings import is_unsupported_protocol

if TYPE_CHECKING:
    from hivemind.p2p import P2P

CALL_S = 5.0  # for one server, finding and connecting included
DIAL_S = 20.0  # for all servers together
GOOD_S = 60.0  # for so long a server counts as reachable while the connection to it stays open
GOOD_PER_S = (
    20.0  # servers that answered are asked again, all together; of more than 1 200 each one less often
)
CUT_FROM = 256  # connections; p2pd cuts those that are idle down to so many
BAD_S = (5.0, 15.0, 30.0, 60.0, 120.0)  # after so many failures in a row
CONCURRENT = 64
_MAX_REASON = 200


@dataclass
class _Verdict:
    reason: str  # empty: it was reached
    until: float
    failures: int


class Dialler:
    """Remembers whom it reached; `dial` again and again with all that shall be reachable.

    A good verdict lasts a minute, but no longer than the connection: that of a killed server breaks at once. With so many
    servers that p2pd itself cuts connections, it lasts as long as asking all of them takes. A bad one lasts the longer the
    more often it was confirmed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Verdict] = {}
        self._more = 0.0  # seconds that good verdicts last beyond a minute

    async def dial(self, p2p: P2P, peers: Collection[str], timeout: float) -> tuple[dict[str, str], int]:
        """Peer id → why it could not be reached, and how many count as reachable since the `timeout` (s) was too short for them.

        Others that it was too short for keep their old verdict.
        """
        now = self._clock()
        connected = await _connected(p2p)
        self._known = {peer: verdict for peer, verdict in self._known.items() if peer in peers}
        self._more = max(sum(not one.reason for one in self._known.values()) / GOOD_PER_S - GOOD_S, 0.0)
        due = [peer for peer in peers if self._is_due(peer, now, connected)]
        due.sort(key=self._rank)
        queue = iter(due)

        async def work() -> None:
            for peer in queue:
                self._learn(peer, await call_info(p2p, peer))

        workers = [asyncio.create_task(work()) for _ in range(min(CONCURRENT, len(due)))]
        try:
            if workers:
                await asyncio.wait(workers, timeout=timeout)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        failed = {peer: verdict.reason for peer, verdict in self._known.items() if verdict.reason}
        return failed, sum(peer not in self._known for peer in due)

    def _is_due(self, peer: str, now: float, connected: Collection[str] | None) -> bool:
        verdict = self._known.get(peer)
        if verdict is None:
            return True
        if verdict.reason:
            return verdict.until <= now
        cut = connected is not None and len(connected) < CUT_FROM and peer not in connected
        return cut or verdict.until + self._more <= now

    def _rank(self, peer: str) -> tuple[int, float]:
        """Who is dialled first if not all can be: those that were there, who answer at once, then strangers."""
        verdict = self._known.get(peer)
        if verdict is None:
            return 1, 0.0
        return (2 if verdict.reason else 0), verdict.until

    def _learn(self, peer: str, reason: str) -> None:
        before = self._known.get(peer)
        failures = (before.failures if before else 0) + 1 if reason else 0
        lasts = BAD_S[min(failures, len(BAD_S)) - 1] if reason else GOOD_S
        self._known[peer] = _Verdict(reason, self._clock() + lasts, failures)


async def _connected(p2p: P2P) -> set[str] | None:
    """Peers that p2pd has a connection to; None if it does not say."""
    try:
        async with asyncio.timeout(CALL_S):
            return {info.peer_id.to_base58() for info in await p2p.list_peers()}
    except Exception:  # hivemind raises what it likes, also for an address that it cannot read
        return None


async def call_info(p2p: P2P, peer_id: str) -> str:
    """Call rpc_info with an empty uid; why that failed, or an empty text. A server that is still starting counts as reached."""
    from hivemind.p2p import PeerID
    from hivemind.proto import runtime_pb2

    try:
        async with asyncio.timeout(CALL_S):
            await p2p.call_protobuf_handler(
                PeerID.from_base58(peer_id),
                "TransformerConnectionHandler.rpc_info",
                runtime_pb2.ExpertUID(uid=""),
                runtime_pb2.ExpertInfo,
            )
    except TimeoutError:
        return f"it did not answer within {CALL_S:g} s"
    except Exception as error:  # hivemind's, p2pd's, and what the peer made of it
        return "" if is_unsupported_protocol(error) else words(error)
    return ""


async def dial_entries(daemon: str, maddrs: Sequence[str]) -> tuple[Entry, ...]:
    """Connect to each entry peer, at any of its addresses, through the p2pd at `daemon`."""
    addresses: dict[str, list[str]] = {}
    for maddr in maddrs:
        addresses.setdefault(maddr.rsplit("/", 1)[1], []).append(maddr)

    async def reach(of_peer: Sequence[str]) -> str:
        try:
            await control.dial(daemon, of_peer, CALL_S)
        except DaemonError as error:
            return words(error)
        return ""

    reasons = dict(zip(addresses, await asyncio.gather(*map(reach, addresses.values())), strict=True))
    return tuple(
        Entry(address=maddr, reachable=not reason, reason=reason)
        for maddr in maddrs
        for reason in (reasons[maddr.rsplit("/", 1)[1]],)
    )


def words(error: Exception) -> str:
    """An error's text, in which a stranger may have written, as one line of printable characters."""
    return " ".join(printable(str(error)[: 4 * _MAX_REASON]).split())[:_MAX_REASON] or type(error).__name__
