"""Our place in the swarm: p2pd and the DHT node on it, started, watched, and replaced with the same identity and port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from petals_agent.errors import DaemonError, SwarmError
from petals_agent.p2p import light
from petals_agent.p2p.daemon import Daemon, DaemonOptions

light.install(without_torch=True)

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

log = logging.getLogger("petals_agent.network")

DHT_TIMEOUT_S = 10.0
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Network:
    """`await start()`, then `keep()` as a task. `daemon` and `node` change when p2pd is replaced; `changed` fires then."""

    def __init__(self, options: DaemonOptions, note: Callable[[str, str], None]) -> None:
        self._options = options
        self._note = note
        self._known: list[str] = []  # peers met in earlier lives of p2pd
        self.daemon: Daemon | None = None
        self.node: DHTNode | None = None
        self.problem: str | None = None  # why we are not connected, for `status`
        self.restarts = -1  # starts of p2pd after the first
        self.maddrs: list[str] = []
        self.up = asyncio.Event()

    @property
    def peer_id(self) -> str:
        return self.daemon.peer_id if self.daemon is not None else ""

    async def start(self) -> None:
        """Start p2pd and the DHT node, however long that takes: without any bootstrap peer, retry with back-off."""
        attempt = 0
        while True:
            try:
                await self._start_once()
                if self.problem is not None:
                    self._note("network", "connected")
                self.problem = None
                return
            except SwarmError as error:
                await self._drop()
                if self.problem is None:
                    self._note("network", f"not connected, trying again: {error}")
                self.problem = str(error)
            attempt += 1
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])

    async def start_once(self) -> None:
        """Start without trying again; raises SwarmError."""
        try:
            await self._start_once()
        except SwarmError:
            await self._drop()
            raise

    async def keep(self) -> None:
        """Replace p2pd whenever it ends."""
        while True:
            await self.up.wait()
            assert self.daemon is not None
            status = await self.daemon.process.wait()
            self.up.clear()
            self._note("p2pd", f"p2pd ended with status {status}; starting it again")
            await self._drop()
            await self.start()

    async def _start_once(self) -> None:
        from hivemind.dht.node import DHTNode
        from hivemind.p2p import P2P
        from hivemind.utils.multiaddr import Multiaddr

        from petals_agent.swarm.guard import RecordGuard

        peers = self._bootstrap_peers()
        self.daemon = await Daemon.start(replace(self._options, initial_peers=peers))
        try:
            async with asyncio.timeout(self._options.startup_timeout):
                p2p = await P2P.replicate(Multiaddr(self.daemon.maddr))
                self.node = await DHTNode.create(
                    p2p=p2p, initial_peers=peers, client_mode=self._options.client, record_validator=RecordGuard()
                )
        except Exception as error:
            named = ", ".join(peers[:3]) or "none configured"
            raise DaemonError(f"no bootstrap peer answers ({named}): {error or type(error).__name__}") from error
        self.maddrs = await self.daemon.visible_maddrs()
        self._options = replace(self._options, listen=_fixed_ports(self._options.listen, self.maddrs))
        self.restarts += 1
        self.up.set()

    def _bootstrap_peers(self) -> list[str]:
        """The configured peers; after several failures also those met before, in case all of the former are gone."""
        peers = list(self._options.initial_peers)
        if peers and self.problem is not None:
            peers += self._known
        return peers

    async def remember_peers(self) -> int:
        """Note the peers that p2pd is connected to now; returns how many."""
        if self.node is None or not self.up.is_set():
            return 0
        async with asyncio.timeout(DHT_TIMEOUT_S):
            infos = await self.node.protocol.p2p.list_peers()
        known = [f"{addr}/p2p/{info.peer_id}" for info in infos for addr in info.addrs if "/p2p-circuit" not in str(addr)]
        self._known = known[:64] or self._known
        return len(infos)

    async def _drop(self) -> None:
        """Forget the dead objects; their own shutdown would wait for a daemon that is gone."""
        node, self.node = self.node, None
        if node is not None:
            node.is_alive = False
            node.protocol.p2p._terminate()
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            await daemon.stop()

    async def stop(self) -> None:
        """End p2pd."""
        self.up.clear()
        await self._drop()


def _fixed_ports(listen: Sequence[str], visible: Sequence[str]) -> tuple[str, ...]:
    """Replace `/tcp/0` by the port that was given, so that a restarted p2pd is found at the same address."""
    fixed = []
    for maddr in listen:
        if maddr.endswith("/tcp/0"):
            family = maddr.split("/")[1]
            ports = [seen.split("/tcp/")[1].split("/")[0] for seen in visible if seen.startswith(f"/{family}/") and "/tcp/" in seen]
            if ports:
                maddr = f"{maddr.removesuffix('/tcp/0')}/tcp/{ports[0]}"
        fixed.append(maddr)
    return tuple(fixed)
