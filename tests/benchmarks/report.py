"""From the rounds of a benchmark to its medians, ratios and text table. Measures nothing."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

FIGURES = ("steps_s", "p50_ms", "p99_ms", "prefill_ms")


def median(values: Sequence[float]) -> float | None:
    """The median, or None where every measurement was void."""
    return round(statistics.median(values), 3) if values else None


def _ratio(first: Sequence[Any], second: Sequence[Any], pick: Callable[[Any], float]) -> float | None:
    """Median of the rounds' ratios; rounds in which one of the two was void do not count."""
    pairs = []
    for one, other in zip(first, second, strict=True):
        with suppress(KeyError):
            pairs.append(pick(one) / pick(other))
    return median(pairs)


def _sessions(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what rounds measured with one number of sessions."""
    cpu = [one["cpu_us"] for one in rounds]
    return {
        **{figure: median([one[figure] for one in rounds]) for figure in FIGURES},
        "cpu_us": {part: median([one[part] for one in cpu]) for part in (cpu[0] if cpu else ())},
    }


def _server(one: Any, counts: Sequence[str]) -> dict[str, Any]:
    valid = {count: [r["sessions"][count] for r in one.rounds if count in r["sessions"]] for count in counts}
    return {
        "start_s": median(one.starts),
        "sessions": {count: _sessions(rounds) for count, rounds in valid.items()},
        "forward_tok_s": median([r["forward"] for r in one.rounds if "forward" in r]),
        "backward_tok_s": median([r["backward"] for r in one.rounds if "backward" in r]),
        **one.footprint,
    }


def summary(
    servers: Sequence[Any], in_process: Sequence[dict[str, float]], void: list[str], args: dict[str, Any]
) -> dict[str, Any]:
    """Medians of each server, and the ratios of the first to the others, each the median of the rounds' ratios."""
    counts = args["sessions"].split(",")
    first = servers[0]
    result: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "load_average": [round(value, 2) for value in os.getloadavg()],
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "settings": {name: args[name] for name in ("rounds", "starts", "steps", "batch")},
        "servers": {one.name: _server(one, counts) for one in servers},
        "in_process": {count: median([rates[count] for rates in in_process]) for count in counts},
        "ratios": {},
        "void": void,
    }
    for other in servers[1:]:
        result["ratios"][f"{first.name}/{other.name}"] = {
            "steps_s": {
                count: _ratio(first.rounds, other.rounds, lambda r, c=count: r["sessions"][c]["steps_s"])
                for count in counts
            },
            "forward_tok_s": _ratio(first.rounds, other.rounds, lambda r: r["forward"]),
            "backward_tok_s": _ratio(first.rounds, other.rounds, lambda r: r["backward"]),
            "start_s": _ratio(first.starts, other.starts, float),
            "pss_mb": round(first.footprint["pss_mb"] / other.footprint["pss_mb"], 3),
        }
    result["ratios"][f"{first.name}/in_process"] = {
        "steps_s": {
            count: _ratio(
                [one["sessions"].get(count, {}) for one in first.rounds],
                [{"steps_s": rates[count]} for rates in in_process],
                lambda figures: figures["steps_s"],
            )
            for count in counts
        }
    }
    return result


def _cell(value: Any, suffix: str = "") -> str:
    if value is None:
        return "void"
    if isinstance(value, float):
        value = (
            f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
        )
    return f"{value}{suffix}"


def table(result: dict[str, Any]) -> str:
    """The figures as aligned text: a column per server, then in-process transformers, then the ratios."""
    servers, ratios = result["servers"], result["ratios"]
    pairs = [pair for pair in ratios if not pair.endswith("/in_process")]
    rows = [["", *servers, "in-process", *pairs]]

    def row(title: str, pick: Callable[[dict[str, Any]], Any], local: str = "", ratio: Any = None) -> None:
        found = [_cell(ratio(ratios[pair]), " ×") if ratio else "" for pair in pairs]
        rows.append([title, *(_cell(pick(one)) for one in servers.values()), local, *found])

    for count in next(iter(servers.values()))["sessions"]:
        local = _cell(result["in_process"][count])
        row(
            f"{count} sessions, steps/s",
            lambda s, c=count: s["sessions"][c]["steps_s"],
            local,
            lambda r, c=count: r["steps_s"][c],
        )
        row(
            "  p50 / p99, ms",
            lambda s, c=count: f"{_cell(s['sessions'][c]['p50_ms'])} / {_cell(s['sessions'][c]['p99_ms'])}",
        )
        row("  prefill, ms", lambda s, c=count: s["sessions"][c]["prefill_ms"])
    row("forward, tokens/s", lambda s: s["forward_tok_s"], "", lambda r: r["forward_tok_s"])
    row("backward, tokens/s", lambda s: s["backward_tok_s"], "", lambda r: r["backward_tok_s"])
    row("start to ONLINE, s", lambda s: s["start_s"], "", lambda r: r["start_s"])
    row("Python processes", lambda s: s["python_processes"])
    row("memory (PSS of the tree), MB", lambda s: s["pss_mb"], "", lambda r: r["pss_mb"])
    row("CPU while idle, %", lambda s: s["idle_cpu_percent"])
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in rows
    ]
    lines += [f"VOID: {why}" for why in result["void"]]
    machine = result["machine"]
    lines.append(
        f"{machine['cpus']} CPUs, torch {machine['torch']}, transformers {machine['transformers']}, median of {result['settings']['rounds']} rounds"
    )
    return "\n".join(line.rstrip() for line in lines)
