"""A process's place at a running p2pd: unary handlers and calls over one connection, streams through its own socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from petals_agent.errors import DaemonError
from petals_agent.p2p.streams import StreamServer

from hivemind.p2p import P2P  # isort: skip
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID  # isort: skip
from hivemind.utils.multiaddr import Multiaddr  # isort: skip

log = logging.getLogger("petals_agent.p2p")

UnaryHandler = Callable[[bytes, str], Awaitable[bytes]]  # (request body, caller's peer id) → answer body


class Attachment:
    """Handlers of this process at one p2pd. When p2pd is replaced, make another one."""

    def __init__(self, p2p: P2P, daemon: str) -> None:
        self._p2p, self.daemon = p2p, daemon

    @classmethod
    async def open(
        cls, daemon: str, unary: Mapping[str, UnaryHandler], streams: StreamServer, timeout: float = 10.0
    ) -> Attachment:
        """Connect to the p2pd at `daemon` and register everything.

        Raises DaemonError when it does not answer in `timeout` seconds or a name is taken by another process.
        """
        p2p: P2P | None = None
        try:
            async with asyncio.timeout(timeout):
                p2p = await P2P.replicate(Multiaddr(daemon))
                for name, handler in unary.items():
                    await p2p._client.add_unary_handler(name, _adapted(handler))
                await streams.attach(daemon)
        except Exception as error:
            if p2p is not None:
                with contextlib.suppress(
                    DaemonError
                ):  # what we got before the failure would refuse our next attempt
                    await streams.detach(daemon)
                await close(p2p)
            reason = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise DaemonError(f"p2pd did not take our handlers: {reason}") from error
        return cls(p2p, daemon)

    async def call(self, peer_id: str, name: str, body: bytes, timeout: float) -> bytes:
        """A unary call to another peer; raises TimeoutError or hivemind's errors."""
        async with asyncio.timeout(timeout):
            answer: bytes = await self._p2p._client.call_unary_handler(
                PeerID.from_base58(peer_id), name, body
            )
        return answer

    async def close(self) -> None:
        """Drop the connection; p2pd forgets unary handlers by itself."""
        await close(self._p2p)


async def close(p2p: P2P) -> None:
    """End hivemind's connection to p2pd and the tasks on it (its own close leaves them to the garbage collector)."""
    p2p._terminate()
    client = p2p._client.control
    tasks = [task for task in (client._read_task, client._write_task, p2p._listen_task) if task is not None]
    await asyncio.gather(*tasks, return_exceptions=True)


def _adapted(handler: UnaryHandler) -> Callable[[bytes, PeerID], Awaitable[bytes]]:
    async def call(body: bytes, remote: PeerID) -> bytes:
        return await handler(body, remote.to_base58())

    return call
