"""Texts that strangers chose stay texts, while many read at once."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from harness.monitor import start_monitor
from harness.peer import Peer
from harness.processes import Processes, wait_until
from monitor import synthetic
from monitor.source import Served, served
from monitor.swarms import peer
from petals_agent.monitor.shown import segment

STATE = synthetic.hostile()
MODEL = STATE.models[0]
CLIENTS = 200


class Elements(HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served(STATE) as one:
        yield one


def addresses() -> list[str]:
    base = f"/models/{segment(MODEL.dht_prefix)}"
    servers = [f"{base}/servers/{server.peer_id}" for server in MODEL.servers]
    return ["/", base, f"{base}?q=<script>alert(1)</script>&state=%22%3E&sort=%00", *servers]


@pytest.mark.parametrize("address", addresses())
def test_pages_hold_no_element_or_attribute_of_strangers(here: Served, address: str) -> None:
    answer = httpx.get(here.url + address)
    assert answer.status_code == 200
    page = Elements(answer.text)
    allowed = {"src", "href", "action", "data-source", "data-history"}
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert len(scripts) == 1 and re.fullmatch(
        r"(\.\./|\./)*static/monitor\.js\?v=\w+", scripts[0]["src"] or ""
    )
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "style", "base")
        assert tag != "img" or (attributes["src"] or "").partition("static/")[2]
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", f"{name} of {tag}"
            if name in allowed:
                assert re.match(r"(\.\.?/|#|\?|static/)", value or ""), f"{name}={value!r:.60} of {tag}"
    text = "".join(page.text)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f\x00-\x08\x1b\ufeff]", answer.text)
    if "/servers/" in address:
        shown = next(one for one in MODEL.servers if one.peer_id in address).public_name or ""
        assert html.unescape(shown)[:10] in text or "\ufffd" in text or shown[:10] in text


def test_long_texts_are_cut(here: Served) -> None:
    assert "x" * 100 not in httpx.get(here.url + "/").text
    assert max(map(len, httpx.get(here.url + "/").text.splitlines())) < 6000


def test_the_api_gives_texts_back_as_they_are(here: Served) -> None:
    document = httpx.get(here.url + "/api/v1/state").json()
    names = [server["public_name"] for server in document["models"][0]["servers"]]
    assert names == list(synthetic.HOSTILE)
    assert [
        row["span"]["server_info"]["public_name"] for row in document["model_reports"][0]["server_rows"]
    ] == names


def test_metrics_stay_lines(here: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = {
        family.name: family
        for family in text_string_to_metric_families(httpx.get(here.url + "/metrics").text)
    }
    assert {sample.labels["model"] for sample in families["petals_swarm_model_blocks"].samples} == {
        MODEL.dht_prefix
    }
    assert sum(sample.value for sample in families["petals_swarm_servers"].samples) == len(MODEL.servers)


async def test_two_hundred_at_once(here: Served) -> None:
    """All listen for news and read; then a new state comes, and all read that."""
    limits = httpx.Limits(max_connections=3 * CLIENTS)
    new = STATE.model_copy(update={"taken_at": STATE.taken_at + 60})

    async def reader(ask: httpx.AsyncClient, listening: asyncio.Barrier) -> tuple[float, float]:
        async with ask.stream("GET", "/events") as answer:
            news = (json.loads(line[6:]) async for line in answer.aiter_lines() if line.startswith("data: "))
            before = (await anext(news))["taken_at"]
            await listening.wait()
            after = (await anext(news))["taken_at"]
        page, state = await asyncio.gather(ask.get("/"), ask.get("/api/v1/state"))
        assert page.status_code == 200 and len(page.text) > 10_000
        assert state.json()["taken_at"] == after
        return before, after

    async with httpx.AsyncClient(base_url=here.url, limits=limits, timeout=60) as ask:
        listening = asyncio.Barrier(CLIENTS + 1)
        readers = [asyncio.create_task(reader(ask, listening)) for _ in range(CLIENTS)]
        async with asyncio.timeout(60):
            await listening.wait()
            here.give(new)
            found = await asyncio.gather(*readers)
    assert found == [(STATE.taken_at, new.taken_at)] * CLIENTS
    wait_until(lambda: here.site.live.listeners == 0, 10, "all listeners to be gone")


def test_two_hundred_clients_of_a_live_swarm_full_of_spam(
    processes: Processes, bootstrap: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Scripts, names of a megabyte and broken UTF-8 are in the DHT, and more come while all read."""
    with Peer([bootstrap]) as other:

        def spam(turn: int) -> None:
            for index, text in enumerate([*synthetic.HOSTILE, "n" * 1_000_000]):
                fields = {"start_block": 0, "end_block": 1, "public_name": text, "version": text}
                other.store("tiny.0", peer(100 * turn + index), (2, 1.0, fields), 300)
                other.store("_petals.models", f"{turn}{text}", {"num_blocks": 1, "repository": text}, 300)
            other.store_raw("tiny.0", peer(99), b"\xa4\xff\xfe\xfd\xfc", 300)  # a text that is no UTF-8
            other.store_raw("_petals.models", "torn", b"\x81\xaanum_blocks", 300)

        spam(1)
        good = (2, 1.0, {"start_block": 0, "end_block": 1, "public_name": "good"})
        other.store("tiny.0", peer(1), good, 300)
        url = start_monitor(processes, tmp_path, [bootstrap], free_port()).url

        async def reader(ask: httpx.AsyncClient, number: int) -> None:
            path = ("/", "/api/v1/state", "/metrics", "/models/tiny")[number % 4]
            for _ in range(3):
                answer = await ask.get(path)
                assert answer.status_code == 200
                if path != "/metrics":
                    assert "good" in answer.text and "n" * 2000 not in answer.text
                if answer.headers["content-type"].startswith("text/html"):
                    scripts = [one for tag, one in Elements(answer.text).elements if tag == "script"]
                    assert len(scripts) == 1 and "window.hurt" not in str(scripts)

        async def all_of_them() -> None:
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as ask, asyncio.timeout(60):
                await asyncio.gather(
                    asyncio.to_thread(spam, 2), *(reader(ask, number) for number in range(CLIENTS))
                )

        asyncio.run(all_of_them())
        wait_until(lambda: peer(200) in httpx.get(f"{url}/api/v1/state").text, 30, "the later ones")
