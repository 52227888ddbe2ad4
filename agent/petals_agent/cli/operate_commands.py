"""`petals-agent reload`, `drain`, `undrain`, `pause`, `resume` and `rebalance`: what an operator asks a running agent to do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="The agent's configuration file.")]
_LOOK_S = 0.5
_MOVE_TIMEOUT_S = 3600.0  # a load from the Hub, and sessions that end in their own time


def _ask(config: Path | None, request: dict[str, Any], timeout: float = 10.0) -> Any:
    from petals_agent.cli.settings import control_socket
    from petals_agent.supervisor.control import ask

    return asyncio.run(ask(control_socket(config), request, timeout))


def reload(
    config: ConfigOption = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when it is done (it always does; for the unit's sake).")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Read the configuration again; says what is in effect now and what needs a restart."""
    import json

    done = _ask(config, {"do": "reload"}, 30.0)
    if json_:
        typer.echo(json.dumps(done))
        return
    applied, later = done["applied"], done["needs_restart"]
    typer.echo(
        f"in effect now: {', '.join(applied)}"
        if applied
        else "nothing that can change at run time has changed"
    )
    if later:
        typer.echo(f"needs a restart (systemctl restart petals-agent): {', '.join(later)}")
    if done["plugins"]:
        typer.echo(f"plugins in use: {', '.join(done['plugins'])}")
    for refused in done["refused"]:
        typer.echo(f"plugin not used: {refused}", err=True)


def drain(
    config: ConfigOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Shown in status and in the log.")] = "",
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.0, help="Seconds for open sessions; default: until they end."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait for another holder of our blocks.")
    ] = False,
    until_restart: Annotated[
        bool, typer.Option("--until-restart", help="A restart of the agent ends the drain.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return at once.")] = False,
) -> None:
    """Let nobody new in, wait until open sessions have ended; stays so over restarts until `petals-agent undrain`."""
    from petals_agent.errors import SwarmError

    request = {"do": "drain", "reason": reason, "timeout": timeout, "force": force, "kept": not until_restart}
    _ask(config, request)
    if no_wait:
        return
    told = ""
    while True:
        state = _ask(config, {"do": "status"})["drain"]
        if state is None:
            raise SwarmError("the drain was called off before it ended")
        text = f"{state['stage']}: {state['detail']}"
        if text != told:
            typer.echo(text)
            told = text
        if state["stage"] == "drained":
            return
        time.sleep(_LOOK_S)


def undrain(config: ConfigOption = None) -> None:
    """Let new sessions in again."""
    _ask(config, {"do": "undrain"})
    typer.echo("new sessions are let in again")


def pause(
    config: ConfigOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Shown in status and in the log.")] = "",
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, max=86400.0, help="Seconds for open sessions to end.")
    ] = 30.0,
) -> None:
    """Free the device: nobody new is let in, then the blocks are unloaded; until `petals-agent resume` or a restart."""
    from petals_agent.errors import SwarmError

    _ask(config, {"do": "pause", "reason": reason, "drain_s": timeout})
    told = ""
    while True:
        status = _ask(config, {"do": "status"})
        if status["state"] != told:
            told = status["state"]
            typer.echo(told if told != "draining" else f"draining: {status['sessions']} sessions are open")
        if told == "paused":
            return
        if status["pause"] is None:
            raise SwarmError("the pause was called off before it began")
        time.sleep(_LOOK_S)


def resume(config: ConfigOption = None) -> None:
    """Load the blocks again, and serve, unless a plugin wants the pause to go on."""
    still = _ask(config, {"do": "resume"})["still"]
    typer.echo(
        "blocks are chosen and loaded again" if still is None else f"a plugin may want it still: {still}"
    )


def rebalance(
    config: ConfigOption = None,
    blocks: Annotated[
        str | None, typer.Option("--blocks", metavar="START:END", help="Go there, whatever the balance says.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look at the swarm and say why.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Look at the swarm's balance now, and move our blocks where that pays; returns when the move is over."""
    import json

    request = {"do": "rebalance", "blocks": blocks, "dry_run": dry_run}
    done = _ask(config, request, _MOVE_TIMEOUT_S)
    typer.echo(json.dumps(done) if json_ else done["said"])
