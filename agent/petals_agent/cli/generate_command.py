"""`petals-agent generate`: continue a prompt through a swarm, streaming the text to the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_agent.errors import ClientError, SwarmError

if TYPE_CHECKING:
    from petals_agent.client.decode import Generation
    from petals_agent.config import Config


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or Hub repository of the model.")
    ] = None,
    initial_peers: Annotated[
        list[str] | None,
        typer.Option("--initial-peers", help="Multiaddress of a member of the swarm; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Take model, prefix and peers from an agent's configuration."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", help="DHT prefix of the model; a local folder has none of its own."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit at the Hub.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the most probable.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Above 0; higher is wilder.")] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the most probable part that reaches this.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed draws the same text.")] = None,
    num_beams: Annotated[
        int, typer.Option("--num-beams", min=1, help="Beam search; the text comes at the end.")
    ] = 1,
    push: Annotated[
        bool, typer.Option("--push", help="Ask servers to hand activations on directly.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object at the end, for scripts.")] = False,
) -> None:
    """Continue a text with a model whose blocks are served by a swarm."""
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise ClientError("the prompt is empty; give a text, or - and a text on standard input")

    if config is not None:
        from petals_agent.cli.settings import configured

        settings = configured(config, None)
        model = model or settings.model.path
        revision = revision or settings.model.revision
        prefix = prefix or (None if settings.model.dht_prefix == "auto" else settings.model.dht_prefix)
        initial_peers = initial_peers or own_addresses(settings) + list(settings.swarm.entry_peers)
    from petals_agent.cli.settings import addresses
    from petals_agent.config.multiaddr import Purpose

    addresses("--initial-peers", initial_peers, Purpose.DIAL)
    if not model or not initial_peers:
        raise ClientError(
            "which model, in which swarm? Give --model and --initial-peers, or an agent's --config"
        )

    from petals_agent.client.generate import Client

    how = {"do_sample": sample, "temperature": temperature, "top_p": top_p, "seed": seed}
    with Client(model, initial_peers, prefix, revision=revision) as client:
        if num_beams > 1:
            result = client.generate(prompt, max_new_tokens, num_beams=num_beams, push=push, do_sample=sample)
            if not json_:
                typer.echo(result.text)
        else:
            pieces = client.stream(prompt, max_new_tokens, push=push, **how)
            for piece in pieces:
                if not json_:
                    typer.echo(piece, nl=False)
            if not json_:
                typer.echo()
            result = pieces.result
    if json_:
        typer.echo(json.dumps(summary(prompt, result)))
    else:
        typer.echo(one_line(result), err=not sys.stdout.isatty())


def own_addresses(settings: Config) -> list[str]:
    """Where the agent of this configuration can be dialled; empty if none runs here."""
    from petals_agent.supervisor.control import ask

    try:
        status = asyncio.run(ask(settings.control.socket, {"do": "status"}, timeout=3.0))
    except SwarmError:
        return []
    return list(status["maddrs"])


def summary(prompt: str, result: Generation) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "prompt": prompt,
        "text": result.text,
        "tokens": result.ids[0],
        "steps": result.steps,
        "first_s": round(result.first_s, 3),
        "tokens_per_s": round(result.tokens_per_s, 2),
        "route": [{"peer_id": hop.peer_id, "start": hop.start, "end": hop.end} for hop in result.route],
    }


def one_line(result: Generation) -> str:
    """Speed and route for a person."""
    route = " → ".join(f"{hop.start}:{hop.end} …{hop.peer_id[-6:]}" for hop in result.route)
    return f"[{len(result.ids[0])} tokens, {result.tokens_per_s:.1f} tokens/s after {result.first_s:.2f} s; route {route}]"
