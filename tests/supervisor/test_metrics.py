"""Metrics of a running agent as Prometheus sees them: valid, documented, true, and never falling."""

from __future__ import annotations

import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from harness.live import LiveAgent, start_live
from harness.open_session import OpenSession
from harness.peer import Peer, chain
from harness.plugins import write_plugins
from harness.processes import Processes, wait_until
from harness.promtool import tool_or_skip
from harness.swarm import start_bootstrap

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "petals_agent_"
JUNK = {"plugin": "bad", "hook": "swarm_metrics", "kind": "junk"}
PLUGINS = {
    "good": """
from petals_agent.hooks import Metric, hookimpl

@hookimpl
def swarm_metrics(swarm, metrics):
    own = metrics["petals_agent_span_end_block"]
    return [Metric("weakest", min(swarm.throughput), "tokens/s"), Metric("end_block", own)]
""",
    "bad": """
from petals_agent.hooks import hookimpl

@hookimpl
def swarm_metrics(swarm):
    return [float("nan")]
""",
}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@dataclass
class Scene:
    """An agent of the whole model with metrics on `port`, and a caller."""

    agent: LiveAgent
    port: int
    peer: Peer

    def text(self) -> str:
        status, body = get(self.port, "/metrics")
        assert status == 200
        return body

    def families(self) -> dict[str, Metric]:
        return {family.name: family for family in text_string_to_metric_families(self.text())}

    def value(self, name: str, **labels: str) -> float | None:
        """One sample; None if it is absent."""
        found = samples(self.families()).get((PREFIX + name, tuple(sorted(labels.items()))))
        return found

    def step(self, tokens: int = 3) -> None:
        self.peer.step(self.agent.status()["peer_id"], chain(0, 8), torch.randn(1, tokens, 256))


def samples(families: dict[str, Metric]) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }


def growing(families: dict[str, Metric]) -> Samples:
    """Those that must never fall."""
    return samples({name: f for name, f in families.items() if f.type in ("counter", "histogram")})


@pytest.fixture(scope="module")
def scene(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[Scene]:
    maddr = start_bootstrap(module_processes)
    folder = write_plugins(tmp_path_factory.mktemp("plugins"), **PLUGINS)
    more = f'[metrics]\nlisten = "127.0.0.1:0"\n[plugins]\ndirs = ["{folder}"]'
    with Peer([maddr]) as peer:
        agent = start_live(module_processes, tmp_path_factory.mktemp("a"), tiny_llama, "0:8", [maddr], more)
        (said,) = [event for event in agent.online()["events"] if event["name"] == "metrics"]
        yield Scene(agent, int(said["fields"]["address"].rpartition(":")[2]), peer)


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name → type and labels, of the table in docs/metrics.md."""
    found = {}
    for row in re.findall(r"^\| (`.*?) \| (\w+) \| (.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M):
        for name in re.findall(r"`(\w+)`", row[0]):
            found[PREFIX + name.removesuffix("_total")] = row[1], set(re.findall(r"`(\w+)`", row[2]))
    return found


def test_all_that_is_there_is_documented(scene: Scene) -> None:
    scene.agent.online()
    wait_until(lambda: scene.value("relayed") is not None, 30, "what peers say of us")
    wait_until(lambda: scene.value("container_beat_age_seconds") is not None, 30, "a beat")
    wait_until(lambda: scene.value("plugin_failures_total", **JUNK) is not None, 30, "a failure")
    found = {
        name: (family.type, {label for one in family.samples for label in one.labels} - {"le"})
        for name, family in scene.families().items()
        if not name.startswith("petals_plugin_")
    }
    alone = {name: what for name, what in documented().items() if "_heartbeat_" not in name}
    assert found == alone, "this host belongs to no fleet"
    assert all(family.documentation for family in scene.families().values())


def test_what_plugins_add(scene: Scene) -> None:
    def gauges() -> dict[str, float]:
        found = samples(scene.families()).items()
        return {name: value for (name, labels), value in found if labels == (("plugin", "good"),)}

    scene.agent.online()
    # the swarm is one server of 1 token/s: us
    right = {"petals_plugin_weakest": 1.0, "petals_plugin_end_block": 8.0}
    wait_until(lambda: right.items() <= gauges().items(), 30, "the plugin's gauges")
    wait_until(lambda: scene.value("plugin_ready", plugin="bad") == 0, 60, "the bad one's end")
    assert scene.value("plugin_ready", plugin="good") == 1
    assert scene.value("plugin_failures_total", **JUNK) == 3
    status = {plugin["name"]: plugin for plugin in scene.agent.status()["plugins"]}
    assert status["bad"]["state"] == "disabled" and "3 times in a row" in status["bad"]["reason"]


def test_figures_are_true(scene: Scene) -> None:
    status = scene.agent.online()
    before = scene.value("tokens_total"), scene.value("step_duration_seconds_count")
    assert before[0] is not None and before[1] is not None
    for _ in range(3):
        scene.step(tokens=5)
    wait_until(lambda: scene.value("tokens_total") == before[0] + 15, 20, "15 tokens more")
    assert scene.value("step_duration_seconds_count") == before[1] + 3
    assert scene.value("step_duration_seconds_bucket", le="+Inf") == before[1] + 3
    assert scene.value("state", state="online") == 1 and scene.value("state", state="recovering") == 0
    assert (scene.value("span_start_block"), scene.value("span_end_block")) == (0, 8)
    assert scene.value("cache_capacity_tokens") == 16384
    assert scene.value("connected") == 1 and scene.value("health", health="unhealthy") == 0
    age = scene.value("announcement_age_seconds")
    assert age is not None and 0 <= age < 60
    rss = psutil.Process(status["pids"]["container"]).memory_info().rss
    assert scene.value("process_resident_memory_bytes", process="container") == pytest.approx(rss, rel=0.5)


def test_cache_in_use(scene: Scene) -> None:
    peer_id = scene.agent.online()["peer_id"]
    with OpenSession(scene.peer, peer_id, chain(0, 8), 1024) as session:
        session.step(torch.randn(1, 1, 256))
        wait_until(lambda: (scene.value("cache_used_tokens") or 0) >= 1024, 60, "reserved cache")
    wait_until(lambda: scene.value("cache_used_tokens") == 0, 30, "free cache")


@pytest.mark.timeout(240)
def test_nothing_falls_when_the_container_is_killed(scene: Scene) -> None:
    scene.agent.online()
    scene.step()
    restarts = scene.value("restarts_total", what="container")
    assert restarts is not None
    last = growing(scene.families())

    def again() -> bool:
        nonlocal last
        families = scene.families()
        now = growing(families)
        assert not {name: (value, now.get(name)) for name, value in last.items() if now.get(name, -1) < value}
        last = now
        values = samples(families)
        return values[PREFIX + "state", (("state", "online"),)] == 1 and (
            values[PREFIX + "restarts_total", (("what", "container"),)] == restarts + 1
        )

    scene.agent.kill_child("container")
    wait_until(again, 90, "another container")
    tokens = scene.value("tokens_total")
    assert tokens is not None
    scene.agent.online()
    scene.step(tokens=7)
    wait_until(lambda: again() and scene.value("tokens_total") == tokens + 7, 30, "7 tokens more")


def test_healthz(scene: Scene) -> None:
    scene.agent.online()
    wait_until(lambda: get(scene.port, "/healthz")[0] == 200, 30, "200")
    assert get(scene.port, "/healthz")[1].startswith("online: blocks 0:8")
    assert get(scene.port, "/")[0] == 404


@pytest.mark.timeout(240)
def test_healthz_while_not_serving(scene: Scene) -> None:
    scene.agent.online()
    scene.agent.kill_child("container")
    wait_until(lambda: get(scene.port, "/healthz")[0] == 503, 30, "503")
    scene.agent.online()
    wait_until(lambda: get(scene.port, "/healthz")[0] == 200, 30, "200")


def test_promtool_finds_nothing_wrong(scene: Scene) -> None:
    scene.agent.online()
    tool = tool_or_skip()
    done = subprocess.run(
        [tool, "check", "metrics"], input=scene.text(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_off_by_default_and_a_taken_port_is_waited_for(
    processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        more = f'[metrics]\nlisten = "127.0.0.1:{port}"\n[serve]\nblocks = "0:1"\n'
        agent = start_live(processes, tmp_path / "taken", tiny_llama, more=more)
        quiet = start_live(processes, tmp_path / "quiet", tiny_llama, more='[serve]\nblocks = "0:1"\n')
        status = agent.until(
            lambda status: any(event["name"] == "metrics" for event in status["events"]), 60, "a warning"
        )
        (text,) = [event["text"] for event in status["events"] if event["name"] == "metrics"]
        assert f"no metrics at 127.0.0.1:{port}" in text and "trying again" in text
        assert agent.online()["state"] == "online"  # without metrics
    wait_until(lambda: answers(port), 30, "the port, once it is free")
    quiet.online()
    listening = psutil.Process(quiet.process.pid).net_connections("inet")
    assert [one for one in listening if one.status == psutil.CONN_LISTEN] == []


def answers(port: int) -> bool:
    try:
        return get(port, "/metrics")[0] == 200
    except OSError:
        return False
