"""Carries questions between members: one libp2p stream each, so that an answer is as fresh as its question.

Who asks and who answers is what libp2p has proved, never what a message says.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from petals_agent.errors import DaemonError, Refused, RequestError, SwarmError
from petals_agent.heartbeat.messages import (
    LIMIT,
    PROTOCOL,
    Answer,
    Request,
    encode,
    read_answer,
    read_request,
)
from petals_agent.p2p import light
from petals_agent.printable import printable

light.install(without_torch=True)

from petals_agent.p2p import control  # noqa: E402
from petals_agent.p2p.streams import Stream, StreamServer  # noqa: E402

from hivemind.proto import p2pd_pb2  # isort: skip  # noqa: E402

log = logging.getLogger("petals_agent.heartbeat")

_HEADER = struct.Struct(">BQ")
_REQUEST_S = 10.0  # for a question to arrive, once its stream is there
_AT_ONCE = 16
_STREAMS = 1024  # open ones of all; members need a few each
_OF_ONE = 64  # and of one peer: it alone cannot shut out the others
_CROWD = 256  # with so many open, strangers are turned away without a word, which would keep their streams for a while

Answering = Callable[[str, Request], Awaitable[Answer]]


@dataclass
class Traffic:
    """What went through, with its framing; libp2p's own share is not seen from here."""

    messages: int = 0
    total_bytes: int = 0

    def count(self, body: bytes) -> None:
        self.messages += 1
        self.total_bytes += _HEADER.size + len(body)


class Post:
    """`start`, then `attach` to a p2pd, and again whenever it was replaced; a question waits while there is none."""

    def __init__(self, answering: Answering, admits: Callable[[str], bool], socket_dir: Path) -> None:
        """`answering` what members ask; `admits` says by the peer id whose streams are taken at all."""
        self._answering, self._admits = answering, admits
        self._server = StreamServer({PROTOCOL: self._handle}, LIMIT, socket_dir)
        self._server.max_streams = _STREAMS
        self._daemon: str | None = None
        self._attached = asyncio.Event()
        self.sent = Traffic()

    async def start(self) -> None:
        await self._server.start()

    async def attach(self, daemon: str) -> None:
        """Answer and ask through the p2pd at multiaddress `daemon`. Raises DaemonError."""
        await self._server.attach(daemon)
        self._daemon = daemon
        self._attached.set()

    def detach(self) -> None:
        """That p2pd is no more."""
        self._daemon = None
        self._attached.clear()

    async def stop(self) -> None:
        await self._server.stop()

    async def ask(self, peer_id: str, request: Request, timeout: float) -> Answer:
        """Raises SwarmError when there is no answer within `timeout` s, or with the words of a refusal."""
        try:
            async with asyncio.timeout(timeout):
                while self._daemon is None:
                    await self._attached.wait()
                reader, writer = await control.open_stream(self._daemon, peer_id, PROTOCOL, timeout)
                try:
                    return await self._exchange(reader, writer, encode(request))
                finally:
                    writer.close()
        except TimeoutError:
            raise SwarmError(f"no answer within {timeout:g} s") from None
        except (OSError, EOFError) as error:
            raise SwarmError(f"it ended without an answer ({error!r:.100})") from error
        except RequestError as error:
            raise SwarmError(f"its answer is none: {error}") from error

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
    ) -> Answer:
        writer.write(_HEADER.pack(0, len(body)) + body)
        await writer.drain()
        self.sent.count(body)
        kind, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        if size > LIMIT:
            raise RequestError(f"it announces {size} bytes; the limit is {LIMIT}")
        answer = await reader.readexactly(size)
        if kind == 0:
            return read_answer(answer)
        try:
            words = p2pd_pb2.RPCError.FromString(answer).message
        except Exception:  # protobuf's, for what is no message of its
            words = "without words"
        raise SwarmError(f"it refuses: {printable(words) or 'without words':.300}")

    async def _handle(self, stream: Stream) -> None:
        admitted = self._admits(stream.remote_id)
        of_it = sum(one.remote_id == stream.remote_id for one in self._server.streams)
        if of_it > _OF_ONE or (not admitted and len(self._server.streams) > _CROWD):
            return stream.abort()
        if not admitted:
            raise Refused("you are not among the members of this fleet")
        try:
            async with asyncio.timeout(_REQUEST_S):
                body = await stream.receive()
        except TimeoutError:
            raise RequestError(f"no question came within {_REQUEST_S:g} s") from None
        if body is None:
            return
        answer = encode(await self._answering(stream.remote_id, read_request(body)))
        await stream.send(answer)
        self.sent.count(answer)

    async def greet(self, peers: tuple[str, ...], timeout: float) -> None:
        """Connect to all of them: after our p2pd was away they try no dial to us for a while, but take ours."""
        turn = asyncio.Semaphore(_AT_ONCE)

        async def connect(peer: str) -> None:
            async with turn:
                try:
                    if self._daemon is not None:
                        await control.connect(self._daemon, peer, timeout)
                except DaemonError as error:
                    log.debug("…%s cannot be dialled: %s", peer[-6:], error)

        await asyncio.gather(*map(connect, peers))
