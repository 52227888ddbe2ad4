"""Can peers dial us: what they are asked, what a monitor is asked, and what follows from a no."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.monitor import start_monitor
from harness.processes import Processes
from petals_agent.errors import SwarmError
from petals_agent.supervisor import reachability as module
from petals_agent.supervisor.network import Network
from petals_agent.supervisor.reachability import Reachability
from petals_agent.supervisor.states import Life
from petals_agent.supervisor.tasks import first
from petals_agent.swarm.reachability import MAX_CHECKS_PER_MINUTE, ask_monitor, ask_peers, call_check

from .test_network import connected, options, tells


def reachability(source: str | None, network: Network, life: Life, *peers: str) -> Reachability:
    return Reachability(source, network, peers, network._options.socket_dir, life)


class Member:
    """A node with its part in the checks."""

    def __init__(self, folder: Path, *peers: str, source: str | None = None, **more: Any) -> None:
        folder.mkdir()
        self.life = Life()
        self.network = Network(options(folder, *peers, **more), self.life)
        self.reachability = reachability(source, self.network, self.life, *peers)
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Member:
        self._task = asyncio.create_task(first(self.network.run(), self.reachability.run()))
        await connected(self.network)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.reachability.stop()
        await self.network.stop()

    @property
    def maddr(self) -> str:
        return self.network.maddrs[0]

    async def known(self) -> bool:
        """Whether it goes through relays, once it knows."""
        assert self._task is not None
        waiting = asyncio.create_task(self.reachability.known.wait())
        await asyncio.wait({waiting, self._task}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        assert waiting.done()
        return self.reachability.relayed


async def test_member_that_can_be_dialled(tmp_path: Path) -> None:
    async with Member(tmp_path / "entry") as entry:
        async with Member(tmp_path / "ours", entry.maddr, source="peers") as ours:
            assert await ours.known() is False
            connection = await connected(ours.network)
            assert not connection.client
            assert await ask_peers(connection.node) == 1.0
            # and again on the next p2pd
            connection.daemon.process.kill()
            await connection.lost.wait()
            node = (await connected(entry.network)).node
            connection = await connected(ours.network)
            async with asyncio.timeout(30):
                while await asked(node, ours) is not True:  # noqa: ASYNC110  another node's state
                    await asyncio.sleep(0.1)


async def asked(node: Any, about: Member) -> bool | None:
    peer = node.protocol.p2p.peer_id.from_base58((await connected(about.network)).daemon.peer_id)
    try:
        return await call_check(node.protocol.p2p, peer, peer.to_bytes())
    except Exception:
        return None


async def test_member_that_cannot_be_dialled(tmp_path: Path, free_port: Any) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}"
    async with Member(tmp_path / "entry") as entry:
        async with Member(tmp_path / "ours", entry.maddr, source="peers", announce=(nobody,)) as ours:
            assert await ours.known() is True
            assert (await connected(ours.network)).client
            assert tells(ours.life, "most peers cannot dial us")


async def test_first_node_and_peers_without_opinion(tmp_path: Path, bootstrap: str) -> None:
    async with Member(tmp_path / "alone", source="peers") as alone:
        assert await alone.known() is False
    async with Member(tmp_path / "beside", bootstrap, source="peers") as beside:
        assert await beside.known() is False


async def test_strangers_may_not_ask_too_often(tmp_path: Path) -> None:
    async with Member(tmp_path / "entry") as entry:
        async with Member(tmp_path / "ours", entry.maddr) as ours:
            node = (await connected(ours.network)).node
            p2p = node.protocol.p2p
            server = p2p.peer_id.from_base58((await connected(entry.network)).daemon.peer_id)
            unknown = bytes(reversed(p2p.peer_id.to_bytes()))
            for _ in range(MAX_CHECKS_PER_MINUTE):
                assert await call_check(p2p, server, unknown) is False
            with pytest.raises(Exception, match=f"more than {MAX_CHECKS_PER_MINUTE} reachability checks"):
                await call_check(p2p, server, p2p.peer_id.to_bytes())
            assert await call_check(p2p, server, server.to_bytes()) is True  # about itself it always answers


# --- a monitor


class Monitor:
    """A health monitor's API on loopback, which answers what it is told."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.asked: list[str] = []
        monitor = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                monitor.asked.append(self.path)
                code, body = monitor.answers.pop(0) if len(monitor.answers) > 1 else monitor.answers[0]
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    started = Monitor()
    yield started
    started.server.shutdown()
    started.server.server_close()


YES = (200, json.dumps({"success": True, "message": "", "your_ip": "127.0.0.1"}).encode())
NO = (200, json.dumps({"success": False, "message": "all dials failed"}).encode())


async def test_monitor_says_yes_after_a_while(
    tmp_path: Path, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MONITOR_RETRY_S", 0.05)
    monitor.answers = [NO, NO, YES]
    async with Member(tmp_path / "ours", source=monitor.url) as ours:
        assert await ours.known() is False
        peer_id = (await connected(ours.network)).daemon.peer_id
    assert monitor.asked == [f"/api/v1/is_reachable/{peer_id}"] * 3
    assert tells(ours.life, "the monitor cannot reach us: all dials failed")


async def test_monitor_says_no_for_good(
    tmp_path: Path, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MONITOR_RETRY_S", 0.01)
    monitor.answers = [NO]
    async with Member(tmp_path / "ours", source=monitor.url) as ours:
        with pytest.raises(SwarmError, match=r"cannot reach this host \(all dials failed\); open its port"):
            await ours.known()


@pytest.mark.parametrize(
    "answer", [(500, b""), (404, b"x"), (200, b"{"), (200, b"[]"), (200, b'{"yes": true}')]
)
async def test_monitor_without_verdict(monitor: Monitor, answer: tuple[int, bytes]) -> None:
    monitor.answers = [answer]
    with pytest.raises(SwarmError, match="gives no verdict"):
        await ask_monitor(monitor.url, "Qm")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [({"ok": True}, True), ({"ok": False}, False), ({"ok": True, "success": False}, False)],
)
async def test_a_monitor_may_say_ok_or_success(monitor: Monitor, said: object, verdict: bool) -> None:
    monitor.answers = [(200, json.dumps(said).encode())]
    assert await ask_monitor(monitor.url, "Qm") == (verdict, "")


async def test_our_own_monitor(
    tmp_path: Path, processes: Processes, free_port: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MONITOR_RETRY_S", 0.5)
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}"
    async with Member(tmp_path / "entry") as entry:
        starting = asyncio.to_thread(
            start_monitor, processes, tmp_path / "monitor", [entry.maddr], free_port()
        )
        url = (await starting).url
        async with Member(tmp_path / "ours", entry.maddr, source=url) as ours:
            assert await ours.known() is False
            assert not tells(ours.life, "going on without")
        async with Member(tmp_path / "hidden", entry.maddr, source=url, announce=(nobody,)) as hidden:
            async with asyncio.timeout(60):
                while not tells(hidden.life, "the monitor cannot reach us: "):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert not hidden.reachability.known.is_set()


async def test_monitor_that_is_not_there_is_done_without(tmp_path: Path, free_port: Any) -> None:
    async with Member(tmp_path / "ours", source=f"http://127.0.0.1:{free_port()}") as ours:
        assert await ours.known() is False
        assert tells(ours.life, "gives no verdict") and tells(ours.life, "going on without")
