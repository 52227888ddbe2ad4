"""The command `petals-agent-monitor` of the package of that name: the monitor, and the same view as text.

It imports nothing that serves: there is no torch beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from petals_agent import __version__
from petals_agent.cli import entry, swarm_command
from petals_agent.cli.monitor_command import (
    ConfigOption,
    ListenOption,
    PeersOption,
    PeriodOption,
    SetOption,
    monitor,
)
from petals_agent.config.load import ENV_FILE

CONFIG_FILE = Path("/etc/petals-agent-monitor/petals-agent-monitor.toml")

app = typer.Typer(name="petals-agent-monitor", add_completion=False, pretty_exceptions_enable=False)
app.command()(swarm_command.swarm)


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    config: ConfigOption = None,
    listen: ListenOption = None,
    initial_peers: PeersOption = None,
    period: PeriodOption = None,
    set_: SetOption = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Show a swarm's models and servers on a web page, over an API and to Prometheus, until stopped."""
    if version:
        typer.echo(f"{app.info.name} {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        monitor(config, listen, initial_peers, period, set_)
    elif config or listen or initial_peers or period or set_:
        context.fail(f"the options of {context.invoked_subcommand} come after it")


def main() -> None:
    """Entry point; the configuration is the service's unless another one is named."""
    if CONFIG_FILE.is_file():
        os.environ.setdefault(ENV_FILE, str(CONFIG_FILE))
    entry.run(app)


if __name__ == "__main__":
    main()
