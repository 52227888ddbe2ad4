"""Ratios are medians over rounds, and a void figure counts nowhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import report


def server(name: str, rates: list[float | None]) -> Any:
    """A measured server whose rounds had these steps/s with one session; None: void."""
    rounds = []
    for rate in rates:
        figures = {
            "steps_s": rate,
            "p50_ms": 1.0,
            "p99_ms": 2.0,
            "prefill_ms": 3.0,
            "cpu_us": {"server": 50.0},
        }
        rounds.append({"sessions": {} if rate is None else {"1": figures}, "forward": 9.0, "backward": 9.0})
    footprint = {"python_processes": 2, "pss_mb": 300.0, "idle_cpu_percent": 0.0}
    return SimpleNamespace(name=name, starts=[2.0, 4.0], rounds=rounds, footprint=footprint)


def summarise(ours: list[float | None], stock: list[float | None]) -> dict[str, Any]:
    args = {"sessions": "1", "rounds": len(ours), "starts": 2, "steps": 10, "batch": "1x1"}
    local = [{"1": 400.0}] * len(ours)
    return report.summary([server("ours", ours), server("stock", stock)], local, [], args)


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    result = summarise([200, 400, 900], [100, 100, 300])
    assert result["ratios"]["ours/stock"]["steps_s"]["1"] == 3.0  # of 2, 4, 3; of the medians it would be 4
    assert result["ratios"]["ours/in_process"]["steps_s"]["1"] == 1.0
    assert result["ratios"]["ours/stock"]["start_s"] == 1.0


def test_void_rounds_do_not_count() -> None:
    result = summarise([200, None, None], [100, 100, None])
    assert result["servers"]["ours"]["sessions"]["1"]["steps_s"] == 200
    assert result["ratios"]["ours/stock"]["steps_s"]["1"] == 2.0
    all_void = summarise([None], [100])
    assert all_void["ratios"]["ours/stock"]["steps_s"]["1"] is None
    assert "void" in report.table(all_void)
    assert "void" not in report.table(result)
