"""One p2pd process: started with our identity, watched, and replaced without anyone else losing state."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import json
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from petals_agent.errors import DaemonError
from petals_agent.p2p import control
from petals_agent.processes import end_child, start_child

log = logging.getLogger("p2pd")  # not one of ours: of p2pd's own words, warnings and errors are shown

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "dpanic": logging.ERROR,
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}
PERSISTENT_MESSAGE_LIMIT = 4 * 2**20  # hivemind's DEFAULT_MAX_MSG_SIZE; both ends of the wire assume it


@dataclass(frozen=True)
class DaemonOptions:
    """What p2pd is started with; multiaddresses as text."""

    identity: Path | None = None  # None: a new identity each time
    initial_peers: Sequence[str] = ()
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)
    announce: Sequence[str] = ()
    client: bool = False  # no DHT records for others, and (with `listen` empty) nothing to dial
    routing: bool = True  # False: it looks for nobody, and dials only the addresses that it is given
    use_relay: bool = True
    use_auto_relay: bool = False
    auto_nat: bool = True
    nat_port_map: bool = True
    startup_timeout: float = 60.0
    socket_dir: Path = field(default_factory=lambda: Path("/tmp"))


def for_calls(
    socket_dir: Path, initial_peers: Sequence[str] = (), *, startup_timeout: float, use_relay: bool = True
) -> DaemonOptions:
    """Of a p2pd that only calls others: a new identity, nothing to dial, no records kept for others."""
    return DaemonOptions(
        initial_peers=initial_peers,
        listen=(),
        client=True,
        use_relay=use_relay,
        auto_nat=False,
        nat_port_map=False,
        startup_timeout=startup_timeout,
        socket_dir=socket_dir,
    )


def binary() -> Path:
    """The p2pd that the hivemind wheel brings."""
    spec = importlib.util.find_spec("hivemind.hivemind_cli")
    if spec is None or not spec.submodule_search_locations:
        raise DaemonError("hivemind is installed without p2pd; reinstall its wheel")
    return Path(next(iter(spec.submodule_search_locations))) / "p2pd"


class Daemon:
    """A running p2pd. `await Daemon.start(options)`, then `maddr` is its control address."""

    def __init__(self, process: asyncio.subprocess.Process, maddr: str) -> None:
        self.process = process
        self.maddr = maddr
        self.peer_id = ""
        self._last_line = ""
        self._stopping = False
        self._reader = asyncio.create_task(self._read_output(), name="p2pd output")

    @property
    def pid(self) -> int:
        return self.process.pid

    @classmethod
    async def start(cls, options: DaemonOptions) -> Daemon:
        """Start p2pd and wait until it answers.

        Raises DaemonError when a listen port is taken, with p2pd's last words when it exits, or after `startup_timeout`
        seconds.
        """
        check_ports(options.listen)
        path = options.socket_dir / f"p2pd-{secrets.token_hex(4)}.sock"
        try:
            process = await start_child(
                _command(options, path),
                environment={"GOLOG_LOG_FMT": "json", "GOLOG_LOG_LEVEL": _log_level()},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            raise DaemonError(
                f"{binary()} cannot be started ({error}); reinstall hivemind's wheel"
            ) from error
        self = cls(process, f"/unix{path}")
        try:
            async with asyncio.timeout(options.startup_timeout):
                await self._until_it_answers(path)
        except TimeoutError:
            await self.stop()
            raise DaemonError(
                f"p2pd did not start within {options.startup_timeout:g} s (last words: {self._last_line or 'none'}); "
                "raise swarm.daemon_startup_timeout, or check the bootstrap peers and the clock"
            ) from None
        except BaseException:
            await self.stop()
            raise
        return self

    async def _until_it_answers(self, path: Path) -> None:
        while True:
            if self.process.returncode is not None:
                await self._reader
                raise DaemonError(
                    f"p2pd ended at once with status {self.process.returncode}: {self._last_line or 'no output'}"
                )
            if path.exists():
                try:
                    self.peer_id, _ = await control.identify(self.maddr, timeout=2.0)
                    return
                except DaemonError:
                    pass  # the socket is there before its listener
            await asyncio.sleep(0.01)

    async def _read_output(self) -> None:
        assert self.process.stdout is not None
        while line := await _line(self.process.stdout):
            level, self._last_line = parse_line(line)
            log.log(logging.DEBUG if self._stopping else level, "%s", self._last_line)

    async def visible_maddrs(self) -> list[str]:
        """Addresses others can dial, with our peer id."""
        _, maddrs = await control.identify(self.maddr)
        return maddrs

    async def stop(self, grace: float = 2.0) -> None:
        """End the process and remove its socket."""
        self._stopping = True  # it calls its end an error
        await end_child(self.process, grace)
        await asyncio.gather(self._reader, return_exceptions=True)
        Path(control.unix_path(self.maddr)).unlink(missing_ok=True)


def parse_line(line: bytes) -> tuple[int, str]:
    """Level and text of one line of p2pd's log (JSON, as we ask for); a line of another form is a debug line, but for a crash's."""
    text = line.decode(errors="replace").strip()
    try:
        entry = json.loads(text)
        level = _LEVELS.get(entry["level"], logging.INFO)
        words = [str(entry[key]).strip() for key in ("logger", "msg", "error") if entry.get(key)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return logging.ERROR if text.startswith(("panic:", "fatal error:")) else logging.DEBUG, text
    return level, ": ".join(words)


def _log_level() -> str:
    """What p2pd shall say. That a routing table is empty is no news from it: we look ourselves, and it complains for ever."""
    level = "info" if log.isEnabledFor(logging.INFO) else "warn"
    return os.environ.get("GOLOG_LOG_LEVEL", f"{level},dht=error,dht/RtRefreshManager=error")


def check_ports(listen: Sequence[str]) -> None:
    """Raise DaemonError if p2pd could not listen on one of these multiaddresses alone.

    p2pd itself does not tell: two of them share a port (SO_REUSEPORT) and steal each other's callers, and one that cannot
    have all of its ports goes on with the others.
    """
    for maddr in listen:
        _, family, host, transport, port, *_ = [*maddr.split("/"), "", "", "", "", ""]
        if transport != "tcp" or port in ("", "0") or family not in ("ip4", "ip6"):
            continue
        try:
            with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == "ip6":
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((host, int(port)))
        except OSError as error:
            if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue  # a host without IPv6 is served by the other addresses
            taken = "another process listens there" if error.errno == errno.EADDRINUSE else error.strerror
            raise DaemonError(
                f"cannot listen on {maddr}: {taken}; free it or choose another address"
            ) from None


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # longer than the buffer: dropped by the reader
        return b"(a line too long to show)"


def _command(options: DaemonOptions, socket: Path) -> list[str]:
    flags: dict[str, object] = {
        "listen": f"/unix{socket}",
        "b": bool(options.initial_peers),
        "dhtClient" if options.client else "dhtServer": options.routing,
        "relay": options.use_relay,
        "autoRelay": options.use_auto_relay,
        "relayHopLimit": 0,
        "autonat": options.auto_nat,
        "natPortMap": options.nat_port_map,
        "connManager": True,
        "idleTimeout": "30s",
        "tls": True,
        "persistentConnMaxMsgSize": PERSISTENT_MESSAGE_LIMIT,
    }
    if options.identity is not None:
        flags["id"] = options.identity
    for name, values in (
        ("bootstrapPeers", options.initial_peers),
        ("hostAddrs", options.listen),
        ("announceAddrs", options.announce),
    ):
        if values:
            flags[name] = ",".join(values)
    if not options.listen:
        flags["noListenAddrs"] = True
    return [
        str(binary()),
        *(f"-{key}={int(value) if isinstance(value, bool) else value}" for key, value in flags.items()),
    ]
