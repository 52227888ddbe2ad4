"""Decisions on disk: kept in order, bounded, and read back whatever else is in the file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from harness.live import start_live
from harness.processes import Processes
from petals_agent.cli.main import app
from petals_agent.supervisor.decisions import FILE, MAX_BYTES, OLD_FILE, Decisions, read_decisions

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def whats(folder: Path, count: int = 10_000) -> list[str]:
    return [decision.what for decision in read_decisions(folder, count)]


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path / "state")
    decisions.record("blocks", "serve 0:4", "as configured", start=0, end=4, figures=[0.5, None])
    decisions.record("restart", "another container", "exit status 9")
    first, second = read_decisions(tmp_path / "state", 20)
    assert (first.kind, first.what, first.why) == ("blocks", "serve 0:4", "as configured")
    assert first.facts == {"start": 0, "end": 4, "figures": [0.5, None]}
    assert (second.what, second.facts) == ("another container", {}) and second.time >= first.time
    assert [decision.what for decision in read_decisions(tmp_path / "state", 1)] == ["another container"]
    assert read_decisions(tmp_path / "state", 0) == []


@given(st.text(), st.text(), st.dictionaries(st.text(min_size=1), json_values, max_size=3))
def test_any_text_and_facts_are_kept_or_cut(
    tmp_path_factory: pytest.TempPathFactory, what: str, why: str, facts: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("state")
    given = {f"_{key}": value for key, value in facts.items()}
    Decisions(folder).record("blocks", what, why, **given)
    (decision,) = read_decisions(folder, 5)
    assert (decision.what, decision.why) == (what, why)
    assert decision.facts == given


def test_facts_that_json_does_not_have(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    circle: list[Any] = []
    circle.append(circle)
    for fact in (float("nan"), circle, "x" * 100_000, tmp_path):
        decisions.record("recovery", "act", "because", fact=fact)
    facts = [decision.facts for decision in read_decisions(tmp_path, 9)]
    assert facts == [{"left_out": True}] * 3 + [{"fact": str(tmp_path)}]


@given(
    st.lists(st.binary(max_size=60) | st.builds(lambda v: json.dumps(v).encode(), json_values), max_size=8)
)
def test_garbage_is_passed_over(tmp_path_factory: pytest.TempPathFactory, garbage: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("state")
    Decisions(folder).record("drain", "first", "asked")
    with (folder / FILE).open("ab") as file:
        file.write(b"\n".join(garbage))
    Decisions(folder).record("drain", "last", "asked")
    assert whats(folder) == ["first", "last"]


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1, "kind": "a", "what": "b"}',
        '{"time": "1", "kind": "a", "what": "b", "why": "c", "facts": {}}',
        '{"time": 1e99, "kind": "a", "what": "b", "why": "c", "facts": {}}',
        '{"time": 1, "kind": "a", "what": "b", "why": "c", "facts": []}',
        '{"time": 1, "kind": "a", "what": "b", "why": "c", "facts": {"x": NaN}}',
        "[" * 100_000,
    ],
)
def test_lines_that_are_no_decisions(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(line + "\n")
    assert read_decisions(tmp_path, 5) == []


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    for what in ("first", "torn"):
        decisions.record("restart", what, "it ended")
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-20])
    assert whats(tmp_path) == ["first"]
    decisions.record("restart", "next", "it ended")
    assert whats(tmp_path) == ["first", "next"]


def test_the_file_stays_bounded_and_one_old_one_is_kept(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    for number in range(3 * MAX_BYTES // 1000):
        decisions.record("rebalance", str(number), "x" * 900)
    sizes = [(tmp_path / name).stat().st_size for name in (FILE, OLD_FILE)]
    assert all(size <= MAX_BYTES + 2000 for size in sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((FILE, OLD_FILE))
    kept = whats(tmp_path)
    assert kept[-1] == str(number) and len(kept) >= MAX_BYTES // 1100
    assert kept == [str(one) for one in range(int(kept[0]), number + 1)]


LIMITED = """
import logging, resource, sys
from pathlib import Path
from petals_agent.supervisor.decisions import Decisions, read_decisions
logging.basicConfig(level="WARNING", stream=sys.stdout)
folder = Path(sys.argv[1])
decisions = Decisions(folder)
decisions.record("blocks", "before", "there is room")
size = (folder / "decisions.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, resource.RLIM_INFINITY))
for _ in range(3):
    decisions.record("blocks", "lost", "there is no room")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
decisions.record("blocks", "after", "there is room again")
print([decision.what for decision in read_decisions(folder, 9)])
"""


def test_without_room_it_goes_on_and_says_so_once(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, in the middle of a line, as a full disk does."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be kept") == 1
    assert done.stdout.endswith("['before', 'after']\n")


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("in the way")
    decisions = Decisions(tmp_path / "state")
    with caplog.at_level(logging.WARNING):
        decisions.record("blocks", "a", "b")
        decisions.record("blocks", "a", "b")
    assert len(caplog.records) == 1


# --- petals-agent explain


def config_in(folder: Path) -> str:
    file = folder / "petals-agent.toml"
    file.write_text('[swarm]\nidentity = "state/id.key"\n')
    return str(file)


def test_explain_without_an_agent(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path / "state")
    for number in range(30):
        decisions.record("restart", f"start number {number}", "p2pd ended\x1b[2J with 9", attempt=number)
    done = CliRunner().invoke(app, ["explain", "--config", config_in(tmp_path), "-n", "2"])
    assert done.exit_code == 0
    assert "start number 28" in done.stdout and "start number 27" not in done.stdout
    assert "p2pd ended" in done.stdout and "attempt=29" in done.stdout and "\x1b" not in done.stdout


def test_explain_as_json(tmp_path: Path) -> None:
    Decisions(tmp_path / "state").record("blocks", "serve 0:4", "as configured", start=0)
    done = CliRunner().invoke(app, ["explain", "--config", config_in(tmp_path), "--json"])
    (decision,) = json.loads(done.stdout)
    assert set(decision) == {"time", "kind", "what", "why", "facts"}
    assert decision["facts"] == {"start": 0}


def test_explain_before_the_first_decision(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    done = CliRunner().invoke(app, ["explain", "--config", config])
    assert done.exit_code == 0 and str(tmp_path / "state") in done.stdout.replace("\n", "")
    assert json.loads(CliRunner().invoke(app, ["explain", "--config", config, "--json"]).stdout) == []


def test_a_running_agent_explains_itself(processes: Processes, tmp_path: Path, tiny_llama: Path) -> None:
    """Why these blocks, and what was replaced; read from disk after the agent's end too."""
    agent = start_live(processes, tmp_path, tiny_llama, "2:4")
    agent.online()
    for child in ("container", "p2pd"):
        agent.kill_child(child)
        agent.until(lambda s, child=child: s["restarts"][child] == 1 and s["state"] == "online", 60, "again")
    agent.process.terminate()
    done = CliRunner().invoke(app, ["explain", "--config", str(agent.config), "--json"])
    blocks, container, p2pd = json.loads(done.stdout)
    assert (blocks["kind"], blocks["what"]) == ("blocks", "serve blocks 2:4")
    assert blocks["facts"]["end"] == 4 and "serve.blocks" in blocks["why"]
    assert (container["kind"], container["what"]) == ("restart", "another container")
    assert "signal 9" in container["why"]
    assert (p2pd["kind"], p2pd["what"]) == ("restart", "p2pd") and "9" in p2pd["why"]
