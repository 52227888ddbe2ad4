"""Sources and their precedence, relative paths, and what a program gets."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from petals_agent.config import (
    PUBLIC_INITIAL_PEERS,
    Config,
    InvalidConfig,
    Loaded,
    check_span,
    config_from,
    load_config,
)
from petals_agent.config.load import parse_overrides

SAMPLE = """
[model]
path = "models/tiny"          # a folder, or a Hub repository
dht_prefix = "tiny"
dtype = "float32"
[swarm]
initial_peers = ["/ip4/127.0.0.1/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"]
listen = ["/ip4/127.0.0.1/tcp/0"]
identity = "state/id.key"
update_period = 30            # seconds; a bare number is seconds, "2m" works too
[serve]
blocks = "0:8"
device = "cpu"
throughput = 1.0
[balance]
enabled = false
[control]
socket = "run/control.sock"
"""


def test_a_private_swarms_server(file: Path) -> None:
    file.write_text(SAMPLE)
    (file.parent / "models/tiny").mkdir(parents=True)
    config = load_config(file)
    assert config.model.folder == file.parent / "models/tiny" and config.model.dtype == "float32"
    assert config.swarm.identity == file.parent / "state/id.key" and config.swarm.update_period == 30
    assert config.swarm.entry_peers == (
        "/ip4/127.0.0.1/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    )
    assert config.serve.span == (0, 8) and config.serve.throughput == 1.0
    assert not config.balance.enabled
    assert config.control.socket == file.parent / "run/control.sock"
    assert config.state_dir == file.parent / "state"


def test_without_such_a_folder_the_model_is_a_repository(file: Path) -> None:
    file.write_text(SAMPLE)
    config = load_config(file)
    assert config.model.path == "models/tiny" and config.model.folder is None


def test_what_comes_later_wins(read: Callable[..., Loaded], file: Path) -> None:
    drop_ins = file.with_name("petals-agent.toml.d")
    drop_ins.mkdir()
    (drop_ins / "10-a.toml").write_text("[serve]\nmax_sessions = 2\nblocks = '0:2'\ncache_tokens = 2\n")
    (drop_ins / "20-b.toml").write_text("[serve]\nblocks = '0:3'\ncache_tokens = 3\n")
    (drop_ins / "30-empty.toml").write_text("")
    (drop_ins / ".40-hidden.toml").write_text("not toml")
    (drop_ins / "50-backup.toml.dpkg-old").write_text("not toml")
    environ = {"PETALS_AGENT__SERVE__CACHE_TOKENS": "4", "PETALS_AGENT__SERVE__BLOCKS": "0:4"}
    loaded = read(
        "[serve]\nmax_sessions = 1\nblocks = '0:1'\ncache_tokens = 1\nstep_timeout = 1",
        {"serve.blocks": "0:5"},
        environ,
    )
    serve = loaded.config.serve
    assert (serve.step_timeout, serve.max_sessions, serve.cache_tokens, serve.blocks) == (1, 2, 4, "0:5")
    assert [path.name for path in loaded.files] == [
        "petals-agent.toml",
        "10-a.toml",
        "20-b.toml",
        "30-empty.toml",
    ]
    assert str(loaded.config.origin("serve.max_sessions")) == f"{drop_ins}/10-a.toml:2"
    assert str(loaded.config.origin("serve.cache_tokens")) == "environment PETALS_AGENT__SERVE__CACHE_TOKENS"
    assert str(loaded.config.origin("serve.blocks")) == "command line"
    assert str(loaded.config.origin("serve.device")) == "default"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("serve.blocks", "0:4", "0:4"),
        ("serve.num_blocks", "4", 4),
        ("serve.num_blocks", "auto", "auto"),
        ("serve.throughput", "2", 2.0),
        ("serve.step_timeout", "30", 30.0),
        ("serve.step_timeout", "2m", 120.0),
        ("balance.enabled", "false", False),
        ("model.revision", "123", "123"),
        ("model.max_disk", "50GB", 50 * 10**9),
        ("swarm.public_name", "true", "true"),
        ("swarm.initial_peers", "public", "public"),
        ("swarm.initial_peers", "", ()),
        ("swarm.initial_peers", "[]", ()),
        ("swarm.initial_peers", ", ".join(PUBLIC_INITIAL_PEERS[:2]), PUBLIC_INITIAL_PEERS[:2]),
        ("swarm.listen", '["/ip4/127.0.0.1/tcp/1"]', ("/ip4/127.0.0.1/tcp/1",)),
        ("model.token_file", "", None),
    ],
)
@pytest.mark.parametrize("by", ["environment", "command line"])
def test_text_from_outside_means_what_the_key_wants(
    read: Callable[..., Loaded], by: str, key: str, text: str, value: object
) -> None:
    name = "PETALS_AGENT__" + key.upper().replace(".", "__")
    loaded = read("", {key: text}, {}) if by == "command line" else read("", {}, {name: text})
    section, name = key.split(".")
    assert getattr(getattr(loaded.config, section), name) == value


def test_relative_paths_belong_to_the_file_that_sets_them(
    read: Callable[..., Loaded], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/users/someone")
    drop_ins = file.with_name("petals-agent.toml.d")
    drop_ins.mkdir()
    (drop_ins / "a.toml").write_text(
        "[plugins]\ndirs = ['plugins', '/abs', '~/p']\n[model]\ntoken_file = '../token'\n"
    )
    config = read("[swarm]\nidentity = 'id.key'", {"control.socket": "c.sock"}).config
    assert config.swarm.identity == file.parent / "id.key"
    assert config.plugins.dirs == (drop_ins / "plugins", Path("/abs"), Path("/users/someone/p"))
    assert config.model.token_file == file.parent / "token"
    assert config.control.socket == elsewhere / "c.sock"


def test_defaults_for_folders_come_from_systemd(read: Callable[..., Loaded]) -> None:
    environ = {"STATE_DIRECTORY": "/s", "CACHE_DIRECTORY": "/c", "RUNTIME_DIRECTORY": "/r"}
    loaded = read("", {}, environ)
    config = loaded.config
    assert config.swarm.identity == Path("/s/identity.key") and config.state_dir == Path("/s")
    assert config.model.cache_dir == Path("/c/models") and config.control.socket == Path("/r/control.sock")
    assert str(loaded.origins["control", "socket"]) == "default (systemd)"


def test_a_plugins_table_is_kept_for_the_plugin(read: Callable[..., Loaded]) -> None:
    text = "[plugins]\ntimeout = 3\n[plugins.webhook]\nurl = 'https://x'\nlimits = {each = [1, 2]}\n[plugins.pin]\n"
    loaded = read(text, {"plugins.webhook.retries": "3"})
    tables = loaded.config.plugins.tables
    assert tables == {"webhook": {"url": "https://x", "limits": {"each": [1, 2]}, "retries": 3}, "pin": {}}


def test_a_probe_is_named_with_its_dot(read: Callable[..., Loaded]) -> None:
    text = '[health.probes."container.loop"]\nperiod = "2s"\nfailures = 3\n'
    config = read(text, {'health.probes."container.loop".timeout': "500ms"}).config
    probe = config.health.probes["container.loop"]
    assert (probe.period, probe.timeout, probe.failures) == (2.0, 0.5, 3)


def test_keys_without_effect_as_yet_are_said(
    file: Path, read: Callable[..., Loaded], caplog: pytest.LogCaptureFixture
) -> None:
    notes = read(
        "[balance]\nenabled = false\n[access]\nmax_sessions_per_peer = 2\nmax_requests_per_minute = 3"
    ).notes
    assert notes == [
        f"{file}:4: access.max_sessions_per_peer has no effect in this version, but in a later one",
        f"{file}:5: access.max_requests_per_minute has no effect in this version, but in a later one",
    ]
    with caplog.at_level(logging.WARNING):
        load_config(file)
    assert [record.getMessage() for record in caplog.records] == notes


def test_a_program_needs_no_file() -> None:
    config = config_from({"model": {"path": "owner/name"}, "serve": {"blocks": "0:4", "step_timeout": "1m"}})
    assert config.serve.span == (0, 4) and config.serve.step_timeout == 60
    with pytest.raises(InvalidConfig, match=r'^serve.blocks = "x"'):
        config_from({"serve": {"blocks": "x"}})


def test_a_configuration_travels_as_json(file: Path) -> None:
    file.write_text(SAMPLE + "[plugins.a]\nb = [1, 'x']\n[health.probes.gpu]\nperiod = 1\n")
    config = load_config(file)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_equality_is_by_value(read: Callable[..., Loaded]) -> None:
    assert read("[serve]\nstep_timeout = 60").config == read("\n\n[serve]\nstep_timeout = '1m'").config
    assert read("[serve]\nstep_timeout = 60").config != read("[serve]\nstep_timeout = 61").config


def test_a_span_outside_the_model_names_its_line(file: Path) -> None:
    file.write_text(SAMPLE)
    config = load_config(file)
    check_span(config.serve.blocks, 8, config.origin("serve.blocks"))
    check_span("auto", 1)
    with pytest.raises(InvalidConfig) as caught:
        check_span(config.serve.blocks, 6, config.origin("serve.blocks"))
    assert str(caught.value) == (
        f'{file}:12: serve.blocks = "0:8": the model has only 6 blocks; '
        'allowed: "auto", or "START:END" within "0:6"'
    )


def test_overrides_of_a_command_line() -> None:
    assert parse_overrides(["serve.blocks=0:4", "a.b = c=d "]) == {"serve.blocks": "0:4", "a.b": "c=d"}
    with pytest.raises(InvalidConfig, match=r"SECTION\.KEY=VALUE"):
        parse_overrides(["serve.blocks"])


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, petals_agent.config; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {"torch", "hivemind", "transformers", "numpy", "typer", "rich", "httpx", "huggingface_hub"}
    assert heavy.isdisjoint(done.stdout.split())


def test_the_environment_is_read_when_called(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(SAMPLE)
    monkeypatch.setitem(os.environ, "PETALS_AGENT__SERVE__BLOCKS", "2:3")
    assert load_config(file).serve.blocks == "2:3"
