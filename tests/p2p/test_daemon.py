"""Starting p2pd: it answers or says why not, its ports are its own, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness.live import all_gone
from harness.processes import Processes, wait_until
from petals_agent.errors import DaemonError
from petals_agent.p2p import control
from petals_agent.p2p.daemon import check_ports, parse_line

from .conftest import StartDaemon


def our_p2pds() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "p2pd"]


async def test_start_and_stop(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start()
    maddrs = await daemon.visible_maddrs()
    assert maddrs and all(maddr.endswith(f"/p2p/{daemon.peer_id}") for maddr in maddrs)
    assert control.unix_path(daemon.maddr).startswith(str(tmp_path))
    await daemon.stop()
    assert daemon.process.returncode is not None and not list(tmp_path.iterdir())
    with pytest.raises(DaemonError, match="not there"):
        await control.identify(daemon.maddr)


@pytest.mark.parametrize("family", ["ip4/127.0.0.1", "ip6/::1"])
async def test_port_of_another_program(start: StartDaemon, family: str) -> None:
    kind, host = family.split("/")
    with socket.create_server(
        (host, 0), family=socket.AF_INET if kind == "ip4" else socket.AF_INET6
    ) as taken:
        maddr = f"/{family}/tcp/{taken.getsockname()[1]}"
        with pytest.raises(DaemonError, match=f"cannot listen on {maddr}: another process listens there"):
            await start(listen=["/ip4/127.0.0.1/tcp/0", maddr])


async def test_port_of_another_p2pd(start: StartDaemon) -> None:
    """Without our own look, both would listen on it and share the callers."""
    first = await start()
    listen = (await first.visible_maddrs())[0].split("/p2p/")[0]
    with pytest.raises(DaemonError, match="another process listens there"):
        await start(listen=[listen])
    await first.stop()
    second = await start(listen=[listen])
    assert (await second.visible_maddrs())[0].startswith(listen)


def test_ports_that_p2pd_chooses_or_that_are_free(free_port: Callable[[], int]) -> None:
    check_ports(
        [
            "/ip4/0.0.0.0/tcp/0",
            "/ip6/::/tcp/0",
            f"/ip4/127.0.0.1/tcp/{free_port()}",
            "/ip4/127.0.0.1/udp/1/quic-v1",
        ]
    )


def test_address_of_another_host() -> None:
    with pytest.raises(DaemonError, match=r"cannot listen on /ip4/203\.0\.113\.1/tcp/4001"):
        check_ports(["/ip4/203.0.113.1/tcp/4001"])


async def test_garbage_as_identity(start: StartDaemon, tmp_path: Path) -> None:
    key = tmp_path / "id.key"
    key.write_bytes(b"garbage")
    with pytest.raises(DaemonError, match="p2pd ended at once with status 1"):
        await start(identity=key)
    assert list(tmp_path.iterdir()) == [key]


async def test_nobody_to_join(start: StartDaemon, free_port: Callable[[], int]) -> None:
    peer = "12D3KooWJbMKSJ5bpnExYsEANfo2e5Pqw6pJR5hmsGvn9aJosM1P"
    with pytest.raises(DaemonError, match="bootstrap"):
        await start(initial_peers=[f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{peer}"])


@pytest.mark.parametrize(
    ("line", "level", "text"),
    [
        (b'{"level":"warn","logger":"dht","msg":"no table\\n"}\n', logging.WARNING, "dht: no table"),
        (b'{"level":"error","msg":"accept","error":"closed"}', logging.ERROR, "accept: closed"),
        (b'{"level":"new","msg":"x"}', logging.INFO, "x"),
        (b"Peer ID: 12D3\n", logging.DEBUG, "Peer ID: 12D3"),
        (b"panic: runtime error\n", logging.ERROR, "panic: runtime error"),
        (b'{"level":["x"],"msg":"x"}', logging.DEBUG, '{"level":["x"],"msg":"x"}'),
        (b"[1]", logging.DEBUG, "[1]"),
        (b"\xff", logging.DEBUG, "\ufffd"),
    ],
)
def test_lines_of_its_log(line: bytes, level: int, text: str) -> None:
    assert parse_line(line) == (level, text)


async def test_its_end_is_no_error(start: StartDaemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    daemon = await start()
    await daemon.stop()
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert "closed network connection" in caplog.text  # what it says at its end, as an error


async def test_start_takes_too_long(start: StartDaemon, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="did not start within 0"):
        await start(startup_timeout=0.0)
    assert not list(tmp_path.iterdir())
    assert not our_p2pds()


async def test_cancelled_start_leaves_nothing(start: StartDaemon, tmp_path: Path) -> None:
    starting = asyncio.ensure_future(start())
    await asyncio.to_thread(wait_until, our_p2pds, 10, "p2pd runs")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not our_p2pds()
    assert not list(tmp_path.iterdir())


PARENT = """
import asyncio, json, sys
from pathlib import Path
from petals_agent.p2p import light
light.install(without_torch=True)
from petals_agent.p2p.daemon import Daemon, DaemonOptions

async def main():
    daemon = await Daemon.start(DaemonOptions(socket_dir=Path(sys.argv[1])))
    print(json.dumps({"event": "up", "pid": daemon.pid}), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_dies_with_its_parent(processes: Processes, tmp_path: Path) -> None:
    parent = processes.start("parent", [sys.executable, "-c", PARENT, tmp_path])
    daemon = psutil.Process(parent.wait_event("up", 60)["pid"])
    psutil.Process(parent.pid).kill()
    wait_until(lambda: all_gone([daemon]), 5, "p2pd's end")
