"""Folders for state, cache and sockets, and where a configuration is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from petals_agent.config import InvalidConfig, load_config, places
from petals_agent.config.load import find_file

SYSTEMD = {
    "STATE_DIRECTORY": "/var/lib/x:/var/lib/y",
    "CACHE_DIRECTORY": "/var/cache/x",
    "RUNTIME_DIRECTORY": "/run/x",
}


def test_systemd_comes_first() -> None:
    found = places({**SYSTEMD, "HOME": "/users/a"}, Path("/etc/petals-agent/petals-agent.toml"))
    assert (found.state, found.cache, found.runtime) == (
        Path("/var/lib/x"),
        Path("/var/cache/x"),
        Path("/run/x"),
    )
    assert found.reason == "systemd"


def test_the_systems_file_means_the_systems_folders() -> None:
    found = places({"HOME": "/users/a"}, Path("/etc/petals-agent/petals-agent.toml"))
    assert (found.state, found.runtime) == (Path("/var/lib/petals-agent"), Path("/run/petals-agent"))


def test_a_second_instance_shares_only_the_cache() -> None:
    first, second = (places({}, Path(f"/etc/petals-agent/{name}.toml")) for name in ("petals-agent", "gpu1"))
    assert second.state == Path("/var/lib/petals-agent/gpu1") and second.runtime == Path(
        "/run/petals-agent/gpu1"
    )
    assert second.cache == first.cache


def test_a_user_has_xdg_folders() -> None:
    found = places(
        {"HOME": "/users/a", "XDG_RUNTIME_DIR": "/run/user/1", "XDG_CACHE_HOME": "not/absolute"},
        Path("/x.toml"),
    )
    assert found.state == Path("/users/a/.local/state/petals-agent")
    assert found.cache == Path("/users/a/.cache/petals-agent")
    assert found.runtime == Path("/run/user/1/petals-agent")
    assert places({"HOME": "/users/a"}).runtime == Path("/users/a/.local/state/petals-agent/run")


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    missing = tmp_path / "no.toml"
    for path, environ in ((missing, {}), (None, {"PETALS_AGENT_CONFIG": str(missing)})):
        with pytest.raises(InvalidConfig, match="no such file"):
            load_config(path, environ=environ)


def test_the_argument_wins_over_the_environment(tmp_path: Path) -> None:
    assert find_file(tmp_path / "a", {"PETALS_AGENT_CONFIG": "/b"})[0] == tmp_path / "a"
    assert find_file(None, {"PETALS_AGENT_CONFIG": "/b"})[0] == Path("/b")


def test_the_users_file_is_found_and_the_current_folder_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_file = tmp_path / ".config/petals-agent/petals-agent.toml"
    user_file.parent.mkdir(parents=True)
    (tmp_path / "petals-agent.toml").write_text("[model]\npath = 'evil/here'\n")
    monkeypatch.chdir(tmp_path)
    environ = {"HOME": str(tmp_path)}
    assert tmp_path / "petals-agent.toml" not in find_file(None, environ)[1]
    user_file.write_text("[model]\npath = 'owner/mine'\n")
    assert load_config(None, environ=environ).model.path == "owner/mine"


def test_no_file_is_needed_when_the_environment_says_all(tmp_path: Path) -> None:
    environ = {
        "XDG_CONFIG_HOME": str(tmp_path),
        "HOME": str(tmp_path),
        "PETALS_AGENT__MODEL__PATH": "owner/name",
    }
    if Path("/etc/petals-agent/petals-agent.toml").exists():
        pytest.skip("this host has a configuration of its own in /etc/petals-agent")
    assert load_config(None, environ=environ).model.path == "owner/name"
    del environ["PETALS_AGENT__MODEL__PATH"]
    with pytest.raises(
        InvalidConfig, match=r"looked for .*petals-agent\.toml, /etc/petals-agent/petals-agent\.toml"
    ):
        load_config(None, environ=environ)
    assert load_config(None, environ=environ, require_model=False).model.path == ""
