"""A published server asks our monitor, instead of the one that it knows, whether it can be reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from harness.monitor import start_monitor
from harness.processes import Processes
from harness.swarm import StockServer
from monitor.swarms import peer

pytestmark = pytest.mark.interop


@pytest.mark.timeout(300)
def test_a_published_server_is_confirmed(
    processes: Processes,
    bootstrap: str,
    stock_server: Callable[..., StockServer],
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    url = start_monitor(processes, tmp_path, [bootstrap], free_port()).url
    stock = stock_server("0:8", [bootstrap], options=["--health-url", url]).wait_online(200)
    assert "Server is reachable from the Internet" in stock.process.output()
    assert httpx.get(f"{url}/api/v1/is_reachable/{stock.peer_id}", timeout=15).json()["success"] is True
    wrong = httpx.get(f"{url}/api/v1/is_reachable/{peer(1)}", timeout=15).json()
    assert wrong["success"] is wrong["ok"] is False and wrong["message"]
