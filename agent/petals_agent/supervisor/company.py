"""Keeps us in company: entry peers are asked now and then and dialled again, and whom we met is remembered over restarts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from petals_agent.config.multiaddr import Purpose, check_multiaddr
from petals_agent.errors import DaemonError
from petals_agent.p2p import control
from petals_agent.supervisor.network import Connection, Network
from petals_agent.supervisor.states import Life

log = logging.getLogger("petals_agent.company")

_PERIOD_S = 15.0
_ASKED = 3  # entry peers each time
_DIALLED = 8  # remembered peers, when nobody else is left
_DIAL_TIMEOUT_S = 5.0
_PING_TIMEOUT_S = 3.0
_MOST_REMEMBERED = 64


class Company:
    """`run()` as a task. Heals an empty routing table and a split swarm: whoever comes back is found within a period."""

    def __init__(self, network: Network, entry_peers: Sequence[str], file: Path, life: Life) -> None:
        """`file` keeps the multiaddresses of peers that were met."""
        self._network = network
        self._entry = list(entry_peers)
        self._file = file
        self._life = life
        self._saved: list[str] = []

    async def run(self) -> NoReturn:
        """Until cancelled."""
        self._network.known = self._saved = await asyncio.to_thread(remembered, self._file)
        alone = False
        while True:
            await asyncio.sleep(_PERIOD_S * random.uniform(0.8, 1.2))
            connection = await self._network.connected()
            await self._ask(connection, _by_peer(self._entry), _ASKED)
            if not self._network.peers and self._network.known:
                await self._ask(connection, _by_peer(self._network.known), _DIALLED)
            lonely = self._network.expects_peers and not self._network.peers
            if lonely is not alone:
                alone = lonely
                tell = self._life.warn if alone else self._life.note
                tell("company", "nobody answers any more; dialling on" if alone else "found peers again")
            await self._remember()

    async def _ask(self, connection: Connection, peers: dict[str, list[str]], count: int) -> None:
        chosen = random.sample(sorted(peers.items()), min(count, len(peers)))
        await asyncio.gather(*(self._ask_one(connection, peer, maddrs) for peer, maddrs in chosen))

    async def _ask_one(self, connection: Connection, peer: str, maddrs: list[str]) -> None:
        """Ping; whoever does not answer is dialled at the addresses that we know and pinged again."""
        if peer == connection.daemon.peer_id or await _ping(connection, peer):
            return
        try:
            await control.dial(connection.daemon.maddr, maddrs, _DIAL_TIMEOUT_S)
        except DaemonError as error:
            log.debug("…%s cannot be dialled: %s", peer[-6:], error)
            return
        await _ping(connection, peer)

    async def _remember(self) -> None:
        known = self._network.known[:_MOST_REMEMBERED]
        if known and known != self._saved:
            try:
                await asyncio.to_thread(_write, self._file, known)
                self._saved = known
            except OSError as error:
                log.debug("peers are not remembered: %s", error)


async def _ping(connection: Connection, peer: str) -> bool:
    """Whether it answers; hivemind then keeps it in the routing table."""
    from hivemind.p2p import PeerID

    protocol: Any = connection.node.protocol
    try:
        async with asyncio.timeout(_PING_TIMEOUT_S):
            return await protocol.call_ping(PeerID.from_base58(peer)) is not None
    except Exception as error:  # hivemind raises what it likes
        log.debug("…%s does not answer: %r", peer[-6:], error)
        return False


def _by_peer(maddrs: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for maddr in maddrs:
        found.setdefault(maddr.rsplit("/", 1)[1], []).append(maddr)
    return found


def remembered(file: Path) -> list[str]:
    """Multiaddresses that were written; none if the file is not there or makes no sense."""
    try:
        stored = json.loads(file.read_text()[: 2**20])
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(stored, list):
        return []
    found = [maddr for maddr in stored[:_MOST_REMEMBERED] if isinstance(maddr, str)]
    return [maddr for maddr in found if _dialable(maddr)]


def _dialable(maddr: str) -> bool:
    try:
        check_multiaddr(maddr, Purpose.DIAL)
    except ValueError:
        return False
    return True


def _write(file: Path, maddrs: Sequence[str]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(list(maddrs)))
    temporary.replace(file)
