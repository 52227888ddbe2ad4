"""A process's handlers at p2pd: called from elsewhere, moved to the next p2pd, and free to be taken again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from petals_agent.errors import DaemonError
from petals_agent.p2p import control
from petals_agent.p2p.attachment import Attachment
from petals_agent.p2p.daemon import Daemon
from petals_agent.p2p.streams import Stream, StreamServer

from .conftest import StartDaemon


async def shout(body: bytes, remote: str) -> bytes:
    return body.upper() + remote.encode()


async def echo(stream: Stream) -> None:
    while (body := await stream.receive()) is not None:
        await stream.send(body)


UNARY = {"Test.shout": shout}


@pytest.fixture
async def streams(tmp_path: Path) -> AsyncIterator[StreamServer]:
    server = StreamServer({"Test.echo": echo, "Test.again": echo}, 1000, tmp_path)
    await server.start()
    yield server
    await server.stop()


async def caller_of(start: StartDaemon, daemon: Daemon, server: StreamServer) -> Attachment:
    """Another process's place, at a p2pd that knows the first."""
    other = await start(initial_peers=await daemon.visible_maddrs())
    return await Attachment.open(other.maddr, {}, StreamServer({}, 1000, Path(server.path).parent))


async def error_of(call: Awaitable[bytes]) -> str:
    try:
        await call
    except Exception as error:
        return str(error)
    return ""


async def test_call(start: StartDaemon, streams: StreamServer) -> None:
    daemon = await start()
    attachment = await Attachment.open(daemon.maddr, UNARY, streams)
    caller = await caller_of(start, daemon, streams)
    answer = await caller.call(daemon.peer_id, "Test.shout", b"hi", 10.0)
    assert answer.startswith(b"HI") and answer[2:].decode() != daemon.peer_id
    await attachment.close()
    async with asyncio.timeout(10):
        while "not supported" not in await error_of(caller.call(daemon.peer_id, "Test.shout", b"hi", 5.0)):
            pass  # p2pd is still noticing
    await caller.close()


async def test_next_p2pd(start: StartDaemon, streams: StreamServer) -> None:
    for _ in range(2):
        daemon = await start()
        attachment = await Attachment.open(daemon.maddr, UNARY, streams)
        caller = await caller_of(start, daemon, streams)
        assert (await caller.call(daemon.peer_id, "Test.shout", b"hi", 10.0)).startswith(b"HI")
        daemon.process.kill()
        await daemon.process.wait()
        for place in (attachment, caller):
            await asyncio.wait_for(place.close(), 5)


async def test_failed_attempt_leaves_no_name_behind(
    start: StartDaemon, streams: StreamServer, tmp_path: Path
) -> None:
    daemon = await start()
    squatter = str(tmp_path / "squatter.sock")
    await control.add_stream_handlers(daemon.maddr, squatter, ["Test.again"])
    for _ in range(2):
        with pytest.raises(DaemonError, match="already set"):
            await Attachment.open(daemon.maddr, UNARY, streams)
    await control.remove_stream_handlers(daemon.maddr, squatter, ["Test.again"])
    attachment = await Attachment.open(daemon.maddr, UNARY, streams)
    await attachment.close()


async def test_no_p2pd(streams: StreamServer, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="did not take our handlers"):
        await Attachment.open(f"/unix{tmp_path}/none.sock", UNARY, streams)
