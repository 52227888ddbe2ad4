"""`petals-agent heartbeat`: the members of the fleet that the running agent belongs to, and how its rounds go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from petals_agent.printable import printable


def heartbeat(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The agent's configuration file.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """The fleet that this host belongs to: its members, its rounds, and who is missing. Exits with 75 while it fails."""
    from petals_agent.cli.settings import control_socket
    from petals_agent.errors import HeartbeatFailed
    from petals_agent.supervisor.control import ask

    found = asyncio.run(ask(control_socket(config), {"do": "heartbeat"}))
    if json_:
        typer.echo(json.dumps(found))
    else:
        for line in lines(found):
            typer.echo(line)
    if found["failure"] is not None:
        raise typer.Exit(HeartbeatFailed.exit_code)


def lines(found: Mapping[str, Any]) -> list[str]:
    """For people; our own line is marked, and so are the members that the last round ended without."""
    state = "well" if found["problem"] is None else found["problem"]
    text = [
        f"{found['fleet']}: {state}",
        f"a round every {found['period']:g} s, time-out {found['timeout']:g} s; "
        f"three failures in a row, or a wrong token: {found['on_failure']}",
    ]
    if found["round"] is not None:
        ago = "none yet" if found["success_ago"] is None else f"{found['success_ago']:.0f} s ago"
        text.append(f"round {found['round']}, {found['failures']} failures in a row, last success {ago}")
    for peer in found["members"]:
        marks = [
            word
            for word, there in (
                ("this host", peer == found["peer_id"]),
                ("witness", peer in found["witnesses"]),
                ("missing", peer in found["missing"]),
            )
            if there
        ]
        text.append(f"  {peer}" + (f"  {', '.join(marks)}" if marks else ""))
    return [printable(line) for line in text]
