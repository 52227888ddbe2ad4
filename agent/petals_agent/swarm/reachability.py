"""Whether peers can dial us directly: the rpc_check handler, asking others, asking a monitor (protocol.md §8).

A check makes us dial a peer that a stranger names, so it is rate-limited and uses a p2pd of its own that has no relay.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_agent.errors import SwarmError
from petals_agent.p2p import light
from petals_agent.p2p.daemon import Daemon, for_calls

light.install(without_torch=True)

from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase  # noqa: E402
from hivemind.proto import dht_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

from petals_agent.p2p.attachment import close  # noqa: E402

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

log = logging.getLogger("petals_agent.reachability")

WAIT_S = 5.0
MAX_CHECKS_PER_MINUTE = 30
PROBE_IDLE_S = 10.0
MAX_OPINIONS = 5
MONITOR_TIMEOUT_S = 10.0


class ReachabilityProtocol(ServicerBase):  # the name is the wire's
    """Answers rpc_check: "yes, you reached me", or what a direct dial of a third peer found."""

    def __init__(self, peers: Callable[[], Sequence[str]], socket_dir: Path) -> None:
        """`peers` gives multiaddresses that the probe can find the swarm through."""
        self._peers = peers
        self._socket_dir = socket_dir
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
            raise SwarmError(
                f"more than {MAX_CHECKS_PER_MINUTE} reachability checks a minute; ask another peer"
            )
        self._checks.append(now)
        try:
            peer = PeerID(named)
            async with asyncio.timeout(WAIT_S):
                answer = await self._dial(peer, named)
        except Exception as error:
            log.debug("check of %r: %r", named[:40], error)
            answer = False
        return dht_pb2.PingResponse(available=answer)

    async def _dial(self, peer: PeerID, about: bytes) -> bool:
        while True:
            probe = await self._ready_probe()
            try:
                return await call_check(probe, peer, about)
            except Exception as error:  # a fresh probe knows nobody until its first exchange with a peer
                if "failed to find any peer in table" not in str(error):
                    raise
            await asyncio.sleep(0.1)

    async def _ready_probe(self) -> P2P:
        """A client-mode p2pd without relay; its dial either works directly or not at all."""
        async with self._lock:
            self._probe_used = time.monotonic()
            if self._probe is None or self._probe[0].process.returncode is not None:
                peers = tuple(self._peers())
                options = for_calls(self._socket_dir, peers, startup_timeout=WAIT_S, use_relay=False)
                daemon = await Daemon.start(options)
                self._probe = (daemon, await P2P.replicate(Multiaddr(daemon.maddr)))
            return self._probe[1]

    async def close_idle_probe(self) -> None:
        """End the probe's p2pd when it was not used for a while; call now and then."""
        if self._probe is not None and time.monotonic() - self._probe_used > PROBE_IDLE_S:
            await self.stop()

    async def stop(self) -> None:
        """End the probe's p2pd."""
        probe, self._probe = self._probe, None
        if probe is not None:
            await close(probe[1])
            await probe[0].stop()


async def call_check(p2p: P2P, peer: PeerID, about: bytes) -> bool:
    """Ask `peer` whether the peer with id bytes `about` can be dialled; raises what the call raises."""
    request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=about))
    response = await p2p.call_protobuf_handler(
        peer, "ReachabilityProtocol.rpc_check", request, dht_pb2.PingResponse
    )
    return bool(response.available)


async def ask_peers(node: DHTNode, max_opinions: int = MAX_OPINIONS) -> float | None:
    """The share of peers that can dial us directly, over at most `max_opinions` of them; None without any.

    Asks as many at a time, and others in place of those without opinion; takes at most 12 s.
    """
    p2p: Any = node.protocol.p2p
    own = p2p.peer_id.to_bytes()
    peers = list(node.protocol.routing_table.peer_id_to_uid)
    random.shuffle(peers)
    opinions: list[bool] = []

    async def ask_until_told() -> None:
        while peers:
            peer = peers.pop()
            try:
                async with asyncio.timeout(2 * WAIT_S):
                    opinions.append(await call_check(p2p, peer, own))
                return
            except Exception as error:
                log.debug("no opinion from …%s: %r", str(peer)[-6:], error)

    try:
        async with asyncio.timeout(2 * WAIT_S + 2):
            await asyncio.gather(*(ask_until_told() for _ in range(max_opinions)))
    except TimeoutError:
        pass
    return sum(opinions) / len(opinions) if opinions else None


async def ask_monitor(url: str, peer_id: str) -> tuple[bool, str]:
    """(reachable, its words) of the monitor at `url`; raises SwarmError when it gives no verdict."""

    def fetch() -> Any:
        address = f"{url.rstrip('/')}/api/v1/is_reachable/{peer_id}"
        with urllib.request.urlopen(address, timeout=MONITOR_TIMEOUT_S) as response:
            return json.loads(response.read(65536))

    try:
        verdict = await asyncio.to_thread(fetch)
        reached = verdict["success"] if "success" in verdict else verdict["ok"]
        return bool(reached), str(verdict.get("message") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SwarmError(f"the monitor at {url} gives no verdict: {error!r}") from error
