"""The control of all interop tests: the published client and the published servers agree among themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import swarm
from harness.processes import Processes
from harness.swarm import StockServer


def test_published_client_and_servers_agree(
    bootstrap: str, stock_server: Callable[..., StockServer], stock_generate: Callable[..., dict[str, Any]]
) -> None:
    for server in [stock_server("0:5", [bootstrap]), stock_server("5:8", [bootstrap])]:
        server.wait_online()
    result = stock_generate([bootstrap], "--check", "--grad", "--beam", "-n", "16")
    assert result["same"] == {"tokens": True, "beam": True, "gradient": True}
    assert len(result["tokens"]) == 16


def test_check_notices_other_weights(
    processes: Processes, stock_server: Callable[..., StockServer], peer_python: Path, tmp_path: Path
) -> None:
    """A check that could not fail would prove nothing: compare with a model of another seed."""
    server = stock_server("0:8").wait_online()
    other = tmp_path / "other"
    processes.run("model", [peer_python, swarm.PEER_SCRIPTS / "model.py", other, "--seed", "1"], timeout=60)
    with pytest.raises(AssertionError, match="the published client failed"):
        swarm.stock_generate(processes, peer_python, other, [server.maddr], "--check")
