"""The stream server of p2p/streams.py as p2pd sees it: frames whole and torn, floods, slow readers, errors that must arrive."""

from __future__ import annotations

import asyncio
import gc
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.waiting import until
from petals_agent.p2p.budget import ByteBudget
from petals_agent.p2p.control import varint
from petals_agent.p2p.streams import Handler, Stream, StreamServer

from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID  # isort: skip
from hivemind.proto import p2pd_pb2  # isort: skip

LIMIT = 200_000
PEER = PeerID.from_base58("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
Serve = Callable[..., Awaitable[StreamServer]]


def frame(body: bytes, marker: int = 0) -> bytes:
    return struct.pack(">BQ", marker, len(body)) + body


END = frame(b"", 1)


async def echo(stream: Stream) -> None:
    while (body := await stream.receive()) is not None:
        await stream.send(body)
        stream.answered()


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Start a server with one handler, "Test.it"."""
    servers: list[StreamServer] = []

    async def start(handler: Handler = echo, *, budget: int = 10 * LIMIT, **options: float) -> StreamServer:
        server = StreamServer({"Test.it": handler}, LIMIT, tmp_path, ByteBudget(budget))
        for name, value in options.items():
            setattr(server, name, value)
        await server.start()
        servers.append(server)
        return server

    accidents: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: accidents.append(context))
    yield start
    for server in servers:
        await server.stop()
    gc.collect()  # tasks whose exceptions nobody has seen
    assert not accidents


class Peer:
    """p2pd's end of one stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, server: StreamServer, peer: PeerID = PEER, name: str = "Test.it") -> Peer:
        one = cls(*await asyncio.open_unix_connection(server.path))
        info = p2pd_pb2.StreamInfo(peer=peer.to_bytes(), addr=b"", proto=name).SerializeToString()
        one.writer.write(varint(len(info)) + info)
        return one

    async def receive(self) -> tuple[int, bytes]:
        async with asyncio.timeout(10):
            marker, size = struct.unpack(">BQ", await self.reader.readexactly(9))
            return marker, await self.reader.readexactly(size)

    async def error(self) -> str:
        """The text of the error that comes next."""
        marker, body = await self.receive()
        assert marker == 1, body[:100]
        return str(p2pd_pb2.RPCError.FromString(body).message)

    async def closed(self) -> bool:
        """Whether the server ends without another byte; then we close too."""
        async with asyncio.timeout(10):
            rest = await self.reader.read()
        self.writer.close()
        return rest == b""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=st.lists(st.binary(max_size=300), max_size=20), seed=st.integers())
async def test_messages_come_through_however_they_are_cut(
    serve: Serve, bodies: list[bytes], seed: int
) -> None:
    rng = random.Random(seed)
    peer = await Peer.open(await serve())
    data = b"".join(frame(body) for body in bodies) + END
    while data:
        size = rng.choice([1, 2, 9, 50, 5000])
        peer.writer.write(data[:size])
        data = data[size:]
        await asyncio.sleep(0)
    for body in bodies:
        assert await peer.receive() == (0, body)
    assert await peer.closed()


async def test_a_large_message(serve: Serve) -> None:
    peer = await Peer.open(await serve())
    body = random.Random(0).randbytes(LIMIT)
    peer.writer.write(frame(body) + END)
    assert await peer.receive() == (0, body)
    assert await peer.closed()


@pytest.mark.parametrize("size", [LIMIT + 1, 10 * 2**30, 2**64 - 1])
async def test_a_claim_beyond_the_limit_is_refused_before_it_comes(serve: Serve, size: int) -> None:
    server = await serve()
    peer = await Peer.open(server)
    peer.writer.write(struct.pack(">BQ", 0, size) + b"x" * 1000)
    assert await peer.error() == f"a message of {size} bytes was announced; the limit here is {LIMIT} bytes"
    assert await peer.closed()
    await until(lambda: not server.streams, 5, "the stream is forgotten")


async def test_an_error_arrives_while_the_peer_still_sends(serve: Serve) -> None:
    """p2pd writes what its peer sent into our socket; were that closed, it would reset the stream and lose the error."""

    async def refuse(stream: Stream) -> None:
        raise ValueError("not you")

    server = await serve(refuse)
    for _ in range(20):
        peer = await Peer.open(server)
        for _ in range(50):
            peer.writer.write(frame(b"x" * 1000))
            await asyncio.sleep(0)
            assert not peer.writer.transport.is_closing()
        assert await peer.error() == "not you"
        assert await peer.closed()
    await until(lambda: not server.streams, 5, "all streams are forgotten")


async def test_a_peer_that_goes_on_sending_after_an_error_is_cut_off(serve: Serve) -> None:
    async def refuse(stream: Stream) -> None:
        raise ValueError("not you")

    server = await serve(refuse, linger=0.1)
    peer = await Peer.open(server)
    assert await peer.error() == "not you"
    await until(lambda: not server.streams, 5, "the stream is dropped")


async def test_an_error_without_a_text_has_one(serve: Serve) -> None:
    async def fail(stream: Stream) -> None:
        raise TimeoutError

    peer = await Peer.open(await serve(fail))
    assert await peer.error() == "TimeoutError()"


async def test_what_comes_after_the_end_is_dropped(serve: Serve) -> None:
    peer = await Peer.open(await serve())
    peer.writer.write(frame(b"one") + END + frame(b"two"))
    assert await peer.receive() == (0, b"one")
    assert await peer.closed()


async def test_an_unknown_marker_is_refused(serve: Serve) -> None:
    peer = await Peer.open(await serve())
    peer.writer.write(frame(b"one", marker=7))
    assert "marker 7" in await peer.error()


async def test_reading_stops_when_the_handler_does_not_take(serve: Serve) -> None:
    """8 messages wait, the rest stays in the sockets until they are taken; then all arrive."""
    take = asyncio.Event()
    taken: list[bytes] = []

    async def slow(stream: Stream) -> None:
        await take.wait()
        while (body := await stream.receive()) is not None:
            taken.append(body)
            stream.answered()
        await stream.send(b"done")

    server = await serve(slow)
    peer = await Peer.open(server)
    bodies = [bytes([number]) * 50_000 for number in range(100)]

    async def write() -> None:
        for body in bodies:
            peer.writer.write(frame(body))
            await peer.writer.drain()
        peer.writer.write(END)

    writing = asyncio.create_task(write())
    await until(lambda: any(stream.paused for stream in server.streams), 5, "reading has stopped")
    assert server.budget.used < 20 * 50_000
    take.set()
    await writing
    assert await peer.receive() == (0, b"done")
    assert taken == bodies


async def test_a_caller_that_leaves_cancels_its_handler(serve: Serve) -> None:
    cancelled = asyncio.Event()

    async def wait(stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    server = await serve(wait)
    peer = await Peer.open(server)
    peer.writer.write(frame(b"x" * 100_000))
    await until(lambda: server.budget.used > 0, 5, "the message is here")
    peer.writer.transport.abort()
    async with asyncio.timeout(5):
        await cancelled.wait()
    assert not server.streams and server.budget.used == 0


async def test_a_caller_that_does_not_read_is_dropped(serve: Serve) -> None:
    ended = asyncio.Event()

    async def shout(stream: Stream) -> None:
        try:
            while True:
                await stream.send(b"x" * 100_000)
        finally:
            ended.set()

    server = await serve(shout, send_timeout=0.1)
    peer = await Peer.open(server)
    async with asyncio.timeout(10):
        await ended.wait()
    await until(lambda: not server.streams, 5, "the stream is dropped")
    peer.writer.close()


async def test_memory_for_requests_is_limited(serve: Serve) -> None:
    """Small messages are always taken; of large ones, one peer may hold half, and all peers the whole budget."""
    server = await serve(budget=4 * LIMIT)
    peers = [PeerID.from_base58(f"QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5{end}") for end in "NPQR"]
    streams = []

    async def hold(peer: PeerID) -> Peer:
        """Send all but the last byte of a message."""
        streams.append(await Peer.open(server, peer))
        streams[-1].writer.write(frame(b"x" * LIMIT)[:-1])
        return streams[-1]

    def holds(count: int) -> bool:
        return server.budget.used == count * (9 + LIMIT - 1 - 2**16)

    for number, peer in enumerate(peers[:2]):
        for _ in range(2):
            await hold(peer)
        assert f"exceed {2 * LIMIT} bytes, the limit for one peer" in await (await hold(peer)).error()
        await until(lambda number=number: holds(2 * number + 2), 5, "two of three are held")
    await hold(peers[2])
    assert f"exceed {4 * LIMIT} bytes, the limit for all peers" in await (await hold(peers[2])).error()
    good = await Peer.open(server, peers[3])
    good.writer.write(frame(b"x" * 60_000) + END)
    assert await good.receive() == (0, b"x" * 60_000)
    for stream in streams:
        stream.writer.close()
    await until(lambda: server.budget.used == 0, 5, "everything is given back")


async def test_the_number_of_streams_is_limited(serve: Serve) -> None:
    server = await serve(max_streams=3)
    peers = [await Peer.open(server) for _ in range(3)]
    await until(lambda: len(server.streams) == 3, 5, "they are here")
    assert "3 open streams, which is its limit" in await (await Peer.open(server)).error()
    peers[0].writer.write(frame(b"hi"))
    assert await peers[0].receive() == (0, b"hi")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
async def test_any_bytes(serve: Serve, data: bytes) -> None:
    server = await serve()
    reader, writer = await asyncio.open_unix_connection(server.path)
    writer.write(data)
    writer.close()
    async with asyncio.timeout(10):
        await reader.read()
    await until(lambda: not server.streams, 5, "the stream is forgotten")
    assert server.budget.used == 0
    await server.stop()


async def test_what_comes_another_way_waits_with_the_rest(serve: Serve) -> None:
    """Up to 8, and as far as the budget goes; more are dropped."""
    server = await serve(budget=20 * LIMIT)
    peer = await Peer.open(server)
    await until(lambda: server.streams, 5, "the stream is here")
    (stream,) = server.streams
    await until(lambda: stream.name, 5, "its handler runs")
    for number in range(12):
        stream.inject(bytes([number]))
    peer.writer.write(END)
    assert [await peer.receive() for _ in range(8)] == [(0, bytes([number])) for number in range(8)]
    assert await peer.closed()


async def test_what_comes_another_way_counts(serve: Serve) -> None:
    async def never(stream: Stream) -> None:
        await asyncio.Event().wait()

    server = await serve(never, budget=8 * LIMIT)
    peer = await Peer.open(server)
    await until(lambda: any(stream.name for stream in server.streams), 5, "its handler runs")
    (stream,) = server.streams
    for _ in range(8):
        stream.inject(b"x" * LIMIT)
    assert 3 * LIMIT < server.budget.used <= 4 * LIMIT
    peer.writer.close()
    await until(lambda: server.budget.used == 0, 5, "everything is given back")
