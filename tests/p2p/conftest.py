"""Real p2pds on loopback, ended with the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from petals_agent.p2p.attachment import close
from petals_agent.p2p.daemon import Daemon, DaemonOptions

from hivemind.p2p import P2P  # isort: skip
from hivemind.utils.multiaddr import Multiaddr  # isort: skip

StartDaemon = Callable[..., Awaitable[Daemon]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartDaemon]:
    """Start a p2pd with these options, sockets in the test's folder."""
    started: list[Daemon] = []
    holding: list[P2P] = []  # p2pd ends with its last client

    async def start_daemon(**options: Any) -> Daemon:
        defaults = {"socket_dir": tmp_path, "startup_timeout": 30, "auto_nat": False, "nat_port_map": False}
        daemon = await Daemon.start(DaemonOptions(**{**defaults, **options}))
        started.append(daemon)
        holding.append(await P2P.replicate(Multiaddr(daemon.maddr)))
        return daemon

    yield start_daemon
    for client in holding:
        await close(client)
    for daemon in started:
        await daemon.stop()
