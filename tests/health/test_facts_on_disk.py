"""Files that others write, the kernel or a dead agent: what they say, and that garbage in them says nothing."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petals_agent.health.findings import Status
from petals_agent.supervisor.company import remembered
from petals_agent.supervisor.container import oom_kills
from petals_agent.supervisor.host_probes import cgroup_memory_share
from petals_agent.supervisor.marker import LeftBehind, Marker
from petals_agent.supervisor.swarm_probes import clock_reading

PEER = "12D3KooWGHuZ6yZ9ZEfiVdL7QMnoMjUQfMKJuwiWSwyRQ8sAFrTy"
LEFT = LeftBehind(PEER, "tiny", 0, 8, 2.0, (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}",))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def garbage() -> list[bytes]:
    return [b"", b"\xff\xfe", b"{", b"null", b"[" * 100_000, b'{"peer_id": 1}', b"9" * 5000, b"[]" * 2**20]


# --- the marker


def test_marker_comes_back(tmp_path: Path) -> None:
    marker = Marker(tmp_path)
    assert marker.read() is None
    marker.write(LEFT)
    assert Marker(tmp_path).read() == LEFT
    marker.remove()
    marker.remove()
    assert Marker(tmp_path).read() is None and list(tmp_path.iterdir()) == []


def test_marker_is_written_again_after_it_was_removed(tmp_path: Path) -> None:
    marker = Marker(tmp_path)
    for _ in range(2):
        marker.write(LEFT)
        assert marker.read() == LEFT
        marker.remove()


@pytest.mark.parametrize("content", garbage())
def test_garbage_is_no_marker(tmp_path: Path, content: bytes) -> None:
    Marker(tmp_path).write(LEFT)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert Marker(tmp_path).read() is None


@quick
@given(json_values, st.sampled_from(sorted(asdict(LEFT))))
def test_no_field_can_make_it_raise(tmp_path: Path, value: Any, name: str) -> None:
    Marker(tmp_path).write(LEFT)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**asdict(LEFT), name: value}))
    left = Marker(tmp_path).read()
    assert left is None or 0 <= left.start < left.end <= left.start + 10_000
    assert left is None or (all(isinstance(p, str) for p in left.peers) and 0 < left.update_period < 1e9)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-1", "0", "1e400"])
@pytest.mark.parametrize("name", ["start", "end", "update_period"])
def test_no_number_is_too_strange(tmp_path: Path, name: str, text: str) -> None:
    Marker(tmp_path).write(LEFT)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**asdict(LEFT), name: "here"}).replace('"here"', text))
    left = Marker(tmp_path).read()
    assert left is None or (name, text) == ("start", "0")


def test_a_place_that_takes_nothing_is_no_reason_to_stop(tmp_path: Path) -> None:
    marker = Marker(tmp_path / "is not there")
    marker.write(LEFT)
    assert marker.read() is None
    marker.remove()


# --- peers that were met


def test_peers_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    assert remembered(file) == []
    file.write_text(json.dumps([*LEFT.peers, "/ip4/1.2.3.4", 7, None, "", "x" * 9000, *LEFT.peers * 200]))
    found = remembered(file)
    assert set(found) == set(LEFT.peers) and len(found) <= 64


@pytest.mark.parametrize("content", garbage())
def test_garbage_is_nobody(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "peers.json"
    file.write_bytes(content)
    assert remembered(file) == []


@quick
@given(json_values)
def test_whatever_json_says(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(value))
    assert all(isinstance(maddr, str) for maddr in remembered(file))


# --- what the kernel says of our memory


Write = Callable[..., tuple[Path, Path]]


@pytest.fixture
def cgroup(tmp_path: Path) -> Write:
    """Writes the files of a group /a/b, and returns the two paths that lead to them."""

    def write(membership: str = "12:cpu:/x\n0::/a/b\n", **files: str) -> tuple[Path, Path]:
        (tmp_path / "cgroup").write_text(membership)
        group = tmp_path / "fs" / "a" / "b"
        group.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (group / name.replace("_", ".", 1)).write_text(content)
        return tmp_path / "cgroup", tmp_path / "fs"

    return write


def test_oom_kills_are_counted(cgroup: Write) -> None:
    places = cgroup(memory_events="low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert oom_kills(*places) == 2


@pytest.mark.parametrize("text", ["", "oom 1\n", "oom_kill x\n", "oom_kill \n"])
def test_no_count_is_none(cgroup: Write, text: str) -> None:
    assert oom_kills(*cgroup(memory_events=text)) is None


@pytest.mark.parametrize("membership", ["", "3:cpu:/a/b\n", "0::/elsewhere\n"])
def test_other_hierarchies_say_nothing(cgroup: Write, membership: str) -> None:
    full = {"memory_events": "oom_kill 1\n", "memory_max": "100", "memory_current": "9", "memory_stat": ""}
    places = cgroup(membership, **full)
    assert oom_kills(*places) is None and cgroup_memory_share(*places) is None
    assert oom_kills(Path("/nowhere"), places[1]) is None


@pytest.mark.parametrize(
    ("limit", "stat_text", "share"),
    [
        ("1000\n", "anon 5\ninactive_file 200\n", 0.75),  # file cache can be dropped
        ("1000\n", "anon 5\n", 0.95),
        ("max\n", "inactive_file 0\n", None),
        ("0\n", "inactive_file 0\n", None),
        ("much\n", "inactive_file 0\n", None),
        ("1000\n", "inactive_file\n", None),
    ],
)
def test_share_of_the_limit(cgroup: Write, limit: str, stat_text: str, share: float | None) -> None:
    places = cgroup(memory_max=limit, memory_stat=stat_text, memory_current="950\n")
    assert cgroup_memory_share(*places) == share


# --- clocks


@pytest.mark.parametrize(
    ("offsets", "status", "words"),
    [
        ([0.0], Status.OK, ""),
        ([1.4, -1.4, 0.1], Status.OK, ""),
        ([2.0, 2.0, 0.0], Status.DEGRADED, "-2.0 s off"),  # theirs are ahead: ours is behind
        ([-10.0, -10.1, -9.9], Status.FAILED, "+10.0 s off"),
        ([0.0, 0.1, 3600.0], Status.OK, ""),  # one wrong clock among peers is not ours
        ([3.5], Status.FAILED, "-3.5 s off"),
    ],
)
def test_clock(offsets: list[float], status: Status, words: str) -> None:
    reading = clock_reading(offsets)
    assert reading.status is status and words in reading.reason


def test_marker_is_for_its_owner(tmp_path: Path) -> None:
    Marker(tmp_path).write(LEFT)
    (file,) = tmp_path.iterdir()
    assert not stat.S_IMODE(file.stat().st_mode) & 0o002
