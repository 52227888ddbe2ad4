"""What Prometheus is told of the agent (docs/metrics.md), read from it at each scrape; imported only if somebody scrapes."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import psutil
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from petals_agent import __version__
from petals_agent.health.findings import Status
from petals_agent.health.verdict import Health
from petals_agent.histogram import Histogram
from petals_agent.supervisor.states import State

if TYPE_CHECKING:
    from petals_agent.supervisor.agent import Agent


def exposition(agent: Agent) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(agent))
    return generate_latest(registry)


def figures(agent: Agent) -> dict[str, float]:
    """All that has no labels, by name."""
    samples = (sample for metric in _Snapshot(agent).collect() for sample in metric.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


class _Snapshot(Collector):
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        for part in (_agent, _span, _work, _network, _health, _heartbeat, _plugins):
            yield from part(self._agent)


def _agent(agent: Agent) -> Iterator[Metric]:
    yield _info("build", "What runs here.", {"version": __version__, "python": platform.python_version()})
    state = agent.life.state
    states = {one.value: float(one is state) for one in State}
    yield _gauge("state", "1 for the state that the agent is in.", states, "state")
    yield _gauge("state_since_time_seconds", "When it entered that state.", agent.life.since)
    yield _gauge("start_time_seconds", "When the agent started.", agent.started)
    restarts = {"container": agent.serving.restarts, "p2pd": agent.network.restarts}
    yield _counter("restarts", "Processes that ended and were started again.", restarts, "what")
    memory = {name: size for name, pid in agent.status().pids.items() if (size := _resident(pid)) is not None}
    yield _gauge("process_resident_memory_bytes", "Memory of our processes.", memory, "process")


def _span(agent: Agent) -> Iterator[Metric]:
    serving = agent.serving
    model, span, loaded = serving.model, serving.span, serving.loaded
    if model is not None:
        labels = {"dht_prefix": model.dht_prefix, "device": model.device, "dtype": model.dtype}
        yield _info("model", "What is served.", {**labels, "peer_id": agent.peer_id})
        yield _gauge("model_blocks", "Blocks that the whole model has.", model.num_blocks)
    if span is not None:
        yield _gauge("span_start_block", "The first block that is served.", span[0])
        yield _gauge("span_end_block", "The block after the last one that is served.", span[1])
    if agent.announcing.throughput is not None:
        text = "Throughput as announced."
        yield _gauge("throughput_tokens_per_second", text, agent.announcing.throughput)
    if loaded is None or span is None:
        return
    yield _gauge("load_duration_seconds", "How long the last load took.", loaded.load_s)
    each = 2 * (span[1] - span[0])  # keys and values of each block
    left = serving.cache_units_left
    yield _gauge("cache_capacity_tokens", "KV cache of each block.", loaded.cache_units / each)
    if left is not None:
        text = "KV cache of each block that sessions have reserved."
        yield _gauge("cache_used_tokens", text, (loaded.cache_units - left) / each)


def _work(agent: Agent) -> Iterator[Metric]:
    serving, totals = agent.serving, agent.serving.totals
    yield _counter("requests", "Steps, forwards and backwards that were answered.", totals.requests)
    yield _counter("tokens", "Tokens that passed our blocks.", totals.tokens)
    text = "A session's step, from its arrival at the engine to its output."
    yield _histogram("step_duration_seconds", text, totals.step_seconds)
    yield _histogram("batch_rows", "Sequences in one batch of the engine.", totals.batch_rows)
    beat = serving.beat
    yield _gauge("sessions", "Open sessions.", beat.sessions if beat is not None else 0)
    in_flight = beat.in_flight if beat is not None else 0
    yield _gauge("requests_in_flight", "Requests that are being worked on.", in_flight)
    yield _gauge(
        "queue_length", "Works that wait or run in the engine.", beat.queued if beat is not None else 0
    )
    if beat is not None and serving.container is not None:
        yield _gauge("container_loop_lag_seconds", "Delay of the container's event loop.", beat.loop_lag_s)
        age = time.monotonic() - serving.container.beat_at
        yield _gauge("container_beat_age_seconds", "Since the container's last sign of life.", age)


def _network(agent: Agent) -> Iterator[Metric]:
    network, announced = agent.network, agent.announcing.announced
    yield _gauge("connected", "1 while p2pd and the DHT node are up.", float(network.connection is not None))
    yield _gauge("peers", "Nodes of the DHT in our routing table.", network.peers)
    if agent.reachability.known.is_set():
        text = "1 if others reach us only through a relay."
        yield _gauge("relayed", text, float(agent.reachability.relayed))
    if announced is not None:
        text = "Since the DHT took our record last."
        yield _gauge("announcement_age_seconds", text, time.time() - announced.at)
        yield _gauge("update_period_seconds", "swarm.update_period.", agent.config.swarm.update_period)


def _health(agent: Agent) -> Iterator[Metric]:
    verdict = agent.care.verdict.health
    healths = {one.value: float(one is verdict) for one in Health}
    yield _gauge("health", "1 for the verdict that all probes amount to.", healths, "health")
    findings = {
        name: float(finding.status is Status.OK)
        for name, finding in agent.care.probing.findings.items()
        if finding.status is not Status.NOT_APPLICABLE
    }
    yield _gauge(
        "probe_ok", "1 if the probe is content; without it where it does not apply.", findings, "probe"
    )


def _heartbeat(agent: Agent) -> Iterator[Metric]:
    found = agent.heartbeat.to_dict()
    if found is None:
        return
    states = {one: float(one == found["state"]) for one in ("gathering", "running")}
    yield _gauge("heartbeat_state", "1 for what our fleet's heartbeat is doing.", states, "state")
    failed = float(found["failure"] is not None)
    yield _gauge("heartbeat_failed", "1 from a fatal failure to the next good round.", failed)
    yield _gauge("heartbeat_failures_in_a_row", "Rounds that failed since a good one.", found["failures"])
    if found["round"] is not None:
        yield _gauge("heartbeat_members", "Members that began together.", len(found["members"]))
        yield _gauge("heartbeat_missing_members", "Without whom the last round ended.", len(found["missing"]))
        yield _gauge("heartbeat_round", "The round in progress or next.", found["round"])
    if found["success_ago"] is not None:
        at = time.time() - found["success_ago"]
        yield _gauge("heartbeat_last_success_time_seconds", "When a round was good last.", at)


def _plugins(agent: Agent) -> Iterator[Metric]:
    states = agent.plugins.plugins
    if not states:
        return
    ready = {one.name: float(one.state == "ready") for one in states}
    yield _gauge(
        "plugin_ready", "1 if the plugin is in use; 0 if it was refused or disabled.", ready, "plugin"
    )
    calls = {one.name: float(one.calls) for one in states}
    yield _counter("plugin_calls", "Calls of a plugin's hooks and probes.", calls, "plugin")
    text = "Calls that gave no answer, by plugin, hook and kind."
    failures = CounterMetricFamily("petals_agent_plugin_failures", text, labels=["plugin", "hook", "kind"])
    for key, count in agent.plugins.failures.items():
        failures.add_metric(key, count)
    yield failures
    families: dict[str, GaugeMetricFamily] = {}
    for plugin, gauges in agent.plugin_metrics.gauges.items():
        for name, metric in gauges.items():
            words = metric.help or f"From plugin {plugin}."
            family = families.setdefault(
                name, GaugeMetricFamily(f"petals_plugin_{name}", words, labels=["plugin"])
            )
            family.add_metric([plugin], metric.value)
    yield from families.values()


def _resident(pid: int | None) -> float | None:
    try:
        return float(psutil.Process(pid).memory_info().rss) if pid is not None else None
    except psutil.Error:
        return None


def _gauge(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = GaugeMetricFamily(f"petals_agent_{name}", text, labels=[label] if label else [])
    for key, one in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], one)
    return family


def _counter(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = CounterMetricFamily(f"petals_agent_{name}", text, labels=[label] if label else [])
    for key, one in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], one)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets, count = [], 0
    for bound, inside in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        count += inside
        buckets.append((bound, float(count)))
    return HistogramMetricFamily(f"petals_agent_{name}", text, buckets, histogram.total)


def _info(name: str, text: str, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(f"petals_agent_{name}_info", text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
