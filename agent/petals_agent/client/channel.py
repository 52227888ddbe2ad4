"""The client's end of one libp2p stream: messages out, messages in, errors as exceptions (protocol.md §2.2, §2.3)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

from petals_agent.client.blame import PeerFailure, fault_of
from petals_agent.p2p import light

light.install(without_torch=False)

from hivemind.proto import p2pd_pb2, runtime_pb2  # noqa: E402

_HEADER = struct.Struct(">BQ")
_MESSAGE, _ERROR = 0, 1
_END = _HEADER.pack(_ERROR, 0)
_ERROR_LIMIT = 64 * 1024


class Channel:
    """An open stream to a peer. Its owner bounds every wait and calls `close`."""

    def __init__(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer_id = peer_id
        self._reader = reader
        self._writer = writer

    async def send(self, messages: Sequence[runtime_pb2.ExpertRequest], *, end: bool = False) -> None:
        """Write messages, and with `end` the marker that no more will come."""
        try:
            for message in messages:
                body = message.SerializeToString()
                self._writer.writelines((_HEADER.pack(_MESSAGE, len(body)), body))
                await self._writer.drain()
            if end:
                self._writer.write(_END)
                await self._writer.drain()
        except OSError as error:
            raise PeerFailure(self.peer_id, f"the stream is closed ({error!r})") from error

    async def receive(self, limit: int) -> runtime_pb2.ExpertResponse | None:
        """The next answer, None when the peer has closed; PeerFailure if it sends an error or over `limit` bytes."""
        try:
            marker, size = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            if size > (limit if marker == _MESSAGE else _ERROR_LIMIT):
                raise PeerFailure(
                    self.peer_id, f"announced a message of {size} bytes; at most {limit} make sense"
                )
            body = await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise PeerFailure(self.peer_id, "closed the stream in the middle of a message") from error
        except OSError as error:
            raise PeerFailure(self.peer_id, f"the stream broke ({error!r})") from error
        try:
            if marker == _MESSAGE:
                return runtime_pb2.ExpertResponse.FromString(body)
            text = str(p2pd_pb2.RPCError.FromString(body).message)
        except Exception as error:
            raise PeerFailure(self.peer_id, f"answered bytes that are no message ({error})") from error
        raise PeerFailure(
            self.peer_id, text or "an error without a text (probably a timeout)", fault_of(text)
        )

    def close(self) -> None:
        """Drop the stream; the peer sees it closed."""
        self._writer.close()
