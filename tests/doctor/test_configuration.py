"""The configuration, and files whose modes are wrong for real."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import Look, check, empty_host
from petals_agent.doctor.account import Account, agent_account, current_account
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.configuration import config_file_mode, plugin_folder_modes, state_folder_mode
from petals_agent.doctor.host import Host

NOBODY = Account("nobody", 65534, frozenset({65534}))


def test_valid(look: Look, tmp_path: Path) -> None:
    result = look("config")
    assert result.outcome is Outcome.OK and str(tmp_path / "petals-agent.toml") in result.found


def test_mistakes_are_told_and_stop_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[model]\npath = 'a/b'\n[serve]\nblock = 1\n")
    host = Host(file, {"HOME": str(tmp_path)})
    result = check("config", host)
    assert result.outcome is Outcome.PROBLEM and "serve.blocks?" in result.found
    assert f"petals-agent config check --config {file}" in result.remedy
    assert check("identity", host).outcome is Outcome.SKIPPED
    assert check("gpu", host).outcome is Outcome.OK


def test_no_configuration_at_all(tmp_path: Path) -> None:
    result = check("config", empty_host(tmp_path))
    assert result.outcome is Outcome.PROBLEM and "looked for" in result.found


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        (0o600, Outcome.OK),
        (0o640, Outcome.OK),
        (0o644, Outcome.WARNING),
        (0o660, Outcome.PROBLEM),
        (0o602, Outcome.PROBLEM),
    ],
)
def test_mode_of_the_file(config: Callable[..., Path], mode: int, outcome: Outcome) -> None:
    file = config()
    file.chmod(mode)
    result = check("file modes", Host(file))
    assert result.outcome is outcome
    assert (f"chmod 0640 {file}" in result.remedy) == (outcome is not Outcome.OK)


def test_a_file_that_the_agent_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("")
    file.chmod(0o600)
    (result,) = config_file_mode(file, file.stat(), NOBODY)
    assert result.outcome is Outcome.PROBLEM and "nobody cannot read" in result.found


@pytest.mark.parametrize(
    ("mode", "outcome"), [(0o600, Outcome.OK), (0o640, Outcome.WARNING), (0o604, Outcome.PROBLEM)]
)
def test_token_file(look: Look, tmp_path: Path, mode: int, outcome: Outcome) -> None:
    token = tmp_path / "token"
    token.write_text("secret words")
    token.chmod(mode)
    result = look("file modes", '[model]\ntoken_file = "token"')
    assert result.outcome is outcome and "secret words" not in str(result)


def test_token_file_that_is_not_there(look: Look) -> None:
    result = look("file modes", '[model]\ntoken_file = "nowhere"')
    assert result.outcome is Outcome.PROBLEM and "not there" in result.found


def test_plugins_that_others_can_change(look: Look, tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir(mode=0o755)
    plugin = folder / "alert.py"
    plugin.write_text("")
    plugin.chmod(0o644)
    assert look("file modes", '[plugins]\ndirs = ["plugins"]').outcome is Outcome.OK
    plugin.chmod(0o664)
    result = look("file modes", '[plugins]\ndirs = ["plugins"]')
    assert result.outcome is Outcome.PROBLEM and str(plugin) in result.found
    plugin.chmod(0o644)
    folder.chmod(0o777)
    assert look("file modes", '[plugins]\ndirs = ["plugins"]').outcome is Outcome.PROBLEM
    assert look("file modes", '[plugins]\nenabled = false\ndirs = ["plugins"]').outcome is Outcome.OK
    assert plugin_folder_modes(tmp_path / "none", NOBODY) == []


def test_state_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (result,) = state_folder_mode(tmp_path, NOBODY)
    assert "sudo chown -R nobody" in result.remedy
    assert state_folder_mode(tmp_path, current_account()) == []
    tmp_path.chmod(0o777)
    (result,) = state_folder_mode(tmp_path, current_account())
    assert result.outcome is Outcome.PROBLEM


@given(st.integers(0, 0o777), st.sampled_from([1, 1000, 0]), st.booleans(), st.booleans())
def test_who_may_what(mode: int, uid: int, owns: bool, in_group: bool) -> None:
    """As the kernel decides: the first of owner, group and others that fits, and root always."""
    status = os.stat_result((mode, 0, 0, 0, uid if owns else 7, 50 if in_group else 60, 0, 0, 0, 0))
    account = Account("a", uid, frozenset({50}))
    shift = 6 if owns else 3 if in_group else 0
    bits = 7 if uid == 0 else mode >> shift & 7
    assert account.may_read(status) == bool(bits & 4)
    assert account.may_write(status) == bool(bits & 2)
    assert account.may_enter(status) == bool(bits & 1)


def test_whose_agent_it_is(tmp_path: Path) -> None:
    assert agent_account(None, None) == current_account()
    assert agent_account(tmp_path, tmp_path / "none").uid == os.geteuid()
    if os.geteuid() == 0:
        socket = tmp_path / "c.sock"
        socket.write_text("")
        os.chown(socket, 65534, 65534)
        assert agent_account(None, socket).uid == 65534, "whoever made the control socket"
