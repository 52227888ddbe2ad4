"""A collector that sees a swarm on loopback every half second, and a page in a real browser."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import torch  # noqa: F401  # first: the monitor's imports put a stand-in where it is not

from monitor import synthetic
from monitor.browser import Tab, chromium, tab, why_not
from monitor.screenshots import past
from monitor.source import Past, Served, served
from petals_agent.monitor.collector import Collector

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Collecting = Callable[..., AbstractAsyncContextManager[Collector]]


@pytest.fixture
def collecting(tmp_path: Path) -> Collecting:
    """`async with collecting([maddr], period=1.0) as collector:`; it runs inside."""

    @asynccontextmanager
    async def run(peers: list[str], **options: Any) -> AsyncIterator[Collector]:
        collector = Collector(
            peers, tmp_path, **{"period": 0.5, "allow_private": True, "startup_timeout": 20.0, **options}
        )
        task = asyncio.create_task(collector.run())
        try:
            yield collector
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await collector.stop()

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of the tests of one file, which must not use asyncio: Playwright's own loop runs beneath them."""
    if reason := why_not():
        pytest.skip(reason)
    with chromium() as one:
        yield one


@pytest.fixture
def site() -> Iterator[Served]:
    """A made-up swarm with a past, served on loopback."""
    now = time.time()
    with served(synthetic.small(now), Past(past(now))) as one:
        yield one


@pytest.fixture
def here(browser: Browser, site: Served) -> Iterator[Tab]:
    """The page, live; in the end nothing was wrong in its console and no other host was asked."""
    with tab(browser) as one:
        one.page.goto(site.url)
        one.page.wait_for_selector("html.live")
        yield one
        assert one.errors == []
        assert {urlsplit(address).hostname for address in one.requested} == {"127.0.0.1"}
