"""Requests to p2pd: what it says is read, what it does not say has a deadline, and what the dead left can be removed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from harness.processes import Processes
from petals_agent.errors import DaemonError
from petals_agent.p2p import control

from .conftest import StartDaemon


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02"), (2**28, b"\x80\x80\x80\x80\x01")],
)
def test_varint(value: int, bytes_: bytes) -> None:
    assert control.varint(value) == bytes_


HOLDER = """
import asyncio, json, sys
from petals_agent.p2p import light
light.install(without_torch=True)
from petals_agent.p2p import control

async def main():
    await control.add_stream_handlers(sys.argv[1], sys.argv[2], ["Test.stream"])
    print(json.dumps({"event": "registered"}), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_handlers_of_the_dead_can_be_removed(
    start: StartDaemon, processes: Processes, tmp_path: Path
) -> None:
    daemon = await start()
    holder = processes.start(
        "holder", [sys.executable, "-c", HOLDER, daemon.maddr, tmp_path / "dead.sock"], grace=0
    )
    await asyncio.to_thread(holder.wait_event, "registered", 60)
    psutil.Process(holder.pid).kill()
    await asyncio.to_thread(holder.wait, 10)
    ours = str(tmp_path / "ours.sock")
    with pytest.raises(DaemonError, match="already set"):
        await control.add_stream_handlers(daemon.maddr, ours, ["Test.stream"])
    with pytest.raises(DaemonError):  # not ours to remove by our own address
        await control.remove_stream_handlers(daemon.maddr, ours, ["Test.stream"])
    await control.remove_stream_handlers(daemon.maddr, str(tmp_path / "dead.sock"), ["Test.stream"])
    await control.add_stream_handlers(daemon.maddr, ours, ["Test.stream"])


async def test_connect_and_disconnect(start: StartDaemon) -> None:
    one = await start()
    other = await start(initial_peers=await one.visible_maddrs())
    await control.connect(other.maddr, one.peer_id, timeout=5.0)
    await control.disconnect(other.maddr, one.peer_id)
    with pytest.raises(DaemonError):
        await control.connect(
            other.maddr, "12D3KooWJbMKSJ5bpnExYsEANfo2e5Pqw6pJR5hmsGvn9aJosM1P", timeout=5.0
        )


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def boasts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(control.varint(2**31))
    await silent(reader, writer)


async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff" * 100)
    await silent(reader, writer)


async def lies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(control.varint(3) + b"\xff\xff\xff")
    await silent(reader, writer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (silent, "did not answer"),
        (hangs_up, "not there"),
        (boasts, "limit"),
        (babbles, "no sense"),
        (lies, "no sense"),
    ],
)
async def test_a_daemon_that_is_none(tmp_path: Path, answer: Answer, words: str) -> None:
    path = tmp_path / "d.sock"
    async with await asyncio.start_unix_server(answer, path):
        with pytest.raises(DaemonError, match=words):
            await control.identify(f"/unix{path}", timeout=0.5)
