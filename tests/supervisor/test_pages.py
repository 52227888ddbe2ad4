"""The small HTTP server: right answers to right requests, and no harm from anything else."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.waiting import until
from petals_agent.supervisor import pages
from petals_agent.supervisor.pages import MAX_CONNECTIONS, MAX_REQUEST, Page, PageServer


def broken() -> Page:
    raise RuntimeError("on purpose")


@pytest.fixture
async def server() -> AsyncIterator[PageServer]:
    server = PageServer("127.0.0.1", 0, {"/metrics": lambda: Page(b"x 1\n" * 1000), "/broken": broken})
    await server.start()
    yield server
    await server.stop()


async def exchange(server: PageServer, request: bytes, *, end: bool = False) -> bytes:
    """Everything that comes back until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(request)
        if end:
            writer.write_eof()
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_a_page_as_a_client_reads_it(server: PageServer) -> None:
    def get() -> tuple[int, str | None, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/metrics?name=x", headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()

    assert await asyncio.to_thread(get) == (200, "text/plain; charset=utf-8", b"x 1\n" * 1000)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.0\n\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
        (b"GET /metrics HTTP/9.9\r\n\r\n", 400),
        (b"get /metrics\r\n\r\n", 400),
        (b"GET http://elsewhere/metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n", 400),
        (b"GET /" + b"a" * 2 * MAX_REQUEST + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 2 * MAX_REQUEST + b"\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * MAX_REQUEST + b"\r\n", 431),
    ],
)
async def test_answers(server: PageServer, request_: bytes, status: int) -> None:
    answer = await exchange(server, request_)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) or (status == 431 and answer == b"")
    assert status != 405 or b"\r\nAllow: GET\r\n" in answer


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
async def test_garbage(server: PageServer, request_: bytes) -> None:
    answer = await exchange(server, request_, end=True)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert (await exchange(server, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_slow_clients_are_sent_away(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PATIENCE_S", 0.2)
    assert await exchange(server, b"GET /metr") == b""
    assert not server._open


async def test_a_client_that_does_not_read(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PATIENCE_S", 0.2)
    server._pages["/big"] = lambda: Page(b"x" * 50_000_000)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(lazy.connect, ("127.0.0.1", server.port))
        lazy.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        await until(lambda: server._open, 10, "the connection")
        await until(lambda: not server._open, 10, "the end of patience")


async def test_who_holds_connections_keeps_nobody_out(server: PageServer) -> None:
    held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3 * MAX_CONNECTIONS)]
    await until(lambda: len(server._open) >= MAX_CONNECTIONS, 10, "a full house")
    assert (await exchange(server, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert len(server._open) <= MAX_CONNECTIONS
    for _, writer in held:
        writer.close()
    await until(lambda: not server._open, 10, "the end of all connections")


async def test_stop_ends_connections(server: PageServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await until(lambda: server._open, 10, "the connection")
    await server.stop()
    with pytest.raises(ConnectionError):
        assert await reader.read() == b""
        raise ConnectionError
    writer.close()
    assert not server._open
