"""Chromium as Debian packages it, driven by Playwright; nothing but 127.0.0.1 is reached by it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from harness.debian import can_install, install

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def program() -> str | None:
    """Where Chromium is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@cache
def why_not() -> str:
    """Why there is no browser here, not even after it was installed if that can be done; empty when there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ModuleNotFoundError:
        return "Playwright is not installed (pip install 'petals-agent[dev]')"
    if program() is None and can_install():
        try:
            install(["chromium"])
        except TimeoutError as error:
            return str(error)
    return "" if program() else "there is no Chromium (apt install chromium)"


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser, without sandbox, since tests may run as root."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--proxy-server=direct://"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program(), args=options)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A page, with everything that went wrong in it and every address that it asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)


@contextmanager
def tab(browser: Browser, size: dict[str, int] = DESKTOP, **options: Any) -> Iterator[Tab]:
    """A new tab with a profile of its own; `options` are Playwright's for a context."""
    context = browser.new_context(viewport=size, **options)
    try:
        page = context.new_page()
        page.set_default_timeout(15_000)
        one = Tab(page)
        page.on(
            "console",
            lambda message: one.errors.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: one.errors.append(str(error)))
        page.on("request", lambda request: one.requested.append(request.url))
        yield one
    finally:
        context.close()


def wait_for_sign(page: Page, peer_id: str, sign: str, timeout: float) -> None:
    """Until the page shows one of `#`, `J`, `?`, `_` beside that server, for at most `timeout` seconds."""
    page.wait_for_function(
        "([peer, sign]) => document.querySelector(`tr[id$='${peer}'] .pill b`)?.textContent === sign",
        arg=[peer_id, sign],
        timeout=timeout * 1000,
    )
