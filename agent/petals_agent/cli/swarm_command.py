"""`petals-agent swarm`: all models and servers of a swarm as text, in the style of the classic monitor."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_agent.errors import ConfigError, SwarmError

if TYPE_CHECKING:
    from petals_agent.config import Config
    from petals_agent.monitor.collector import Collector
    from petals_agent.monitor.state import SwarmState

_WATCH_PERIOD_S = 10.0
_NOT_JOINED_S = 15.0  # when it does not work for so long, we say why and give up
_PATIENCE_S = 150.0  # while nothing is known to be wrong


def swarm(
    initial_peers: Annotated[
        list[str] | None,
        typer.Option("--initial-peers", help="Multiaddress of a member of the swarm; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Take peers and prefixes from an agent's configuration."),
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option("--prefix", help="DHT prefix of a model that is not in the registry; may be repeated."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every ten seconds until Ctrl-C.")] = False,
) -> None:
    """Show who serves which blocks of which models: # online, J joining, ? unreachable, _ offline.

    Exit status: 0 when the swarm was read, whatever it looks like (--json tells each model's "state"); 69 when it could
    not be joined; 78 for a wrong option or configuration; 130 after Ctrl-C.
    """
    from petals_agent.cli.settings import addresses, configured
    from petals_agent.config.multiaddr import Purpose
    from petals_agent.log import setup
    from petals_agent.swarm.uids import check_prefix

    setup("error", "auto", "swarm")
    peers = addresses("--initial-peers", initial_peers, Purpose.DIAL)
    prefixes = list(prefix or ())
    if config is not None or not peers:
        settings = configured(config, None, require_model=False)
        peers = peers or _members(settings)
        prefixes += _prefixes(settings)
    for one in prefixes:
        try:
            check_prefix(one)
        except ValueError as error:
            raise ConfigError(f"--prefix {one!r}: {error}") from None
    try:
        asyncio.run(_show(peers, prefixes, json_, watch))
    except asyncio.CancelledError:  # SIGTERM
        raise typer.Exit(128 + signal.SIGTERM) from None


def _members(settings: Config) -> list[str]:
    from petals_agent.cli.generate_command import own_addresses

    peers = [*own_addresses(settings), *settings.swarm.entry_peers]
    if not peers:
        raise ConfigError(
            "which swarm? swarm.initial_peers is empty and no agent runs here; give --initial-peers"
        )
    return peers


def _prefixes(settings: Config) -> list[str]:
    own = settings.model.dht_prefix
    return [*settings.monitor.prefixes, *([] if own == "auto" else [own])]


async def _show(peers: list[str], prefixes: list[str], json_: bool, watch: bool) -> None:
    """Print the first reading, or each one with `watch`. Raises SwarmError when the swarm cannot be joined."""
    from petals_agent.monitor.collector import Collector
    from petals_agent.supervisor.tasks import first

    showing = asyncio.current_task()
    assert showing is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, showing.cancel)
    with tempfile.TemporaryDirectory(prefix="petals-swarm-") as folder:
        collector = Collector(peers, Path(folder), prefixes=prefixes, period=_WATCH_PERIOD_S)
        try:
            await first(collector.run(), _print_states(collector, json_, watch))
        finally:
            await collector.stop()


async def _print_states(collector: Collector, json_: bool, watch: bool) -> None:
    with collector.subscribe() as states:
        await _first_reading(collector)
        shown = collector.state
        _print(shown, json_, watch)
        while watch:
            before = shown  # the first one waits there too
            with suppress(TimeoutError):  # what is shown grows older
                async with asyncio.timeout(None if json_ else _WATCH_PERIOD_S):
                    while (shown := await anext(states)) is before:
                        pass
            _print(shown, json_, watch)


async def _first_reading(collector: Collector) -> None:
    from petals_agent.monitor.collector import JOINING, NOT_READ

    began = time.monotonic()
    while not collector.state.taken_at:
        waited = time.monotonic() - began
        is_on_the_way = collector.state.problem in (NOT_READ, JOINING)
        if waited > (_PATIENCE_S if is_on_the_way else _NOT_JOINED_S):
            raise SwarmError(collector.state.problem)
        await asyncio.sleep(0.1)


def _print(state: SwarmState, json_: bool, watch: bool) -> None:
    from rich.console import Console

    from petals_agent.monitor.text_view import render

    if json_:
        print(state.model_dump_json(indent=None if watch else 2), flush=True)
        return
    console = Console(highlight=False)
    if watch:
        console.clear()
    console.print(render(state, console.width, time.time()), soft_wrap=True, end="")
    sys.stdout.flush()
