"""History: what it tells, that it stays small, and that a lost, broken or full file stops nobody."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from petals_agent.monitor import history
from petals_agent.monitor.history import DAY_S, History
from petals_agent.monitor.state import SwarmState
from petals_agent.swarm.records import ServerState

from .swarms import peer, reading, records, reported

MONTH_S = 30 * DAY_S


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[History]:
    """A history in a file."""
    made = History(tmp_path / "deep" / "monitor.sqlite", MONTH_S)
    yield made
    await made.close()


def at(moment: float, *seeds: int, blocks: int = 2, prefix: str = "m") -> SwarmState:
    """The swarm at Unix time `moment`: these servers hold all blocks, with as many tokens/s as their seed says."""
    servers = [records(seed, 0, blocks, rps=float(seed), expires=moment + 60) for seed in seeds]
    return reported(reading(blocks, *servers, prefix=prefix), now=moment)


async def test_first_seen_and_uptime(kept: History) -> None:
    now = time.time()
    for minutes, seeds in ((90, (1,)), (60, (1, 2)), (30, (2,)), (1, (1, 2))):
        await kept.record(at(now - 60 * minutes, *seeds))
    found = await kept.presence([peer(1), peer(2), peer(3)])
    assert set(found) == {peer(1), peer(2)}
    assert found[peer(1)].first_seen == pytest.approx(now - 5400) and found[peer(1)].uptime == 0.75
    assert found[peer(2)].first_seen == pytest.approx(now - 3600) and found[peer(2)].uptime == 0.75


async def test_a_server_that_only_joins_has_no_uptime(kept: History) -> None:
    now = time.time()
    await kept.record(reported(reading(2, records(1, 0, 2, ServerState.JOINING)), now=now))
    assert (await kept.presence([peer(1)]))[peer(1)].uptime == 0.0


async def test_what_a_wrong_clock_wrote_into_the_future_does_not_count(kept: History) -> None:
    now = time.time()
    await kept.record(at(now + 3 * DAY_S, 1))
    await kept.record(at(now - 60, 1, 2))
    found = await kept.presence([peer(1), peer(2)])
    assert [found[peer(seed)].uptime for seed in (1, 2)] == [1.0, 1.0]
    assert found[peer(1)].first_seen == pytest.approx(now - 60)
    for since in (now - 3600, now - 2 * DAY_S):
        assert [point.online for point in await kept.coverage("m", since)] == [2.0]


async def test_coverage_keeps_the_worst_and_the_mean(kept: History) -> None:
    start = time.time() // 60 * 60 - 600
    await kept.record(at(start + 1, 10, 20))
    await kept.record(at(start + 31))
    (point,) = await kept.coverage("m", start - 60)
    assert (point.at, point.seconds) == (start, 60)
    assert (point.weakest, point.mean, point.uncovered, point.online) == (0.0, 15.0, 2, 1.0)
    assert await kept.coverage("other", start) == []


async def test_the_older_the_coarser_and_then_forgotten(kept: History) -> None:
    now = time.time() // 3600 * 3600
    for hours in (24 * 31, 24 * 20, 24 * 3, 2, 1, 0):
        await kept.record(at(now - 3600 * hours, 5))
    day, week, month = [await kept.coverage("m", now - age) for age in (DAY_S / 2, 6 * DAY_S, 29 * DAY_S)]
    assert [(point.seconds, round((now - point.at) / 3600)) for point in day] == [(60, 2), (60, 1), (60, 0)]
    assert (week[0].seconds, round((now - week[0].at) / 3600)) == (600, 72)
    assert [round((now - point.at) / 3600) for point in month] == [480, 72, 2, 1, 0]
    everything = await kept.coverage("m", 0)
    assert all(point.at > now - MONTH_S - 6 * 3600 for point in everything)


async def test_it_survives_a_restart(tmp_path: Path) -> None:
    now = time.time()
    for seed in (1, 2):
        kept = History(tmp_path / "h", MONTH_S)
        await kept.record(at(now, seed))
        await kept.close()
    kept = History(tmp_path / "h", MONTH_S)
    assert set(await kept.presence([peer(1), peer(2)])) == {peer(1), peer(2)}
    await kept.close()


async def test_a_flood_of_peer_ids_stays_bounded_and_drives_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_SERVERS", 50)
    monkeypatch.setattr(history, "MAX_MODELS", 3)
    kept, now = History(tmp_path / "h", MONTH_S), time.time()
    for turn in range(6):
        seeds = (1, *range(100 + 40 * turn, 140 + 40 * turn))
        await kept.record(at(now - 60 + turn, *seeds, prefix=f"m{turn}"))
    assert peer(1) in await kept.presence([peer(1)])
    await kept.close()
    with closing(sqlite3.connect(tmp_path / "h")) as database:
        count = {
            name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in ("server", "presence", "model")
        }
        assert count["server"] == 50 and count["presence"] <= 50 and count["model"] == 3
        assert (
            database.execute(
                "SELECT count(*) FROM coverage WHERE model NOT IN (SELECT id FROM model)"
            ).fetchone()[0]
            == 0
        )


@pytest.mark.parametrize("damage", ["no database", "torn", "another's tables", "of the future"])
async def test_a_file_that_is_unusable_is_moved_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, now = tmp_path / "h", time.time()
    if damage == "no database":
        path.write_bytes(b"this is none" * 1000)
    elif damage == "torn":
        kept = History(path, MONTH_S)
        for turn in range(20):
            await kept.record(at(now - 60 * turn, *range(1, 40)))
        await kept.close()
        raw = bytearray(path.read_bytes())
        raw[5000:-100] = b"\xff" * len(raw[5000:-100])
        path.write_bytes(raw)
    else:
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE server (x)")
            database.execute("PRAGMA user_version = 99" if "future" in damage else "PRAGMA user_version = 1")
    before = path.read_bytes()
    kept = History(path, MONTH_S)
    for _ in range(2):  # tables that are not ours show at the first use only
        await kept.record(at(now, 1))
    assert peer(1) in await kept.presence([peer(1)])
    await kept.close()
    assert (tmp_path / "h.broken").read_bytes()[:16] == before[:16]
    assert any("begins anew" in record.message for record in caplog.records)


async def test_a_place_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept = History(tmp_path / "file" / "h", MONTH_S)
    for _ in range(3):
        await kept.record(at(time.time(), 1))
    assert await kept.presence([peer(1)]) == {} and await kept.coverage("m", 0) == []
    await kept.close()
    assert len([record for record in caplog.records if "history is not kept" in record.message]) == 1


WRITING = """
import asyncio, sys, time
from pathlib import Path
from monitor.test_history import at
from petals_agent.monitor.history import History

async def main():
    kept = History(Path(sys.argv[1]), 86400.0)
    for turn in range(100_000):
        await kept.record(at(time.time(), *range(100)))
        print(turn, flush=True)

asyncio.run(main())
"""


def killed_while_it_writes(path: Path) -> int:
    """How many readings it had told that it wrote."""
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{WRITING}"]
    with subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, text=True) as writing:
        assert writing.stdout is not None
        while (written := int(writing.stdout.readline())) < 20:
            pass
        writing.kill()
    return written


async def test_killed_while_it_writes(tmp_path: Path) -> None:
    written = killed_while_it_writes(tmp_path / "h")
    kept = History(tmp_path / "h", MONTH_S)
    assert len(await kept.presence(map(peer, range(100)))) == 100
    await kept.close()
    assert not (tmp_path / "h.broken").exists()
    with closing(sqlite3.connect(tmp_path / "h")) as database:
        (count,) = database.execute("SELECT sum(count) FROM reading").fetchone()
        assert count > written


FULL = """
import asyncio, resource, sys, time
from pathlib import Path
from monitor.test_history import at, peer
from petals_agent.monitor.history import History

async def main():
    path = Path(sys.argv[1])
    kept = History(path, 86400.0)
    await kept.record(at(time.time(), 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 8192, resource.RLIM_INFINITY))
    for turn in range(30):
        await kept.record(at(time.time(), *range(100 * turn, 100 * turn + 100)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await kept.record(at(time.time(), 7777))
    assert peer(7777) in await kept.presence([peer(7777)])
    assert peer(1) in await kept.presence([peer(1)])
    await kept.close()

asyncio.run(main())
"""


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """Simulated by a limit on the size of files, in a process of its own."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{FULL}", str(tmp_path / "h")],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "history is not kept" in done.stderr


async def test_a_file_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_TIMEOUT_S", 0.2)
    kept, now = History(tmp_path / "h", MONTH_S), time.time()
    await kept.record(at(now, 1))
    with closing(sqlite3.connect(tmp_path / "h", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        async with asyncio.timeout(5):
            await kept.record(at(now, 2))
        other.execute("ROLLBACK")
    for _ in range(200):  # until the late write has given up
        if found := await kept.presence([peer(1)]):
            break
        await asyncio.sleep(0.05)
    assert peer(1) in found
    await kept.close()
