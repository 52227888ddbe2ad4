"""The command `petals-agent`: parse the command line, call the part that does the work, turn errors into exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from petals_agent import __version__
from petals_agent.cli import (
    config_commands,
    demo_command,
    doctor_command,
    entry,
    explain_command,
    generate_command,
    heartbeat_command,
    monitor_command,
    operate_commands,
    plan_command,
    plugins_command,
    post_stop_command,
    swarm_command,
)
from petals_agent.errors import SwarmError

app = typer.Typer(
    name="petals-agent",
    help="Serve transformer blocks in a Petals swarm, and look after them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; default: see `petals-agent config show`."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key, e.g. --set serve.blocks=0:4; may be repeated."),
]


app.add_typer(config_commands.app, name="config")
app.add_typer(plugins_command.app, name="plugins")
app.command()(generate_command.generate)
app.command()(demo_command.demo)
app.command()(post_stop_command.post_stop)
for command in (
    operate_commands.reload,
    operate_commands.drain,
    operate_commands.undrain,
    operate_commands.pause,
    operate_commands.resume,
    operate_commands.rebalance,
):
    app.command()(command)
app.command()(explain_command.explain)
app.command()(plan_command.plan)
app.command()(swarm_command.swarm)
app.command()(monitor_command.monitor)
app.command()(doctor_command.doctor)
app.command()(heartbeat_command.heartbeat)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"petals-agent {__version__}")
        raise typer.Exit()


@app.command()
def run(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Join the swarm and serve until stopped (this is what the systemd unit runs)."""
    from petals_agent.cli.settings import configured
    from petals_agent.log import setup
    from petals_agent.supervisor.agent import Agent

    settings = configured(config, set_)
    setup(settings.log.level, settings.log.format)
    Agent(settings, lambda: configured(config, set_)).run()


@app.command()
def status(
    config: ConfigOption = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """What the running agent does: state, blocks, sessions, cache, tokens/s, last events."""
    from petals_agent.cli.settings import control_socket
    from petals_agent.cli.status_view import print_status
    from petals_agent.supervisor.control import ask

    socket = control_socket(config)

    def show(clear: bool) -> None:
        snapshot = asyncio.run(ask(socket, {"do": "status"}))
        if json_:
            typer.echo(json.dumps(snapshot, indent=None if watch else 2))
        else:
            print_status(snapshot, clear)

    try:
        show(clear=watch)
        while watch:
            time.sleep(1.0)
            show(clear=True)
    except KeyboardInterrupt:
        if not watch:
            raise


@app.command()
def bootstrap(
    listen: Annotated[
        list[str] | None, typer.Option("--listen", help="Multiaddress to listen on; may be repeated.")
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option("--announce", help="Multiaddress that others shall dial; may be repeated."),
    ] = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option("--initial-peers", help="Another entry node to join; may be repeated.")
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option("--identity", help="Key file, made if missing; keeps the address over restarts."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the addresses as one JSON object.")] = False,
) -> None:
    """Run a swarm's entry node: light, no model; prints the addresses that others join by."""
    from petals_agent.cli.settings import addresses
    from petals_agent.config.multiaddr import Purpose
    from petals_agent.config.places import places
    from petals_agent.log import setup
    from petals_agent.supervisor.bootstrap import bootstrap as serve

    setup("info", "auto", "bootstrap")
    folders = places(os.environ)
    listen = addresses("--listen", listen, Purpose.LISTEN)
    announce = addresses("--announce", announce, Purpose.ANNOUNCE)
    initial_peers = addresses("--initial-peers", initial_peers, Purpose.DIAL)

    def ready(maddrs: Sequence[str]) -> None:
        if json_:
            print(json.dumps({"maddrs": list(maddrs)}), flush=True)
            return
        typer.echo("This swarm can be joined at:")
        for maddr in maddrs:
            typer.echo(f"  {maddr}")

    try:
        folders.runtime.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SwarmError(
            f"{folders.runtime} cannot be made ({error.strerror}); p2pd's socket lies there"
        ) from error
    asyncio.run(
        serve(
            identity or folders.state / "bootstrap.key",
            listen or ["/ip4/0.0.0.0/tcp/31337", "/ip6/::/tcp/31337"],
            announce,
            initial_peers,
            folders.runtime,
            ready,
        )
    )


def main() -> None:
    """Entry point; AgentErrors become one line on stderr and their exit code."""
    entry.run(app)


if __name__ == "__main__":
    main()
