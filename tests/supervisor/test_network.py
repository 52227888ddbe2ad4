"""p2pd and the DHT node: joined when that is possible, replaced at the same place, refused where someone else is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.processes import Processes
from petals_agent.errors import IdentityTaken
from petals_agent.p2p.daemon import Daemon, DaemonOptions
from petals_agent.supervisor.network import Connection, Network, fixed_ports, own_maddrs
from petals_agent.supervisor.states import Life
from petals_agent.swarm.identity import ensure_identity

WAIT_S = 30.0


def tells(life: Life, words: str) -> bool:
    """Whether one of its events says so."""
    return any(words in event.text for event in life.events)


def options(folder: Path, *peers: str, **more: Any) -> DaemonOptions:
    defaults: dict[str, Any] = {
        "identity": folder / "id.key",
        "initial_peers": peers,
        "socket_dir": folder,
        "startup_timeout": 20.0,
        "auto_nat": False,
        "nat_port_map": False,
    }
    ensure_identity(folder / "id.key")
    return DaemonOptions(**{**defaults, **more})


@asynccontextmanager
async def running(network: Network) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(network.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await network.stop()


async def connected(network: Network) -> Connection:
    return await asyncio.wait_for(network.connected(), WAIT_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  several objects' state
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("listen", "visible", "fixed"),
    [
        ("/ip4/127.0.0.1/tcp/0", ["/ip4/127.0.0.1/tcp/11/p2p/X"], "/ip4/127.0.0.1/tcp/11"),
        (
            "/ip4/0.0.0.0/tcp/0",
            ["/ip4/198.51.100.1/tcp/9/p2p/X", "/ip4/127.0.0.1/tcp/11/p2p/X"],
            "/ip4/0.0.0.0/tcp/11",
        ),
        ("/ip6/::/tcp/0", ["/ip4/127.0.0.1/tcp/11/p2p/X", "/ip6/::1/tcp/12/p2p/X"], "/ip6/::/tcp/12"),
        ("/ip6/::/tcp/0", ["/ip4/127.0.0.1/tcp/11/p2p/X"], "/ip6/::/tcp/0"),
        ("/ip4/127.0.0.1/tcp/7", ["/ip4/127.0.0.1/tcp/11/p2p/X"], "/ip4/127.0.0.1/tcp/7"),
    ],
)
def test_chosen_ports_are_kept(listen: str, visible: list[str], fixed: str) -> None:
    assert fixed_ports([listen], visible) == (fixed,)


@pytest.mark.parametrize(
    ("listen", "visible", "own"),
    [
        (["/ip4/0.0.0.0/tcp/7"], ["/ip4/192.0.2.1/tcp/80/p2p/X"], ["/ip4/127.0.0.1/tcp/7/p2p/X"]),
        (
            ["/ip4/10.0.0.2/tcp/7", "/ip6/::/tcp/8"],
            ["/ip4/192.0.2.1/tcp/80/p2p/X", "/ip6/2001:db8::1/tcp/8/p2p/X"],
            ["/ip4/10.0.0.2/tcp/7/p2p/X", "/ip6/::1/tcp/8/p2p/X"],
        ),
        (["/ip4/0.0.0.0/tcp/0"], ["/ip4/192.0.2.1/tcp/80/p2p/X"], ["/ip4/192.0.2.1/tcp/80/p2p/X"]),
        (["/ip4/0.0.0.0/tcp/7"], [], []),
    ],
)
def test_addresses_from_this_host(listen: list[str], visible: list[str], own: list[str]) -> None:
    assert own_maddrs(listen, visible) == own


async def test_p2pd_is_replaced_at_the_same_place(bootstrap: str, tmp_path: Path) -> None:
    life = Life()
    network = Network(options(tmp_path, bootstrap), life)
    async with running(network):
        for death in range(3):
            connection, maddrs = await connected(network), network.maddrs
            assert network.restarts == death
            connection.daemon.process.kill()
            await asyncio.wait_for(connection.lost.wait(), WAIT_S)
            again = await connected(network)
            assert again is not connection and again.daemon.peer_id == connection.daemon.peer_id
            assert network.maddrs == maddrs
            assert network.peers == 1  # it is back in the DHT
    assert tells(life, "it ended with status -9")
    assert sorted(path.name for path in tmp_path.glob("*.sock")) == []


async def test_first_node_of_a_swarm(tmp_path: Path) -> None:
    network = Network(options(tmp_path), Life())
    async with running(network):
        await connected(network)
        assert network.problem is None and network.peers == 0


async def test_over_ipv6(tmp_path: Path) -> None:
    for name in ("entry", "ours"):
        (tmp_path / name).mkdir()
    listen = ("/ip6/::1/tcp/0",)
    entry = Network(options(tmp_path / "entry", listen=listen), Life())
    async with running(entry):
        await connected(entry)
        assert entry.maddrs[0].startswith("/ip6/::1/tcp/")
        ours = Network(options(tmp_path / "ours", *entry.maddrs, listen=listen), Life())
        async with running(ours):
            connection, maddrs = await connected(ours), ours.maddrs
            assert ours.peers == 1
            connection.daemon.process.kill()
            await asyncio.wait_for(connection.lost.wait(), WAIT_S)
            await connected(ours)
            assert ours.maddrs == maddrs


async def test_entry_node_comes_later(tmp_path: Path, free_port: Callable[[], int]) -> None:
    for name in ("entry", "ours"):
        (tmp_path / name).mkdir()
    peer_id = ensure_identity(tmp_path / "entry" / "id.key")
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    maddr = f"{listen}/p2p/{peer_id}"
    life = Life()
    network = Network(options(tmp_path / "ours", maddr), life)
    async with running(network):
        await until(lambda: network.problem is not None)
        assert f"no bootstrap peer answers ({maddr})" in str(network.problem)
        assert network.connection is None
        entry = Network(options(tmp_path / "entry", listen=(listen,)), Life())
        async with running(entry):
            await connected(network)
            await until(lambda: network.problem is None)
            assert network.peers == 1
    assert life.events[-1].text == "connected"


async def test_port_is_taken_for_a_while(bootstrap: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        listen = f"/ip4/127.0.0.1/tcp/{squatter.getsockname()[1]}"
        network = Network(options(tmp_path, bootstrap, listen=(listen,)), Life())
        async with running(network):
            await until(lambda: network.problem is not None)
            assert f"cannot listen on {listen}" in str(network.problem)
            squatter.close()
            await connected(network)
            assert network.maddrs[0].startswith(listen)


async def elsewhere(folder: Path, bootstrap: str) -> Daemon:
    """A peer on "another host" that uses the identity in `folder`."""
    ensure_identity(folder / "id.key")
    return await Daemon.start(
        DaemonOptions(identity=folder / "id.key", initial_peers=[bootstrap], socket_dir=folder)
    )


async def test_identity_that_is_live_elsewhere(bootstrap: str, tmp_path: Path) -> None:
    other = await elsewhere(tmp_path, bootstrap)
    network = Network(options(tmp_path, bootstrap), Life())
    try:
        async with running(network) as task:
            with pytest.raises(IdentityTaken, match=f"another live peer .*{other.peer_id}"):
                await asyncio.wait_for(task, WAIT_S)
            assert network.connection is None
    finally:
        await other.stop()


async def test_identity_whose_last_user_is_just_going(bootstrap: str, tmp_path: Path) -> None:
    other = await elsewhere(tmp_path, bootstrap)
    network = Network(options(tmp_path, bootstrap), Life())
    async with running(network) as task:
        done, _ = await asyncio.wait({task}, timeout=1.5)
        assert not done and network.connection is None  # it looks, and waits
        os.kill(other.pid, signal.SIGKILL)
        assert (await connected(network)).daemon.peer_id == other.peer_id
    await other.stop()


async def test_client_of_the_dht(bootstrap: str, tmp_path: Path) -> None:
    network = Network(options(tmp_path, bootstrap), Life())
    async with running(network):
        before = await connected(network)
        assert not before.client
        await asyncio.wait_for(network.leave_routing(), WAIT_S)
        after = await connected(network)
        assert after.client and after.daemon.peer_id == before.daemon.peer_id
        assert network.restarts == 0  # that was no failure


def test_stop_leaves_no_task(processes: Processes, bootstrap: str, tmp_path: Path) -> None:
    """In a process of its own, where asyncio would complain at the end."""
    program = f"""
import asyncio, logging
from pathlib import Path
from petals_agent.p2p import light
light.install(without_torch=True)
from petals_agent.p2p.daemon import DaemonOptions
from petals_agent.supervisor.network import Network
from petals_agent.supervisor.states import Life

async def main():
    network = Network(DaemonOptions(initial_peers=[{bootstrap!r}], socket_dir=Path({str(tmp_path)!r})), Life())
    task = asyncio.create_task(network.run())
    for _ in range(2):
        connection = await network.connected()
        await connection.node.get("something", latest=True)
        connection.daemon.process.kill()
        await connection.lost.wait()
    await network.connected()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await network.stop()
    left = asyncio.all_tasks() - {{asyncio.current_task()}}
    left = [task for task in left if task.get_coro().__name__ != "sleep"]  # DHTNode.create leaves one for 3 s
    assert not left, left

asyncio.run(main(), debug=False)
"""
    done = processes.run("network", [sys.executable, "-X", "dev", "-c", program], timeout=60)
    assert done.returncode == 0, done.output()
    assert "never" not in done.err.read_text() and "destroyed" not in done.err.read_text(), done.output()
