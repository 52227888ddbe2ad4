"""A place in the swarm for a program that is no agent: a p2pd of its own, and for a group a DHT node on it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NoReturn

from petals_agent.errors import DaemonError, SwarmError
from petals_agent.heartbeat.fleet import we_are_cancelled
from petals_agent.heartbeat.post import Post
from petals_agent.p2p import light
from petals_agent.p2p.daemon import Daemon, DaemonOptions

light.install(without_torch=True)

from hivemind.p2p import P2P  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

from petals_agent.p2p.attachment import close  # noqa: E402

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

log = logging.getLogger("petals_agent.heartbeat")

_PAUSE_S = 1.0
_GREET_S = 5.0


class Place:
    """`run()` as a task: p2pd is there, and again with the same identity when it has ended."""

    def __init__(self, options: DaemonOptions, post: Post, with_dht: bool) -> None:
        self._options, self._post, self._with_dht = options, post, with_dht
        self._node: DHTNode | None = None
        self._joined = asyncio.Event()
        self.members: tuple[str, ...] = ()  # whom a new p2pd connects to

    async def node(self) -> DHTNode:
        """The DHT node, waiting for it if need be."""
        while self._node is None:
            await self._joined.wait()
        return self._node

    async def run(self) -> NoReturn:
        """Raises SwarmError when p2pd or the DHT node cannot be had at all; later it is tried again."""
        first = True
        while True:
            try:
                await self._live_once()
                log.warning("p2pd ended and is started again")
            except SwarmError as error:
                if first:
                    raise
                log.warning("p2pd cannot be started, trying again: %s", error)
            first = False
            await asyncio.sleep(_PAUSE_S)

    async def _live_once(self) -> None:
        daemon = await Daemon.start(self._options)
        p2p: P2P | None = None
        try:
            p2p = await self._connect(daemon)
            await self._post.attach(daemon.maddr)
            await self._post.greet(self.members, _GREET_S)
            await daemon.process.wait()
        finally:
            self._post.detach()
            self._joined.clear()
            node, self._node = self._node, None
            if node is not None:
                await _forget(node)
            if p2p is not None:
                await close(p2p)
            await daemon.stop()

    async def _connect(self, daemon: Daemon) -> P2P:
        """The connection that p2pd stays for (without one it ends after half a minute), and with it the DHT node."""
        timeout = self._options.startup_timeout
        p2p = None
        try:
            async with asyncio.timeout(timeout):
                p2p = await P2P.replicate(Multiaddr(daemon.maddr))
                if self._with_dht:
                    await self._join(p2p)
        except (Exception, asyncio.CancelledError) as error:  # hivemind raises what it likes
            if p2p is not None:
                await close(p2p)
            if we_are_cancelled(error):
                raise
            raise DaemonError(f"the swarm was not joined within {timeout:g} s: {error!r:.200}") from error
        return p2p

    async def _join(self, p2p: P2P) -> None:
        from hivemind.dht.node import DHTNode

        from petals_agent.swarm.guard import RecordGuard

        peers = list(self._options.initial_peers)
        self._node = await DHTNode.create(p2p=p2p, initial_peers=peers, record_validator=RecordGuard())
        self._joined.set()


async def _forget(node: DHTNode) -> None:
    """Its own shutdown would wait for a p2pd that is gone."""
    node.is_alive = False
    refresh = node.cache_refresh_task
    if refresh is not None:
        refresh.cancel()
        await asyncio.gather(refresh, return_exceptions=True)
