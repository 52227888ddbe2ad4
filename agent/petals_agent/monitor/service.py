"""The monitor as a service: collector and web server in one process, and systemd told the truth about both."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.config import Config  # noqa: E402
from petals_agent.config.places import places  # noqa: E402
from petals_agent.config.values import parse_host_port  # noqa: E402
from petals_agent.errors import ConfigError, SwarmError  # noqa: E402
from petals_agent.log import event  # noqa: E402
from petals_agent.monitor.callers import Proxies  # noqa: E402
from petals_agent.monitor.collector import NOT_READ, Collector  # noqa: E402
from petals_agent.monitor.history import History  # noqa: E402
from petals_agent.monitor.patience import Patience  # noqa: E402
from petals_agent.monitor.shown import span_of_time  # noqa: E402
from petals_agent.monitor.site import Site  # noqa: E402
from petals_agent.monitor.web import create_app  # noqa: E402
from petals_agent.processes import raise_file_limit  # noqa: E402
from petals_agent.supervisor.notify import Notifier  # noqa: E402
from petals_agent.supervisor.tasks import first  # noqa: E402

log = logging.getLogger("petals_agent.monitor")

_MAX_HEADER = 16_384  # bytes of a request before its body
_MAX_CONNECTIONS = 2000
_BACKLOG = 512
_STOP_S = 5
_LOOK_S = 1.0


def run(config: Config) -> None:
    """Serve until SIGINT or SIGTERM; the swarm is read every `monitor.period`. Raises AgentError."""
    seek_cycles_rarely()
    asyncio.run(serve(config))


def seek_cycles_rarely() -> None:
    """For the whole process: a refresh makes up to a million values without a cycle, and Python would look at each again and again."""
    gc.set_threshold(50_000, 20, 20)


async def serve(config: Config) -> None:
    """The same in a running loop, whose signals it takes. Raises AgentError when it cannot start."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    raise_file_limit()
    notifier = Notifier()
    history, collector = _collector(config)
    with listen(config.monitor.listen) as listener:
        site = Site(collector)
        await site.start()
        server = make_server(create_app(site, Proxies(config.monitor.trusted_proxies)))
        serving = asyncio.create_task(server.serve([listener]))
        patience = Patience(server.server_state.connections)  # type: ignore[arg-type]
        address = "http://{}:{}".format(*_shown(listener))
        log.info("the swarm is shown at %s", address, extra=event("monitor", address=address))
        try:
            await first(
                stop.wait(),
                _ended(serving),
                collector.run(),
                site.run(),
                patience.run(),
                _tell(site, notifier, address),
            )
        finally:
            notifier.stopping()
            site.live.close()
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
            await collector.stop()
            await history.close()


def status_line(site: Site, address: str, now: float) -> str:
    """What `systemctl status` shows, from what is served at `now` (Unix seconds)."""
    state = site.rendering.state
    if not state.taken_at:
        return f"Reading the swarm for the first time ({state.problem}); {address}"
    models = Counter(model.state for model in state.models)
    states = ", ".join(f"{models[one]} {one}" for one in ("healthy", "degraded", "broken") if models[one])
    servers = Counter(server.state for model in state.models for server in model.servers)
    age = span_of_time(now - state.taken_at)
    return (
        f"{'' if site.fresh(now) else 'OUT OF DATE: '}{len(state.models)} models ({states or 'none'}), "
        f"{servers['online']} of {servers.total()} servers online, read {age} ago"
        f"{'; ' + state.problem if state.problem else ''}; {address}"
    )


async def _tell(site: Site, notifier: Notifier, address: str) -> NoReturn:
    """READY once it is known whether the swarm can be read; the watchdog starves when what is served is no longer fresh.

    Who has read nothing yet would read nothing after a restart either: the page stays, and says why.
    """
    pause = min(_LOOK_S, (notifier.watchdog_s or _LOOK_S * 3) / 3)
    while True:
        now, state = time.time(), site.rendering.state
        notifier.status(status_line(site, address, now))
        if state.problem == NOT_READ:
            notifier.extend_start()
        else:
            notifier.ready()
            if site.fresh(now) or not state.taken_at:
                notifier.ping()
        await asyncio.sleep(pause)


def _collector(config: Config) -> tuple[History, Collector]:
    peers = config.swarm.entry_peers
    if not peers:
        raise ConfigError("which swarm? the monitor needs swarm.initial_peers (or --initial-peers)")
    own = config.model.dht_prefix
    runtime = places(os.environ).runtime
    _make(runtime)
    _make(config.monitor.history.parent)
    history = History(config.monitor.history, config.monitor.retention)
    collector = Collector(
        peers,
        runtime,
        prefixes=[*config.monitor.prefixes, *(() if own == "auto" else (own,))],
        period=config.monitor.period,
        history=history,
        # in a swarm of one's own, private addresses are the usual ones
        allow_private=config.swarm.initial_peers != "public",
        startup_timeout=config.swarm.daemon_startup_timeout,
    )
    return history, collector


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SwarmError(
            f"{folder} cannot be made ({error.strerror}); the monitor keeps files there"
        ) from error


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals are ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: ASGIApp) -> uvicorn.Server:
    """The web server for `app`; its `serve` takes no signals."""
    logging.getLogger("uvicorn.error").setLevel(
        logging.ERROR
    )  # not a line for each nonsense that a scanner sends
    return _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=_STOP_S,
            h11_max_incomplete_event_size=_MAX_HEADER,
        )
    )


def listen(address: str) -> socket.socket:
    """A socket at "HOST:PORT" that connections can be made to. Raises SwarmError when there cannot be one."""
    host, port = parse_host_port(address)
    try:
        family, kind, number, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # heads and bodies go separately
            listener.bind(target)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise SwarmError(
            f"nobody can be served at {address} ({reason}); free it or change monitor.listen"
        ) from error
    return listener


def _shown(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    return f"[{host}]" if ":" in host else host, port


async def _ended(serving: asyncio.Task[None]) -> None:
    """Until the web server has ended, which it should not; raises what ended it."""
    await asyncio.wait([serving])
    serving.result()
    raise SwarmError("the web server has ended by itself")
