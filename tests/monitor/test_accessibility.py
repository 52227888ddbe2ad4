"""The page for everyone: contrast as computed, names and landmarks, the keyboard alone, and a phone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from monitor import synthetic
from monitor.browser import PHONE, Tab, tab
from monitor.screenshots import past
from monitor.source import Past, Served, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const color = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const d = canvas.getImageData(0, 0, 1, 1).data; return { rgb: [d[0], d[1], d[2]], a: d[3] / 255 }; };
  const over = (top, under) => top.rgb.map((c, i) => c * top.a + under[i] * (1 - top.a));
  const light = (rgb) => { const [r, g, b] = rgb.map((c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (element) => { const chain = []; for (let e = element; e; e = e.parentElement) chain.unshift(e);
    return chain.reduce((under, e) => over(color(getComputedStyle(e).backgroundColor), under), [255, 255, 255]); };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.nodeValue.trim() || element.closest('.unseen, .skip, svg, option, script, noscript') || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const under = ground(element), ink = over(color(style.color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push(`${ratio.toFixed(2)} ${element.className}: ${walker.currentNode.nodeValue.trim().slice(0, 30)}`);
  }
  return [...new Set(poor)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, site: Served, scheme: str) -> None:
    with tab(browser, color_scheme=scheme) as one:
        one.page.goto(site.url)
        one.page.wait_for_selector("html.live")
        one.page.locator("a.peer").first.click()
        one.page.wait_for_selector("tr.opened dl")
        assert one.page.evaluate(CONTRAST) == []
        server = one.page.locator("a.peer").first.get_attribute("href") or ""
        for path in (server, "./models/none"):
            one.page.goto(f"{site.url}/{path}")
            assert one.page.evaluate(CONTRAST) == []
        site.given.is_fresh = False
        site.give(site.given.state.model_copy(update={"problem": "2 keys did not answer"}))
        one.page.goto(site.url)
        one.page.wait_for_selector("#stale ~ #problem")
        one.page.wait_for_selector("html.late")
        assert one.page.evaluate(CONTRAST) == []


def test_names_and_landmarks(here: Tab) -> None:
    page = here.page
    assert [page.locator(tag).count() for tag in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    assert page.locator("html").get_attribute("lang") == "en"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, a, [role=img], nav, section, form, ul.legend')].filter((e) =>
          e.type !== 'hidden' && !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()
          && !document.getElementById(e.getAttribute('aria-labelledby'))).map((e) => e.outerHTML.slice(0, 90))"""
    )
    assert unnamed == []
    twice = page.evaluate(
        "() => { const ids = [...document.querySelectorAll('[id]')].map((e) => e.id); return ids.filter((id, i) => ids.indexOf(id) !== i); }"
    )
    assert twice == []
    assert page.locator("thead th[aria-sort]").count() == page.locator("thead th").count()
    assert page.locator("tbody tr > th[scope=row]").count() == 18


def test_everything_is_reached_by_keyboard(here: Tab) -> None:
    here.page.keyboard.press("Tab")
    assert here.page.evaluate("document.activeElement.className") == "skip"
    here.page.keyboard.press("Enter")
    assert here.page.evaluate("document.activeElement.id") == "main"
    seen = set()
    for _ in range(60):
        here.page.keyboard.press("Tab")
        seen.add(
            here.page.evaluate(
                "document.activeElement.nodeName + ' ' + (document.activeElement.className || document.activeElement.name || document.activeElement.textContent)"
            )
        )
        if here.page.evaluate("document.activeElement === document.body"):
            break
        outline = here.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "the focus must be seen"
    assert {"INPUT q", "SELECT state", "A peer", "A Tokens/s"} <= seen


@pytest.mark.parametrize("width", [320, 390, 640])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_phone_needs_no_scrolling_sideways(browser: Browser, width: int, size: str) -> None:
    """Nor a desktop at 200 or 400 %."""
    now = time.time()
    state = synthetic.small(now) if size == "small" else synthetic.big(models=2, now=now)
    with (
        served(state, Past(past(now))) as site,
        tab(browser, {**PHONE, "width": width}, has_touch=True) as one,
    ):
        one.page.goto(site.url)
        one.page.wait_for_selector("html.live")
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width
        assert one.page.evaluate(
            "[...document.querySelectorAll('.scroll')].every((e) => e.scrollWidth <= e.clientWidth + 1)"
        )
        beyond = one.page.evaluate(
            """() => [...document.querySelectorAll('.model *')].filter((e) => e.checkVisibility() && !e.closest('svg, .unseen, .pill, .scroll')
              && e.getBoundingClientRect().right > e.closest('.model').getBoundingClientRect().right - 13).map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert beyond == []
