"""The HTTP interface, over real connections to the monitor's own server."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.processes import wait_until
from monitor import synthetic
from monitor.source import Past, Served, served
from petals_agent.monitor.callers import Allowance
from petals_agent.monitor.classic import StateDocument
from petals_agent.monitor.history import Point
from petals_agent.monitor.live import Live
from petals_agent.monitor.pages import assets
from petals_agent.monitor.rendering import Rendering
from petals_agent.monitor.state import SwarmState
from petals_agent.monitor.web import Limits

STATE = synthetic.small()
PEER = STATE.models[0].servers[0].peer_id


def points(count: int = 100) -> list[Point]:
    now = time.time()
    return [
        Point(now - 600 * (count - i), 600.0, 5.0 + i, 9.0 + i, int(i % 7 == 0), 3, 1, 0, 0)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served(STATE, Past(points())) as one:
        yield one


@pytest.fixture
def ask(here: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=here.url) as client:
        yield client


# --- the API


def test_state(ask: httpx.Client) -> None:
    answer = ask.get("/api/v1/state")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert StateDocument.model_validate_json(answer.content).models == STATE.models


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def misfits(value: Any, schema: dict[str, Any], document: dict[str, Any], path: str = "$") -> list[str]:
    """Where `value` breaks a JSON schema, as far as OpenAPI documents of ours use it; unknown keys count."""
    schema = resolved(schema, document)
    if "anyOf" in schema:
        found = [misfits(value, one, document, path) for one in schema["anyOf"]]
        return min(found, key=len)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    if kind in ("integer", "number"):
        fits = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    else:
        fits = kind is None or isinstance(value, kinds[kind])
    if not fits or ("enum" in schema and value not in schema["enum"]) or value != schema.get("const", value):
        return [f"{path}: {value!r:.40} is no {kind}"]
    if isinstance(value, list):
        items = schema.get("items", {})
        return [one for i, item in enumerate(value) for one in misfits(item, items, document, f"{path}[{i}]")]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", not known)
        bad = [f"{path}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            if name in known:
                bad += misfits(item, known[name], document, f"{path}.{name}")
            elif isinstance(more, dict):
                bad += misfits(item, more, document, f"{path}.{name}")
            elif not more:
                bad.append(f"{path}: {name} is not documented")
        return bad
    return []


@pytest.mark.parametrize(
    ("path", "documented"),
    [
        ("/api/v1/state", "/api/v1/state"),
        (f"/api/v1/is_reachable/{PEER}", "/api/v1/is_reachable/{peer_id}"),
        ("/api/v1/history/Mixtral-8x22B?hours=48", "/api/v1/history/{prefix}"),
        ("/healthz", "/healthz"),
    ],
)
def test_answers_are_as_the_openapi_document_says(ask: httpx.Client, path: str, documented: str) -> None:
    document = ask.get("/openapi.json").json()
    schema = document["paths"][documented]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    answer = ask.get(path)
    assert answer.status_code == 200
    assert misfits(answer.json(), schema, document) == []
    broken = {**answer.json(), "undocumented": 1} if path == "/api/v1/state" else {}
    assert misfits(broken, schema, document), "the check finds nothing"


def test_answers_to_what_is_wrong_are_documented_too() -> None:
    empty = SwarmState(taken_at=0, duration_s=0, update_period_s=30, problem="not read yet")
    limits = Limits()
    limits.checks = limits.pages = Allowance(rate=0.001, burst=2, all_rate=1.0, all_burst=100)
    history, check = "/api/v1/history/{prefix}", "/api/v1/is_reachable/{peer_id}"
    with served(STATE, Past(points()), limits=limits) as one, httpx.Client(base_url=one.url) as ask:
        document = ask.get("/openapi.json").json()

        def documented(answer: httpx.Response, path: str, status: int) -> None:
            assert answer.status_code == status
            said = document["paths"][path]["get"]["responses"][str(status)]
            assert misfits(answer.json(), said["content"]["application/json"]["schema"], document) == []

        documented(ask.get("/api/v1/history/none"), history, 404)
        documented(ask.get("/api/v1/history/lab-private?hours=x"), history, 422)
        documented(ask.get("/api/v1/is_reachable/x"), check, 400)
        for _ in range(2):
            ask.get("/api/v1/history/lab-private")
        documented(ask.get("/api/v1/history/lab-private"), history, 429)
        documented(ask.get(f"/api/v1/is_reachable/{PEER}"), check, 429)
        one.given.is_fresh = False
        documented(ask.get("/healthz"), "/healthz", 503)
    with served(empty, live=Live(max_listeners=0)) as one, httpx.Client(base_url=one.url) as ask:
        documented(ask.get("/api/v1/state"), "/api/v1/state", 503)
        documented(ask.get("/events"), "/events", 503)


def test_openapi_names_all_and_only_data(ask: httpx.Client) -> None:
    paths = ask.get("/openapi.json").json()["paths"]
    assert sorted(paths) == [
        "/api/v1/history/{prefix}",
        "/api/v1/is_reachable/{peer_id}",
        "/api/v1/state",
        "/events",
        "/healthz",
        "/metrics",
    ]
    assert set(paths["/api/v1/is_reachable/{peer_id}"]["get"]["responses"]) == {"200", "400", "429", "503"}
    assert ask.get("/docs").status_code == ask.get("/redoc").status_code == 404


def test_history(ask: httpx.Client) -> None:
    past = ask.get("/api/v1/history/lab-private", params={"hours": 2}).json()
    assert past["dht_prefix"] == "lab-private" and past["until"] - past["since"] == 7200
    assert past["points"] and all(one["at"] >= past["since"] for one in past["points"])
    assert ask.get("/api/v1/history/unknown").status_code == 404
    for hours in ("0", "-1", "x", "100000000"):
        assert ask.get("/api/v1/history/lab-private", params={"hours": hours}).status_code == 422


def test_metrics(ask: httpx.Client) -> None:
    answer = ask.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert all(name.startswith("petals_swarm_") and family.documentation for name, family in families.items())
    states = {
        sample.labels["model"]: sample.labels["state"]
        for sample in families["petals_swarm_model_state"].samples
        if sample.value == 1
    }
    assert states == {model.dht_prefix: model.state for model in STATE.models}
    servers = {
        (sample.labels["model"], sample.labels["state"]): sample.value
        for sample in families["petals_swarm_model_servers"].samples
    }
    assert servers["Llama-4-70B-hf", "joining"] == 1 and sum(servers.values()) == 18
    assert families["petals_swarm_snapshot_time_seconds"].samples[0].value == STATE.taken_at


# --- forms of an answer

DOCUMENTS = [
    "/",
    "/api/v1/state",
    "/metrics",
    "/models/Mixtral-8x22B",
    "/static/monitor.js",
    "/static/monitor.css",
]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_who_has_it_is_not_sent_it_again(ask: httpx.Client, path: str) -> None:
    for encoding in ("gzip", "identity"):
        answer = ask.get(path, headers={"Accept-Encoding": encoding})
        again = ask.get(path, headers={"Accept-Encoding": encoding, "If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]
        assert "accept-encoding" in again.headers["vary"].lower()


@pytest.mark.parametrize("path", DOCUMENTS)
def test_gzip_is_sent_to_who_takes_it(here: Served, ask: httpx.Client, path: str) -> None:
    plain = ask.get(path, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    with ask.stream("GET", path, headers={"Accept-Encoding": "br, gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip" and answer.headers["etag"] != plain.headers["etag"]
    assert gzip.decompress(raw) == plain.content and int(answer.headers["content-length"]) == len(raw)


@pytest.mark.parametrize("path", [*DOCUMENTS, "/healthz", "/openapi.json"])
def test_head(ask: httpx.Client, path: str) -> None:
    whole, head = ask.get(path), ask.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert {k: v for k, v in head.headers.items() if k != "date"} == {
        k: v for k, v in whole.headers.items() if k != "date"
    }


def test_headers_that_keep_a_browser_on_guard(ask: httpx.Client) -> None:
    for path in (*DOCUMENTS, "/nothing", "/api/v1/is_reachable/x", "/healthz"):
        headers = ask.get(path).headers
        policy = headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_other_sites_may_read_data_and_only_data(ask: httpx.Client) -> None:
    origin = {"Origin": "https://example.org"}
    for path in ("/api/v1/state", "/metrics", "/healthz", "/api/v1/history/lab-private", "/api/v1/nothing"):
        assert ask.get(path, headers=origin).headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in ask.get("/", headers=origin).headers
    before = ask.options("/api/v1/state", headers={**origin, "Access-Control-Request-Method": "GET"})
    assert before.status_code == 204 and before.headers["access-control-allow-methods"] == "GET, HEAD"
    assert "access-control-allow-credentials" not in before.headers and "content-length" not in before.headers


@pytest.mark.parametrize("path", ["/metrics/", "/api/v1/state/", "/healthz/"])
def test_nobody_is_led_away_by_what_they_call_us(ask: httpx.Client, path: str) -> None:
    """Host is the caller's word, or a proxy's for itself: no address is made from it."""
    for host in ("127.0.0.1:1", "[", "a/b?c", "evil.example"):
        answer = ask.get(path, headers={"Host": host})
        assert answer.status_code == 404 and "location" not in answer.headers and host not in answer.text


def test_nothing_can_be_written(ask: httpx.Client) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE"):
        answer = ask.request(method, "/api/v1/state", content=b"x")
        assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"
    answer = ask.head("/events")
    assert answer.status_code == 405 and answer.headers["allow"] == "GET"


def test_static_files_are_kept_for_ever_by_their_version(ask: httpx.Client) -> None:
    page = ask.get("/").text
    addresses = re.findall(r'(?:href|src)="\./(static/[^"]+)"', page)
    assert len(addresses) >= 3
    for address in addresses:
        assert "immutable" in ask.get(f"/{address}").headers["cache-control"]
    assert ask.get("/static/monitor.js?v=old").headers["cache-control"] == "no-cache"


# --- pages


def test_overview_shows_every_server_of_a_small_swarm(ask: httpx.Client) -> None:
    page = ask.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for model in STATE.models:
        assert model.dht_prefix in page.text and (not model.reason or model.reason in page.text)
        for server in model.servers:
            assert page.text.count(f"/servers/{server.peer_id}") == 1
    assert "2 records make no sense" in page.text


def test_the_first_page_of_a_large_swarm_is_small() -> None:
    """Ten thousand servers; uncompressed, with style, script and icon."""
    state = synthetic.big()
    past = {model.dht_prefix: points() for model in state.models}
    page = Rendering(state, past, False, time.time()).overview
    assert len(page.body) + sum(len(one.body) for one in assets().values()) < 150_000
    assert page.body.count(b"Show 1,000 servers") == 9 and page.body.count(b'class="plot"') == 20


def test_addresses_in_a_page_lead_somewhere(ask: httpx.Client) -> None:
    for path in ("/", "/models/Mixtral-8x22B", f"/models/Llama-4-70B-hf/servers/{PEER}"):
        page = ask.get(path)
        links = set(re.findall(r'(?:href|src|action|data-source|data-history)="([^"#]+)', page.text))
        assert len(links) > 5
        for link in links:
            address = page.url.join(link.replace("&amp;", "&"))
            if address.host == "127.0.0.1":
                assert ask.get(address).status_code == 200, f"{path} → {link}"


def test_a_model_in_an_order_and_filtered(ask: httpx.Client) -> None:
    page = ask.get("/models/Mixtral-8x22B", params={"sort": "-throughput", "state": "online"}).text
    shown = re.findall(r"/servers/(\w+)\"", page)
    online = [one for one in STATE.models[1].servers if one.state == "online"]
    assert shown == [one.peer_id for one in sorted(online, key=lambda one: -one.throughput)]
    assert 'aria-sort="descending"' in page and "3 of 4 servers" in page


def test_what_is_not_there(ask: httpx.Client) -> None:
    for path in (
        "/models/none",
        f"/models/none/servers/{PEER}",
        "/models/Mixtral-8x22B/servers/x",
        "/favicon.ico",
        "/a/b",
    ):
        answer = ask.get(path)
        assert answer.status_code == 404 and answer.headers["content-type"].startswith("text/html")
        assert re.search(r'href="((?:\.\./)+|\./)static/', answer.text)
    answer = ask.get("/api/v1/none")
    assert answer.status_code == 404 and answer.json() == {"detail": "Not Found"}


def test_pages_that_must_be_made_are_limited() -> None:
    limits = Limits()
    limits.pages = Allowance(rate=0.001, burst=5, all_rate=1.0, all_burst=100)
    with served(STATE, limits=limits) as one, httpx.Client(base_url=one.url) as ask:
        codes = [ask.get("/models/Mixtral-8x22B", params={"q": str(i)}).status_code for i in range(7)]
        assert codes == [200] * 5 + [429] * 2
        assert ask.get("/models/Mixtral-8x22B", params={"q": "1"}).status_code == 200, "it is made already"
        assert ask.get("/").status_code == 200
        refused = ask.get("/models/Mixtral-8x22B", params={"q": "x"})
        assert refused.headers["content-type"].startswith("text/html") and "ask again" in refused.text
        assert int(refused.headers["retry-after"]) > 1


# --- age


def test_before_the_first_reading() -> None:
    empty = SwarmState(taken_at=0, duration_s=0, update_period_s=30, problem="not read yet")
    with served(empty) as one, httpx.Client(base_url=one.url) as ask:
        one.given.is_fresh = False
        assert ask.get("/").status_code == ask.get("/api/v1/state").status_code == 503
        assert "for the first time" in ask.get("/").text and ask.get("/").headers["retry-after"] == "5"
        assert ask.get("/healthz").json() == {"ok": False, "age_s": None, "problem": "not read yet"}
        assert ask.get("/metrics").status_code == 200
        one.given.is_fresh = True
        one.give(STATE)
        wait_until(lambda: ask.get("/").status_code == 200, 10, "the first reading to be shown")


def test_a_stale_snapshot_is_called_so() -> None:
    with served(STATE) as one, httpx.Client(base_url=one.url) as ask:
        assert ask.get("/healthz").status_code == 200
        assert "Out of date" not in ask.get("/").text
        one.given.is_fresh = False
        assert ask.get("/healthz").status_code == 503
        wait_until(lambda: "Out of date" in ask.get("/").text, 10, "the page to say so")
        assert "petals_swarm_snapshot_stale 1.0" in ask.get("/metrics").text
        one.given.is_fresh = True
        wait_until(lambda: "Out of date" not in ask.get("/").text, 10, "the page to be fresh again")


def test_json_is_json(ask: httpx.Client) -> None:
    json.loads(
        ask.get("/api/v1/state").content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
