"""A swarm's entry node: DHT and reachability checks only, with an identity that stays, so that its address can be given out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.p2p.daemon import DaemonOptions, check_ports  # noqa: E402
from petals_agent.processes import raise_file_limit  # noqa: E402
from petals_agent.supervisor.network import DHT_TIMEOUT_S, Network  # noqa: E402
from petals_agent.supervisor.reachability import Reachability  # noqa: E402
from petals_agent.supervisor.sockets import remove_stale_sockets  # noqa: E402
from petals_agent.supervisor.states import Life  # noqa: E402
from petals_agent.supervisor.tasks import first  # noqa: E402
from petals_agent.swarm.identity import IdentityLock, ensure_identity  # noqa: E402

log = logging.getLogger("petals_agent.bootstrap")

_REFRESH_S = 30.0  # so that members who came and went are noticed


async def bootstrap(
    identity: Path,
    listen: Sequence[str],
    announce: Sequence[str],
    initial_peers: Sequence[str],
    socket_dir: Path,
    ready: Callable[[Sequence[str]], None],
) -> None:
    """Run until SIGINT or SIGTERM; `ready` is called with the multiaddresses to give to others.

    Raises SwarmError when the identity or a port cannot be used; initial peers that do not answer are waited for.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    check_ports(listen)
    raise_file_limit()
    remove_stale_sockets(socket_dir)
    options = DaemonOptions(
        identity=identity,
        listen=listen,
        announce=announce,
        initial_peers=initial_peers,
        socket_dir=socket_dir,
    )
    life = Life()
    network = Network(options, life)  # looks at the identity before it may be made
    await asyncio.to_thread(ensure_identity, identity)
    lock = IdentityLock(identity)
    reachability = Reachability(None, network, initial_peers, socket_dir, life)
    try:
        await first(stop.wait(), network.run(), reachability.run(), _refresh(network, ready))
    finally:
        await reachability.stop()
        await network.stop()
        lock.release()


async def _refresh(network: Network, ready: Callable[[Sequence[str]], None]) -> NoReturn:
    """Look for something now and then, as stock entry nodes do: it renews the routing table."""
    await network.connected()
    ready(network.maddrs)
    while True:
        await asyncio.sleep(_REFRESH_S)
        connection = await network.connected()
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                await connection.node.get(f"refresh.{secrets.token_hex(8)}", latest=True)
        except Exception as error:  # hivemind raises what it likes, e.g. when p2pd has just ended
            log.info("the routing table was not renewed: %s", error or type(error).__name__)
