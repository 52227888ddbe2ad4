"""The heartbeat for any Python program: `start(period)` gives an event that stops it when it is set.

    from petals_agent import heartbeat
    handle = heartbeat.start(60, members=[…], initial_peers=[…], identity="me.key")   # all members are there
    …
    handle.set()                                                                      # or at exit, by itself

Semantics are those of TensorFlow DTensor's heartbeat. A program that uses torch imports it before this.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from petals_agent.config import Config, config_from, load_config
from petals_agent.errors import ConfigError, HeartbeatFailed, SwarmError
from petals_agent.heartbeat.fleet import Group, Listed, Roll
from petals_agent.heartbeat.member import Member, Told
from petals_agent.heartbeat.place import Place
from petals_agent.heartbeat.post import Post
from petals_agent.heartbeat.rules import Timing
from petals_agent.p2p.daemon import DaemonOptions
from petals_agent.swarm.identity import IdentityLock, ensure_identity

log = logging.getLogger("petals_agent.heartbeat")

OnFailure = Literal["exit", "unhealthy", "log"]
_STOP_S = 5.0
_EXIT_S = 15.0  # after a failure that ends the program: what is in the way then is left alone

_lock = threading.Lock()
_running: Handle | None = None


@dataclass(frozen=True)
class _Options:
    members: tuple[str, ...]
    group: str
    size: int | None
    on_failure: OnFailure
    timing: Timing
    daemon: DaemonOptions


class Handle(threading.Event):
    """Set it to stop the heartbeat. `failure` is why the fleet is not consistent, or None while it is."""

    def __init__(self, options: _Options, before: Handle | None = None) -> None:
        """`before` had the same identity and has been told to stop."""
        super().__init__()
        self._options, self._before = options, before
        self._member: Member | None = None
        self._identity: IdentityLock | None = None
        self._stop: Callable[[], object] | None = None  # no lock: signal handlers set us, too
        self._begun = threading.Event()  # or ended
        self._beats = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="petals-agent heartbeat", daemon=True)

    # --- for the program

    def set(self) -> None:
        """Stop. The others will find that we are gone: stop all of them about together."""
        super().set()
        if self._stop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                self._stop()

    @property
    def failure(self) -> str | None:
        """The last fatal failure, until all members beat together again; None with on_failure = "log"."""
        member = self._member
        if member is None or self._options.on_failure != "unhealthy":
            return None
        return member.failure if self._error is None else f"the heartbeat ended: {self._error!r:.300}"

    def status(self) -> dict[str, Any]:
        """Members, round, failures in a row and more, as `petals-agent heartbeat --json` shows them; empty once stopped."""
        return self._member.to_dict() if self._member is not None and self.alive else {}

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the heartbeat's thread and its p2pd have ended."""
        self._thread.join(timeout)

    def begin(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def wait_for_all(self, timeout: float | None) -> None:
        """Until all members beat together. Raises what kept them from it, SwarmError after `timeout` seconds."""
        there = self._begun.wait(timeout)
        if self._error is not None:
            raise self._error
        if not there:
            member = self._member
            problem = member.problem if member is not None else "p2pd is not there"
            self.set()
            self.join(_STOP_S)
            raise SwarmError(
                f"the heartbeat did not start within {timeout:g} s: {problem}; start all members"
            )

    # --- its own thread

    def _run(self) -> None:
        try:
            if self._before is not None:
                self._before.join(2 * _STOP_S)
                self._before = None
            asyncio.run(self._main())
        except BaseException as error:
            self._error = error
            if self._beats and (isinstance(error, HeartbeatFailed) or not self.is_set()):
                self._break_off(error)
        finally:
            self._begun.set()

    def _break_off(self, error: BaseException) -> None:
        """It ended by itself: a failure of the fleet, or a mistake of ours, after which nobody here would notice one."""
        ends = self._options.on_failure == "exit"
        if ends:
            self._exit_soon()
        known = isinstance(error, HeartbeatFailed)
        log.critical("%s", error if known else f"the heartbeat ended: {error!r}", exc_info=not known)
        if ends:
            logging.shutdown()
            os._exit(HeartbeatFailed.exit_code)  # whatever the program's other threads are doing

    def _exit_soon(self) -> None:
        """Even if a stream that nobody reads, or p2pd, keeps us from ending in order."""
        timer = threading.Timer(_EXIT_S, os._exit, (HeartbeatFailed.exit_code,))
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no more threads: the interpreter ends
            timer.start()

    async def _main(self) -> None:
        options = self._options
        stop = asyncio.Event()
        self._stop = partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set)
        if self.is_set():  # looked at last, as `set` looks at `_stop` last
            return
        identity = options.daemon.identity
        assert identity is not None
        me = ensure_identity(identity)
        self._identity = IdentityLock(identity)
        try:
            with tempfile.TemporaryDirectory(prefix="petals-heartbeat-") as folder:
                await self._beat(me, stop, Path(folder))
        finally:
            self._identity.release()

    def forget(self) -> None:
        """In a forked process: our identity stays with the parent, and is free when that ends."""
        if self._identity is not None:
            self._identity.release()

    async def _beat(self, me: str, stop: asyncio.Event, folder: Path) -> None:
        options = self._options

        async def answer(peer_id: str, request: Any) -> Any:
            return await member.answer(peer_id, request)

        post = Post(answer, lambda peer_id: member.admits(peer_id), folder)
        place = Place(replace(options.daemon, socket_dir=folder), post, with_dht=not options.members)
        roll: Roll
        if options.members:
            roll = Listed(options.members, options.timing.period)
            roll.check_member(me)
        else:
            roll = Group(options.group, options.size, options.timing.period, place.node)

        def tell(told: Told) -> None:
            if told.failure is None:
                log.info("%d members beat together", len(told.members))
                place.members = tuple(peer for peer in told.members if peer != me)
                self._beats = True
                self._begun.set()
                return
            if options.on_failure == "exit" and not self.is_set():
                if self._beats:
                    self._exit_soon()
                raise HeartbeatFailed(f"the fleet is not consistent: {told.failure}")
            log.warning("the fleet is not consistent: %s", told.failure)

        member = self._member = Member(me, roll, options.timing, post.ask, tell)
        await post.start()
        tasks = [asyncio.create_task(part) for part in (place.run(), member.run(), stop.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            await post.stop()
        for result in ended:
            if isinstance(result, Exception):
                raise result
        if not stop.is_set():
            raise SwarmError("a task of the heartbeat was cancelled by somebody else")


def start(
    period: float | None = None,
    *,
    members: Sequence[str] | None = None,
    group: str | None = None,
    size: int | None = None,
    on_failure: OnFailure = "exit",
    initial_peers: Sequence[str] | None = None,
    listen: Sequence[str] | None = None,
    identity: str | Path | None = None,
    start_timeout: float | None = 300.0,
    config: Path | None = None,
    timing: Timing | None = None,
) -> Handle:
    """Beat with the other members every `period` seconds; returns when all are there and have one token.

    `members` are peer ids, ours among them; or a named `group`, of `size` members (None: those who come). `on_failure`:
    "exit" ends this process at once with status 75, "unhealthy" sets the handle's `failure`, "log" only warns; after the latter two
    the members gather anew. `identity` is the key file that is our peer id, made if it is missing, and for one program only.
    `initial_peers` and `listen` are multiaddresses. What is None comes from the agent's configuration ([heartbeat] and [swarm]).
    `timing` is for tests.

    A second start is ignored: it returns the running handle, at once. Raises ConfigError; SwarmError when not all members are there
    after `start_timeout` seconds (None: wait for ever); with "exit" HeartbeatFailed when their tokens are unequal at the start.
    """
    global _running
    with _lock:
        if _running is not None and not _running.is_set() and _running.alive:
            log.warning("a heartbeat is running already: this start is ignored")
            return _running
        beat = {
            "members": members,
            "group": group,
            "size": size,
            "period": period,
            "on_failure": on_failure,
        }
        swarm = {"initial_peers": initial_peers, "listen": listen, "identity": identity}
        options = _options(_given(beat), _given(swarm), config)
        _running = handle = Handle(replace(options, timing=timing or options.timing), _running)
        handle.begin()
    handle.wait_for_all(start_timeout)
    return handle


def _given(table: dict[str, Any]) -> dict[str, Any]:
    """What is not None, as a configuration file would hold it."""
    plain = {
        key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for key, value in table.items()
    }
    return {key: value for key, value in plain.items() if value is not None}


def _options(beat: dict[str, Any], swarm: dict[str, Any], path: Path | None) -> _Options:
    """What is not given is taken from the configuration, which is read only then. Raises ConfigError."""
    fleet = "members" in beat or "group" in beat
    if fleet:
        beat = {"members": [], "group": "", "size": "auto", **beat}
    mine = config_from({"heartbeat": beat, "swarm": swarm})
    complete = fleet and "period" in beat and {"initial_peers", "listen", "identity"} <= swarm.keys()
    base = Config() if complete else load_config(path, require_model=False)
    own = base.heartbeat.model_copy(update={key: getattr(mine.heartbeat, key) for key in beat})
    net = base.swarm.model_copy(update={key: getattr(mine.swarm, key) for key in swarm})
    if not own.members and not own.group:
        raise ConfigError("a heartbeat needs heartbeat.members (peer ids) or heartbeat.group (a name)")
    daemon = DaemonOptions(
        identity=net.identity,
        initial_peers=net.entry_peers,
        listen=net.listen,
        announce=net.announce,
        use_relay=net.relay,
        use_auto_relay=net.relay,
        startup_timeout=net.daemon_startup_timeout,
    )
    size = None if own.size == "auto" else own.size
    return _Options(own.members, own.group, size, own.on_failure, Timing.of(own.period), daemon)


def _stop_at_exit() -> None:
    handle = _running
    if handle is not None and handle.alive:
        handle.set()
        handle.join(_STOP_S)


def _forget_in_child() -> None:
    """A forked process has no heartbeat: the thread stayed with the parent."""
    global _running, _lock
    if _running is not None:
        _running.forget()
    _running, _lock = None, threading.Lock()


atexit.register(_stop_at_exit)
os.register_at_fork(after_in_child=_forget_in_child)
