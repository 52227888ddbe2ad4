"""A command finds the running agent also when its file has become wrong."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from petals_agent.cli.settings import control_socket
from petals_agent.errors import ConfigError


def test_socket_of_a_file_that_became_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    file, usual = tmp_path / "petals-agent.toml", tmp_path / "control.sock"
    file.write_text("[model]\npath = 'owner/name'\n[control]\nsocket = 'other.sock'\n")
    assert control_socket(file) == tmp_path / "other.sock"
    file.write_text("[log]\nlevel = 'loud'\n")
    with pytest.raises(ConfigError, match="loud"):
        control_socket(file)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(usual))
        assert control_socket(file) == usual
    usual.unlink()
    usual.touch()  # no socket
    with pytest.raises(ConfigError, match="loud"):
        control_socket(file)
