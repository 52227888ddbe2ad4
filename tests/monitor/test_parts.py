"""The parts that pages and answers are made from, each by itself."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor import synthetic
from petals_agent.monitor import bars, charts, pages, shown
from petals_agent.monitor.callers import Allowance, Proxies
from petals_agent.monitor.classic import StateDocument, classic
from petals_agent.monitor.documents import HTML, Document, takes_gzip
from petals_agent.monitor.history import Point
from petals_agent.monitor.patience import Patience
from petals_agent.monitor.rendering import state_json
from petals_agent.monitor.tables import PAGE, SORTS, Query, table

# --- texts and figures


@pytest.mark.parametrize(
    "text", ["\u202ea", "a\u2066", "\x1b[31m", "a\x00", "\ufeff", "\u200b", "\ud800", "\U000e0041"]
)
def test_what_steers_the_reader_is_replaced(text: str) -> None:
    assert "\ufffd" in shown.visible(text)
    assert shown.visible(text).isprintable()


def test_marks_do_not_pile_up_over_other_lines() -> None:
    assert shown.visible("Z" + "\u0337\u0321\u0352" * 30 + "!") == "Z\u0337\u0321\u0352!"


@pytest.mark.parametrize("text", ["Universität Basel", "北京", "שלום", "👩‍💻", "a b", "<b>", "e\u0301\u0323"])
def test_names_of_all_languages_stay(text: str) -> None:
    assert shown.visible(text) == text


def test_only_web_addresses_become_links() -> None:
    assert shown.web_address("https://huggingface.co/a/b") == "https://huggingface.co/a/b"
    for text in (
        "javascript:alert(1)",
        "data:text/html,x",
        "//host",
        "https://",
        "https://a@b/",
        "x" * 3000,
        "http://[",
        None,
    ):
        assert shown.web_address(text) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1234.5, "1,234"),
        (12.34, "12.3"),
        (0.4123, "0.412"),
        (7, "7"),
        (1e6, "1,000,000"),
    ],
)
def test_figures(value: float | None, text: str) -> None:
    assert shown.figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0"), (0.0412, "0.041"), (74.0, "74.0"), (1234.56, "1,234.6")]
)
def test_rates_in_a_column(value: float, text: str) -> None:
    assert shown.rate(value) == text


def test_a_share_below_one_is_never_shown_as_all() -> None:
    assert shown.share(0.99999) == "99.9 %"
    assert shown.share(1.0) == "100.0 %"
    assert shown.share(0.96) == "96.0 %"


def test_lengths_of_time() -> None:
    assert [shown.span_of_time(one) for one in (0, 59.9, 61, 3 * 86400 + 4 * 3600 + 9)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "3 d 4 h",
    ]


# --- drawings


def test_coverage_says_where_nobody_serves() -> None:
    rng = random.Random(0)
    model = synthetic.model(rng, "m", 10, [synthetic.server(rng, 0, 4), synthetic.server(rng, 2, 6)])
    assert bars.coverage_in_words(model) == "Servers online per block: 0 to 2; nobody serves 6 to 9"
    drawn = str(bars.coverage(model, "m"))
    assert drawn.count('class="gap"') == 1 and 'x="60%" width="40%"' in drawn
    assert "M0 2V1H2V0H4V1H6V2H10V2Z" in drawn


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_gaps_are_the_blocks_without_server(online: list[int]) -> None:
    inside = {block for start, end in bars.gap_runs(online) for block in range(start, end)}
    assert inside == {block for block, count in enumerate(online) if count == 0}


def point(at: float, weakest: float = 10.0, uncovered: int = 0) -> Point:
    return Point(at, 60.0, weakest, weakest * 2, uncovered, 3, 0, 0, 0)


def test_a_chart_keeps_the_worst_of_what_it_merges() -> None:
    points = [point(60.0 * index, 100.0) for index in range(1440)]
    points[700] = point(60.0 * 700, 1.0, uncovered=5)
    samples = charts.thin(points, 0.0, 86400.0)
    assert len(samples) <= 120
    assert min(one.weakest for one in samples) == 1.0 and max(one.uncovered for one in samples) == 5
    drawn = charts.draw(points, 20, 0.0, 86400.0)
    assert drawn is not None
    assert (
        "at worst 15 of 20" in drawn.covered_words and "1 to 100 tokens/s, now 100" in drawn.throughput_words
    )
    assert drawn.coverage.count('class="lack"') == 1 and drawn.top == "200"


def test_a_time_without_readings_leaves_a_hole() -> None:
    points = [point(60.0 * index) for index in range(1440) if not 300 < index < 900]
    drawn = charts.draw(points, 20, 0.0, 86400.0)
    assert drawn is not None
    line = str(drawn.coverage).split('class="line" d="')[1].split('"')[0]
    assert line.count("M") == 2


@pytest.mark.parametrize(
    ("highest", "top"), [(0.0, "1"), (0.7, "0.8"), (420.0, "500"), (9000.0, "10k"), (2.2e6, "3M")]
)
def test_the_top_of_an_axis_is_short(highest: float, top: str) -> None:
    drawn = charts.draw([point(0.0, highest / 2), point(9000.0, highest / 2)], 5, 0.0, 86400.0)
    assert drawn is not None and drawn.top == top


def test_a_month_is_drawn_when_it_shows_more_than_a_day() -> None:
    state = synthetic.small(90 * 86400.0)
    model, now = state.models[0], state.taken_at
    day = [point(now - 60.0 * index) for index in range(1500, 0, -1)]
    week = [point(now - 7 * 86400.0), *day]
    titles = []
    for points in (day, week):
        view = pages.View(state, {model.dht_prefix: points}, False, now)
        lengths = [("24 h", "12 h", 24), ("30 days", "15 days", 720)]
        titles.append([one.title for one in pages.plots(view, model, lengths)])
    assert titles == [["24 h"], ["24 h", "30 days"]]


def test_one_point_is_no_line() -> None:
    assert charts.draw([point(0.0)], 5, 0.0, 86400.0) is None


# --- tables


def test_every_order_is_one_and_can_be_turned() -> None:
    servers = synthetic.big(models=1, servers=120).models[0].servers
    for sort, by in SORTS.items():
        up = table(servers, Query(sort=sort)).servers
        down = table(servers, Query(sort=sort, descending=True)).servers
        assert [by(one) for one in up] == sorted(by(one) for one in servers)[:PAGE]
        assert [by(one) for one in down] == sorted((by(one) for one in servers), reverse=True)[:PAGE]


def test_pages_hold_each_server_once() -> None:
    servers = synthetic.big(models=1, servers=120).models[0].servers
    pages = [table(servers, Query(page=number)) for number in (1, 2, 3, 4)]
    assert {one.pages for one in pages} == {4}
    assert [one.peer_id for page in pages for one in page.servers] == [
        one.peer_id for one in sorted(servers, key=SORTS["blocks"])
    ]
    assert table(servers, Query(page=99)).query.page == 4


def test_filters() -> None:
    servers = synthetic.small().models[0].servers
    assert {one.state for one in table(servers, Query(state="joining")).servers} == {"joining"}
    assert [one.public_name for one in table(servers, Query(text="NEW here")).servers] == ["new here"]
    one = servers[1]
    assert table(servers, Query(text=one.peer_id[-8:])).servers == (one,)
    assert table(servers, Query(text="nobody has this")).servers == ()


@given(st.dictionaries(st.sampled_from(["sort", "q", "state", "page", "x"]), st.text(max_size=200)))
def test_any_query_can_be_read_and_asked_again(asked: dict[str, str]) -> None:
    from urllib.parse import parse_qsl

    query = Query.read(asked)
    assert Query.read(dict(parse_qsl(query.address()[1:]))) == query
    assert table((), query).servers == ()


# --- the classic keys


def test_the_document_fits_its_schema_and_says_the_same_twice() -> None:
    state = synthetic.small()
    document = StateDocument.model_validate_json(state_json(state))
    assert document.model_dump(include=set(type(state).model_fields)) == state.model_dump()
    assert document.last_updated == state.taken_at
    assert [report["dht_prefix"] for report in document.model_reports] == [
        model.dht_prefix for model in state.models
    ]


def test_classic_values() -> None:
    state = synthetic.small()
    found = classic(state)
    broken, degraded, private = found["model_reports"]
    assert (broken["state"], degraded["state"], private["state"]) == ("broken", "healthy", "healthy")
    assert broken["name"] == "example/Llama-4-70B" and broken["short_name"] == "Llama-4-70B"
    assert private["name"] == private["short_name"] == "lab-private" and private["repository"] is None
    assert found["bootstrap_states"] == ["online", "online"]
    assert len(found["reachability_issues"]) == 1
    unreachable = next(row for row in degraded["server_rows"] if row["state"] == "unreachable")
    assert unreachable["span"]["server_info"]["state"] == "online"
    row, server = broken["server_rows"][0], state.models[0].servers[0]
    assert row["short_peer_id"] == "..." + server.peer_id[-6:]
    assert row["cache_tokens_left_per_block"] == server.cache_tokens_left
    assert row["span"]["server_info"]["cache_tokens_left"] == server.cache_tokens_left * 2 * 30
    assert row["span"]["server_info"]["next_pings"] == server.pings
    assert found["top_contributors"]["lab-garage"] >= 14


def test_what_is_not_finite_becomes_null() -> None:
    state = synthetic.small()
    server = state.models[0].servers[0].model_copy(update={"pings": {"a": float("inf")}})
    model = state.models[0].model_copy(update={"servers": (server,)})
    text = state_json(state.model_copy(update={"models": (model,)}))
    assert b'"a":null' in text and b"Infinity" not in text


# --- documents


def test_a_document_has_two_forms_with_tags_of_their_own() -> None:
    document = Document.of(b"text " * 1000, HTML)
    assert document.packed is not None and gzip.decompress(document.packed) == document.body
    assert document.etag(True) != document.etag(False)
    assert document.known(document.etag(True)) and document.known(f'"x", W/{document.etag(False)}')
    assert document.known("*") and not document.known("") and not document.known('"other"')
    assert Document.of(b"text " * 1000, HTML) == document
    assert Document.of(b"small", HTML).packed is None


@pytest.mark.parametrize(
    ("header", "takes"),
    [
        ("", False),
        ("gzip", True),
        ("GZip;q=0.5, br", True),
        ("br, deflate", False),
        ("gzip;q=0", False),
        ("gzip; q=0.0, *", False),
        ("*", True),
        ("identity;q=1, *;q=0", False),
        ("gzip;q=nonsense", False),
    ],
)
def test_accept_encoding(header: str, takes: bool) -> None:
    assert takes_gzip(header) is takes


# --- callers


@pytest.mark.parametrize(
    ("peer", "forwarded", "caller"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        ("127.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("::1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("127.0.0.1", ["6.6.6.6", "1.2.3.4, 10.0.0.7"], "1.2.3.4"),
        ("10.0.0.7", ["[2001:db8::1]:443"], "2001:db8::1"),
        ("::ffff:127.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("127.0.0.1", ["1.2.3.4, <script>"], "127.0.0.1"),
        ("127.0.0.1", ["127.0.0.1, 127.0.0.1"], "127.0.0.1"),
    ],
)
def test_who_calls(peer: str, forwarded: list[str], caller: str) -> None:
    assert Proxies(["10.0.0.0/8"]).caller(peer, forwarded) == caller


def test_an_allowance_runs_out_and_fills_again() -> None:
    now = [0.0]
    allowance = Allowance(rate=1.0, burst=3, all_rate=100.0, all_burst=100, clock=lambda: now[0])
    assert [allowance.wait("1.2.3.4") for _ in range(3)] == [0, 0, 0]
    assert allowance.wait("1.2.3.4") == pytest.approx(1.0)
    assert allowance.wait("5.6.7.8") == 0
    now[0] = 1.5
    assert allowance.wait("1.2.3.4") == 0
    assert allowance.wait("1.2.3.4") == pytest.approx(0.5)


def test_all_callers_together_have_a_limit_too() -> None:
    allowance = Allowance(rate=1.0, burst=5, all_rate=1.0, all_burst=10, clock=lambda: 0.0)
    assert [allowance.wait(f"1.2.3.{index}") for index in range(11)] == [0] * 10 + [1.0]


def test_one_customer_of_ipv6_is_one_caller() -> None:
    allowance = Allowance(rate=1.0, burst=1, all_rate=100.0, all_burst=100, clock=lambda: 0.0)
    assert allowance.wait("2001:db8::1") == 0
    assert allowance.wait("2001:db8::2") > 0
    assert allowance.wait("2001:db8:0:1::2") == 0


# --- slow callers


class Cycle:
    def __init__(self, done: bool) -> None:
        self.response_complete = done


class Caller:
    """A connection with `left` bytes that nobody has read yet."""

    def __init__(self, left: int, cycle: Cycle | None) -> None:
        self.left, self.cycle, self.transport = left, cycle, self

    def get_write_buffer_size(self) -> int:
        return self.left


@pytest.fixture
def callers() -> Iterator[dict[str, Caller]]:
    yield {
        "sends nothing": Caller(0, None),
        "sends no second request": Caller(0, Cycle(True)),
        "reads nothing": Caller(5000, Cycle(True)),
        "reads": Caller(5000, Cycle(True)),
        "waits for news": Caller(0, Cycle(False)),
    }


def test_patience_ends_for_who_does_nothing(callers: dict[str, Caller]) -> None:
    patience = Patience(callers.values(), request=10, answer=20)  # type: ignore[arg-type]
    ended: dict[str, int] = {}
    for second in range(1, 40):
        callers["reads"].left -= 10
        for one in patience.look(1.0):
            name = next(name for name, caller in callers.items() if caller is one)
            ended.setdefault(name, second)
    assert ended == {"sends nothing": 11, "sends no second request": 11, "reads nothing": 21}


def test_who_asks_again_and_again_is_not_idle() -> None:
    """A proxy keeps its connections: whenever we look one request is done, but each time it is another one."""
    caller = Caller(0, None)
    patience = Patience([caller], request=10, answer=20)  # type: ignore[list-item]
    for _ in range(40):
        caller.cycle = Cycle(True)
        assert patience.look(1.0) == []
