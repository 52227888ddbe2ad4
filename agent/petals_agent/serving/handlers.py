"""The seven protocol names of a Petals server, bound to a BlockServer (protocol.md §2.1)."""

from __future__ import annotations

from collections.abc import Mapping

from petals_agent.p2p.attachment import UnaryHandler
from petals_agent.p2p.streams import Handler, Stream
from petals_agent.serving import calls
from petals_agent.serving.inference import serve_session
from petals_agent.serving.push import take_push
from petals_agent.serving.server import BlockServer
from petals_agent.serving.wire import parse

from hivemind.proto import runtime_pb2  # isort: skip

_SERVICE = "TransformerConnectionHandler"


def unary_handlers(server: BlockServer) -> Mapping[str, UnaryHandler]:
    """Requests in one message."""

    async def rpc_info(body: bytes, caller: str) -> bytes:
        return calls.info(server, parse(runtime_pb2.ExpertUID, body).uid)

    async def rpc_forward(body: bytes, caller: str) -> bytes:
        return await calls.unary(server, body, caller, backward=False)

    async def rpc_backward(body: bytes, caller: str) -> bytes:
        return await calls.unary(server, body, caller, backward=True)

    async def rpc_push(body: bytes, caller: str) -> bytes:
        return await take_push(server, body)

    handlers = (rpc_info, rpc_forward, rpc_backward, rpc_push)
    return {f"{_SERVICE}.{handler.__name__}": handler for handler in handlers}


def stream_handlers(server: BlockServer) -> Mapping[str, Handler]:
    """Requests as streams."""

    async def rpc_inference(stream: Stream) -> None:
        await serve_session(server, stream)

    async def rpc_forward_stream(stream: Stream) -> None:
        await calls.streamed(server, stream, backward=False)

    async def rpc_backward_stream(stream: Stream) -> None:
        await calls.streamed(server, stream, backward=True)

    handlers = (rpc_inference, rpc_forward_stream, rpc_backward_stream)
    return {f"{_SERVICE}.{handler.__name__}": handler for handler in handlers}
