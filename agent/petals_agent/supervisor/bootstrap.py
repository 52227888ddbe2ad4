"""A swarm's entry node: DHT and reachability checks only, with an identity that stays, so that its address can be given out."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.p2p.daemon import DaemonOptions  # noqa: E402
from petals_agent.supervisor.network import Network  # noqa: E402
from petals_agent.swarm.identity import IdentityLock, ensure_identity  # noqa: E402
from petals_agent.swarm.reachability import ReachabilityProtocol  # noqa: E402

log = logging.getLogger("petals_agent.bootstrap")


async def bootstrap(
    identity: Path,
    listen: Sequence[str],
    announce: Sequence[str],
    initial_peers: Sequence[str],
    socket_dir: Path,
    ready: Callable[[Sequence[str]], None],
) -> None:
    """Run until SIGINT or SIGTERM; `ready` is called with the multiaddresses to give to others.

    Raises SwarmError, e.g. when the identity or the port cannot be used.
    """
    await asyncio.to_thread(ensure_identity, identity)
    lock = IdentityLock(identity)
    options = DaemonOptions(
        identity=identity,
        listen=listen,
        announce=announce,
        initial_peers=initial_peers,
        use_auto_relay=False,
        socket_dir=socket_dir,
    )
    network = Network(options, lambda name, text: log.info("%s: %s", name, text))
    checks = ReachabilityProtocol(lambda: network.maddrs)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    work = asyncio.create_task(_work(network, checks, ready), name="bootstrap")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (work, stopped):
            task.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)
        await checks.stop()
        await network.stop()
        lock.release()


async def _work(network: Network, checks: ReachabilityProtocol, ready: Callable[[Sequence[str]], None]) -> None:
    await network.start_once()
    ready(network.maddrs)
    keeper = asyncio.create_task(network.keep(), name="network")
    try:
        while True:
            await network.up.wait()
            node, daemon = network.node, network.daemon
            if node is None or daemon is None:
                continue
            await checks.attach(node.protocol.p2p)
            while network.daemon is daemon and network.up.is_set():
                await asyncio.sleep(1.0)
                await checks.close_idle_probe()
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
