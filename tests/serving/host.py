"""A server of blocks in this process, at a p2pd of its own."""

from __future__ import annotations

from pathlib import Path

from petals_agent.engine.backend import Backend
from petals_agent.engine.engine import Engine
from petals_agent.p2p.attachment import Attachment, close
from petals_agent.p2p.daemon import Daemon, DaemonOptions
from petals_agent.p2p.streams import StreamServer
from petals_agent.serving.admission import CacheLedger
from petals_agent.serving.handlers import stream_handlers, unary_handlers
from petals_agent.serving.limits import Limits
from petals_agent.serving.push import PushTable
from petals_agent.serving.server import BlockServer

from serving.caller import PREFIX  # isort: skip
from hivemind.p2p import P2P  # isort: skip
from hivemind.utils.multiaddr import Multiaddr  # isort: skip

LIMITS = Limits(inference_max_length=512, max_batch_tokens=65536)
CACHE_TOKENS = 4096


class Host:
    """`server` and its p2pd; `restore` undoes what a test changed."""

    def __init__(
        self, server: BlockServer, daemon: Daemon, held: P2P, streams: StreamServer, maddrs: list[str]
    ) -> None:
        self.server, self.daemon, self.streams, self.maddrs = server, daemon, streams, maddrs
        self._held = held  # p2pd ends with its last client

    @classmethod
    async def start(
        cls, backend: Backend, start: int, end: int, folder: Path, *, initial_peers: list[str] | None = None
    ) -> Host:
        """Serve blocks [start, end)."""
        server = BlockServer(
            engine=Engine(backend, cache_tokens=CACHE_TOKENS),
            prefix=PREFIX,
            start=start,
            end=end,
            ledger=CacheLedger(2 * CACHE_TOKENS * (end - start)),
            pushes=PushTable(),
            limits=LIMITS,
            version="test",
        )
        server.engine.start()
        streams = StreamServer(
            stream_handlers(server),
            LIMITS.message_bytes(backend.hidden_size, server.blocks),
            folder,
            server.budget,
        )
        await streams.start()
        daemon = await Daemon.start(
            DaemonOptions(
                socket_dir=folder, auto_nat=False, nat_port_map=False, initial_peers=initial_peers or ()
            )
        )
        held = await P2P.replicate(Multiaddr(daemon.maddr))
        server.attachment = await Attachment.open(daemon.maddr, unary_handlers(server), streams)
        return cls(server, daemon, held, streams, await daemon.visible_maddrs())

    @property
    def peer_id(self) -> str:
        return self.daemon.peer_id

    @property
    def idle(self) -> bool:
        """Whether nothing of any session is left."""
        server = self.server
        return not (
            server.sessions
            or server.ledger.used
            or server.pushes.streams
            or server.in_flight
            or server.calls
            or server.engine.queued
            or server.budget.used
        )

    def restore(self) -> None:
        """Limits and cache as they were at the start."""
        self.server.limits = LIMITS
        self.server.ledger = CacheLedger(2 * CACHE_TOKENS * self.server.blocks)

    async def stop(self) -> None:
        """End the handlers, the engine and p2pd."""
        await self.streams.stop()
        if self.server.attachment is not None:
            await self.server.attachment.close()
        self.server.engine.stop()
        await close(self._held)
        await self.daemon.stop()
