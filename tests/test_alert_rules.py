"""Prometheus' alert rules: they fire when they should, and speak of metrics that there are."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from harness.promtool import tool_or_skip
from monitor import synthetic
from petals_agent.monitor.exposition import exposition

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "packaging" / "prometheus"


@pytest.mark.parametrize("rules", ["petals-agent", "petals-swarm"])
def test_alert_rules(rules: str) -> None:
    tool = tool_or_skip()
    for command in (["check", "rules", f"{rules}.rules.yml"], ["test", "rules", f"{rules}.rules.test.yml"]):
        done = subprocess.run([tool, *command], cwd=RULES, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def spoken_of(rules: str) -> set[str]:
    """The metrics in the expressions of alert rules."""
    text = (RULES / f"{rules}.rules.yml").read_text()
    expressions = " ".join(re.findall(r"expr: (.*(?:\n {10}.*)*)", text))
    used = re.findall(r"\bpetals_(?:agent|swarm)_\w+", expressions)
    return {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in used}


def test_the_agents_metrics_are_those_of_the_documents() -> None:
    rows = re.findall(r"^\| (`.*?) \| \w+ \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    known = {f"petals_agent_{name.removesuffix('_total')}" for name in names}
    used = spoken_of("petals-agent")
    assert used and used <= known


def test_a_swarms_metrics_are_those_of_the_monitor() -> None:
    text = exposition(synthetic.small(time.time()), False).decode()
    used = spoken_of("petals-swarm")
    assert used and used <= set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
