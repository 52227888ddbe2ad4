"""The page in a real browser: what it shows, how it is used, and that it stays as its reader left it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from monitor import synthetic
from monitor.browser import Tab, tab
from monitor.source import Served, served
from petals_agent.monitor.live import Live
from petals_agent.monitor.state import SwarmState

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def later(state: SwarmState, **changes: Any) -> SwarmState:
    return state.model_copy(update={"taken_at": state.taken_at + 60, **changes})


def with_servers(state: SwarmState, index: int, change: Any) -> SwarmState:
    """`state` a minute later, with `change` done to the servers of one model."""
    models = list(state.models)
    models[index] = models[index].model_copy(update={"servers": tuple(change(models[index].servers))})
    return later(state, models=tuple(models))


def rows(one: Tab, model: int = 0) -> list[str]:
    """Ends of the peer ids in one table, from top to bottom."""
    table = one.page.locator(".servers").nth(model)
    return [text.strip("▸▾… ") for text in table.locator("a.peer").all_text_contents()]


def test_all_models_and_servers_appear(here: Tab, site: Served) -> None:
    for index, model in enumerate(site.given.state.models):
        card = here.page.locator("section.model").nth(index)
        assert card.locator("h2").text_content() == model.name
        assert model.state in (card.locator(".badge").text_content() or "")
        assert sorted(rows(here, index)) == sorted(server.peer_id[-6:] for server in model.servers)
    pills = here.page.locator("tbody .pill").all_inner_texts()
    assert {re.sub(r"\s+", "", pill) for pill in pills} == {"#online", "Jjoining", "?unreachable", "_offline"}
    assert here.page.title() == "1 broken · Swarm monitor"


def test_age_counts(here: Tab) -> None:
    words = here.page.locator("#taken")
    first = words.text_content()
    here.page.wait_for_function(
        "(first) => document.getElementById('taken').textContent !== first", arg=first
    )
    assert re.fullmatch(r"\d+ s ago", words.text_content() or "")


def test_order(here: Tab, site: Served) -> None:
    head = here.page.locator("section.model").first.locator("thead th").nth(3)
    head.locator("a").click()
    here.page.wait_for_selector('th[aria-sort="descending"]')
    servers = sorted(site.given.state.models[0].servers, key=lambda server: -server.throughput)
    assert rows(here) == [server.peer_id[-6:] for server in servers]
    head.locator("a").press("Enter")
    here.page.wait_for_function(
        "() => document.querySelector('th[aria-sort=ascending] a').textContent === 'Tokens/s'"
    )
    assert rows(here) == [server.peer_id[-6:] for server in reversed(servers)]
    focused = here.page.evaluate("document.activeElement.textContent")
    assert focused == "Tokens/s", "the focus stays on the head of the column"


def test_a_wish_outlives_a_refresh(here: Tab, site: Served) -> None:
    """Both are under way at once, and the answer to the wish comes last."""
    held: list[Any] = []
    here.page.route("**/models/**", lambda route: held.append(route))
    here.page.locator("thead a").nth(3).click()
    new = later(site.given.state)
    site.give(new)
    here.page.wait_for_function(
        "(taken) => Number(document.body.dataset.takenAt) === taken", arg=new.taken_at
    )
    assert held
    here.page.unroute("**/models/**")  # which lets those go that were held
    here.page.wait_for_selector('th[aria-sort="descending"]')
    servers = sorted(site.given.state.models[0].servers, key=lambda server: -server.throughput)
    assert rows(here) == [server.peer_id[-6:] for server in servers]


def test_a_page_that_is_new_is_not_asked_for_again(here: Tab) -> None:
    asked = [address for address in here.requested if urlsplit(address).path == "/"]
    here.page.wait_for_function(f"() => performance.now() > 500 + {here.page.evaluate('performance.now()')}")
    assert (
        asked == [address for address in here.requested if urlsplit(address).path == "/"] == [here.page.url]
    )


def test_filter_by_keyboard(here: Tab) -> None:
    here.page.keyboard.press("/")
    here.page.keyboard.type("new here")
    here.page.wait_for_function(
        "() => document.querySelectorAll('.servers')[0].querySelectorAll('a.peer').length === 1"
    )
    assert here.page.locator(".matching").first.text_content() == "1 of 5 servers"
    assert here.page.locator("#announcer").text_content() == "1 of 5 servers"
    assert here.page.evaluate("document.activeElement.value") == "new here"
    here.page.keyboard.press("Tab")
    here.page.keyboard.type("o")
    here.page.wait_for_function(
        "() => document.querySelectorAll('.servers')[0].querySelectorAll('a.peer').length === 0"
    )
    assert len(rows(here, 1)) == 4, "other models are left alone"


def test_details(here: Tab, site: Served) -> None:
    peer = here.page.locator("a.peer").first
    peer.focus()
    peer.press("Space")
    here.page.wait_for_selector("tr.opened dl")
    assert peer.get_attribute("aria-expanded") == "true" and peer.get_attribute("role") == "button"
    text = here.page.locator("tr.opened").inner_text()
    server = next(one for one in site.given.state.models[0].servers if one.peer_id in text)
    for word in (server.version or "", server.dtype or "", "Network", "First seen", "Pings to"):
        assert word in text
    peer.press("Enter")
    assert here.page.locator("tr.opened").count() == 0 and peer.get_attribute("aria-expanded") == "false"


def test_a_new_state_leaves_everything_as_it_was(here: Tab, site: Served) -> None:
    page = here.page
    page.locator("section.model").nth(1).locator("thead a").nth(3).click()
    page.wait_for_selector('th[aria-sort="descending"]')
    order = rows(here, 1)
    page.locator("a.peer").first.click()
    page.wait_for_selector("tr.opened dl")
    page.keyboard.press("/")
    page.keyboard.type("garage")
    page.wait_for_function("() => document.querySelector('.matching').textContent.includes(' of ')")
    page.locator("input[type=search]").first.evaluate("field => field.setSelectionRange(0, 1)")
    page.evaluate("scrollTo(0, 333)")
    page.evaluate("window.before = [...document.querySelectorAll('section.model')]")

    def faster(servers: Any) -> list[Any]:
        return [one.model_copy(update={"throughput": one.throughput + 1e6, "uptime": 0.5}) for one in servers]

    site.give(with_servers(site.given.state, 1, faster))
    page.wait_for_function("() => document.body.textContent.includes('1,000,')")
    assert rows(here, 1) == order
    assert page.locator('th[aria-sort="descending"]').count() == 1
    assert page.evaluate("document.activeElement.value") == "garage"
    assert page.evaluate("[document.activeElement.selectionStart, document.activeElement.selectionEnd]") == [
        0,
        1,
    ]
    assert page.evaluate("scrollY") == 333
    assert page.locator("tr.opened dl").count() == 1
    assert page.evaluate(
        "[...document.querySelectorAll('section.model')].every((one, i) => one === before[i])"
    )


def test_open_details_are_renewed(here: Tab, site: Served) -> None:
    here.page.locator("a.peer").first.click()
    here.page.wait_for_selector("tr.opened dl")
    site.give(
        with_servers(
            site.given.state,
            0,
            lambda servers: [one.model_copy(update={"version": "9.9.9"}) for one in servers],
        )
    )
    here.page.wait_for_function("() => document.querySelector('tr.opened').textContent.includes('9.9.9')")
    site.give(with_servers(site.given.state, 0, lambda servers: []))
    here.page.wait_for_function("() => !document.querySelector('tr.opened')")


def test_states_of_a_server_as_they_change(here: Tab, site: Served) -> None:
    peer = site.given.state.models[0].servers[0].peer_id
    for state, mark in (("unreachable", "?"), ("offline", "_"), ("joining", "J"), ("online", "#")):

        def changed(servers: Any, state: str = state) -> list[Any]:
            return [
                one.model_copy(update={"state": state}) if one.peer_id == peer else one for one in servers
            ]

        site.give(with_servers(site.given.state, 0, changed))
        here.page.wait_for_function(
            "([peer, mark]) => document.querySelector(`tr[id$='${peer}'] .pill b`).textContent === mark",
            arg=[peer, mark],
        )


def test_what_changes_for_the_worse_is_announced(here: Tab, site: Served) -> None:
    state = site.given.state
    models = [model.model_copy(update={"state": "broken", "reason": "test"}) for model in state.models]
    site.give(later(state, models=tuple(models)))
    here.page.wait_for_function(
        "() => document.getElementById('announcer').textContent === 'Models: 3 broken'"
    )
    assert here.page.locator("#announcer").get_attribute("aria-live") == "polite"
    here.page.wait_for_function("() => document.title === '3 broken · Swarm monitor'")


def test_readouts_under_the_pointer(here: Tab) -> None:
    here.page.locator(".cover").first.hover()
    assert re.match(
        r"block \d+: \d+ online", here.page.locator(".coverage .readout").first.text_content() or ""
    )
    plot = here.page.locator(".plot").nth(1)
    plot.hover()
    here.page.wait_for_function(
        """() => { const plot = document.querySelectorAll('.plot')[1]; const box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: box.left + box.width / 3}));
        return /mean/.test(plot.closest('figure').querySelector('.readout').textContent); }"""
    )


def test_a_lost_connection_is_shown_and_mended(browser: Browser, site: Served) -> None:
    with tab(browser) as one:
        one.page.goto(site.url)
        one.page.wait_for_selector("html.live")
        one.page.context.set_offline(True)
        site.run(_end_streams(site))
        one.page.wait_for_function("() => !document.documentElement.classList.contains('live')")
        one.page.context.set_offline(False)
        one.page.wait_for_selector("html.live")


def test_who_gets_no_news_asks(browser: Browser) -> None:
    """A refusal ends an EventSource for good, such as a proxy's 502 while we are restarted."""
    now = time.time()
    state = synthetic.small(now).model_copy(update={"update_period_s": 1.0})
    live = Live(max_listeners=0)
    with served(state, live=live) as site, tab(browser) as one:
        one.page.goto(site.url)
        site.give(later(state))
        one.page.wait_for_function(
            "(taken) => Number(document.body.dataset.takenAt) === taken", arg=state.taken_at + 60
        )
        assert one.page.locator("html.live").count() == 0
        live.max_listeners = 5
        one.page.wait_for_selector("html.live")


def test_a_past_that_is_refused_breaks_nothing(here: Tab) -> None:
    here.page.route(
        "**/api/v1/history/**", lambda route: route.fulfill(status=200, json={"detail": "too many"})
    )
    with here.page.expect_response("**/api/v1/history/**"):
        here.page.locator(".plot").nth(1).hover()
    box = here.page.locator(".plot").nth(1).bounding_box()
    assert box is not None
    here.page.mouse.move(box["x"] + 9, box["y"] + 9, steps=5)
    assert here.page.locator(".plots .readout").nth(1).text_content() == ""


async def _end_streams(site: Served) -> None:
    for connection in list(site.connections):
        connection.transport.abort()


def test_an_old_snapshot_looks_old(browser: Browser) -> None:
    now = time.time()
    with served(synthetic.small(now - 3600)) as site, tab(browser) as one:
        one.page.goto(site.url)
        one.page.wait_for_selector("html.late")
        assert (
            "1 h ago" in one.page.locator("#age").inner_text()
            or "60 min ago" in one.page.locator("#age").inner_text()
        )


def test_a_snapshot_that_grows_stale_looks_so(here: Tab, site: Served) -> None:
    site.given.is_fresh = False
    here.page.wait_for_selector("#stale")
    here.page.wait_for_selector("html.late:not(.live)")
    site.given.is_fresh = True
    here.page.wait_for_selector("html.live:not(.late)")


def test_large_swarms_are_paged(browser: Browser) -> None:
    with served(synthetic.big(models=2, servers=120, now=time.time())) as site, tab(browser) as one:
        one.page.goto(site.url)
        before = rows(one)
        one.page.locator("a[rel=next]").first.click()
        one.page.wait_for_function(
            "() => document.querySelector('.pager span').textContent === 'page 2 of 4'"
        )
        assert len(rows(one)) == 36 and not set(rows(one)) & set(before)
        assert one.page.url.rstrip("/") == site.url
        assert one.errors == []


# --- without JavaScript


def test_everything_is_there_without_javascript(browser: Browser, site: Served) -> None:
    with tab(browser, java_script_enabled=False) as one:
        one.page.goto(site.url)
        assert one.page.locator("a.peer").count() == 18
        assert "UTC" in (one.page.locator("#taken").text_content() or "")
        one.page.locator("input[type=search]").first.fill("new here")
        one.page.locator("input[type=search]").first.press("Enter")
        one.page.wait_for_url(re.compile(r"/models/Llama-4-70B-hf\?q=new\+here"))
        assert one.page.locator("a.peer").count() == 1
        one.page.locator("thead a").first.click()
        one.page.locator("a.peer").first.click()
        assert "First seen" in one.page.locator("#details").inner_text()
        one.page.get_by_role("link", name="All models").click()
        assert one.page.locator("section.model").count() == 3


# --- strangers' texts


def test_nothing_of_strangers_runs(browser: Browser) -> None:
    with served(synthetic.hostile(time.time())) as site, tab(browser) as one:
        one.page.goto(site.url)
        one.page.wait_for_selector("html.live")
        for peer in one.page.locator("a.peer").all():
            peer.click()
        one.page.wait_for_function("() => document.querySelectorAll('tr.opened dl').length === 8")
        site.give(later(site.given.state))
        one.page.wait_for_function(
            "(old) => document.body.dataset.takenAt !== old",
            arg=one.page.locator("body").get_attribute("data-taken-at"),
        )
        one.page.locator("h2 a").click()
        one.page.wait_for_selector("h1")
        assert one.page.evaluate("window.hurt") is None
        assert one.errors == []
        assert {urlsplit(address).hostname for address in one.requested} == {"127.0.0.1"}
