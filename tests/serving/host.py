"""A server of blocks in this process, at a p2pd of its own."""

from __future__ import annotations

from pathlib import Path

from petals_agent.engine.backend import Backend
from petals_agent.engine.engine import Engine
from petals_agent.p2p.attachment import Attachment
from petals_agent.p2p.streams import StreamServer
from petals_agent.serving.admission import CacheLedger
from petals_agent.serving.handlers import stream_handlers, unary_handlers
from petals_agent.serving.limits import Limits
from petals_agent.serving.push import PushTable
from petals_agent.serving.server import BlockServer

from serving.caller import PREFIX  # isort: skip
from hivemind.p2p import P2P  # isort: skip

LIMITS = Limits(inference_max_length=512, max_batch_tokens=65536)
CACHE_TOKENS = 4096


class Host:
    """`server` and its p2pd; `restore` undoes what a test changed."""

    def __init__(self, server: BlockServer, p2pd: P2P, streams: StreamServer, maddrs: list[str]) -> None:
        self.server, self.p2pd, self.streams, self.maddrs = server, p2pd, streams, maddrs

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
        p2pd = await P2P.create(
            initial_peers=initial_peers or (),
            host_maddrs=["/ip4/127.0.0.1/tcp/0"],
            dht_mode="server",
            use_relay=False,
            auto_nat=False,
            nat_port_map=False,
        )
        server.attachment = await Attachment.open(
            str(p2pd.daemon_listen_maddr), unary_handlers(server), streams
        )
        return cls(server, p2pd, streams, [str(maddr) for maddr in await p2pd.get_visible_maddrs()])

    @property
    def peer_id(self) -> str:
        return str(self.p2pd.peer_id)

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
        self.server.budget.limit = LIMITS.waiting_bytes(
            self.server.engine.backend.hidden_size, self.server.blocks
        )
        self.server.ledger = CacheLedger(2 * CACHE_TOKENS * self.server.blocks)

    async def stop(self) -> None:
        """End the handlers, the engine and p2pd."""
        await self.streams.stop()
        if self.server.attachment is not None:
            await self.server.attachment.close()
        self.server.engine.stop()
        await self.p2pd.shutdown()
