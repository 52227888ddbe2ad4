"""Server-to-server pushes: taking them for our sessions, and sending our outputs on (protocol.md §4.6)."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from petals_agent.errors import RequestError
from petals_agent.p2p.streams import Stream
from petals_agent.serving.server import BlockServer
from petals_agent.serving.wire import NextServer, decode_metadata, encode_metadata, parse

from hivemind.proto import runtime_pb2  # isort: skip

log = logging.getLogger("petals_agent.push")

PUSH = "TransformerConnectionHandler.rpc_push"
_REMEMBERED_STEPS = 1024
_UNARY_LIMIT = 4 * 2**20 - 65536


class SeenSteps:
    """Step ids that were taken: the direct and the pushed copy of a step give one answer."""

    def __init__(self) -> None:
        self._order: deque[str] = deque()
        self._known: set[str] = set()

    def __contains__(self, step_id: str | None) -> bool:
        return step_id in self._known

    def add(self, step_id: str | None) -> None:
        """Remember an id for a while; steps without one are always new."""
        if step_id is None:
            return
        self._known.add(step_id)
        self._order.append(step_id)
        if len(self._order) > _REMEMBERED_STEPS:
            self._known.discard(self._order.popleft())


class Pushed(bytes):
    """A request that another server sent, beside the client's own copy."""


@dataclass(eq=False)
class PushTable:
    """Open sessions by the id that pushes name; and the pushes on their way out."""

    streams: dict[str, Stream] = field(default_factory=dict)
    outgoing: set[asyncio.Task[None]] = field(default_factory=set)

    def open(self, session_id: str, stream: Stream) -> None:
        """Raises RequestError when the id is in use."""
        if session_id in self.streams:
            raise RequestError(f"session id {session_id} is not unique on this server")
        self.streams[session_id] = stream

    def close(self, session_id: str, stream: Stream) -> None:
        if self.streams.get(session_id) is stream:
            del self.streams[session_id]


async def take_push(server: BlockServer, body: bytes) -> bytes:
    """rpc_push: hand the request to its session and answer at once; an unknown session is no error."""
    request = parse(runtime_pb2.ExpertRequest, body)
    server.chain(request.uid)
    metadata = decode_metadata(request.metadata, server.limits.max_metadata_bytes)
    session_id = metadata.get("session_id")
    if not isinstance(session_id, str):
        raise RequestError("rpc_push needs the session_id of the session that it is for")
    if not request.tensors:
        raise RequestError("a push came without tensors; only the client may end its session")
    stream = server.pushes.streams.get(session_id)
    if stream is not None:
        stream.inject(Pushed(body))
    return b""


def send_push(
    server: BlockServer,
    targets: list[NextServer],
    metadata: dict[str, Any],
    output: runtime_pb2.Tensor,
    others: list[runtime_pb2.Tensor],
) -> None:
    """Send a step's output to the next server in the background; if that fails the client's own copy still comes."""
    pushes, attachment = server.pushes, server.attachment
    if attachment is None or len(pushes.outgoing) >= server.limits.max_push_tasks:
        return
    target = targets[0]
    passed_on = dict(metadata)
    passed_on.pop("args_structure", None)  # the tensors below are in their plain order
    passed_on.update(
        session_id=target.session_id,
        next_servers=[(n.peer_id, n.session_id, n.start, n.end) for n in targets[1:]],
        pushed=True,
    )
    request = runtime_pb2.ExpertRequest(
        uid=" ".join(f"{server.prefix}.{block}" for block in range(target.start, target.end)),
        tensors=[output, *others],
        metadata=encode_metadata(passed_on),
    )
    if request.ByteSize() > _UNARY_LIMIT:
        return

    async def push() -> None:
        try:
            await attachment.call(
                target.peer_id, PUSH, request.SerializeToString(), server.limits.request_timeout
            )
        except Exception as error:
            log.debug("a push to …%s failed: %r", target.peer_id[-6:], error)

    task = asyncio.get_running_loop().create_task(push(), name="push")
    pushes.outgoing.add(task)
    task.add_done_callback(pushes.outgoing.discard)
