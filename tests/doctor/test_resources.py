"""Memory, disk and files: real readings, and the figures that are judged."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import Look
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.resources import cgroup_limit, disk, file_limit, judge_cache, judge_limit
from petals_agent.models.disk import _HEADROOM

BYTES = st.integers(0, 10**13)


def test_memory_for_a_small_model(look: Look) -> None:
    result = look("memory", '[model]\ndtype = "bfloat16"\n[serve]\ncache_tokens = 10')
    assert result.outcome is Outcome.OK and "4 blocks with 10 tokens of cache" in result.found


def test_memory_that_no_host_has(look: Look, model: Path) -> None:
    config = model / "config.json"
    config.write_text(
        config.read_text().replace('"hidden_size": 16', '"hidden_size": 16, "head_dim": 131072')
    )
    result = look("memory", "[serve]\ncache_tokens = 2147483647")
    assert result.outcome is Outcome.PROBLEM and "4 blocks with 2147483647 tokens" in result.found
    assert result.remedy.endswith("petals-agent plan")


def test_memory_without_a_model(look: Look, model: Path) -> None:
    (model / "config.json").unlink()
    assert look("memory").outcome is Outcome.SKIPPED


def test_limit_of_a_cgroup(tmp_path: Path) -> None:
    """Written as the kernel writes them: the smallest limit on the way up counts."""
    membership = tmp_path / "cgroup"
    membership.write_text("1:name=systemd:/x\n0::/system.slice/a.service\n")
    group = tmp_path / "root" / "system.slice" / "a.service"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000\n")
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\n")
    assert cgroup_limit(membership, tmp_path / "root") == (1000, 2)
    (group / "memory.max").write_text("900\n")
    assert cgroup_limit(membership, tmp_path / "root") == (900, 2)
    membership.write_text("1:name=systemd:/x\n")
    assert cgroup_limit(membership, tmp_path / "root") == (None, 0)


def test_limit_of_this_process(look: Look) -> None:
    assert look("memory limit").outcome in (Outcome.OK, Outcome.WARNING)


@given(st.none() | BYTES, st.integers(0, 3), st.none() | BYTES)
def test_judging_a_limit(limit: int | None, kills: int, need: int | None) -> None:
    result = judge_limit(limit, kills, need, "petals-agent.service")
    too_small = limit is not None and need is not None and need > limit
    expected = Outcome.PROBLEM if too_small else Outcome.WARNING if kills else Outcome.OK
    assert result.outcome is expected
    assert ("petals-agent.service" in result.remedy) == too_small


@given(BYTES, BYTES, st.none() | BYTES, st.none() | BYTES, BYTES)
def test_judging_the_cache(free: int, used: int, budget: int | None, total: int | None, missing: int) -> None:
    missing = min(missing, total or 0)
    result = judge_cache(Path("/cache"), free, free + used, budget, total, None if total is None else missing)
    if total is not None and budget is not None and total > budget:
        assert result.outcome is Outcome.PROBLEM and "model.max_disk" in result.found
    elif missing and missing + _HEADROOM > free:
        assert result.outcome is Outcome.PROBLEM and "to be downloaded" in result.found
    if result.outcome is Outcome.OK:
        assert not missing or missing <= free, "a download that is promised to fit does"


def test_disk_of_this_host(look: Look, tmp_path: Path) -> None:
    place, free, size = disk(tmp_path / "not" / "there")
    assert place == tmp_path and size == shutil.disk_usage(tmp_path).total and 0 < free <= size
    assert look("disk").outcome is Outcome.OK


def test_open_files(look: Look) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = min(max((hard - 512) // 2, 1), 1000)
    assert look("open files", f"[serve]\nmax_sessions = {few}").outcome is Outcome.OK
    assert look("open files", "[serve]\nmax_sessions = 2147483647").outcome is Outcome.WARNING


def test_whose_limit_counts() -> None:
    """That of the running agent (here: us), then the unit's, then this process's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 2**31 if hard == resource.RLIM_INFINITY else hard
    assert file_limit({"LimitNOFILE": "77"}, {"pids": {"agent": os.getpid()}}) == hard
    assert file_limit({"LimitNOFILE": "77"}, None) == 77
    assert file_limit({}, None) == hard
