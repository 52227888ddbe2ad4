"""The collector on live swarms: servers come, die and come back, p2pd and entry nodes die, strangers write nonsense."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.live import start_live
from harness.peer import Peer
from harness.processes import Process, Processes, wait_until
from harness.swarm import PETALS_AGENT
from harness.waiting import until
from petals_agent.errors import LimitExceeded, SwarmError
from petals_agent.monitor import collector as collector_module
from petals_agent.monitor.checking import MAX_CHECKS
from petals_agent.monitor.collector import Collector
from petals_agent.monitor.history import History
from petals_agent.monitor.state import Model, Server, SwarmState
from petals_agent.p2p.daemon import Daemon, DaemonOptions

from .conftest import Collecting
from .swarms import peer


def model(collector: Collector, prefix: str = "tiny") -> Model | None:
    return next((one for one in collector.state.models if one.dht_prefix == prefix), None)


def server(collector: Collector, peer_id: str) -> Server | None:
    found = model(collector)
    return next((one for one in found.servers if one.peer_id == peer_id), None) if found else None


@pytest.mark.timeout(240)
async def test_servers_come_and_die(
    processes: Processes, bootstrap: str, tiny_llama: Path, tmp_path: Path, collecting: Collecting
) -> None:
    more = '[swarm]\nupdate_period = 5\n[model]\ndht_prefix = "tiny"'
    kept = History(None, 86400.0)
    async with collecting([bootstrap], prefixes=["tiny"], history=kept) as collector:
        await until(lambda: collector.state.taken_at, 30, "the first reading")
        assert collector.fresh(time.time())
        assert not collector.fresh(time.time() + 1000) and not collector.fresh(time.time() - 1000)
        agents = [
            start_live(processes, tmp_path / blocks[0], tiny_llama, blocks, [bootstrap], more)
            for blocks in ("0:4", "4:8")
        ]
        await until(lambda: (found := model(collector)) and found.state == "healthy", 90, "a healthy model")
        found = model(collector)
        assert found is not None and found.num_blocks == 8 and found.online == (1,) * 8
        assert [(one.start, one.end, one.state) for one in found.servers] == [
            (0, 4, "online"),
            (4, 8, "online"),
        ]
        assert all(entry.reachable for entry in collector.state.entries)
        await nobody_suffers_from_our_own_death(collector)
        alive, dead = (str(agent.status()["peer_id"]) for agent in agents)

        assert await collector.check(alive) == (True, "")
        good, why = await collector.check(peer(1))
        assert not good and why
        with pytest.raises(ValueError, match="peer id"):
            await collector.check("../etc/passwd")

        agents[1].process.kill()
        await until(
            lambda: (one := server(collector, dead)) and one.state == "unreachable",
            20,
            "? for the killed one",
        )
        assert (one := server(collector, dead)) is not None and one.reason
        await until(
            lambda: (one := server(collector, dead)) and one.state == "offline", 40, "_ for the killed one"
        )
        found = model(collector)
        assert found is not None and found.state == "broken" and "blocks 4:8" in found.reason
        assert found.online == (1,) * 4 + (0,) * 4
        assert not (await collector.check(dead))[0]
        await until(
            lambda: (one := server(collector, alive)) and one.uptime is not None and one.first_seen,
            10,
            "what history knows",
        )
        assert (await kept.coverage("tiny", 0))[-1].uncovered >= 4
    await kept.close()


async def nobody_suffers_from_our_own_death(collector: Collector) -> None:
    """Those whom our p2pd could not reach when it died are not said to be unreachable by the next one."""
    connection = collector._network.connection
    assert connection is not None
    with collector.subscribe() as states:
        os.kill(connection.daemon.pid, signal.SIGKILL)
        for one in (one for found in collector.state.models for one in found.servers):
            collector._dialler._learn(one.peer_id, "p2pd ended while it was dialled")
        killed = time.time()
        async with asyncio.timeout(60):
            async for state in states:
                assert [one.state for found in state.models for one in found.servers] == ["online"] * 2
                if state.taken_at > killed + 1:
                    break


async def test_private_addresses_are_not_dialled_on_request(
    processes: Processes, bootstrap: str, collecting: Collecting
) -> None:
    async with collecting([bootstrap], allow_private=False) as collector:
        with pytest.raises(SwarmError):
            await collector.check(bootstrap.rsplit("/", 1)[1])
        await until(lambda: collector.state.taken_at, 30, "the first reading")
        found, why = await collector.check(bootstrap.rsplit("/", 1)[1])
        assert not found and "private" in why
        checks = [collector.check(peer(seed)) for seed in range(MAX_CHECKS + 3)]
        results = await asyncio.gather(*checks, return_exceptions=True)
        assert sum(isinstance(one, LimitExceeded) for one in results) == 3
        assert sum(one[0] is False for one in results if isinstance(one, tuple)) == MAX_CHECKS


def p2pd_of_this_process() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children() if child.name() == "p2pd"]


async def test_checks_that_overlap_share_one_p2pd_and_none_is_left(
    bootstrap: str, collecting: Collecting, tmp_path: Path
) -> None:
    options = DaemonOptions(
        initial_peers=[bootstrap],
        socket_dir=tmp_path,
        startup_timeout=20.0,
        auto_nat=False,
        nat_port_map=False,
    )
    members = [await Daemon.start(options) for _ in range(2)]
    before = set(p2pd_of_this_process())
    peers = [bootstrap.rsplit("/", 1)[1], *(member.peer_id for member in members)]
    async with collecting([bootstrap]) as collector:
        await until(lambda: collector.state.taken_at, 30, "the first reading")
        own = set(p2pd_of_this_process()) - before
        seen: set[int] = set()
        checks = asyncio.gather(*(collector.check(peer_id) for peer_id in peers * 3))
        while not checks.done():
            seen |= set(p2pd_of_this_process())
            await asyncio.sleep(0.005)
        assert await checks == [(True, "")] * 9
        assert len(seen - own - before) == 1 and set(p2pd_of_this_process()) == own | before
        leaving = asyncio.create_task(collector.check(peers[0]))
        await until(lambda: set(p2pd_of_this_process()) > own | before, 10, "a check that runs")
    assert set(p2pd_of_this_process()) == before
    with pytest.raises(asyncio.CancelledError):
        await leaving
    for member in members:
        await member.stop()


async def test_the_collectors_own_p2pd_dies_and_hangs(bootstrap: str, collecting: Collecting) -> None:
    async with collecting([bootstrap]) as collector:
        await until(lambda: collector.state.taken_at, 30, "the first reading")
        for number in (signal.SIGKILL, signal.SIGSTOP):
            (pid,) = p2pd_of_this_process()
            os.kill(pid, number)
            killed = time.time()
            await until(lambda: collector.state.taken_at > killed + 1, 60, f"a reading after {number.name}")  # noqa: B023
            assert not collector.state.problem and p2pd_of_this_process() != [pid]


async def test_a_clock_that_was_set_is_compared_with_the_peers(
    bootstrap: str, collecting: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collecting([bootstrap]) as collector:
        await until(lambda: collector.state.taken_at, 30, "the first reading")
        (pid,) = p2pd_of_this_process()
        ahead = SimpleNamespace(time=lambda: time.time() + 3600, monotonic=time.monotonic)
        monkeypatch.setattr(collector_module, "time", ahead)
        with collector.subscribe() as states:
            async with asyncio.timeout(30):
                while not (problem := (await anext(states)).problem):
                    pass
        assert "was set by +3600 s" in problem
        await until(lambda: not collector.state.problem, 30, "a reading after joining anew")
        assert p2pd_of_this_process() != [pid]


async def test_the_swarm_is_gone_and_comes_back(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], collecting: Collecting
) -> None:
    command = [*PETALS_AGENT, "bootstrap", "--json", "--identity", tmp_path / "id.key"]
    command += ["--listen", f"/ip4/127.0.0.1/tcp/{free_port()}"]

    def start() -> tuple[Process, str]:
        node = processes.start("bootstrap", command, env={"RUNTIME_DIRECTORY": str(tmp_path)})
        return node, str(wait_until(node.events, 60, "its addresses")[0]["maddrs"][0])

    node, maddr = start()
    async with collecting([maddr]) as collector:
        await until(lambda: collector.state.taken_at, 30, "the first reading")
        with Peer([maddr]) as other:
            other.store("_petals.models", "tiny", {"num_blocks": 2, "repository": None}, 300)
        await until(lambda: model(collector), 10, "the model")
        node.kill()
        await until(lambda: collector.state.problem, 30, "a word on what is wrong")
        await until(
            lambda: not any(entry.reachable for entry in collector.state.entries), 60, "entries that are gone"
        )
        taken = collector.state.taken_at
        assert model(collector) is not None, "the old state is still there, with its age"
        assert collector.fresh(taken + 1) and not collector.fresh(taken + 100)
        assert start()[1] == maddr
        await until(lambda: collector.state.taken_at > taken, 60, "a reading of what came back")
        assert not collector.state.problem and all(entry.reachable for entry in collector.state.entries)


class Swallowing(History):
    """As Python's and hivemind's own waits do at times: a cancellation goes by unheard."""

    async def record(self, state: SwarmState) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


async def test_a_cancellation_that_somebody_swallowed_is_obeyed(bootstrap: str, tmp_path: Path) -> None:
    collector = Collector([bootstrap], tmp_path, period=0.5, history=Swallowing(None, 86400.0))
    running = asyncio.create_task(collector.run())
    await until(lambda: collector.state.taken_at, 30, "the first reading")
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=10)
    assert done and running.cancelled()
    await collector.stop()


async def test_no_entry_node_at_all(collecting: Collecting) -> None:
    async with collecting([f"/ip4/127.0.0.1/tcp/9/p2p/{peer(1)}"]) as collector:
        await until(lambda: "no bootstrap peer answers" in collector.state.problem, 60, "what is wrong")
        assert collector.state.taken_at == 0 and not collector.fresh(time.time())
        assert [entry.reachable for entry in collector.state.entries] == [False]


async def test_an_unlisted_model_is_measured(bootstrap: str, collecting: Collecting) -> None:
    with Peer([bootstrap]) as other:
        for seed, start, end in ((1, 0, 3), (2, 120, 141)):
            value = (2, 5.0, {"start_block": start, "end_block": end})
            for block in (start, end - 1):
                other.store(f"_mine.{block}", peer(seed), value, 60)
        async with collecting([bootstrap], prefixes=["_mine", "nobody"]) as collector:
            await until(lambda: collector.state.taken_at, 60, "the first reading")
            mine, nobody = model(collector, "_mine"), model(collector, "nobody")
            assert mine is not None and mine.num_blocks == 141 and mine.state == "broken"
            assert nobody is not None and nobody.num_blocks == 0 and "not known" in nobody.reason


async def test_what_strangers_write(bootstrap: str, collecting: Collecting) -> None:
    good = (
        2,
        7.0,
        {"start_block": 0, "end_block": 4, "version": "1", "public_name": "<script>alert(1)</script>"},
    )
    with Peer([bootstrap]) as other:
        other.store(
            "_petals.models", "tiny", {"num_blocks": 4, "repository": "https://huggingface.co/a/<b>"}, 300
        )
        for number in range(20):
            other.store(
                "_petals.models", f"spam{number}", {"num_blocks": 60_000, "repository": "\u202e" * 99}, 300
            )
        for block in range(4):
            other.store(f"tiny.{block}", peer(1), good, 300)
        nonsense: list[Any] = [
            *(
                None,
                5,
                "<script>",
                b"\xff\xfe",
                [],
                {},
                (2,),
                (9, 1.0, {}),
                (2, 1, {}),
                (2, float("inf"), {}),
            ),
            (2, 1e308, {"adapters": ["\u202e\x00"] * 50}),
            (2, 1.0, {"public_name": "n" * 1_000_000}),
            (2, 1.0, {"next_pings": {"x" * 900: -1.0}}),
            (2, 1.0, {"start_block": 0, "end_block": 10**18}),
            (2, 1.0, {"start_block": 3, "end_block": 1}),
            (2, 1.0, {"extra": [[]] * 200_000}),
        ]
        for seed, value in enumerate(nonsense, 100):
            other.store("tiny.2", peer(seed), value, 300)
        for seed, subkey in enumerate(["", "no peer id", "\x1b[2J", 7, peer(2) + "x"], 200):
            other.store("tiny.3", subkey, (2, 1.0, {"seed": seed}), 300)  # type: ignore[arg-type]
        for key, raw in (
            ("tiny.1", b"\xc1\x93\x02"),
            ("_petals.models", b"\xc1"),
            ("tiny.0", b"\xd4\x50\x00"),
        ):
            other.store_raw(key, peer(99), raw, 300)
        async with collecting([bootstrap]) as collector:
            await until(lambda: collector.state.taken_at, 30, "the first reading")
            found = model(collector)
            assert found is not None and found.num_blocks == 4 and not found.unread_blocks
            ours = server(collector, peer(1))
            assert ours is not None and (ours.start, ours.end, ours.state) == (0, 4, "unreachable")
            assert ours.public_name == "<script>alert(1)</script>"
            assert found.rejected == len(nonsense) + 4 + 2  # one subkey is no text, and goes by in silence
            assert "20 of the registry's 21 models were not read" in collector.state.problem
            assert json.loads(collector.state.model_dump_json())["models"]
            assert collector.state.duration_s < 20

            other.store("_petals.models", "tiny", "no longer a model", 900)
            spoilt = time.time()
            await until(lambda: collector.state.taken_at > spoilt, 30, "a reading without its entry")
            found = model(collector)
            assert found is not None and not found.unread_blocks, "its servers announce themselves still"
            assert server(collector, peer(1)) is not None
