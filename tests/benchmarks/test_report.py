"""Ratios are medians over rounds, and a void figure counts nowhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import report


def server(name: str, rates: list[float | None]) -> Any:
    """A measured server whose turns with one session had these steps/s; None: void."""
    more = {"p50_ms": 1.0, "p99_ms": 2.0, "prefill_ms": 3.0, "cpu_us": {"server": 50.0}}
    turns = [None if rate is None else {"steps_s": rate, **more} for rate in rates]
    footprint = {"python_processes": 2, "pss_mb": 300.0, "idle_cpu_percent": 0.0}
    training = {"forward": [10.0, 30.0, 20.0], "backward": [5.0, 5.0, 5.0]}
    return SimpleNamespace(
        name=name, starts=[2.0, 4.0], sessions={"1": turns}, training=training, footprint=footprint
    )


def summarise(ours: list[float | None], stock: list[float | None]) -> dict[str, Any]:
    settings = {"rounds": len(ours)}
    return report.summary([server("ours", ours), server("stock", stock)], [{"1": 400.0}], [], settings)


def test_ratio_is_the_median_of_the_turns_ratios() -> None:
    result = summarise([200, 400, 900], [100, 100, 300])
    assert result["ratios"]["ours/stock"]["steps_s"]["1"] == 3.0  # of 2, 4, 3; of the medians it would be 4
    assert result["ratios"]["ours/in_process"]["steps_s"]["1"] == 1.0
    assert result["ratios"]["ours/stock"]["start_s"] == 1.0
    ours = result["servers"]["ours"]
    assert (ours["sessions"]["1"]["cpu_us"]["server"], ours["forward_tok_s"]) == (50.0, 20.0)
    assert "void" not in report.table(result)


def test_one_void_turn_voids_the_figure() -> None:
    result = summarise([200, None, 200], [100, 100, 100])
    assert result["servers"]["ours"]["sessions"]["1"]["steps_s"] is None
    assert result["servers"]["stock"]["sessions"]["1"]["steps_s"] == 100
    assert result["ratios"]["ours/stock"]["steps_s"]["1"] is None
    assert result["ratios"]["ours/in_process"]["steps_s"]["1"] is None
    assert "void" in report.table(result)
