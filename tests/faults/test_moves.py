"""Moves that go wrong: no room, bad weights, and what dies meanwhile; the swarm is never promised what is not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.hurt import HIDDEN, INJECT, QUICK
from harness.live import LiveAgent, all_gone, start_again, start_live
from harness.moving import MOVES, move, rebalance, span, start_others
from harness.open_session import OpenSession
from harness.peer import Peer, chain
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.promises import Promises
from harness.steady import Steady, Texts, expected_texts
from harness.swarm import start_bootstrap

pytestmark = pytest.mark.timeout(150)
LONG_PERIOD = "\n[swarm]\nupdate_period = 8"  # records live twice as long: those that are gone were withdrawn
COOLDOWN_S = 2.0
AUTO = f"""[log]
format = "json"
[balance]
enabled = true
mean_balance_check_period = 1
mean_block_selection_delay = 0.1
cooldown = {COOLDOWN_S}
drain_timeout = 1
[serve]
num_blocks = 4
blocks = "auto"
"""
REPORTS = """
from pathlib import Path
from petals_agent.hooks import hookimpl

@hookimpl
def after_rebalance(plan, report):
    with open(Path(__file__).with_name("reports"), "a") as file:
        file.write(f"{report.moved} {report.span} {report.reason}\\n")
"""


@dataclass
class Swarm:
    """An entry node's address, a peer that looks on, and what each prompt leads to."""

    maddr: str
    peer: Peer
    texts: Texts


@pytest.fixture(scope="module")
def swarm(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[Swarm]:
    """All blocks are served, slowly, whatever happens to the agent of a test."""
    maddr = start_bootstrap(module_processes)
    others = start_others(module_processes, tmp_path_factory.mktemp("others"), tiny_llama, maddr)
    texts = expected_texts(tiny_llama, 30)
    for other in others:
        other.online()
    with Peer([maddr]) as peer:
        yield Swarm(maddr, peer, texts)


def start(
    processes: Processes,
    folder: Path,
    model: Path,
    swarm: Swarm,
    more: str = "",
    orders: Sequence[str] = (),
    **env: str,
) -> LiveAgent:
    """An agent with blocks 0:4 that obeys orders in `folder`/orders."""
    place = folder / "orders"
    place.mkdir(parents=True)
    for order in orders:
        (place / order).touch()
    env |= {"PYTHONPATH": str(INJECT), "PETALS_AGENT_FAULTS": str(place)}
    more = f"{QUICK}\n{MOVES}\n{more}"
    return start_live(processes, folder, model, "0:4", [swarm.maddr], more, env=env)


def loads(agent: LiveAgent) -> list[str]:
    """The spans that were offered one after the other."""
    return [str(event["span"]) for event in agent.logged() if event["event"] == "load"]


@pytest.mark.parametrize(
    ("room", "way"),
    [(5, ["2:4", "2:6"]), (4, ["2:4", "2:6"]), (4, ["0:2", "4:6", "4:8"])],
    ids=["room for one", "full", "full, nothing in common"],
)
def test_without_room_for_both(
    room: int, way: list[str], swarm: Swarm, processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """What both spans share stays, or half of each; somebody always answers for what is announced."""
    agent = start(
        processes,
        tmp_path / "a",
        tiny_llama,
        swarm,
        orders=["crowded.stay"],
        PETALS_AGENT_ROOM_BLOCKS=str(room),
    )
    peer_id = agent.online()["peer_id"]
    with (
        Steady(tiny_llama, swarm.maddr, swarm.texts) as steady,
        Promises(swarm.peer, peer_id) as promises,
    ):
        steady.more()
        move(agent, way[-1])
        steady.more()
    assert loads(agent) == ["0:4", *way]
    assert not promises.broken, promises.broken[:5]
    steady.check()
    wait_until(lambda: promises.kept(span(way[-1])), 10, "exactly the new blocks")
    refused = rebalance(agent, blocks="0:8")  # what is there already is all that there is room for
    assert not refused["ok"] and "do not fit" in str(refused["error"]), refused
    assert agent.online()["blocks"] == way[-1]
    wait_until(lambda: promises.kept(span(way[-1])), 10, "what did not fit is withdrawn")
    assert agent.status()["restarts"]["container"] == 0


def tear(folder: Path) -> Path:
    """Cut the file with block 6 short, which was whole when the agent looked; returns it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / str(index["weight_map"]["model.layers.6.mlp.down_proj.weight"])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def test_bad_weights(swarm: Swarm, processes: Processes, tmp_path: Path, tiny_llama: Path) -> None:
    """A load that fails leaves everything as it was, and says so to everybody; once it is mended, the move works."""
    plugins = write_plugins(tmp_path / "plugins", reports=REPORTS)
    more = f'[plugins]\ndirs = ["{plugins}"]{LONG_PERIOD}'
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    agent = start(processes, tmp_path / "a", folder, swarm, more)
    peer_id, file = agent.online()["peer_id"], tear(folder)
    promises = Promises(swarm.peer, peer_id)
    with OpenSession(swarm.peer, peer_id, chain(0, 4), 16) as session:
        first = session.step(HIDDEN)
        refused = rebalance(agent, blocks="3:7")
        assert not refused["ok"] and file.name in str(refused["error"]), refused
        wait_until(lambda: promises.kept((0, 4)), 5, "what was arriving is withdrawn")
        both = torch.cat((HIDDEN, HIDDEN), dim=1)
        again = swarm.peer.step(peer_id, chain(0, 4), both)
        torch.testing.assert_close(
            torch.cat((first, session.step(HIDDEN)), dim=1), again, atol=1e-3, rtol=0.0
        )
    status = agent.online()
    assert status["blocks"] == "0:4" and status["restarts"]["container"] == 0
    (told,) = (event["message"] for event in agent.logged() if event["event"] == "move")
    assert told.startswith("blocks 3:7 were not taken, 0:4 go on") and file.name in told
    reports = plugins / "reports"
    wait_until(lambda: reports.exists() and reports.read_text(), 10, "the report")
    assert reports.read_text().startswith(f"False 0:4 {folder / file.name}")
    shutil.copy(tiny_llama / file.name, file)
    assert rebalance(agent, blocks="3:7", dry_run=True)["ok"]


def test_a_move_that_fails_is_not_tried_again_at_once(
    processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """Half of the blocks have no server, so that each look leads to the same move; it is made once that is possible."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    maddr = start_bootstrap(processes)
    agent = start_live(processes, tmp_path / "a", folder, "0:4", [maddr], AUTO)
    assert agent.online()["blocks"] == "0:4"
    file = tear(folder)
    start_live(processes, tmp_path / "fixed", tiny_llama, "0:4", [maddr])

    def failures() -> list[float]:
        return [event["time"] for event in agent.logged() if "were not taken" in event["message"]]

    wait_until(lambda: len(failures()) == 2, 60, "two moves that fail")
    agent.until(lambda status: "the last 2 moves failed" in status["balance"], 10, "a look that is left out")
    shutil.copy(tiny_llama / file.name, file)
    agent.until(lambda status: status["blocks"] == "4:8" and status["state"] == "online", 60, "the move")
    first, second, *others = failures()
    assert second - first > COOLDOWN_S and not others, failures()


def loading(peer: Peer, peer_id: str) -> bool:
    """Whether blocks 2:6 are announced as JOINING."""
    return peer.state(peer_id, "tiny.5") == 1


def offered(peer: Peer, peer_id: str) -> bool:
    """Whether they are ONLINE, and those that leave are withdrawn."""
    return [peer.state(peer_id, f"tiny.{block}") for block in (1, 5)] == [0, 2]


def draining(peer: Peer, peer_id: str) -> bool:
    """Whether those that leave are refused to whoever is new."""
    try:
        peer.info(peer_id, "tiny.0")
    except Exception:
        return True
    return False


@contextmanager
def holding(peer: Peer, peer_id: str) -> Iterator[None]:
    """A session on blocks 0:4, so that these are not dropped."""
    session = OpenSession(peer, peer_id, chain(0, 4), 16)
    session.step(HIDDEN)
    try:
        yield
    finally:
        with suppress(Exception):  # whoever it was with may be gone
            session.__exit__()


CASES = [
    ("container", signal.SIGKILL, loading),
    ("container", signal.SIGKILL, offered),
    ("container", signal.SIGKILL, draining),
    ("container", signal.SIGSTOP, loading),
    ("container", signal.SIGSTOP, draining),
    ("p2pd", signal.SIGKILL, loading),
    ("p2pd", signal.SIGKILL, offered),
    ("agent", signal.SIGKILL, loading),
    ("agent", signal.SIGKILL, offered),
]


@pytest.mark.parametrize(
    ("part", "number", "phase"),
    CASES,
    ids=[f"{part}-{kind.name}-{phase.__name__}" for part, kind, phase in CASES],
)
def test_somebody_dies_in_a_move(
    part: str,
    number: signal.Signals,
    phase: Callable[[Peer, str], bool],
    swarm: Swarm,
    processes: Processes,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    """Afterwards exactly one span is served and announced; nothing of another one is left in the DHT."""
    more = "" if phase is draining else LONG_PERIOD
    agent = start(processes, tmp_path / "a", tiny_llama, swarm, more, PETALS_AGENT_SLOW_S="7")
    before = agent.online()
    peer_id, pids, family = before["peer_id"], before["pids"], agent.family()
    if phase is loading:
        order = agent.config.parent / "orders" / "slow"
        order.touch()
        wait_until(lambda: not order.exists(), 10, "the order is taken")
    with holding(swarm.peer, peer_id), ThreadPoolExecutor(1) as pool:
        moving = pool.submit(rebalance, agent, blocks="2:6")
        wait_until(lambda: phase(swarm.peer, peer_id), 30, phase.__name__)
        os.kill(pids[part], number)
        if part == "agent":
            wait_until(lambda: all_gone(family), 10, "the end of its family")
            agent = start_again(processes, agent.config)
        else:
            agent.until(lambda status: status["pids"][part] not in (None, pids[part]), 60, f"another {part}")
    moving.result(60)
    blocks = str(agent.online()["blocks"])
    assert blocks == "0:4" if part == "agent" or (part == "container" and phase is loading) else "2:6"
    promises = Promises(swarm.peer, peer_id)
    wait_until(lambda: promises.kept(span(blocks)), 5, f"blocks {blocks} are promised, and no others")
    assert swarm.peer.step(peer_id, chain(*span(blocks)), HIDDEN).isfinite().all()
