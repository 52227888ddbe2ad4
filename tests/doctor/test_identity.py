"""The key file: missing, private or not, unreadable, no key, in use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from doctor.conftest import Look
from harness.processes import Processes
from petals_agent.doctor.account import Account, current_account
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.identity import is_locked, key_file_mode
from petals_agent.swarm.identity import ensure_identity

NOBODY = Account("nobody", 65534, frozenset({65534}))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "state" / "id.key"
    ensure_identity(path)
    return path


def test_a_missing_key_is_made_later(look: Look) -> None:
    result = look("identity")
    assert result.outcome is Outcome.OK and "first start" in result.found


def test_a_good_key(look: Look, key: Path) -> None:
    result = look("identity")
    assert result.outcome is Outcome.OK and ensure_identity(key) in result.found


@pytest.mark.parametrize("mode", [0o644, 0o440, 0o602])
def test_a_key_that_others_can_read(look: Look, key: Path, mode: int) -> None:
    key.chmod(mode)
    result = look("identity")
    assert result.outcome is Outcome.PROBLEM and result.remedy == f"Close it: chmod 0600 {key}"


def test_a_key_that_the_agent_cannot_read(key: Path) -> None:
    """It is root's, or ours, with mode 0400."""
    result = key_file_mode(key, key.stat(), NOBODY)
    assert result is not None and result.outcome is Outcome.PROBLEM and "sudo chown nobody" in result.remedy
    assert key_file_mode(key, key.stat(), current_account()) is None


def test_an_unreadable_key_as_its_owner(look: Look, key: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    key.chmod(0)
    assert look("identity").outcome is Outcome.PROBLEM


def test_what_is_no_key(look: Look, key: Path) -> None:
    key.chmod(0o600)
    key.write_bytes(b"nonsense")
    result = look("identity")
    assert result.outcome is Outcome.PROBLEM and result.remedy.endswith(f"mv {key} {key}.old")


HOLD = """
import json, sys, time
from pathlib import Path
from petals_agent.swarm.identity import IdentityLock
lock = IdentityLock(Path(sys.argv[1]))
print(json.dumps({"event": "locked"}), flush=True)
sys.stdin.read()
time.sleep(100)
"""


def test_a_key_that_an_agent_elsewhere_uses(look: Look, key: Path, processes: Processes) -> None:
    lock = key.with_name("id.key.lock")
    assert look("identity").outcome is Outcome.OK
    holder = processes.start("holder", [sys.executable, "-c", HOLD, key])
    holder.wait_event("locked", 60)
    result = look("identity")
    assert result.outcome is Outcome.PROBLEM and "does not answer here" in result.found
    assert is_locked(lock, Path("/proc/locks").read_text())
    holder.kill()
    assert look("identity").outcome is Outcome.OK, "the file is there and nobody holds it"
