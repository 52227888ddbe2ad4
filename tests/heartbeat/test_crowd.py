"""Real members on loopback: p2pd's, streams, and the DHT for a group; in one process, so that many fit."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from harness.processes import Processes
from harness.swarm import start_bootstrap
from petals_agent.errors import SwarmError
from petals_agent.heartbeat.fleet import RECORD_S, Group
from petals_agent.heartbeat.messages import PROTOCOL, Join, Who
from petals_agent.heartbeat.rules import Timing
from petals_agent.p2p import control

from .crowd import Crowd, Load

REAL = Timing.of(1.0)  # the shortest that the rule allows: a time-out of 2 s
QUICK = Timing(period=0.1, timeout=2.0, hold=0.7, settle=5.0)  # the rule's time-out, without its pauses
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def bootstrap(module_processes: Processes) -> str:
    """One for all tests here."""
    return start_bootstrap(module_processes)


async def test_no_false_alarm_under_full_load(bootstrap: str, tmp_path: Path) -> None:
    """A thousand rounds: tests/benchmarks/heartbeat.py."""
    async with Crowd(tmp_path, bootstrap, QUICK, 5) as crowd:
        await crowd.begun()
        async with Load(os.cpu_count() or 1):
            await crowd.until(lambda: min(s.round for s in crowd.seats) > 20, 100, "twenty rounds")
        assert crowd.failures == []


async def test_p2pd_of_a_member_is_replaced_without_an_alarm(bootstrap: str, tmp_path: Path) -> None:
    """Of the first member, whom all others call."""
    async with Crowd(tmp_path, bootstrap, REAL, 4) as crowd:
        await crowd.begun()
        socket = next((tmp_path / crowd.seats[0].key.stem).glob("p2pd-*.sock"))
        (pid,) = [child for child in _children("p2pd") if str(socket) in " ".join(_arguments(child))]
        os.kill(pid, signal.SIGKILL)
        await crowd.until(lambda: pid not in _children("p2pd"), 10, "it is gone")
        number = max(seat.round for seat in crowd.seats)
        await crowd.until(lambda: min(s.round for s in crowd.seats) > number + 2, 90, "rounds go on")
        await crowd.until(
            lambda: not any(seat.rounds.standing.failures for seat in crowd.seats if seat.rounds),
            30,
            "good ones",
        )
        assert crowd.failures == []


def _children(name: str) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True) if child.name() == name]


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def test_its_own_p2pd_has_somebody_to_stay_for(bootstrap: str, tmp_path: Path) -> None:
    """p2pd ends itself after 30 s without a client that holds a connection; questions come and go."""
    async with Crowd(tmp_path, bootstrap, Timing.of(60.0), 2) as crowd:
        await crowd.begun()
        for seat in crowd.seats:
            daemon = seat.post._daemon
            assert daemon is not None
            path = control.unix_path(daemon)
            await crowd.until(lambda at=path: _connections(at) >= 1, 10, "a connection")
            steady = time.monotonic() + 1.0
            while time.monotonic() < steady:
                assert _connections(path) >= 1, "in a pause"
                await asyncio.sleep(0.05)


def _connections(path: str) -> int:
    """Established ones to a unix socket."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.split()[5] == "03" and line.endswith(path) for line in lines[1:])


async def test_a_stranger_is_refused(bootstrap: str, tmp_path: Path) -> None:
    async with (
        Crowd(tmp_path, bootstrap, QUICK, 3) as crowd,
        Crowd(_made(tmp_path / "others"), bootstrap, QUICK, 2) as others,
    ):
        await crowd.begun()
        await others.begun()
        stranger, target = others.seats[0].post, crowd.seats[0].peer_id
        for request in (Join(fleet=crowd.seats[0].name, life=b"12345678"), Who(fleet=crowd.seats[0].name)):
            with pytest.raises(SwarmError, match="not among the members"):
                await stranger.ask(target, request, 10.0)
        await crowd.until(lambda: min(s.round for s in crowd.seats) > 5, 60, "rounds go on")
        assert crowd.failures == []


async def test_garbage_on_the_wire_costs_nothing(bootstrap: str, tmp_path: Path) -> None:
    async with Crowd(tmp_path, bootstrap, QUICK, 3) as crowd:
        await crowd.begun()
        sender, target = crowd.seats[1], crowd.seats[0].peer_id
        daemon = sender.post._daemon
        assert daemon is not None
        for body in (b"", b"\x00" * 9 + b"junk", bytes([0]) + (2**62).to_bytes(8, "big"), os.urandom(3000)):
            reader, writer = await control.open_stream(daemon, target, PROTOCOL, 10.0)
            writer.write(body)
            writer.write_eof()
            async with asyncio.timeout(15):
                await reader.read()
            writer.close()
        number = crowd.seats[0].round
        await crowd.until(lambda: min(s.round for s in crowd.seats) > number + 3, 60, "rounds go on")
        assert crowd.failures == []


async def test_strangers_shut_nobody_out(bootstrap: str, tmp_path: Path) -> None:
    """They open streams and ask nothing, or do not close them after the refusal."""
    async with (
        Crowd(tmp_path, bootstrap, QUICK, 3) as crowd,
        Crowd(_made(tmp_path / "others"), bootstrap, QUICK, 2) as others,
    ):
        await crowd.begun()
        await others.begun()
        target, daemon = crowd.seats[0], others.seats[0].post._daemon
        assert daemon is not None
        most, writers = 0, []
        for _ in range(20):
            opening = [control.open_stream(daemon, target.peer_id, PROTOCOL, 10.0) for _ in range(20)]
            writers += [
                one[1]
                for one in await asyncio.gather(*opening, return_exceptions=True)
                if isinstance(one, tuple)
            ]
            most = max(most, len(target.post._server.streams))
        assert len(writers) > 300 and most < 100, "one peer has a few at most"
        number = target.round
        await crowd.until(lambda: min(s.round for s in crowd.seats) > number + 5, 60, "rounds go on")
        for writer in writers:
            writer.close()
        assert crowd.failures == []


async def test_traffic_is_as_designed(bootstrap: str, tmp_path: Path) -> None:
    """Five members and three witnesses: twelve questions and as many answers."""
    async with Crowd(tmp_path, bootstrap, QUICK, 5) as crowd:
        await crowd.begun()
        await crowd.until(lambda: min(s.round for s in crowd.seats) >= 3, 60, "it runs")
        (messages, total), number = crowd.traffic, crowd.seats[0].round
        await crowd.until(lambda: crowd.seats[0].round >= number + 10, 60, "ten rounds")
        rounds = crowd.seats[0].round - number
        assert (crowd.traffic[0] - messages) / rounds == pytest.approx(24, rel=0.15)
        assert (crowd.traffic[1] - total) / rounds < 24 * 130


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- groups


async def test_a_group_finds_itself(bootstrap: str, tmp_path: Path) -> None:
    async with Crowd(tmp_path, bootstrap, QUICK, 4, group="fleet", size=4) as crowd:
        await crowd.begun()
        sessions = [seat.rounds.session for seat in crowd.seats if seat.rounds is not None]
        assert len({session.token for session in sessions}) == 1
        assert {len(session.fleet.members) for session in sessions} == {4}
        assert crowd.failures == []


async def test_a_group_of_those_who_come_and_garbage_in_its_records(
    processes: Processes, tmp_path: Path
) -> None:
    from hivemind.utils.timed_storage import get_dht_time

    entry = start_bootstrap(processes)
    async with Crowd(_made(tmp_path / "others"), entry, QUICK, 2, group="others", size=2) as others:
        await others.begun()
        node = await others.seats[0].place.node()
        key = Group("fleet", None, QUICK.period, others.seats[0].place.node)._key
        dead = ["1" * 46, "Qm" + "1" * 44, "x", "<script>", "", others.seats[0].peer_id]
        for number, subkey in enumerate([*dead, 7, b"\xff\xfe", ("a", 1)]):
            await node.store(key, {"junk": number}, get_dht_time() + RECORD_S, subkey=subkey)
        async with Crowd(_made(tmp_path / "fleet"), entry, QUICK, 3, group="fleet") as crowd:
            await crowd.begun()
            sessions = [seat.rounds.session for seat in crowd.seats if seat.rounds is not None]
            assert {session.fleet.members for session in sessions} == {
                tuple(sorted(seat.peer_id for seat in crowd.seats))
            }
            assert crowd.failures == []
