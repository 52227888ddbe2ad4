"""Our place in the swarm: p2pd and the DHT node on it, started, watched, and replaced with the same identity and port."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from petals_agent.errors import DaemonError, IdentityTaken, SwarmError
from petals_agent.health.recovery import Budget
from petals_agent.p2p import light
from petals_agent.p2p.daemon import Daemon, DaemonOptions
from petals_agent.processes import signal_child
from petals_agent.supervisor.states import Life
from petals_agent.swarm.identity import check_not_live, is_there

light.install(without_torch=True)

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

log = logging.getLogger("petals_agent.network")

DHT_TIMEOUT_S = 10.0
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0  # a p2pd that lived so long starts the back-off anew
_LOOPBACK = {"/ip4/0.0.0.0": "/ip4/127.0.0.1", "/ip6/::": "/ip6/::1"}  # an address of every interface


@dataclass(eq=False)
class Connection:
    """One life of p2pd and the DHT node on it; `lost` is set when that p2pd has ended."""

    daemon: Daemon
    node: DHTNode
    client: bool  # outside the DHT's routing, since nobody can dial us
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Network:
    """`run()` as a task; `await connected()` gives the present connection, which changes when p2pd is replaced."""

    def __init__(self, options: DaemonOptions, life: Life, budget: Budget | None = None) -> None:
        """An identity that exists already is checked for another live user before p2pd starts with it.

        `budget` counts the deaths of p2pd that we did not cause.
        """
        self._options = options
        self._budget = budget
        self._life = life
        self._unproven = options.identity is not None and is_there(options.identity)
        self.known: list[str] = []  # multiaddresses of peers met, in earlier lives too
        self._met = False  # anybody, in this life
        self._up = asyncio.Event()
        self._replacing = False  # p2pd ends because we want it to
        self._condemned: str | None = None  # because it did no good any more
        self.connection: Connection | None = None
        self.problem: str | None = None  # why we are not connected, for `status`
        self.restarts = 0  # of p2pd, when it ended by itself
        self.maddrs: list[str] = []

    async def connected(self) -> Connection:
        """The connection, waiting for it if need be."""
        while self.connection is None:
            await self._up.wait()
        return self.connection

    async def run(self) -> NoReturn:
        """Connect, and replace p2pd whenever it ends; without any bootstrap peer, retry with back-off.

        Raises IdentityTaken when another live peer uses our identity.
        """
        short_lives = 0
        while True:
            await self._until_connected()
            connection = await self.connected()
            began = time.monotonic()
            status = await connection.daemon.process.wait()
            await self._drop()
            if self._replacing:
                self._replacing = False
                continue
            self.restarts += 1
            reason, self._condemned = self._condemned, None
            why = f"it ended with status {status}" if reason is None else reason
            self._life.warn("p2pd", f"p2pd is started again: {why}", reason=why)
            self._life.decided("restart", "p2pd", why, restarts=self.restarts)
            if reason is not None:
                continue
            if self._budget is not None:
                self._budget.spend(time.monotonic())
            short_lives = 0 if time.monotonic() - began > _STEADY_S else short_lives + 1
            await _pause(short_lives - 1)

    async def restart(self, reason: str) -> None:
        """End p2pd, which does no good any more, and wait until another one is connected."""
        connection = self.connection
        if connection is None or connection.lost.is_set():
            return
        self._condemned = reason
        signal_child(connection.daemon.process, signal.SIGKILL)
        await connection.lost.wait()
        await self.connected()

    @property
    def expects_peers(self) -> bool:
        """Whether somebody was there to join, or came since."""
        return bool(self._options.initial_peers) or self._met

    async def leave_routing(self) -> None:
        """Nobody can dial us: become a mere client of the DHT, so that others do not try in vain."""
        connection = await self.connected()
        self._options = replace(self._options, client=True)
        self._replacing = True
        await connection.daemon.stop()
        await connection.lost.wait()

    async def _until_connected(self) -> None:
        attempt = 0
        while self.connection is None:
            try:
                await self._start()
            except IdentityTaken:
                raise
            except SwarmError as error:
                if self.problem != str(error):
                    text = f"not connected, trying again: {error}"
                    self._life.warn("network", text, reason=str(error))
                self.problem = str(error)
                attempt += 1
                await _pause(attempt)
        if self.problem is not None:
            self._life.note("network", "connected")
            self.problem = None

    async def _start(self) -> None:
        peers = self._bootstrap_peers()
        options = replace(self._options, initial_peers=peers)
        try:
            if self._unproven and peers:
                await check_not_live(options)
                self._unproven = False
            daemon = await Daemon.start(options)
        except DaemonError as error:
            raise _explained(error, peers) from error
        try:
            node = await _join(daemon, options)
        except BaseException:
            await daemon.stop()
            raise
        self.maddrs = await daemon.visible_maddrs()
        if not self._options.announce:
            self._options = replace(self._options, listen=fixed_ports(self._options.listen, self.maddrs))
        self.connection = Connection(daemon, node, options.client)
        self._up.set()

    def _bootstrap_peers(self) -> tuple[str, ...]:
        """The configured peers; after a failure also those met before, in case all of the former are gone."""
        peers = tuple(self._options.initial_peers)
        return (*peers, *self.known) if peers and self.problem is not None else peers

    async def remember_peers(self) -> None:
        """Note the peers that p2pd is connected to now; raises TimeoutError, or what hivemind raises."""
        connection = await self.connected()
        async with asyncio.timeout(DHT_TIMEOUT_S):
            infos = await connection.node.protocol.p2p.list_peers()
        known = [
            f"{addr}/p2p/{info.peer_id}"
            for info in infos
            for addr in info.addrs
            if "/p2p-circuit" not in str(addr)
        ]
        self.known = known[:64] or self.known
        self._met = self._met or bool(known)

    @property
    def own_maddrs(self) -> list[str]:
        """Where we can be dialled from this host, with the peer id; empty before the first start."""
        return own_maddrs(self._options.listen, self.maddrs)

    @property
    def peers(self) -> int:
        """How many nodes of the DHT we know."""
        connection = self.connection
        return len(connection.node.protocol.routing_table.peer_id_to_uid) if connection is not None else 0

    async def _drop(self) -> None:
        """End p2pd and forget what was on it; hivemind's own shutdown would wait for a daemon that is gone."""
        self._up.clear()
        connection, self.connection = self.connection, None
        if connection is None:
            return
        connection.lost.set()
        await _forget(connection.node)
        await connection.daemon.stop()

    async def stop(self) -> None:
        """End p2pd."""
        await self._drop()


async def _join(daemon: Daemon, options: DaemonOptions) -> DHTNode:
    """A DHT node on `daemon`; raises SwarmError that says what went wrong."""
    from hivemind.dht.node import DHTNode
    from hivemind.p2p import P2P
    from hivemind.utils.multiaddr import Multiaddr

    from petals_agent.p2p.attachment import close
    from petals_agent.swarm.guard import RecordGuard

    p2p: P2P | None = None
    try:
        async with asyncio.timeout(options.startup_timeout):
            p2p = await P2P.replicate(Multiaddr(daemon.maddr))
            return await DHTNode.create(
                p2p=p2p,
                initial_peers=list(options.initial_peers),
                client_mode=options.client,
                record_validator=RecordGuard(),
            )
    except BaseException as error:
        if p2p is not None:
            await close(p2p)
        if not isinstance(error, Exception):
            raise
        raise _explained(error, options.initial_peers) from error


async def _forget(node: DHTNode) -> None:
    from petals_agent.p2p.attachment import close

    node.is_alive = False
    refresh = node.cache_refresh_task
    if refresh is not None:
        refresh.cancel()
        await asyncio.gather(refresh, return_exceptions=True)
    await close(node.protocol.p2p)


def _explained(error: Exception, peers: Sequence[str]) -> SwarmError:
    """hivemind's and p2pd's words for a failed start, in ours."""
    text = str(error) or type(error).__name__
    if "failed to connect to bootstrap peers" in text or "none of the initial_peers" in text:
        named = ", ".join(peers[:3]) + (f" and {len(peers) - 3} more" if len(peers) > 3 else "")
        return SwarmError(f"no bootstrap peer answers ({named}); check swarm.initial_peers and the network")
    if "local time must be within" in text:
        return SwarmError(f"the clock of this host differs from its peers' ({text}); set it by NTP")
    if isinstance(error, TimeoutError):
        return SwarmError(
            "the DHT was not joined in time; raise swarm.daemon_startup_timeout or check the network"
        )
    return error if isinstance(error, SwarmError) else SwarmError(f"the DHT could not be joined: {text}")


def fixed_ports(listen: Sequence[str], visible: Sequence[str]) -> tuple[str, ...]:
    """Replace `/tcp/0` by the port that was given, so that a restarted p2pd is found at the same address.

    `visible` may also hold addresses of a NAT: the port is taken from the address listened on, or from loopback where
    that is every interface.
    """
    fixed = []
    for maddr in listen:
        if maddr.endswith("/tcp/0"):
            host = maddr.removesuffix("/tcp/0")
            here = _LOOPBACK.get(host, host)
            ports = [
                seen.removeprefix(f"{here}/tcp/").split("/")[0]
                for seen in visible
                if seen.startswith(f"{here}/tcp/")
            ]
            maddr = f"{host}/tcp/{ports[0] if ports else 0}"
        fixed.append(maddr)
    return tuple(fixed)


def own_maddrs(listen: Sequence[str], visible: Sequence[str]) -> list[str]:
    """Where we can be dialled from this host: what we listen on, since no router need lead back what it forwards to us.

    `visible` if the ports listened on are not known.
    """
    peers = {maddr.rsplit("/p2p/", 1)[1] for maddr in visible}
    places = [maddr.partition("/tcp/") for maddr in listen if not maddr.endswith("/tcp/0")]
    here = [f"{_LOOPBACK.get(host, host)}{tcp}{port}" for host, tcp, port in places]
    return [f"{maddr}/p2p/{peer}" for maddr in here for peer in peers] or list(visible)


async def _pause(failures: int) -> None:
    """Back off, each host for a time of its own."""
    pause = _BACKOFF_S[min(max(failures, 0), len(_BACKOFF_S) - 1)]
    await asyncio.sleep(pause * random.uniform(0.8, 1.2))
