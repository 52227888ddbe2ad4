"""`petals-agent monitor`: the swarm's web page and API (this is what petals-agent-monitor.service runs)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petals_agent.errors import ConfigError

_EXTRA = {"fastapi", "jinja2", "markupsafe", "starlette", "uvicorn"}

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; it need not name a model."),
]
ListenOption = Annotated[
    str | None, typer.Option("--listen", help="HOST:PORT of the page instead of monitor.listen.")
]
PeersOption = Annotated[
    list[str] | None,
    typer.Option("--initial-peers", help="Member of the swarm to watch; may be repeated."),
]
PeriodOption = Annotated[
    str | None,
    typer.Option("--period", help="Time between two readings of the swarm instead of monitor.period."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key, e.g. --set monitor.retention=7d; may be repeated."),
]


def monitor(
    config: ConfigOption = None,
    listen: ListenOption = None,
    initial_peers: PeersOption = None,
    period: PeriodOption = None,
    set_: SetOption = None,
) -> None:
    """Show a swarm's models and servers on a web page, over an API and to Prometheus, until stopped."""
    from petals_agent.cli.settings import addresses, configured
    from petals_agent.config.multiaddr import Purpose
    from petals_agent.log import setup

    options = {"listen": listen, "period": period}
    overrides = [*(set_ or ()), *(f"monitor.{key}={value}" for key, value in options.items() if value)]
    settings = configured(config, overrides, require_model=False)
    peers = addresses("--initial-peers", initial_peers, Purpose.DIAL)
    if peers:
        swarm = settings.swarm.model_copy(update={"initial_peers": tuple(peers)})
        settings = settings.model_copy(update={"swarm": swarm})
    try:
        from petals_agent.monitor.service import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise ConfigError(
            f"the monitor needs {error.name}, which is not installed: apt install ./petals-agent-monitor_*.deb, "
            "or pip install 'petals-agent[monitor]'"
        ) from error
    setup(settings.log.level, settings.log.format, "monitor")
    run(settings)
