"""From the rounds of a benchmark to its medians, ratios and text table. Measures nothing."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

FIGURES = ("steps_s", "p50_ms", "p99_ms", "prefill_ms")


def median(values: Sequence[float | None]) -> float | None:
    """The median; None if there is nothing or one of them is void (None)."""
    valid = [value for value in values if value is not None]
    return round(statistics.median(valid), 3) if valid and len(valid) == len(values) else None


def ratio(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """The median of what the turns' pairs give; None if one of them is void."""
    pairs = zip(first, second, strict=True)
    return median([None if one is None or other is None else one / other for one, other in pairs])


def figure(turns: Sequence[dict[str, Any] | None], name: str) -> list[float | None]:
    """One figure of all turns; those of CPU time are named by their part."""
    return [None if turn is None else turn.get(name, turn["cpu_us"].get(name)) for turn in turns]


def _sessions(turns: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    parts = next((turn["cpu_us"] for turn in turns if turn), {})
    return {
        **{name: median(figure(turns, name)) for name in FIGURES},
        "cpu_us": {part: median(figure(turns, part)) for part in parts},
    }


def _server(one: Any) -> dict[str, Any]:
    return {
        "start_s": median(one.starts),
        "sessions": {count: _sessions(turns) for count, turns in one.sessions.items()},
        **{f"{kind}_tok_s": median(rates) for kind, rates in one.training.items()},
        **one.footprint,
    }


def _ratios(one: Any, other: Any) -> dict[str, Any]:
    rates = {
        count: ratio(figure(turns, "steps_s"), figure(other.sessions[count], "steps_s"))
        for count, turns in one.sessions.items()
    }
    return {
        "steps_s": rates,
        **{f"{kind}_tok_s": ratio(rates, other.training[kind]) for kind, rates in one.training.items()},
        "start_s": ratio(one.starts, other.starts),
        "pss_mb": ratio([one.footprint["pss_mb"]], [other.footprint["pss_mb"]]),
    }


def summary(
    servers: Sequence[Any], in_process: Sequence[dict[str, float]], void: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Medians of each server and of in-process transformers, and the ratios of the first server to the others."""
    first = servers[0]
    local = {count: median([rates[count] for rates in in_process]) for count in first.sessions}
    own = {count: median(figure(turns, "steps_s")) for count, turns in first.sessions.items()}
    ratios = {f"{first.name}/{other.name}": _ratios(first, other) for other in servers[1:]}
    ratios[f"{first.name}/in_process"] = {
        "steps_s": {count: ratio([own[count]], [local[count]]) for count in own}
    }
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "load_average": [round(value, 2) for value in os.getloadavg()],
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "settings": settings,
        "servers": {one.name: _server(one) for one in servers},
        "in_process": local,
        "ratios": ratios,
        "void": void,
    }


def _cell(value: Any, suffix: str = "") -> str:
    if value is None:
        return "void"
    if isinstance(value, float):
        value = (
            f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
        )
    return f"{value}{suffix}"


def _rows(
    servers: Sequence[dict[str, Any]], in_process: dict[str, Any], ratios: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[str], str, list[str]]]:
    """Yield (title, a cell for each server, cell of in-process, a cell for each ratio)."""
    for count, local in in_process.items():
        sessions = [one["sessions"][count] for one in servers]
        rates = [_cell(one["steps_s"][count], " ×") for one in ratios]
        yield f"{count} sessions, steps/s", [_cell(one["steps_s"]) for one in sessions], _cell(local), rates
        yield (
            "  p50 / p99, ms",
            [f"{_cell(one['p50_ms'])} / {_cell(one['p99_ms'])}" for one in sessions],
            "",
            [],
        )
        yield "  prefill, ms", [_cell(one["prefill_ms"]) for one in sessions], "", []
        yield "  server's CPU per step, µs", [_cell(one["cpu_us"].get("server")) for one in sessions], "", []
    for title, key in (
        ("forward, tokens/s", "forward_tok_s"),
        ("backward, tokens/s", "backward_tok_s"),
        ("start to ONLINE, s", "start_s"),
        ("memory (PSS of the tree), MB", "pss_mb"),
    ):
        yield title, [_cell(one[key]) for one in servers], "", [_cell(one[key], " ×") for one in ratios]
    yield "Python processes", [_cell(one["python_processes"]) for one in servers], "", []
    yield "CPU while idle, %", [_cell(one["idle_cpu_percent"]) for one in servers], "", []


def table(result: dict[str, Any]) -> str:
    """The figures as aligned text: a column per server, then in-process transformers, then the ratios."""
    servers, machine = result["servers"], result["machine"]
    pairs = [pair for pair in result["ratios"] if not pair.endswith("/in_process")]
    rows = [["", *servers, "in-process", *pairs]]
    for title, cells, local, ratios in _rows(
        list(servers.values()), result["in_process"], [result["ratios"][pair] for pair in pairs]
    ):
        rows.append([title, *cells, local, *ratios, *[""] * (len(pairs) - len(ratios))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines += [f"VOID: {why}" for why in result["void"]]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    lines.append(f"{machine['cpus']} CPUs, {versions}, {result['settings']['rounds']} rounds")
    return "\n".join(lines)
