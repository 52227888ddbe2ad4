"""The page in a real browser, of a live swarm of ours and of a published server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.live import start_live
from harness.monitor import start_monitor
from harness.processes import Processes
from harness.swarm import StockServer
from monitor.browser import chromium, tab, wait_for_sign, why_not

PERIOD_S = 4


@pytest.mark.timeout(400)
def test_a_mixed_swarm(
    processes: Processes,
    bootstrap: str,
    stock_server: Callable[..., StockServer],
    tiny_llama: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    """All appear as what they are; who is killed is first unreachable and then offline; sorted and filtered meanwhile."""
    if reason := why_not():
        pytest.skip(reason)
    stock = stock_server("4:8", [bootstrap], options=["--update-period", str(PERIOD_S)])
    monitor = start_monitor(processes, tmp_path / "monitor", [bootstrap], free_port())
    often = f"[swarm]\nupdate_period = {PERIOD_S}\n"
    # nobody is at the address that it announces, so the monitor does not confirm it, and it goes on joining
    hidden = f'{often}announce = ["/ip4/127.0.0.1/tcp/{free_port()}"]\nreachability = "{monitor.url}"\n'
    agents = {
        "#": start_live(processes, tmp_path / "ours", tiny_llama, "0:4", [bootstrap], often),
        "J": start_live(processes, tmp_path / "hidden", tiny_llama, "2:6", [bootstrap], hidden),
    }
    ids = {
        sign: str(agent.until(lambda status: status.get("peer_id"), 60, "a peer id")["peer_id"])
        for sign, agent in agents.items()
    }
    stock.wait_online(200)
    with chromium() as browser, tab(browser) as one:
        page = one.page
        page.goto(monitor.url)
        page.wait_for_selector("html.live")
        for sign, peer_id in {**ids, "#": stock.peer_id}.items():
            wait_for_sign(page, peer_id, sign, 60)
        wait_for_sign(page, ids["#"], "#", 60)
        page.wait_for_function("() => document.querySelector('.badge').textContent.trim() === 'healthy'")

        def rows() -> list[str]:
            return [text[-6:] for text in page.locator("a.peer").all_text_contents()]

        short = {peer_id[-6:] for peer_id in (*ids.values(), stock.peer_id)}
        assert set(rows()) == short
        page.locator("thead a", has_text="Server").first.click()
        page.wait_for_function(
            "() => document.querySelector('th[aria-sort=ascending]')?.textContent.includes('Server')"
        )
        assert rows() == sorted(rows()) and set(rows()) == short
        page.locator("input[type=search]").first.fill(stock.peer_id[-6:])
        page.wait_for_function("() => document.querySelectorAll('a.peer').length === 1")

        stock.process.kill()
        wait_for_sign(page, stock.peer_id, "?", 30)
        page.wait_for_function("() => document.querySelector('.badge').textContent.trim() === 'broken'")
        wait_for_sign(page, stock.peer_id, "_", 60)
        assert one.errors == []
