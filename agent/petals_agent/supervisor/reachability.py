"""Our part in the swarm's reachability checks, and what they say of us: announced ONLINE only when that is known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from petals_agent.errors import SwarmError
from petals_agent.supervisor.network import DHT_TIMEOUT_S, Connection, Network
from petals_agent.supervisor.states import Life
from petals_agent.supervisor.tasks import first
from petals_agent.swarm.reachability import ReachabilityProtocol, ask_monitor, ask_peers

_ASKED_AGAIN_S = (1.0, 2.0)  # a peer that was told of us only now may not find us yet
_MONITOR_RETRY_S = 15.0
_MONITOR_ATTEMPTS = 29
_IDLE_CHECK_S = 5.0


class Reachability:
    """`run()` as a task; `known` is set when `relayed` holds: whether peers reach us only through others."""

    def __init__(
        self,
        source: str | None,
        network: Network,
        entry_peers: Sequence[str],
        socket_dir: Path,
        life: Life,
    ) -> None:
        """`source` of what we know of ourselves: "peers", a monitor's URL, or None to answer only; "off": not even that."""
        self._source = source
        self._network = network
        self._life = life
        self._checks = ReachabilityProtocol(lambda: (*network.maddrs, *entry_peers), socket_dir)
        self.relayed = False
        self.known = asyncio.Event()

    async def run(self) -> NoReturn:
        """Serve checks on every p2pd; find out about ourselves once. Raises SwarmError when a monitor says no."""
        if self._source in (None, "off"):
            self.known.set()
        while True:
            connection = await self._network.connected()
            if self._source != "off" and not connection.client:
                await self._attach(connection)
            if not self.known.is_set():
                await self._find_out(connection)
            while not connection.lost.is_set():
                await self._checks.close_idle_probe()
                try:
                    async with asyncio.timeout(_IDLE_CHECK_S):
                        await connection.lost.wait()
                except TimeoutError:
                    pass

    async def _attach(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                await first(self._checks.attach(connection.node.protocol.p2p), connection.lost.wait())
        except Exception as error:  # without it we serve all the same
            reason = str(error) or type(error).__name__
            self._life.warn("reachability", f"peers cannot ask us: {reason}", reason=reason)

    async def stop(self) -> None:
        """End the probe's p2pd, if there is one."""
        await self._checks.stop()

    async def _find_out(self, connection: Connection) -> None:
        if self._source is not None and self._source != "peers":
            await self._ask_monitor(self._source)
        elif await self._peers_say_no(connection):
            self._life.warn(
                "reachability",
                "most peers cannot dial us; going on through relays (see swarm.announce)",
                relayed=True,
            )
            self.relayed = True
            await self._network.leave_routing()
        if self.relayed or not connection.lost.is_set():
            self.known.set()

    async def _peers_say_no(self, connection: Connection) -> bool:
        for pause in (*_ASKED_AGAIN_S, 0.0):
            share = await ask_peers(connection.node)
            if share is None or share >= 0.5:
                return False
            await asyncio.sleep(pause)
        return not connection.lost.is_set()

    async def _ask_monitor(self, url: str) -> None:
        words = ""
        for _ in range(_MONITOR_ATTEMPTS):
            try:
                reachable, words = await ask_monitor(url, (await self._network.connected()).daemon.peer_id)
            except SwarmError as error:
                self._life.warn("reachability", f"{error}; going on without", reason=str(error))
                return
            if reachable:
                return
            self._life.warn(
                "reachability",
                f"the monitor cannot reach us: {words or 'no reason given'}; asking again",
                reason=words,
            )
            await asyncio.sleep(_MONITOR_RETRY_S)
        raise SwarmError(
            f"{url} cannot reach this host ({words or 'no reason given'}); open its port, set swarm.announce, or "
            'set swarm.reachability = "off" if that is meant to be so'
        )
