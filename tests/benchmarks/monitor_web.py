"""What the monitor's page and API cost: rendering a refresh, requests/s on loopback, bytes, and time until the page is usable.

    monitor_web.py [--json] [--servers 1000] [--models 10] [--seconds 5]

The load comes from a process of its own on the same machine; where others work too, the CPU time of both says what
the machine could do for us alone. Figures of the browser are left out where there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import uvloop

from monitor import synthetic
from monitor.browser import chromium, tab, why_not
from monitor.screenshots import past
from monitor.source import Past, served
from petals_agent.monitor import pages
from petals_agent.monitor.documents import LEVEL
from petals_agent.monitor.rendering import Rendering, state_json
from petals_agent.monitor.state import SwarmState

CONNECTIONS = 16


def rendering(state: SwarmState, rounds: int = 3) -> dict[str, Any]:
    """CPU seconds of one refresh, and what its parts weigh in bytes."""
    points = past(time.time())
    days = {model.dht_prefix: points for model in state.models}
    costs = []
    for _ in range(rounds):
        before = time.process_time()
        done = Rendering(state, days, False, time.time())
        costs.append(time.process_time() - before)
    assets = pages.assets()
    files = [assets["monitor.css"], assets["monitor.js"], assets["flower.svg"]]
    page = done.overview
    return {
        "refresh_cpu_s": round(statistics.median(costs), 3),
        "first_page_bytes": len(page.body) + sum(len(one.body) for one in files),
        "first_page_bytes_sent": len(page.packed or page.body)
        + sum(len(one.packed or one.body) for one in files),
        "html_bytes": len(page.body),
        "state_bytes": len(done.state_json.body),
        "state_bytes_sent": len(done.state_json.packed or b""),
    }


def levels(state: SwarmState) -> dict[str, Any]:
    """What each level of gzip would cost and save on the API's document."""
    body, found = state_json(state), {}
    for level in range(1, 10):
        before = time.process_time()
        size = len(gzip.compress(body, level, mtime=0))
        found[str(level)] = {"cpu_s": round(time.process_time() - before, 3), "bytes": size}
    return {"used": LEVEL, "uncompressed": len(body), "levels": found}


@contextmanager
def site(servers: int, models: int) -> Iterator[tuple[int, psutil.Process]]:
    """The port of a site in a process of its own."""
    command = [sys.executable, __file__, "--serve", "--servers", str(servers), "--models", str(models)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield int(process.stdout.readline()), psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.wait(30)


def serve(servers: int, models: int) -> None:
    now = time.time()
    with served(synthetic.big(models, servers, now=now), Past(past(now))) as one:
        print(one.port, flush=True)
        sys.stdin.read()


class _Reader(asyncio.BufferedProtocol):
    """Asks for the same again and again, and reads answers into one buffer, so that the load costs little itself."""

    def __init__(self, request: bytes, end: float) -> None:
        self._request, self._end = request, end
        self._buffer = bytearray(1 << 20)
        self._head, self._left, self._began = b"", 0, 0.0
        self.took: list[float] = []
        self.size = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._left:
            self._left -= nbytes
        else:
            head, end, _ = (self._head + self._buffer[:nbytes]).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return
            assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 304")), head[:60]
            found = re.search(rb"content-length: (\d+)", head, re.I)
            self.size = int(found[1]) if found else 0
            self._left = self.size - (len(self._head) + nbytes - len(head) - len(end))
            self._head = b""
        if not self._left:
            self.took.append(time.perf_counter() - self._began)
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server ended the connection"))

    def _ask(self) -> None:
        if time.monotonic() < self._end:
            self._began = time.perf_counter()
            self._transport.write(self._request)
        else:
            self.done.set_result(None)
            self._transport.close()


async def load(port: int, server: psutil.Process, path: str, headers: str, seconds: float) -> dict[str, Any]:
    """Requests in closed loops over kept connections; answers are counted when they have been read whole."""
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()
    loop, began = asyncio.get_running_loop(), time.monotonic()
    before, own_before = server.cpu_times(), time.process_time()
    readers = []
    for _ in range(CONNECTIONS):
        _, one = await loop.create_connection(lambda: _Reader(request, began + seconds), "127.0.0.1", port)
        readers.append(one)
    async with asyncio.timeout(seconds + 30):
        await asyncio.gather(*(one.done for one in readers))
    spent, after, own = time.monotonic() - began, server.cpu_times(), time.process_time() - own_before
    took = sorted(one for reader in readers for one in reader.took)
    cpu = after.user + after.system - before.user - before.system
    return {
        "requests_per_s": round(len(took) / spent),
        "server_cpu_ms": round(cpu / len(took) * 1000, 3),
        "load_cpu_ms": round(own / len(took) * 1000, 3),
        "median_ms": round(took[len(took) // 2] * 1000, 2),
        "p99_ms": round(took[int(len(took) * 0.99)] * 1000, 2),
        "bytes": readers[0].size,
    }


def usable(port: int, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds from the click on a link to a page that shows all and answers to clicks, in a new profile each."""
    if reason := why_not():
        return {"left_out": reason}
    found = []
    with chromium() as browser:
        for _ in range(rounds + 1):
            with tab(browser) as one:
                before = time.perf_counter()
                one.page.goto(f"http://127.0.0.1:{port}/", wait_until="commit")
                one.page.wait_for_selector("html.with-script footer", state="attached")
                one.page.wait_for_selector('a.peer[role="button"]')
                found.append((time.perf_counter() - before) * 1000)
    return {"median_ms": round(statistics.median(found[1:])), "worst_ms": round(max(found[1:]))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=1000, help="of each model")
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.servers, arguments.models)
        return 0
    state = synthetic.big(arguments.models, arguments.servers)
    result: dict[str, Any] = {
        "servers": arguments.servers * arguments.models,
        "models": arguments.models,
        "rendering": rendering(state),
        "gzip": levels(state),
    }
    with site(arguments.servers, arguments.models) as (port, server):
        loads = {
            "state_gzip": ("/api/v1/state", "Accept-Encoding: gzip\r\n"),
            "state_not_modified": ("/api/v1/state", "If-None-Match: *\r\n"),
            "page_gzip": ("/", "Accept-Encoding: gzip\r\n"),
            "healthz": ("/healthz", ""),
        }
        result["load"] = {
            name: uvloop.run(load(port, server, path, headers, arguments.seconds))
            for name, (path, headers) in loads.items()
        }
        result["usable"] = usable(port)
    print(json.dumps(result, indent=None if arguments.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
