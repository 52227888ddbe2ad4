"""`petals-agent explain`: the agent's last decisions, read from its state folder, so also when it does not run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from petals_agent.errors import SwarmError
from petals_agent.printable import printable


def explain(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The agent's configuration file.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many, newest last.")] = 20,
    json_: Annotated[bool, typer.Option("--json", help="One JSON array, for scripts.")] = False,
) -> None:
    """The agent's last decisions: why these blocks, why a restart, why a ping was withheld."""
    from petals_agent.cli.settings import configured
    from petals_agent.supervisor.decisions import FILE, Decision, read_decisions

    folder = configured(config, None, require_model=False).state_dir
    try:
        decisions = read_decisions(folder, count)
    except OSError as error:
        raise SwarmError(
            f"{folder / FILE} cannot be read ({error.strerror}); join the agent's group or use sudo"
        ) from None

    def show(decision: Decision) -> None:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision.time))
        typer.echo(printable(f"{moment}  {decision.kind}: {decision.what}"))
        facts = "  ".join(f"{name}={json.dumps(value)}" for name, value in decision.facts.items())
        typer.echo(printable(f"{'':21}because {decision.why}" + (f"  [{facts}]" if facts else "")))

    if json_:
        typer.echo(json.dumps([decision.to_dict() for decision in decisions]))
        return
    if not decisions:
        typer.echo(f"no decisions are kept in {folder} yet")
    for decision in decisions:
        show(decision)
