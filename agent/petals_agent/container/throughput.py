"""How fast this host is, in the numbers the swarm compares (protocol.md §9.3); measured once and kept.

inference: one block, one sequence, one token a step, cache growing. forward: one block, 1024 tokens. network: bits/s
of the link divided by the bits of one token's hidden state. All in tokens/s.
"""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from petals_agent.engine.backend import Backend
from petals_agent.engine.kv import KVCache
from petals_agent.engine.plan import StepPlan
from petals_agent.engine.session import Session, StepWork
from petals_agent.log import event
from petals_agent.swarm.throughput import span_throughput

log = logging.getLogger("petals_agent.throughput")

ASSUMED_LINK_BITS_S = 100e6  # what stock servers assume when their speed test fails
INFERENCE_STEPS = 100
FORWARD_TOKENS = 1024
FORWARD_STEPS = 10
_BUDGET_S = 2.0  # for each of the two; a slow block is measured over fewer steps


@dataclass(frozen=True)
class Rates:
    """What is announced. The three parts are None when the throughput was configured as a number."""

    throughput: float
    network_rps: float | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None


def combine(network_rps: float, forward_rps: float, inference_rps: float, blocks: int) -> Rates:
    """The rates of a directly reachable server of `blocks` blocks."""
    throughput = span_throughput(network_rps, forward_rps, blocks, relayed=False)
    return Rates(throughput, network_rps, forward_rps, inference_rps)


def link_bits_s() -> float:
    """Speed of the fastest network interface that is up, as the kernel knows it; 100 Mbit/s when it does not."""
    speeds = []
    for speed in Path("/sys/class/net").glob("*/speed"):
        try:
            value = int(speed.read_text())
            up = (speed.parent / "operstate").read_text().strip() == "up"
        except (OSError, ValueError):
            continue
        if up and value > 0:
            speeds.append(value * 1e6)
    return max(speeds, default=ASSUMED_LINK_BITS_S)


def measure(backend: Backend) -> tuple[float, float]:
    """(forward_rps, inference_rps) of one block of `backend`."""
    first = min(backend.layers)
    with torch.inference_mode():
        hidden = torch.randn(1, FORWARD_TOKENS, backend.hidden_size).to(backend.device, backend.dtype)
        forward = FORWARD_TOKENS * _rate(lambda: backend.block(first, hidden), FORWARD_STEPS, backend.device)
        cache = KVCache(backend.layers, backend.dtype, backend.device)
        session = Session(1, INFERENCE_STEPS + 2, first, first + 1)
        cache.open(session)
        token = torch.randn(1, 1, backend.hidden_size).to(backend.device, backend.dtype)

        def step() -> None:
            work = StepWork(session, token, lambda result: None)
            backend.step(token[0], StepPlan([(work, 1)], backend.dtype, backend.device), first, first + 1, [])
            session.length += 1

        inference = _rate(step, INFERENCE_STEPS, backend.device)
    return forward, inference


def _rate(run: object, times: int, device: torch.device) -> float:
    """Calls per second after one warm-up, over at most `times` calls or _BUDGET_S seconds."""
    assert callable(run)
    run()
    _synchronize(device)
    started, done = time.perf_counter(), 0
    while done < times and time.perf_counter() - started < _BUDGET_S:
        run()
        done += 1
    _synchronize(device)
    return done / (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class RateCache:
    """Measured rates by host, model, dtype, device and version, in one JSON file shared by all agents of a host."""

    path: Path

    def key(self, model: str, backend: Backend, version: str) -> str:
        device = torch.cuda.get_device_name(backend.device) if backend.device.type == "cuda" else "cpu"
        return "|".join((platform.node(), model, str(backend.dtype), device, backend.name, version))

    def get(self, key: str) -> tuple[float, float, float] | None:
        """(network, forward, inference) tokens/s if they were measured before."""
        entry: Any = self._read().get(key)
        try:
            network, forward, inference = (float(entry[name]) for name in ("network", "forward", "inference"))
        except (TypeError, KeyError, ValueError):
            return None
        return (network, forward, inference) if min(network, forward, inference) > 0 else None

    def put(self, key: str, network: float, forward: float, inference: float) -> None:
        """Remember; a cache that cannot be written costs a measurement at the next start, no more."""
        entry = {"network": network, "forward": forward, "inference": inference, "measured": time.time()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                entries = {**self._read(), key: entry}
                temporary = self.path.with_suffix(".new")
                temporary.write_text(json.dumps(entries, indent=1))
                temporary.rename(self.path)
        except OSError as error:
            log.warning("the measured throughput could not be kept in %s: %s", self.path, error)

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}


def rates(backend: Backend, blocks: int, model: str, version: str, cache: RateCache, *, anew: bool) -> Rates:
    """What to announce for `blocks` blocks: from the cache, or measured (`anew`: in any case)."""
    key = cache.key(model, backend, version)
    known = None if anew else cache.get(key)
    if known is None:
        forward, inference = measure(backend)
        known = (link_bits_s() / (16 * backend.hidden_size), forward, inference)
        cache.put(key, *known)
        each = asdict(combine(*known, 1))
        log.info("measured per block: %s", each, extra=event("measured", **each))
    return combine(*known, blocks)
