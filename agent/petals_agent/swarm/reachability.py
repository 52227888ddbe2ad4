"""Peers tell each other whether they can be dialled directly: the rpc_check handler, and asking others (protocol.md §8).

A check makes us dial a peer that a stranger names, so it is rate-limited and uses a p2pd of its own that has no relay.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from petals_agent.errors import SwarmError
from petals_agent.p2p import light
from petals_agent.p2p.daemon import Daemon, DaemonOptions

light.install(without_torch=True)

from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase  # noqa: E402
from hivemind.proto import dht_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

log = logging.getLogger("petals_agent.reachability")

WAIT_S = 5.0
MAX_CHECKS_PER_MINUTE = 30
PROBE_IDLE_S = 60.0
MAX_OPINIONS = 5


class ReachabilityProtocol(ServicerBase):  # the name is the wire's
    """Answers rpc_check: "yes, you reached me", or what a direct dial of a third peer found."""

    def __init__(self, peers: Callable[[], Sequence[str]]) -> None:
        """`peers` gives multiaddresses that the probe can find the swarm through."""
        self._peers = peers
        self._checks: list[float] = []
        self._probe: tuple[Daemon, P2P] | None = None
        self._probe_used = 0.0
        self._lock = asyncio.Lock()
        self._own = b""

    async def attach(self, p2p: P2P) -> None:
        """Serve on `p2p`; again after p2pd was replaced."""
        self._own = p2p.peer_id.to_bytes()
        await self.add_p2p_handlers(p2p)

    async def rpc_check(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        named = request.peer.node_id
        if named == self._own:
            return dht_pb2.PingResponse(available=True)
        now = time.monotonic()
        self._checks = [at for at in self._checks if now - at < 60.0]
        if len(self._checks) >= MAX_CHECKS_PER_MINUTE:
            raise SwarmError(f"more than {MAX_CHECKS_PER_MINUTE} reachability checks a minute; ask another peer")
        self._checks.append(now)
        try:
            peer = PeerID(named)
            async with asyncio.timeout(WAIT_S):
                probe = await self._ready_probe()
                answer = await call_check(probe, peer, named)
        except Exception as error:
            log.debug("check of %r: %r", named[:40], error)
            answer = False
        return dht_pb2.PingResponse(available=answer)

    async def _ready_probe(self) -> P2P:
        """A client-mode p2pd without relay; its dial either works directly or not at all."""
        async with self._lock:
            self._probe_used = time.monotonic()
            if self._probe is None or self._probe[0].process.returncode is not None:
                options = DaemonOptions(
                    initial_peers=tuple(self._peers()),
                    listen=(),
                    client=True,
                    use_relay=False,
                    auto_nat=False,
                    nat_port_map=False,
                    startup_timeout=WAIT_S,
                )
                daemon = await Daemon.start(options)
                self._probe = (daemon, await P2P.replicate(Multiaddr(daemon.maddr)))
            return self._probe[1]

    async def close_idle_probe(self) -> None:
        """End the probe's p2pd when it was not used for a minute; call now and then."""
        if self._probe is not None and time.monotonic() - self._probe_used > PROBE_IDLE_S:
            await self.stop()

    async def stop(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            probe[1]._terminate()
            await probe[0].stop()


async def call_check(p2p: P2P, peer: PeerID, about: bytes) -> bool:
    """Ask `peer` whether the peer with id bytes `about` can be dialled; raises what the call raises."""
    request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=about))
    response = await p2p.call_protobuf_handler(
        peer, "ReachabilityProtocol.rpc_check", request, dht_pb2.PingResponse
    )
    return bool(response.available)


async def ask_peers(node: DHTNode, max_peers: int = MAX_OPINIONS) -> float | None:
    """The share of peers that can dial us directly, over at most `max_peers` opinions; None without any."""
    p2p: Any = node.protocol.p2p
    own = p2p.peer_id.to_bytes()
    opinions: list[bool] = []
    for peer in list(node.protocol.routing_table.peer_id_to_uid)[: 4 * max_peers]:
        try:
            async with asyncio.timeout(2 * WAIT_S):
                opinions.append(await call_check(p2p, peer, own))
        except Exception as error:
            log.debug("no opinion from …%s: %r", str(peer)[-6:], error)
        if len(opinions) == max_peers:
            break
    return sum(opinions) / len(opinions) if opinions else None
