"""Dials bootstrap peers through a p2pd of its own, as the agent would, and asks each for its time."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from petals_agent.errors import DaemonError
from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.p2p import control  # noqa: E402
from petals_agent.p2p.daemon import Daemon, for_calls  # noqa: E402

if TYPE_CHECKING:
    from hivemind.p2p import P2P

START_TIMEOUT_S, DIAL_TIMEOUT_S, PING_TIMEOUT_S = 10.0, 8.0, 4.0


@dataclass(frozen=True)
class Answer:
    """What one peer did when it was dialled."""

    maddrs: tuple[str, ...]
    problem: str | None = None  # why it cannot be reached
    offset: float | None = None  # its clock minus ours in seconds; None if it did not say

    @property
    def peer_id(self) -> str:
        return self.maddrs[0].rsplit("/", 1)[1]


async def ask_peers(maddrs: Sequence[str]) -> list[Answer]:
    """Dial each peer at all of its addresses at once; takes at most 25 s. Raises DaemonError without a p2pd."""
    by_peer: dict[str, list[str]] = {}
    for maddr in maddrs:
        by_peer.setdefault(maddr.rsplit("/", 1)[1], []).append(maddr)
    if not by_peer:
        return []
    from hivemind.p2p import P2P
    from hivemind.utils.multiaddr import Multiaddr

    from petals_agent.p2p.attachment import close

    with tempfile.TemporaryDirectory(prefix="petals-agent-") as folder:
        daemon = await Daemon.start(for_calls(Path(folder), startup_timeout=START_TIMEOUT_S))
        try:
            p2p = await P2P.replicate(Multiaddr(daemon.maddr))
            try:
                return list(await asyncio.gather(*(_ask(daemon, p2p, own) for own in by_peer.values())))
            finally:
                await close(p2p)
        finally:
            await daemon.stop()


async def _ask(daemon: Daemon, p2p: P2P, maddrs: Sequence[str]) -> Answer:
    from hivemind.p2p import PeerID
    from hivemind.proto import dht_pb2

    answer = Answer(tuple(maddrs))
    try:
        await control.dial(daemon.maddr, maddrs, DIAL_TIMEOUT_S)
    except DaemonError as error:
        return Answer(answer.maddrs, problem=str(error))
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            asked = time.time()
            reply = await p2p.call_protobuf_handler(
                PeerID.from_base58(answer.peer_id),
                "DHTProtocol.rpc_ping",
                dht_pb2.PingRequest(validate=False),
                dht_pb2.PingResponse,
            )
            return Answer(answer.maddrs, offset=float(reply.dht_time - (asked + time.time()) / 2))
    except Exception:  # hivemind raises what it likes; it was reached, and says no time
        return answer
