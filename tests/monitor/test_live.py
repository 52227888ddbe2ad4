"""News over server-sent events: what listeners get, how many there may be, and who is too slow."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from harness.processes import wait_until
from monitor import synthetic
from monitor.source import served
from petals_agent.errors import LimitExceeded
from petals_agent.monitor.live import Live

STATE = synthetic.small()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events as they come; comments count as events without a name."""
    one: dict[str, Any] = {}
    for line in lines:
        if line.startswith(":"):
            yield {"comment": line[1:].strip()}
        elif line:
            name, _, value = line.partition(": ")
            one[name] = value
        elif one:
            if "event" in one:
                yield {**one, "data": json.loads(one["data"])}
            one = {}


def test_each_new_state_is_told() -> None:
    with served(STATE) as one, httpx.stream("GET", f"{one.url}/events", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store" and "content-encoding" not in answer.headers
        news = events(answer.iter_lines())
        first = next(news)
        assert first["event"] == "state" and first["data"]["taken_at"] == STATE.taken_at
        one.give(STATE.model_copy(update={"taken_at": STATE.taken_at + 60}))
        second = next(news)
        assert second["data"]["taken_at"] == STATE.taken_at + 60 and second["id"] != first["id"]


def test_who_comes_back_is_told_only_what_is_new() -> None:
    live = Live(heartbeat=0.2)
    with served(STATE, live=live) as one:
        with httpx.stream("GET", f"{one.url}/events", timeout=10) as answer:
            seen = next(events(answer.iter_lines()))["id"]
        headers = {"Last-Event-ID": seen}
        with httpx.stream("GET", f"{one.url}/events", timeout=10, headers=headers) as answer:
            assert next(events(answer.iter_lines())) == {"comment": "still here"}
        with httpx.stream("GET", f"{one.url}/events", timeout=10, headers={"Last-Event-ID": "old"}) as answer:
            assert next(events(answer.iter_lines()))["id"] == seen


def test_listeners_are_bounded_and_places_become_free() -> None:
    with (
        served(STATE, live=Live(max_listeners=2, heartbeat=0.1)) as one,
        httpx.Client(base_url=one.url) as ask,
    ):
        with ask.stream("GET", "/events") as first, ask.stream("GET", "/events") as second:
            lines = [answer.iter_lines() for answer in (first, second)]  # they end with their iterators
            for each in lines:
                next(each)
            refused = ask.get("/events")
            assert refused.status_code == 503 and refused.headers["retry-after"] == "30"
            assert ask.get("/").status_code == 200
        wait_until(lambda: one.site.live.listeners == 0, 10, "the places to be free")
        with ask.stream("GET", "/events") as again:
            assert again.status_code == 200


def test_the_end_of_the_service_ends_streams() -> None:
    with served(STATE) as one:
        connection = socket.create_connection(("127.0.0.1", one.port), timeout=10)
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100)
    with connection:
        rest = b""
        while part := connection.recv(65536):
            rest += part
    assert rest.endswith(b"0\r\n\r\n")


async def test_a_slow_listener_gets_the_newest_only() -> None:
    live = Live()
    live.tell("a", {"taken_at": 1})
    stream = live.listen("a")
    assert (await anext(stream)).startswith(b"retry:")
    for serial in "bcd":
        live.tell(serial, {"taken_at": ord(serial)})
    async with asyncio.timeout(5):
        assert b"id: d\n" in await anext(stream)
        live.tell("e", {"taken_at": 0})
        assert b"id: e\n" in await anext(stream)
        live.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_the_same_again_is_no_news() -> None:
    live = Live(heartbeat=0.05)
    live.tell("a", {})
    stream = live.listen()
    await anext(stream)
    assert b"id: a\n" in await anext(stream)
    live.tell("a", {})
    assert await anext(stream) == b": still here\n\n"


async def test_those_who_come_at_once_are_counted_too() -> None:
    live = Live(max_listeners=2)
    streams = [live.listen() for _ in range(5)]
    begun = [await anext(stream, b"") for stream in streams]
    assert sum(map(bool, begun)) == live.listeners == 2


async def test_one_caller_leaves_places_for_others() -> None:
    live = Live(max_listeners=10, each=2)
    streams = [live.listen(caller="2001:db8::1"), live.listen(caller="2001:db8::2")]
    for stream in streams:
        await anext(stream)
    with pytest.raises(LimitExceeded, match="2 listeners at your address"):
        live.listen(caller="2001:db8::3")
    assert await anext(live.listen(caller="192.0.2.7"))
    await streams[0].aclose()
    assert await anext(live.listen(caller="2001:db8::3"))


async def test_too_many_is_an_error_that_names_the_limit() -> None:
    live = Live(max_listeners=1)
    first = live.listen()
    await anext(first)
    with pytest.raises(LimitExceeded, match="1 listeners"):
        live.listen()
