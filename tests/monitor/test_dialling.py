"""Whom the dialler reaches, and for how long it believes that: real p2pds, a clock that is set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from petals_agent.monitor import dialling
from petals_agent.monitor.dialling import BAD_S, CALL_S, GOOD_S, Dialler, dial_entries, words
from petals_agent.p2p import control
from petals_agent.p2p.attachment import Attachment, close
from petals_agent.p2p.daemon import Daemon, DaemonOptions, for_calls
from petals_agent.p2p.streams import StreamServer
from petals_agent.swarm.nesting import limit_depth

from .swarms import peer

from hivemind.p2p import P2P  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.multiaddr import Multiaddr  # isort: skip

limit_depth()


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Servers:
    """A p2pd that calls, and servers that count how often they were asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.daemons: list[Daemon] = []
        self._clients: list[P2P] = []
        self.asked = 0

    async def caller(self) -> P2P:
        daemon = await Daemon.start(for_calls(self._folder, startup_timeout=20.0))
        self.daemons.append(daemon)
        self._clients.append(await P2P.replicate(Multiaddr(daemon.maddr)))
        return self._clients[0]

    async def serve(self, *, starting: bool = False, hangs: bool = False) -> Daemon:
        """One more server, that the caller knows; `starting`: its p2pd is there before its handlers; `hangs`: never answers."""

        async def info(body: bytes, remote: str) -> bytes:
            assert runtime_pb2.ExpertUID.FromString(body).uid == ""
            self.asked += 1
            if hangs:
                await asyncio.Event().wait()
            return runtime_pb2.ExpertInfo(serialized_info=b"\x80").SerializeToString()

        options = DaemonOptions(
            socket_dir=self._folder, startup_timeout=20.0, auto_nat=False, nat_port_map=False
        )
        daemon = await Daemon.start(options)
        self.daemons.append(daemon)
        handlers = {} if starting else {"TransformerConnectionHandler.rpc_info": info}
        streams = StreamServer({}, 1000, self._folder)
        self._clients.append((await Attachment.open(daemon.maddr, handlers, streams))._p2p)
        await control.dial(self.daemons[0].maddr, await daemon.visible_maddrs(), 5.0)
        return daemon

    async def close(self) -> None:
        for client in self._clients:
            await close(client)
        for daemon in self.daemons:
            await daemon.stop()


@asynccontextmanager
async def servers(folder: Path) -> AsyncIterator[Servers]:
    made = Servers(folder)
    try:
        yield made
    finally:
        await made.close()


async def test_verdicts_last_as_long_as_they_are_worth(tmp_path: Path) -> None:
    async with servers(tmp_path) as made:
        p2p, clock = await made.caller(), Clock()
        first, second = await made.serve(), await made.serve()
        dialler, both = Dialler(clock), [first.peer_id, second.peer_id]
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 2
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 2
        clock.now = GOOD_S + 1
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 4
        await second.stop()
        failed, _ = await dialler.dial(p2p, both, 20.0)  # without any time between
        assert list(failed) == [second.peer_id] and failed[second.peer_id]
        assert made.asked == 4
        began = time.monotonic()
        assert (await dialler.dial(p2p, both, 20.0))[0] == failed
        assert time.monotonic() - began < CALL_S
        for pause in BAD_S:
            assert dialler._known[second.peer_id].until == clock.now + pause
            clock.now += pause
            await dialler.dial(p2p, [second.peer_id], 20.0)
        assert await dialler.dial(p2p, [first.peer_id], 20.0) == ({}, 0)
        assert list(dialler._known) == [first.peer_id]


async def test_many_servers_are_asked_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "GOOD_PER_S", 0.02)
    async with servers(tmp_path) as made:
        p2p, clock = await made.caller(), Clock()
        both = [(await made.serve()).peer_id for _ in range(2)]
        dialler = Dialler(clock)
        await dialler.dial(p2p, both, 20.0)
        clock.now = 99.0
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 2
        clock.now = 101.0
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 4


async def test_a_connection_that_we_cut_ourselves_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(tmp_path) as made:
        p2p, clock = await made.caller(), Clock()
        first, second = await made.serve(), await made.serve()
        dialler, both = Dialler(clock), [first.peer_id, second.peer_id]
        await dialler.dial(p2p, both, 20.0)
        await control.disconnect(made.daemons[0].maddr, second.peer_id)
        monkeypatch.setattr(dialling, "CUT_FROM", 1)  # as if p2pd had as many connections as it keeps
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 2
        monkeypatch.undo()
        assert await dialler.dial(p2p, both, 20.0) == ({}, 0) and made.asked == 3


async def test_who_is_connected_is_not_known(tmp_path: Path) -> None:
    async with servers(tmp_path) as made:
        p2p, clock = await made.caller(), Clock()
        server = await made.serve()
        dialler = Dialler(clock)
        await dialler.dial(p2p, [server.peer_id], 20.0)
        made.daemons[0].process.kill()
        await made.daemons[0].process.wait()
        assert await dialler.dial(p2p, [server.peer_id], 20.0) == ({}, 0)


async def test_a_server_that_is_starting_counts_as_reached(tmp_path: Path) -> None:
    async with servers(tmp_path) as made:
        p2p = await made.caller()
        starting = await made.serve(starting=True)
        assert await Dialler().dial(p2p, [starting.peer_id], 20.0) == ({}, 0)


async def test_a_server_that_hangs_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "CALL_S", 0.5)
    async with servers(tmp_path) as made:
        p2p = await made.caller()
        hanging, server = await made.serve(hangs=True), await made.serve()
        failed, late = await Dialler().dial(p2p, [hanging.peer_id, server.peer_id], 20.0)
        assert failed == {hanging.peer_id: "it did not answer within 0.5 s"} and not late and made.asked == 2


async def test_strangers_are_told_apart_and_no_time_is_lost(tmp_path: Path) -> None:
    async with servers(tmp_path) as made:
        p2p = await made.caller()
        server = await made.serve()
        strangers = [peer(seed) for seed in range(100)]
        began = time.monotonic()
        failed, late = await Dialler().dial(p2p, [*strangers, server.peer_id], 20.0)
        assert set(failed) == set(strangers) and not late
        assert time.monotonic() - began < 20.0


async def test_what_is_late_keeps_its_verdict(tmp_path: Path) -> None:
    async with servers(tmp_path) as made:
        p2p, clock = await made.caller(), Clock()
        server = await made.serve()
        dialler, both = Dialler(clock), [server.peer_id, peer(1)]
        assert await dialler.dial(p2p, both, 0.0) == ({}, 2)
        failed, late = await dialler.dial(p2p, both, 20.0)
        assert list(failed) == [peer(1)] and late == 0
        clock.now = GOOD_S + 1
        assert await dialler.dial(p2p, both, 0.0) == (failed, 0)


async def test_entries(tmp_path: Path) -> None:
    async with servers(tmp_path) as made:
        await made.caller()
        server = await made.serve()
        (good,) = await server.visible_maddrs()
        wrong = f"{good.rsplit('/', 1)[0]}/{peer(1)}"
        dead = f"/ip4/127.0.0.1/tcp/9/p2p/{peer(2)}"
        caller = made.daemons[0].maddr
        entries = await dial_entries(caller, [good, wrong, dead])
        assert [entry.reachable for entry in entries] == [True, False, False]
        assert [entry.address for entry in entries] == [good, wrong, dead]
        assert all(entry.reachable == (not entry.reason) for entry in entries)


@pytest.mark.parametrize("text", ["\x1b[2J\r\n\u202ex", "x" * 10_000, "", "\ud800"])
def test_an_error_s_words_are_one_printable_line(text: str) -> None:
    said = words(ValueError(text))
    assert said and said.isprintable() and len(said) <= 200
