"""What `petals-agent status` shows: one snapshot of the agent, as plain values."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from petals_agent import __version__

if TYPE_CHECKING:
    from petals_agent.supervisor.agent import Agent


@dataclass(frozen=True)
class Status:
    """Names are stable: scripts read them from `status --json`. Times in seconds, `blocks` as "start:end"."""

    state: str
    since: float
    peer_id: str
    version: str
    model: str
    dht_prefix: str | None
    blocks: str | None
    num_blocks: int | None
    loading: str | None
    announced: str | None
    announced_ago: float | None
    network: str
    maddrs: list[str]
    sessions: int
    in_flight: int
    queued: int
    requests: int
    tokens: int
    tokens_per_s: float
    batch_rows: float
    cache_used: float | None
    throughput: float | None
    backend: str | None
    device: str | None
    dtype: str | None
    pids: dict[str, int | None]
    restarts: dict[str, int]
    uptime: float
    events: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_status(agent: Agent) -> Status:
    """Collect the snapshot."""
    now = time.time()
    container, model, loaded = agent.container, agent.model, agent.loaded
    beat = container.beat if container is not None and loaded is not None else None
    network = agent.network
    cache_used = None
    if loaded is not None and beat is not None and loaded.cache_units:
        cache_used = 1 - beat.cache_units_left / loaded.cache_units
    progress = agent.progress if loaded is None else None
    return Status(
        state=agent.life.state.value,
        since=now - agent.life.since,
        peer_id=agent.peer_id,
        version=__version__,
        model=str(agent.config.model.path),
        dht_prefix=model.dht_prefix if model is not None else None,
        blocks=f"{agent.span[0]}:{agent.span[1]}" if agent.span is not None else None,
        num_blocks=model.num_blocks if model is not None else None,
        loading=f"{progress.text} {progress.done}/{progress.total}" if progress is not None else None,
        announced=agent.announced.state.name.lower() if agent.announced is not None else None,
        announced_ago=now - agent.announced.at if agent.announced is not None else None,
        network=network.problem or ("connected" if network.up.is_set() else "connecting"),
        maddrs=network.maddrs,
        sessions=beat.sessions if beat is not None else 0,
        in_flight=beat.in_flight if beat is not None else 0,
        queued=beat.queued if beat is not None else 0,
        requests=beat.requests if beat is not None else 0,
        tokens=beat.tokens if beat is not None else 0,
        tokens_per_s=container.tokens_per_s if container is not None and loaded is not None else 0.0,
        batch_rows=beat.batch_rows if beat is not None else 0.0,
        cache_used=cache_used,
        throughput=loaded.throughput if loaded is not None else None,
        backend=loaded.backend if loaded is not None else None,
        device=model.device if model is not None else None,
        dtype=model.dtype if model is not None else None,
        pids={
            "container": container.pid if container is not None and container.process.returncode is None else None,
            "p2pd": network.daemon.pid if network.daemon is not None else None,
        },
        restarts={"container": agent.container_restarts, "p2pd": max(network.restarts, 0)},
        uptime=now - agent.started,
        events=[asdict(event) for event in list(agent.life.events)[-10:]],
    )
