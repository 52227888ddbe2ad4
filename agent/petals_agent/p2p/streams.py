"""Server side of libp2p streams: p2pd connects to our unix socket once per stream, we frame and bound what comes.

hivemind spends several tasks and queues on each message; a decode step is 1 KiB, so that would cost as much as the
model. Here a stream is one asyncio protocol object, and reading a message is a buffer slice.

Wire (protocol.md §2.2): first a varint-delimited p2pd StreamInfo, then messages of 1 marker byte (0 message, 1 error
or end), 8 bytes big-endian length, body.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import cast

from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.p2p import control
from petals_agent.p2p.budget import FREE_BYTES, ByteBudget

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # isort: skip
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID  # isort: skip
from hivemind.proto import p2pd_pb2  # isort: skip

log = logging.getLogger("petals_agent.streams")

_HEADER = struct.Struct(">BQ")
_MESSAGE, _ERROR = 0, 1
_PENDING_MESSAGES = 8  # unread messages per stream before we stop reading from p2pd
_STREAM_INFO_LIMIT = 4096

Handler = Callable[["Stream"], Awaitable[None]]


class Stream(asyncio.Protocol):
    """One incoming stream. `receive` gives request bodies, `send` writes responses, `gone` fires when the caller left."""

    def __init__(self, server: StreamServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._pending: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._ended = False  # the caller sent its end marker
        self._finished = False  # we have said our last word
        self._charged = 0  # bytes taken from the budget
        self._unanswered = 0  # bytes of messages that the handler has received or will
        self._last_call: asyncio.TimerHandle | None = None
        self.paused = False
        self._task: asyncio.Task[None] | None = None
        self.name = ""
        self.remote_id = ""
        self.gone = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._server.streams.add(self)

    def data_received(self, data: bytes) -> None:
        if self._finished:
            return
        self._buffer += data
        if self._task is None and not self._start():
            return
        self._split_messages()
        try:
            self._charge()
        except LimitExceeded as error:
            self.fail(str(error))
            if self._task is not None:
                self._task.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = self._finished = True
        self._server.streams.discard(self)
        self._forget()
        self._wake()
        if self._last_call is not None:
            self._last_call.cancel()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # --- what handlers use

    async def receive(self) -> bytes | None:
        """The next request body; None when the caller has ended its side or is gone. Bound it by asyncio.timeout.

        It counts against the budget until the handler ends, or calls `answered`.
        """
        while not self._pending:
            if self._ended or self.gone:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        body = self._pending.popleft()
        if self.paused and len(self._pending) < _PENDING_MESSAGES // 2 and self._transport is not None:
            self.paused = False
            self._transport.resume_reading()
            self._split_messages()
        return body

    def answered(self) -> None:
        """All that was received so far is done with."""
        self._unanswered = sum(map(len, self._pending))
        self._charge()

    @property
    def ready(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(self._pending) or self._ended or self.gone

    def inject(self, body: bytes) -> None:
        """Queue a request that came another way (a push); dropped when too many wait already."""
        if self._finished or len(self._pending) >= _PENDING_MESSAGES:
            return
        self._unanswered += len(body)
        try:
            self._charge()
        except LimitExceeded:
            self._unanswered -= len(body)
        else:
            self._pending.append(body)
            self._wake()

    async def send(self, body: bytes) -> None:
        """Write one response; waits while the caller reads slower than we write, and drops it when it does not read at all."""
        if self._finished or self._transport is None:
            return
        header = _HEADER.pack(_MESSAGE, len(body))
        if len(body) < 65536:
            self._transport.write(header + body)
        else:
            self._transport.writelines((header, body))
        if self._writable is not None:
            try:
                async with asyncio.timeout(self._server.send_timeout):
                    await self._writable
            except TimeoutError:
                self.abort()
                raise ConnectionError(
                    f"the caller did not read for {self._server.send_timeout:g} s"
                ) from None

    def fail(self, message: str) -> None:
        """Write the error marker with `message` and end."""
        if not self._finished and self._transport is not None:
            body = p2pd_pb2.RPCError(message=message).SerializeToString()
            self._transport.write(_HEADER.pack(_ERROR, len(body)) + body)
            self.finish()

    def finish(self) -> None:
        """End our side. What still comes is read and dropped: p2pd would lose our last words if it could not write to us."""
        if self._finished or self._transport is None:
            return
        self._finished = self._ended = True
        self._forget()
        self._wake()
        if self.paused:
            self._transport.resume_reading()
        self._transport.write_eof()
        self._last_call = asyncio.get_running_loop().call_later(self._server.linger, self.abort)

    def abort(self) -> None:
        """Drop the connection; the handler's task is cancelled."""
        if self._transport is not None:
            self._transport.abort()

    # --- framing

    def _start(self) -> bool:
        """Parse the StreamInfo and start the handler; False while it is incomplete or when the stream is refused."""
        server = self._server
        size = shift = used = 0
        for byte in self._buffer[:5]:
            size |= (byte & 0x7F) << shift
            used, shift = used + 1, shift + 7
            if byte < 0x80:
                break
        else:
            if len(self._buffer) >= 5:
                self.abort()
            return False
        if size > _STREAM_INFO_LIMIT:
            self.abort()
            return False
        if len(self._buffer) < used + size:
            return False
        try:
            info = p2pd_pb2.StreamInfo.FromString(bytes(self._buffer[used : used + size]))
            handler = server.handlers[info.proto]
        except (DecodeError, KeyError):
            self.abort()
            return False
        del self._buffer[: used + size]
        if len(server.streams) > server.max_streams:
            self.fail(
                f"this server has {server.max_streams} open streams, which is its limit; try another one"
            )
            return False
        self.name = info.proto
        self.remote_id = PeerID(info.peer).to_base58()
        self._task = asyncio.get_running_loop().create_task(self._handle(handler), name=info.proto)
        return True

    async def _handle(self, handler: Handler) -> None:
        try:
            await handler(self)
        except Exception as error:
            expected = isinstance(
                error, (RequestError, ConnectionError)
            )  # else it is our mistake, not the caller's
            level = logging.DEBUG if expected else logging.ERROR
            log.log(
                level, "%s from …%s failed: %s", self.name, self.remote_id[-6:], error, exc_info=not expected
            )
            self.fail(str(error) or repr(error))
        finally:
            self.finish()

    def _split_messages(self) -> None:
        buffer, offset = self._buffer, 0
        limit = self._server.message_limit
        while not self._ended and len(buffer) - offset >= _HEADER.size:
            marker, size = _HEADER.unpack_from(buffer, offset)
            if size > limit:
                self.fail(f"a message of {size} bytes was announced; the limit here is {limit} bytes")
                return
            if marker > _ERROR:
                self.fail(f"a message with marker {marker} came; 0 and 1 are known")
                return
            if len(self._pending) >= _PENDING_MESSAGES:
                if not self.paused and self._transport is not None:
                    self.paused = True
                    self._transport.pause_reading()
                break
            end = offset + _HEADER.size + size
            if len(buffer) < end:
                break
            if marker == _MESSAGE:
                self._pending.append(bytes(memoryview(buffer)[offset + _HEADER.size : end]))
                self._unanswered += size
            else:
                self._ended = True
            offset = end
        if self._ended:
            buffer.clear()
        elif offset:
            del buffer[:offset]
        if self._pending or self._ended:
            self._wake()

    def _charge(self) -> None:
        """Count what this stream holds against the budget of all; raises LimitExceeded when that is too much."""
        size = max(len(self._buffer) + self._unanswered - FREE_BYTES, 0)
        if size > self._charged:
            self._server.budget.take(self.remote_id, size - self._charged)
        elif size < self._charged:
            self._server.budget.give_back(self.remote_id, self._charged - size)
        self._charged = size

    def _forget(self) -> None:
        """Drop what was received."""
        self._buffer.clear()
        self._pending.clear()
        self._server.budget.give_back(self.remote_id, self._charged)
        self._charged = self._unanswered = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class StreamServer:
    """Accepts streams for a set of protocol names through one p2pd; `path` is what the agent must clean up after us."""

    max_streams = 4096
    send_timeout = 60.0  # seconds for a caller to read what we send
    linger = 5.0  # seconds for a caller to close after our last word

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        message_limit: int,
        socket_dir: Path,
        budget: ByteBudget | None = None,
    ) -> None:
        """`message_limit` bytes for one message, `budget` for all that wait for an answer."""
        self.handlers = dict(handlers)
        self.message_limit = message_limit
        self.budget = ByteBudget(max(2**28, 4 * message_limit)) if budget is None else budget
        self.path = str(socket_dir / f"p2pclient-{secrets.token_hex(4)}.sock")
        self.streams: set[Stream] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen on `path`; nothing comes before `attach`."""
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: Stream(self), self.path)

    async def attach(self, daemon: str) -> None:
        """Register all names with the p2pd at `daemon`; raises DaemonError, e.g. when another process has them."""
        await control.add_stream_handlers(daemon, self.path, list(self.handlers))

    async def detach(self, daemon: str) -> None:
        """Take the names back; open streams go on."""
        await control.remove_stream_handlers(daemon, self.path, list(self.handlers))

    async def stop(self) -> None:
        """Drop all streams and stop listening."""
        if self._server is not None:
            self._server.close()
        tasks = [stream._task for stream in self.streams if stream._task is not None]
        for stream in list(self.streams):
            stream.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        if os.path.exists(self.path):
            os.unlink(self.path)
