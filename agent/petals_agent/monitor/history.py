"""What the monitor remembers: which servers were there when, and how well each model was covered, in SQLite."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from petals_agent.monitor.state import Model, ServerState, SwarmState

log = logging.getLogger("petals_agent.monitor")

VERSION = 1
MAX_SERVERS = 10_000
MAX_MODELS = 200
DAY_S = 86400.0
TIERS = ((60, DAY_S), (600, 7 * DAY_S), (3600, 60 * DAY_S), (6 * 3600, float("inf")))
"""Seconds of a bucket, and for how long such buckets are kept (the last ones for the retention)."""
_TIMEOUT_S = 5.0
_SCHEMA = """
CREATE TABLE server (
    id INTEGER PRIMARY KEY, peer_id TEXT UNIQUE NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL
);
CREATE TABLE presence (
    server INTEGER NOT NULL REFERENCES server ON DELETE CASCADE, hour INTEGER NOT NULL, online INTEGER NOT NULL,
    PRIMARY KEY (server, hour)
) WITHOUT ROWID;
CREATE TABLE reading (hour INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE model (id INTEGER PRIMARY KEY, dht_prefix TEXT UNIQUE NOT NULL, last_seen REAL NOT NULL);
CREATE TABLE coverage (
    model INTEGER NOT NULL REFERENCES model ON DELETE CASCADE, seconds INTEGER NOT NULL, at INTEGER NOT NULL,
    readings INTEGER NOT NULL, weakest REAL NOT NULL, mean REAL NOT NULL, uncovered INTEGER NOT NULL,
    online REAL NOT NULL, joining REAL NOT NULL, offline REAL NOT NULL, unreachable REAL NOT NULL,
    PRIMARY KEY (model, seconds, at)
) WITHOUT ROWID;
"""
_COUNTS: tuple[ServerState, ...] = ("online", "joining", "offline", "unreachable")
# a mean of what was and what comes
_MEANS = ", ".join(
    f"{name} = ({name} * readings + excluded.{name}) / (readings + 1)" for name in ("mean", *_COUNTS)
)
_ADD_COVERAGE = f"""
INSERT INTO coverage VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET {_MEANS},
    readings = readings + 1, weakest = min(weakest, excluded.weakest), uncovered = max(uncovered, excluded.uncovered)
"""
_ADD_SERVER = """
INSERT INTO server (peer_id, first_seen, last_seen) VALUES (?, ?, ?)
ON CONFLICT DO UPDATE SET first_seen = min(first_seen, excluded.first_seen), last_seen = excluded.last_seen
"""
_ADD_PRESENCE = """
INSERT INTO presence SELECT id, ?, 1 FROM server WHERE peer_id = ? ON CONFLICT DO UPDATE SET online = online + 1
"""
# whom a flood of new peer ids shall not push out: those that were there for long
_TOO_MANY_SERVERS = """
DELETE FROM server WHERE id IN (SELECT id FROM server ORDER BY last_seen - first_seen DESC, id LIMIT -1 OFFSET ?)
"""
_TOO_MANY_MODELS = """
DELETE FROM model WHERE id IN (SELECT id FROM model ORDER BY last_seen DESC, id LIMIT -1 OFFSET ?)
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Presence:
    """What is remembered of one server; `first_seen` is Unix time, `uptime` the share of the last 24 h it was online."""

    first_seen: float
    uptime: float | None


@dataclass(frozen=True)
class Point:
    """A model at one time (Unix seconds, the start of a bucket of `seconds`); rates in tokens/s, counts are means."""

    at: float
    seconds: float
    weakest: float  # of the slowest block, at the worst moment
    mean: float  # over the blocks
    uncovered: int  # blocks without server, at the worst moment
    online: float
    joining: float
    offline: float
    unreachable: float


class History:
    """A file that may be lost, broken or full at any time: then the monitor goes on without, and the log says so."""

    def __init__(self, path: Path | None, retention: float) -> None:
        """`path` None: in memory only. `retention` of coverage in seconds."""
        self._path = path
        self._retention = retention
        self._database: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._late: asyncio.Future[Any] | None = None  # what took longer than we waited
        self._problem = ""  # told already

    async def record(self, state: SwarmState) -> None:
        """Note one reading; never raises."""
        await self._do(lambda database: _record(database, state, self._retention), None)

    async def presence(self, peer_ids: Iterable[str]) -> Mapping[str, Presence]:
        """What is known of these servers; empty when the file cannot be read."""
        wanted = set(peer_ids)
        return await self._do(lambda database: _presence(database, wanted, time.time()), {})

    async def coverage(self, prefix: str, since: float) -> list[Point]:
        """A model's past from Unix time `since` on, oldest first, at most some 2 000 points: the younger, the finer.

        Beyond a day a point stands for ten minutes, beyond a week for an hour, beyond two months for six. Empty when
        nothing is known.
        """
        return await self._do(lambda database: _coverage(database, prefix, since, time.time()), [])

    async def close(self) -> None:
        """Close the file."""
        database, self._database = self._database, None
        if database is not None:
            with suppress(TimeoutError):
                await self._within(database.close)
        self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        if self._late is not None and not self._late.done():
            return otherwise
        try:
            result = await self._within(lambda: self._with_database(work))
        except (sqlite3.Error, OSError) as error:
            self._tell(f"history is not kept: {self._path}: {error}")
            return otherwise
        except TimeoutError:
            self._tell(f"history is not kept: {self._path} did not answer within {_TIMEOUT_S:g} s")
            return otherwise
        self._problem = ""
        return result

    def _with_database(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """In the thread."""
        if self._database is None:
            self._database = _open(self._path)
        try:
            with self._database:
                return work(self._database)
        except sqlite3.DatabaseError as error:
            self._database.close()
            self._database = None
            if self._path is not None and _is_broken(error):
                _move_aside(self._path, str(error))
            raise

    async def _within(self, work: Callable[[], T]) -> T:
        task = asyncio.get_running_loop().run_in_executor(self._thread, work)
        done, _ = await asyncio.wait([task], timeout=_TIMEOUT_S)
        if not done:
            self._late = task
            task.add_done_callback(lambda late: late.exception())
            raise TimeoutError
        return task.result()

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            log.warning("%s", problem)
        self._problem = problem


def _open(path: Path | None) -> sqlite3.Connection:
    """The database with its tables; one that is broken, or of another version, is moved aside. Raises sqlite3.Error, OSError."""
    if path is None:
        return _connect(":memory:")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(str(path))
    except sqlite3.DatabaseError as error:
        if not _is_broken(error):
            raise
        _move_aside(path, str(error))
        return _connect(str(path))


def _connect(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, timeout=_TIMEOUT_S)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA foreign_keys = ON")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            raise _Foreign(f"its tables are of version {version}, ours of {VERSION}")
        fault = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise _Foreign(str(fault))
    except BaseException:
        database.close()
        raise
    return database


class _Foreign(sqlite3.DatabaseError):
    """A file that we cannot go on with."""


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # without the details
    return isinstance(error, _Foreign) or code in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,  # e.g. tables that are not ours
    )


def _move_aside(path: Path, why: str) -> None:
    aside = path.with_name(path.name + ".broken")
    log.warning("history begins anew: %s is unusable (%s) and is now %s", path, why, aside.name)
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()


def _record(database: sqlite3.Connection, state: SwarmState, retention: float) -> None:
    now, hour = state.taken_at, int(state.taken_at // 3600)
    servers = {
        server.peer_id for model in state.models for server in model.servers if server.state != "offline"
    }
    online = {
        server.peer_id for model in state.models for server in model.servers if server.state == "online"
    }
    database.executemany(_ADD_SERVER, ((peer, now, now) for peer in servers))
    database.execute(_TOO_MANY_SERVERS, (MAX_SERVERS,))
    database.executemany(_ADD_PRESENCE, ((hour, peer) for peer in online))
    database.execute("INSERT INTO reading VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1", (hour,))
    for model in state.models:
        database.execute(
            "INSERT INTO model (dht_prefix, last_seen) VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET last_seen = excluded.last_seen",
            (model.dht_prefix, now),
        )
        (number,) = database.execute(
            "SELECT id FROM model WHERE dht_prefix = ?", (model.dht_prefix,)
        ).fetchone()
        figures = _figures(model)
        database.executemany(
            _ADD_COVERAGE, ((number, size, int(now // size) * size, *figures) for size, _ in TIERS)
        )
    database.execute(_TOO_MANY_MODELS, (MAX_MODELS,))
    for size, kept in TIERS:
        oldest = now - min(kept, retention)
        database.execute("DELETE FROM coverage WHERE seconds = ? AND at < ?", (size, oldest))
    database.execute("DELETE FROM presence WHERE hour < ?", (hour - 24,))
    database.execute("DELETE FROM reading WHERE hour < ?", (hour - 24,))
    database.execute("DELETE FROM server WHERE last_seen < ?", (now - retention,))


def _figures(model: Model) -> tuple[float, ...]:
    rates = model.throughput
    states = [server.state for server in model.servers]
    mean = sum(rates) / len(rates) if rates else 0.0
    return model.weakest, mean, model.online.count(0), *(float(states.count(name)) for name in _COUNTS)


def _presence(database: sqlite3.Connection, wanted: set[str], now: float) -> dict[str, Presence]:
    hour = int(now // 3600)
    day = (hour - 23, hour)  # what a wrong clock wrote into the future does not count
    (readings,) = database.execute(
        "SELECT total(count) FROM reading WHERE hour BETWEEN ? AND ?", day
    ).fetchone()
    rows = database.execute(
        "SELECT peer_id, first_seen,"
        " (SELECT total(online) FROM presence WHERE server = id AND hour BETWEEN ? AND ?) FROM server",
        day,
    )
    return {
        peer: Presence(first_seen, min(online / readings, 1.0) if readings else None)
        for peer, first_seen, online in rows
        if peer in wanted
    }


def _coverage(database: sqlite3.Connection, prefix: str, since: float, now: float) -> list[Point]:
    size = next(size for size, kept in TIERS if now - since <= kept)
    rows = database.execute(
        "SELECT at, seconds, weakest, mean, uncovered, online, joining, offline, unreachable FROM coverage"
        " JOIN model ON model = id WHERE dht_prefix = ? AND seconds = ? AND at > ? AND at <= ? ORDER BY at LIMIT 20000",
        (prefix, size, since - size, now),
    )
    return [Point(*row) for row in rows]
