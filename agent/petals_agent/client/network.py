"""What a client has of the network: a p2pd, a DHT node, the current view, pings and bans; and calls to peers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from petals_agent.client import wire
from petals_agent.client.blame import Bans, PeerFailure, fault_of
from petals_agent.client.channel import Channel
from petals_agent.client.routing import fastest_route, uncovered, usable, widest_route
from petals_agent.errors import SwarmError
from petals_agent.p2p.daemon import Daemon, DaemonOptions
from petals_agent.swarm.guard import RecordGuard
from petals_agent.swarm.pings import PingBook, ping_all, sample
from petals_agent.swarm.uids import chain_uid, check_prefix
from petals_agent.swarm.view import Span, SwarmView, read_view

from hivemind.dht.node import DHTNode  # isort: skip
from hivemind.p2p import P2P, PeerID  # isort: skip
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError  # isort: skip
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.multiaddr import Multiaddr  # isort: skip

_BELIEVED_AFTER_FAILURE = 5.0  # age of a view (seconds)
_READ_AGAIN_AFTER = 1.0


@dataclass(frozen=True)
class ClientOptions:
    """Times in seconds, and how persistent a client is."""

    startup_timeout: float = 60.0
    update_period: float = 60.0
    connect_timeout: float = 10.0
    request_timeout: float = 180.0
    ping_timeout: float = 2.0
    max_pinged: int = 3
    max_retries: int = 8


class Network:
    """A client-mode member of one model's swarm. All methods belong to one event loop."""

    def __init__(
        self, initial_peers: Sequence[str], prefix: str, num_blocks: int, options: ClientOptions | None = None
    ) -> None:
        self.initial_peers = list(initial_peers)
        self.prefix = check_prefix(prefix)
        self.num_blocks = num_blocks
        self.options = options or ClientOptions()
        self.bans = Bans()
        self.pings = PingBook()
        self.rng = random.Random()
        self._daemon: Daemon | None = None
        self._p2p: P2P | None = None
        self._node: DHTNode | None = None
        self._view: SwarmView | None = None
        self._reading = asyncio.Lock()
        self._pinging: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start p2pd and join the DHT as a client; raises SwarmError when no initial peer answers."""
        try:
            self._daemon = await Daemon.start(
                DaemonOptions(
                    initial_peers=self.initial_peers,
                    listen=(),
                    client=True,
                    auto_nat=False,
                    nat_port_map=False,
                    startup_timeout=self.options.startup_timeout,
                )
            )
            self._p2p = await P2P.replicate(Multiaddr(self._daemon.maddr))
            async with asyncio.timeout(self.options.startup_timeout):
                self._node = await DHTNode.create(
                    p2p=self._p2p,
                    initial_peers=self.initial_peers,
                    client_mode=True,
                    num_workers=32,
                    record_validator=RecordGuard(),
                )
        except TimeoutError:
            await self.stop()
            raise SwarmError(
                f"the DHT could not be joined within {self.options.startup_timeout:g} s through "
                f"{self.initial_peers}; check these addresses"
            ) from None
        except Exception as error:
            await self.stop()
            raise SwarmError(f"cannot join the DHT through {self.initial_peers}: {error}") from error

    async def stop(self) -> None:
        """End p2pd; every open channel breaks."""
        node, p2p, daemon = self._node, self._p2p, self._daemon
        self._node = self._p2p = self._daemon = None
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.wait({self._pinging})
        if node is not None:
            async with asyncio.timeout(10):
                await node.shutdown()
            if node.cache_refresh_task is not None:
                node.cache_refresh_task.cancel()
        if p2p is not None:
            async with asyncio.timeout(10):
                await p2p.shutdown()
        if daemon is not None:
            await daemon.stop()

    # --- who serves what

    async def view(self, max_age: float) -> SwarmView:
        """The swarm as read from the DHT at most `max_age` seconds ago; reads it again if need be."""
        async with self._reading:
            if self._view is None or self._view.age(time.time()) > max_age:
                if self._node is None:
                    raise SwarmError(
                        "the client is not connected; call start() first, and nothing after stop()"
                    )
                first = self._view is None
                self._view = await read_view(self._node, self.prefix, self.num_blocks)
                if self._pinging is not None:
                    self._pinging.cancel()
                self._pinging = asyncio.create_task(self._ping(self._view), name="pings")
                if first:  # later the old values serve until there are new ones
                    await asyncio.wait({self._pinging})
            return self._view

    async def _ping(self, view: SwarmView) -> None:
        spans, limit = view.spans(), self.options.max_pinged
        groups = (
            [s.peer_id for s in spans if s.start == 0],
            [s.peer_id for s in spans if 0 < s.start and s.end < self.num_blocks],
            [s.peer_id for s in spans if s.end == self.num_blocks],
        )
        chosen = {peer for group in groups for peer in sample(group, limit, self.rng)}
        await ping_all(self._node, chosen, self.pings, self.options.ping_timeout)

    async def route(
        self,
        start: int,
        end: int,
        *,
        cache_tokens: int | None,
        avoid: Collection[str] = (),
        fresh: bool = False,
    ) -> list[Span]:
        """Servers for blocks [start, end): the fastest for decoding, or with `cache_tokens` None for forward/backward.

        Peers in `avoid` are used only where nobody else is; `fresh` (after a failure) reads the DHT again. Raises
        ClientError that names the blocks without a server.
        """
        avoid = {*avoid, *self.bans.banned()}
        view = await self.view(_BELIEVED_AFTER_FAILURE if fresh else self.options.update_period)
        if uncovered([span for span in view.spans() if span.peer_id not in avoid], start, end):
            view = await self.view(_READ_AGAIN_AFTER)  # somebody may have joined meanwhile
        spans = usable(view.spans(), start, end, avoid)
        rtts = self.pings.as_dict()
        if cache_tokens is None:
            return widest_route(spans, start, end, rtts, self.rng)
        return fastest_route(spans, start, end, rtts, cache_tokens)

    def uid(self, start: int, end: int) -> str:
        """The chain of blocks start … end-1."""
        return chain_uid(self.prefix, start, end)

    # --- calls to one peer; every failure is a PeerFailure

    @asynccontextmanager
    async def channel(self, peer_id: str, method: str) -> AsyncIterator[Channel]:
        """A stream that is closed at the end of the block."""
        channel = await self.open(peer_id, method)
        try:
            yield channel
        finally:
            channel.close()

    async def open(self, peer_id: str, method: str) -> Channel:
        """Open a stream; the caller closes it."""
        p2p, timeout = self._require_p2p(), self.options.connect_timeout
        try:
            async with asyncio.timeout(timeout):
                _, reader, writer = await p2p.call_binary_stream_handler(
                    PeerID.from_base58(peer_id), f"{wire.HANDLER}.{method}"
                )
        except TimeoutError:
            raise PeerFailure(peer_id, f"did not open a stream within {timeout:g} s") from None
        except (P2PDaemonError, ControlFailure, EOFError) as error:
            raise PeerFailure(peer_id, str(error), fault_of(str(error))) from error
        except OSError as error:
            raise SwarmError(f"our p2pd is gone ({error!r}); make a new client") from error
        return Channel(peer_id, reader, writer)

    async def call(
        self,
        peer_id: str,
        method: str,
        blocks: tuple[int, int],
        tensors: wire.Tensors,
        shapes: Sequence[tuple[int, ...]],
    ) -> list[torch.Tensor]:
        """`rpc_forward` or `rpc_backward` over blocks [start, end): the answer's tensors, of these shapes.

        Above 1 MiB of input the call is streamed.
        """
        metadata = {"points": 0.0, "active_adapter": None, "args_structure": wire.structure(len(tensors))}
        uid, timeout = self.uid(*blocks), self.options.request_timeout
        streamed = wire.raw_bytes(tensors) > wire.MAX_UNARY_BYTES
        calling = (
            self._call_stream(
                peer_id, method, wire.streamed_request(uid, tensors, metadata), wire.answer_limit(shapes)
            )
            if streamed
            else self._call_unary(peer_id, method, wire.request(uid, tensors, metadata))
        )
        try:
            async with asyncio.timeout(timeout):
                answer = await calling
            return wire.response(answer, shapes, like=tensors[0])
        except TimeoutError:
            raise PeerFailure(
                peer_id, f"{method} of blocks {blocks[0]}:{blocks[1]} took over {timeout:g} s"
            ) from None
        except ValueError as error:
            raise PeerFailure(peer_id, str(error)) from error

    async def _call_unary(
        self, peer_id: str, method: str, request: runtime_pb2.ExpertRequest
    ) -> list[runtime_pb2.ExpertResponse]:
        name, peer = f"{wire.HANDLER}.{method}", PeerID.from_base58(peer_id)
        try:
            return [
                await self._require_p2p().call_protobuf_handler(
                    peer, name, request, runtime_pb2.ExpertResponse
                )
            ]
        except (P2PHandlerError, P2PDaemonError, ControlFailure, EOFError, OSError) as error:
            raise PeerFailure(peer_id, str(error), fault_of(str(error))) from error

    async def _call_stream(
        self, peer_id: str, method: str, requests: list[runtime_pb2.ExpertRequest], limit: int
    ) -> list[runtime_pb2.ExpertResponse]:
        async with self.channel(peer_id, f"{method}_stream") as channel:
            sending = asyncio.create_task(channel.send(requests, end=True))
            try:
                responses = []
                while (response := await channel.receive(limit)) is not None:
                    limit -= response.ByteSize()
                    responses.append(response)
                return responses
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    def _require_p2p(self) -> P2P:
        if self._p2p is None:
            raise SwarmError("the client is not connected; call start() first, and nothing after stop()")
        return self._p2p
