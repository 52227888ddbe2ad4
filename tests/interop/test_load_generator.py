"""The load generator accepts a server that computes the right thing and voids the figures of one that does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from harness.processes import Process, Processes
from harness.swarm import PEER_SCRIPTS, PREFIX, TESTS, StockServer

BENCHMARKS = TESTS / "benchmarks"


def run_load(processes: Processes, maddr: str, model: Path, folder: Path) -> Process:
    """Compute the answers of `model` and hold the server to them."""
    file = folder / "answers.npz"
    shape = ["--sessions", "2", "--steps", "5", "--batch", "2x16"]
    local = processes.run(
        "local", [sys.executable, BENCHMARKS / "local.py", model, "--answers", file, *shape], timeout=60
    )
    assert local.returncode == 0, local.output()
    options = ["--peers", maddr, "--prefix", PREFIX, "--answers", file, "--sessions", "1,2"]
    return processes.run("load", [sys.executable, BENCHMARKS / "load.py", *options], timeout=60)


def test_right_answers_count_and_wrong_ones_void(
    processes: Processes, stock_server: Callable[..., StockServer], tiny_llama: Path, tmp_path: Path
) -> None:
    maddr = stock_server("0:8").wait_online().maddr
    load = run_load(processes, maddr, tiny_llama, tmp_path)
    assert load.returncode == 0, load.output()
    result = load.events()[-1]
    assert set(result["sessions"]) == {"1", "2"}
    assert result["sessions"]["2"]["steps_s"] > 0 and result["backward_tok_s"] > 0

    other = tmp_path / "other"
    processes.run("model", [sys.executable, PEER_SCRIPTS / "model.py", other, "--seed", "1"], timeout=60)
    load = run_load(processes, maddr, other, tmp_path)
    assert load.returncode == 1
    assert "session 0, step 0: off by" in json.dumps(load.events()[-1]["void"])
