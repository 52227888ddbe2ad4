"""`petals-agent demo`: a whole swarm on this host, a small real model, and a text that comes out of it."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Annotated

import typer


def demo(
    prompt: Annotated[
        str, typer.Option("--prompt", help="The text to continue.")
    ] = "And it came to pass, that",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 96,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same text.")] = 7,
    once: Annotated[bool, typer.Option("--once", help="End after the text instead of staying up.")] = False,
) -> None:
    """Start a private swarm on this host and generate a text through it."""
    from petals_agent.demo.swarm import MODEL, PREFIX, DemoSwarm

    def say(text: str) -> None:
        typer.secho(f"  {text}", fg="bright_black" if sys.stdout.isatty() else None)

    signal.signal(signal.SIGTERM, _interrupt)
    typer.echo("Starting a private swarm: an entry node and two agents, each with half of a small model.")
    with DemoSwarm(say, meanwhile=_load_client) as swarm:
        from petals_agent.cli.generate_command import one_line
        from petals_agent.client.generate import Client

        with Client(str(MODEL), swarm.maddrs, PREFIX) as client:
            typer.echo()
            typer.secho(prompt, bold=True, nl=False)
            pieces = client.stream(
                prompt, max_new_tokens, do_sample=True, temperature=0.7, top_p=0.95, seed=seed
            )
            for piece in pieces:
                typer.echo(piece, nl=False)
            typer.echo("\n")
            typer.echo(one_line(pieces.result))
        if once:
            return
        typer.echo("\nThe swarm stays up. In another terminal:\n")
        typer.echo(
            f"  petals-agent generate --model {MODEL} --prefix {PREFIX} --initial-peers {swarm.maddrs[0]} "
            '--sample --temperature 0.7 "In the beginning"'
        )
        typer.echo(f"  petals-agent status --config {swarm.config_of(0)}")
        typer.echo(f"  petals-agent swarm --initial-peers {swarm.maddrs[0]}")
        typer.echo(
            f"  petals-agent monitor --initial-peers {swarm.maddrs[0]}   # a web page at http://127.0.0.1:8099"
        )
        typer.echo("\nCtrl-C ends it.")
        threading.Event().wait()


def _load_client() -> None:
    """Import what the client needs (torch and transformers) while the agents start."""
    import petals_agent.client.generate
    import petals_agent.models.client_parts
    import petals_agent.models.hf  # noqa: F401


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
