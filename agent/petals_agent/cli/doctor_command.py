"""`petals-agent doctor`: look at everything that keeps a host from serving, and say what to do about each."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals_agent.printable import printable

if TYPE_CHECKING:
    from petals_agent.doctor.check import Checked

_COLOURS = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "red"}


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", readable=False, help="The agent's configuration file.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Check this host: configuration, clock, ports, reachability, GPU, memory, disk, model, unit; with remedies.

    Exits with 1 when there is a problem; warnings and what could not be looked at are none.
    """
    from petals_agent.doctor.checks import CHECKS

    checked = asyncio.run(_run(config, live=sys.stdout.isatty() and not json_))
    order = [check.name for check in CHECKS]
    checked.sort(key=lambda one: order.index(one.name))
    problems = sum(one.result.outcome.value == "problem" for one in checked)
    if json_:
        typer.echo(json.dumps({"ok": not problems, "checks": [_fields(one) for one in checked]}))
    elif not sys.stdout.isatty():
        for one in checked:
            _print(_fields(one))
    if not json_:
        warnings = sum(one.result.outcome.value == "warning" for one in checked)
        typer.echo(f"{len(checked)} checks: {problems} problems, {warnings} warnings")
    raise typer.Exit(1 if problems else 0)


async def _run(config: Path | None, live: bool) -> list[Checked]:
    from petals_agent.doctor.checks import CHECKS
    from petals_agent.doctor.host import Host
    from petals_agent.doctor.runner import run_checks

    checked = []
    async for one in run_checks(CHECKS, Host(config)):
        if live:
            _print(_fields(one))
        checked.append(one)
    return checked


def _fields(one: Checked) -> dict[str, Any]:
    """What `--json` prints of a check; names are stable."""
    result = one.result
    return {
        "name": one.name,
        "outcome": result.outcome.value,
        "found": result.found,
        "remedy": result.remedy,
        "seconds": round(one.seconds, 3),
    }


def _print(check: Mapping[str, Any]) -> None:
    outcome = typer.style(f"{check['outcome']:<8}", **_style(check["outcome"]))
    typer.echo(f"{outcome} {check['name']:<16} {printable(check['found'])}")
    if check["remedy"]:
        typer.echo(f"{'':25} → {check['remedy']}")


def _style(outcome: str) -> dict[str, Any]:
    colour = _COLOURS[outcome]
    return {"dim": True} if colour == "dim" else {"fg": colour}
