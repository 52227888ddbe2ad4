"""How a command line ends: what went wrong is one line on stderr and an exit code."""

from __future__ import annotations

import sys

import typer

from petals_agent.errors import AgentError


def run(app: typer.Typer) -> None:
    """Parse the command line and do what it says; does not return after an AgentError or Ctrl-C."""
    try:
        app()
    except AgentError as error:
        typer.echo(f"{app.info.name}: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
