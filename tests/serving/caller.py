"""A peer that calls servers through hivemind's own p2p client, which shares no code with ours."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, AsyncIterator  # noqa: UP035  hivemind knows only this one

import torch

from petals_agent.p2p import light

light.install(without_torch=False)

import hivemind.compression.base as compression_base  # noqa: E402
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor  # noqa: E402
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError as P2PHandlerError  # noqa: E402
from hivemind.proto import runtime_pb2  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

compression_base.USE_LEGACY_BFLOAT16 = False  # as Petals does

Request, Response = runtime_pb2.ExpertRequest, runtime_pb2.ExpertResponse
PREFIX = "tiny"
NO_PROMPTS, NO_IDS = torch.empty(0), torch.empty(0, dtype=torch.int64)
PART = 4 * 2**20


class TransformerConnectionHandler(ServicerBase):
    """The signatures from which hivemind makes a stub."""

    async def rpc_info(
        self, request: runtime_pb2.ExpertUID, context: P2PContext
    ) -> runtime_pb2.ExpertInfo: ...
    async def rpc_forward(self, request: Request, context: P2PContext) -> Response: ...
    async def rpc_backward(self, request: Request, context: P2PContext) -> Response: ...
    async def rpc_push(self, request: Request, context: P2PContext) -> Response: ...
    async def rpc_forward_stream(
        self, request: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]: ...
    async def rpc_backward_stream(
        self, request: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]: ...
    async def rpc_inference(
        self, request: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]: ...


def uid(start: int, end: int) -> str:
    """The chain of blocks [start, end)."""
    return " ".join(f"{PREFIX}.{block}" for block in range(start, end))


def request(chain: str, tensors: Sequence[torch.Tensor | Any], **metadata: Any) -> Any:
    """One request; tensors may be messages already."""
    packed = [serialize_torch_tensor(t) if isinstance(t, torch.Tensor) else t for t in tensors]
    return Request(uid=chain, tensors=packed, metadata=MSGPackSerializer.dumps(metadata) if metadata else b"")


def split(whole: Any) -> list[Any]:
    """The messages of a streamed call: one part of a tensor in each, uid and metadata in all."""
    messages = []
    for tensor in whole.tensors:
        buffer = tensor.buffer
        first = runtime_pb2.Tensor()
        first.CopyFrom(tensor)
        first.buffer, first.chunks = buffer[:PART], -(-len(buffer) // PART)
        parts = [
            first,
            *(runtime_pb2.Tensor(buffer=buffer[i : i + PART]) for i in range(PART, len(buffer), PART)),
        ]
        messages += [Request(uid=whole.uid, metadata=whole.metadata, tensors=[part]) for part in parts]
    return messages


class Session:
    """One rpc_inference stream."""

    def __init__(self, stub: Any, chain: str) -> None:
        self.chain = chain
        self.session_id = str(uuid.uuid4())
        self._stub = stub
        self._out: asyncio.Queue[Any] = asyncio.Queue()
        self._answers: AsyncIterator[Any] | None = None

    async def send(self, message: Any) -> None:
        """Put a request on the stream; None ends our side."""
        if self._answers is None:
            self._answers = aiter(await self._stub.rpc_inference(self._feed()))
        self._out.put_nowait(message)

    async def receive(self, timeout: float = 20.0) -> torch.Tensor:
        """The next answer's tensor; P2PHandlerError for the server's error.

        StopAsyncIteration when both sides have ended: hivemind does not notice before that the server has closed.
        """
        assert self._answers is not None
        async with asyncio.timeout(timeout):
            answer = await anext(self._answers)
        (tensor,) = answer.tensors
        return deserialize_torch_tensor(tensor)

    def step_request(
        self,
        hidden: torch.Tensor | Any,
        prompts: torch.Tensor | Any = NO_PROMPTS,
        hypo_ids: torch.Tensor | Any = NO_IDS,
        **metadata: Any,
    ) -> Any:
        """A step's request with new ids, unless `metadata` says otherwise."""
        ids = {"session_id": self.session_id, "step_id": str(uuid.uuid4())}
        return request(self.chain, (hidden, prompts, hypo_ids), **(ids | metadata))

    async def step(self, hidden: Any, *tensors: Any, **metadata: Any) -> torch.Tensor:
        """Send one step and wait for its answer."""
        await self.send(self.step_request(hidden, *tensors, **metadata))
        return await self.receive()

    async def close(self) -> None:
        """As Petals does: an empty request, then wait until the server has closed."""
        await self.send(Request())
        await self.send(None)
        assert self._answers is not None
        async with asyncio.timeout(10):
            assert [answer async for answer in self._answers] == []

    async def vanish(self) -> None:
        """Reset the stream without a word."""
        if self._answers is not None:
            # a generator that nobody has read from closes nothing
            reading = asyncio.ensure_future(anext(self._answers))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._answers = None

    async def _feed(self) -> AsyncIterator[Any]:
        while (message := await self._out.get()) is not None:
            yield message


class Caller:
    """A p2pd in client mode, and stubs of the servers it was started with."""

    def __init__(self, p2p: P2P) -> None:
        self.p2p = p2p
        self._sessions: list[Session] = []

    @classmethod
    async def start(cls, maddrs: Sequence[str]) -> Caller:
        return cls(
            await P2P.create(
                initial_peers=maddrs,
                dht_mode="client",
                use_relay=False,
                auto_nat=False,
                nat_port_map=False,
                no_listen=True,
            )
        )

    def stub(self, peer_id: str) -> Any:
        return TransformerConnectionHandler.get_stub(self.p2p, PeerID.from_base58(peer_id))

    def session(self, peer_id: str, start: int, end: int) -> Session:
        """A new session, not opened yet."""
        self._sessions.append(Session(self.stub(peer_id), uid(start, end)))
        return self._sessions[-1]

    async def vanish(self) -> None:
        """Reset every stream that is still open."""
        sessions, self._sessions = self._sessions, []
        await asyncio.gather(*(session.vanish() for session in sessions))

    async def call(
        self, peer_id: str, method: str, message: Any, streamed: bool = False
    ) -> list[torch.Tensor]:
        """A forward or backward; the tensors of the answer."""
        stub = self.stub(peer_id)
        async with asyncio.timeout(60):
            if not streamed:
                answer = await getattr(stub, method)(message)
                return [deserialize_torch_tensor(tensor) for tensor in answer.tensors]

            async def feed() -> AsyncIterator[Any]:
                for part in split(message):
                    yield part

            parts = [part async for part in await getattr(stub, f"{method}_stream")(feed())]
        return joined(parts)

    async def stop(self) -> None:
        await self.p2p.shutdown()


def joined(parts: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors of a streamed answer; a part with a dtype begins a new one."""
    tensors: list[Any] = []
    for (part,) in (answer.tensors for answer in parts):
        if part.dtype:
            tensors.append(part)
        else:
            tensors[-1].buffer += part.buffer
    return [deserialize_torch_tensor(tensor) for tensor in tensors]
