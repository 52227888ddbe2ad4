"""How well and how cheaply servers spread over a model: our rule and the published one from the same random starts.

    balance.py [--json] [--quick]

Needs no network and no model: the rules run in the simulator (tests/sim). First still: servers decide one after the other,
in rounds, on what is true. Then an hour in which 1 % of the servers leave each minute and as many come: checks at random times,
views up to 20 s old, a minute to load. The published rule is left out where it takes hours (marked –).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from petals_agent.balance.plan import make_plan
from sim.instances import instance
from sim.rounds import Rounds, Rule, ours, play, published, rows
from sim.simulator import Simulator

SIZES = ((8, 32), (50, 80), (200, 80), (1000, 126))
QUICK = ((8, 32), (50, 80))
ROUNDS = {"ours": 60, "published": 6}
STILL_UP_TO = 200  # servers: beyond, the published rule's six rounds take hours
CHURN_UP_TO = 50
QUICK_CHURN_UP_TO = 8
TIMED = {"ours": 50, "published": 3}  # decisions timed at the start
HOUR_S = 3600.0


def rule_of(name: str) -> Rule:
    return ours() if name == "ours" else published()


def decision_ms(name: str, servers: int, blocks: int) -> float:
    """The median time of one decision in the random start, nothing cached."""
    first = instance(servers, blocks)
    rule = rule_of(name)
    seconds = []
    for server in first[: TIMED[name]]:
        made = play(first, blocks, lambda _: lambda _server, _snapshot: None, 1).snapshot
        make_plan.cache_clear()
        began = time.perf_counter()
        rule(server, made)
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds) * 1e3, 3)


def still(name: str, servers: int, blocks: int) -> Rounds:
    """Rounds until nobody moves, six at most for the published rule."""
    rule = rule_of(name)
    return play(instance(servers, blocks), blocks, lambda _: rule, ROUNDS[name])


def churn(name: str, start: Rounds) -> dict[str, Any]:
    """An hour with churn, from where the still swarm ended."""
    servers = [replace(server, follows=name == "ours") for server in rows(start.snapshot)]
    swarm = Simulator(start.snapshot.num_blocks, servers, churn_per_minute=0.01)
    swarm.run(HOUR_S)
    return {
        "quality": round(statistics.mean(swarm.qualities), 4),
        "worst_quality": round(min(swarm.qualities), 4),
        "moves": len(swarm.moves),
        "idle_moves": sum(not move.useful for move in swarm.moves),
    }


def measure(name: str, servers: int, blocks: int, quick: bool) -> dict[str, Any]:
    """All figures of one rule in one size; None where the published rule takes too long."""
    figures: dict[str, Any] = {
        "decision_ms": decision_ms(name, servers, blocks),
        "still": None,
        "churn": None,
    }
    mine = name == "ours"
    if not mine and servers > STILL_UP_TO:
        return figures
    end = still(name, servers, blocks)
    figures["still"] = {
        "quality": round(end.snapshot.quality, 4),
        "moves": end.moves,
        "moves_per_server": round(end.moves / servers, 3),
        "idle_moves": end.idle_moves,
        "rounds": end.rounds,
    }
    if mine or servers <= (QUICK_CHURN_UP_TO if quick else CHURN_UP_TO):
        figures["churn"] = churn(name, end)
    return figures


def table(results: list[dict[str, Any]]) -> str:
    """Rows of sizes; in each cell ours / published."""
    heads = (
        "servers × blocks",
        "quality",
        "moves",
        "idle",
        "ms",
        "1 %/min: quality",
        "worst",
        "moves",
        "idle",
    )
    keys = (("still", "quality"), ("still", "moves"), ("still", "idle_moves"), ("decision_ms",))
    keys += (("churn", "quality"), ("churn", "worst_quality"), ("churn", "moves"), ("churn", "idle_moves"))
    rows = [heads]
    for result in results:
        cells = [" / ".join(cell(result[name], key) for name in ("ours", "published")) for key in keys]
        rows.append((f"{result['servers']} × {result['blocks']}", *cells))
    rows.insert(1, tuple("---" for _ in heads))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = (" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def cell(figures: dict[str, Any], key: tuple[str, ...]) -> str:
    value: Any = figures
    for part in key:
        value = None if value is None else value[part]
    if value is None:
        return "–"
    return (
        f"{value:.3f}" if "quality" in key[-1] else f"{value:.3g}" if isinstance(value, float) else str(value)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of the table (ours / published)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the two small sizes; no published rule under churn"
    )
    options = parser.parse_args()
    results = []
    for servers, blocks in QUICK if options.quick else SIZES:
        print(f"{servers} × {blocks} …", file=sys.stderr, flush=True)
        figures = {name: measure(name, servers, blocks, options.quick) for name in ("ours", "published")}
        results.append({"servers": servers, "blocks": blocks, **figures})
    print(json.dumps(results, indent=2) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
