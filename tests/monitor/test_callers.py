"""What callers may send and ask for: checks of reachability, limits, requests that are too long or never end."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from harness.processes import wait_until
from monitor import synthetic
from monitor.source import Served, served
from petals_agent.errors import LimitExceeded, SwarmError
from petals_agent.monitor.callers import Allowance
from petals_agent.monitor.web import Limits

STATE = synthetic.small()
PEER = STATE.models[0].servers[0].peer_id

# --- is this peer reachable?


@pytest.fixture
def dials() -> Iterator[Served]:
    limits = Limits()
    limits.checks = Allowance(rate=0.001, burst=6, all_rate=1.0, all_burst=10)
    with served(STATE, limits=limits) as one:
        yield one


def test_is_reachable(dials: Served) -> None:
    answer = httpx.get(f"{dials.url}/api/v1/is_reachable/{PEER}")
    assert answer.json() == {"ok": True, "success": True, "message": None, "your_ip": "127.0.0.1"}
    dials.given.answer = (False, "it does not answer")
    answer = httpx.get(f"{dials.url}/api/v1/is_reachable/{PEER}", headers={"X-Forwarded-For": "203.0.113.5"})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "ok": False,
        "success": False,
        "message": "it does not answer",
        "your_ip": "203.0.113.5",
    }
    assert dials.given.dialled == [PEER, PEER]


@pytest.mark.parametrize(
    "peer", ["x", "Qm", PEER[:-1], PEER + "1", "..%2f..", "%00", "a/b", "<script>", "l" * 2000]
)
def test_what_is_no_peer_id_is_not_dialled(dials: Served, peer: str) -> None:
    answer = httpx.get(f"{dials.url}/api/v1/is_reachable/{peer}")
    assert answer.status_code == 400
    assert answer.json()["success"] is answer.json()["ok"] is False
    assert re.search("base58|multihash|at most", answer.json()["message"])
    assert dials.given.dialled == []


def test_checks_are_limited_by_caller(dials: Served) -> None:
    address = f"{dials.url}/api/v1/is_reachable/{PEER}"
    first = {"X-Forwarded-For": "203.0.113.5"}
    codes = [httpx.get(address, headers=first).status_code for _ in range(8)]
    assert codes == [200] * 6 + [429] * 2
    refused = httpx.get(address, headers=first)
    assert int(refused.headers["retry-after"]) > 1 and "ask again" in refused.json()["message"]
    assert httpx.get(address, headers={"X-Forwarded-For": "203.0.113.6"}).status_code == 200


def test_nobody_keeps_all_checks_busy(dials: Served) -> None:
    """Peers that never answer take their whole time; who asks for many of them leaves some for others."""
    address = f"{dials.url}/api/v1/is_reachable/{PEER}"

    async def never(peer_id: str) -> tuple[bool, str]:
        dials.given.dialled.append(peer_id)
        await asyncio.to_thread(released.wait, 20)
        return False, "too late"

    async def ask_many() -> None:
        busy, other = {"X-Forwarded-For": "2001:db8::1"}, {"X-Forwarded-For": "203.0.113.6"}
        async with httpx.AsyncClient() as ask:
            hanging = [asyncio.create_task(ask.get(address, headers=busy)) for _ in range(4)]
            await asyncio.to_thread(
                wait_until, lambda: len(dials.given.dialled) == 4, 10, "the checks to run"
            )
            refused = await ask.get(address, headers={"X-Forwarded-For": "2001:db8::2"})
            assert refused.status_code == 429 and "4 checks" in refused.json()["message"]
            dials.given.check = usual  # type: ignore[method-assign]
            assert (await ask.get(address, headers=other)).status_code == 200
            released.set()
            assert [one.status_code for one in await asyncio.gather(*hanging)] == [200] * 4
            assert (await ask.get(address, headers=busy)).status_code == 200, "places become free"

    released = threading.Event()
    usual, dials.given.check = dials.given.check, never  # type: ignore[method-assign]
    asyncio.run(ask_many())


@pytest.mark.parametrize(
    ("error", "status"), [(LimitExceeded("too many checks run"), 429), (SwarmError("not in the swarm"), 503)]
)
def test_a_check_that_cannot_be_made(dials: Served, error: Exception, status: int) -> None:
    dials.given.answer = error
    answer = httpx.get(f"{dials.url}/api/v1/is_reachable/{PEER}")
    assert answer.status_code == status and answer.json()["message"] == str(error)
    assert "retry-after" in answer.headers


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served(STATE) as one:
        yield one


# --- what callers send


def raw(one: Served, data: bytes) -> bytes:
    """All that is answered to `data` until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", one.port), timeout=10) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:  # it does not wait for what it will not read
            pass
        return answer


def test_bounded_requests(here: Served) -> None:
    end = b"\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert raw(here, b"GET /healthz HTTP/1.1" + end).startswith(b"HTTP/1.1 200")
    assert raw(here, b"GET /" + b"a" * 5000 + b" HTTP/1.1" + end).startswith(b"HTTP/1.1 414")
    assert raw(here, b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + end).startswith(b"HTTP/1.1 431")
    endless = raw(here, b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000)
    assert endless == b"" or endless.startswith(b"HTTP/1.1 400")
    assert raw(here, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_who_never_ends_a_request_is_cut_off() -> None:
    with (
        served(STATE, request=2.0) as one,
        socket.create_connection(("127.0.0.1", one.port), timeout=30) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        try:
            assert connection.recv(10) == b""
        except ConnectionResetError:
            pass


def test_who_goes_on_asking_is_not_cut_off() -> None:
    """Answers are so quick that no look at the connection finds it busy."""
    with served(STATE, request=2.0) as one:
        connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=10)
        connection.connect()
        connection.auto_open = 0  # type: ignore[assignment]  # a new connection is none that was kept
        end = time.monotonic() + 4.5
        while time.monotonic() < end:
            connection.request("GET", "/healthz")
            with connection.getresponse() as answer:
                assert answer.status == 200 and answer.read()
            time.sleep(0.05)  # a caller's own pace
        connection.close()


def test_who_does_not_read_costs_a_piece_and_no_copy_of_all() -> None:
    state = synthetic.big(models=1, servers=1500)
    with served(state) as one:
        size = len(one.site.rendering.state_json.body)
        callers = [socket.socket() for _ in range(20)]
        for caller in callers:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect(("127.0.0.1", one.port))
            caller.sendall(b"GET /api/v1/state HTTP/1.1\r\nHost: x\r\n\r\n")

        def waiting() -> list[int]:
            return [connection.transport.get_write_buffer_size() for connection in one.connections]

        wait_until(lambda: len(waiting()) == 20 and min(waiting()) > 0, 20, "all answers to be stuck")
        assert size > 2_000_000 and max(waiting()) < 500_000
        assert httpx.get(f"{one.url}/healthz").status_code == 200
        for caller in callers:
            caller.close()
        wait_until(lambda: len(one.connections) == 0, 20, "the connections to be gone")
