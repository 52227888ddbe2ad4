"""`config show` writes TOML that loads to the same configuration, with origins and without secrets."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.config import PUBLIC_INITIAL_PEERS, Loaded, config_from, read_config
from petals_agent.config.keys import schema_keys, table_leaves
from petals_agent.config.show import as_json, as_toml
from petals_agent.config.values import YEAR_S

words = st.text("aZ09-_.:/ '\"\\#=[]{}é字½", min_size=1, max_size=12)
durations = st.floats(1, 3600) | st.integers(1, 3600) | st.sampled_from(["2m", "1h", "1500ms", "59m59s"])
counts = st.just("auto") | st.integers(1, 2**31 - 1)
limits = st.just("unlimited") | st.integers(1, 2**31 - 1)
paths = st.text("abc-_ é", min_size=1, max_size=8).map("/tmp/{}".format)
peer_ids = st.lists(
    st.sampled_from([PUBLIC_INITIAL_PEERS[0][-46:], PUBLIC_INITIAL_PEERS[1][-46:]]), max_size=2
)
plugin_values = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | words
    | st.dates()
    | st.times()
    | st.datetimes(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
VALUES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "path": st.sampled_from(["owner/name", "name", "/folder"]),
        "revision": words,
        "dht_prefix": st.sampled_from(["tiny", "owner/name"]),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
        "quantization": st.just("none"),
        "adapters": st.lists(st.sampled_from(["owner/lora", "/lora"]), max_size=2),
        "token_file": st.just("") | paths,
        "cache_dir": paths,
        "max_disk": st.just("unlimited") | st.integers(0, 2**60) | st.sampled_from(["50GB", "200GiB"]),
    },
    "swarm": {
        "initial_peers": st.just("public") | st.lists(st.sampled_from(PUBLIC_INITIAL_PEERS), max_size=3),
        "listen": st.just(["/ip6/::/tcp/1"]),
        "announce": st.just(["/ip4/1.2.3.4/tcp/1"]),
        "identity": paths,
        "public_name": words,
        "relay": st.booleans(),
        "reachability": st.sampled_from(["peers", "off", "https://monitor.example:80/x"]),
        "update_period": durations,
        "daemon_startup_timeout": durations,
    },
    "serve": {
        "blocks": st.sampled_from(["auto", "0:4", "007:8"]),
        "num_blocks": st.just("auto"),
        "device": st.sampled_from(["cpu", "cuda", "cuda:3"]),
        "throughput": st.sampled_from(["auto", "measure"]) | st.floats(1e-300, 1e9) | st.integers(1, 10**9),
        "cache_tokens": counts,
        "max_batch_size": counts,
        "inference_max_length": counts,
        "max_sessions": st.integers(1, 10**6),
        "compression": st.sampled_from(["none", "quantile_8bit"]),
        "request_timeout": durations,
        "session_timeout": durations | st.floats(1, YEAR_S),
        "step_timeout": durations,
        "max_alloc_timeout": durations | st.just(0),
        "drain_timeout": durations | st.just(0),
    },
    "balance": {
        "enabled": st.booleans(),
        "balance_quality": st.floats(0, 100),
        "mean_balance_check_period": durations,
        "mean_block_selection_delay": durations,
        "min_gain": st.floats(0, 100),
        "cooldown": durations,
        "drain_timeout": durations,
    },
    "health": {
        "recoveries_per_hour": st.integers(0, 3600),
        "repair": st.booleans(),
        "ready": st.sampled_from(["online", "joining"]),
        "probes": st.dictionaries(
            st.sampled_from(["gpu", "container.loop", "fan.speed"]),
            st.fixed_dictionaries(
                {}, optional={"period": durations, "timeout": durations, "failures": st.integers(1, 9)}
            ),
            max_size=2,
        ),
    },
    "plugins": {
        "enabled": st.booleans(),
        "dirs": st.lists(paths, max_size=2),
        "timeout": durations,
        "pause_period": durations,
    },
    "access": {
        "allow_peers": peer_ids,
        "deny_peers": peer_ids,
        "max_sessions_per_peer": limits,
        "max_requests_per_minute": limits,
    },
    "heartbeat": {
        "group": words,
        "members": peer_ids,
        "size": counts,
        "period": durations,
        "on_failure": st.sampled_from(["exit", "unhealthy", "log"]),
    },
    "metrics": {"listen": st.sampled_from(["off", "127.0.0.1:1", "[::1]:0", "host:65535"])},
    "monitor": {
        "listen": st.just("0.0.0.0:1"),
        "prefixes": st.lists(words, max_size=2),
        "period": durations,
        "trusted_proxies": st.lists(st.sampled_from(["10.0.0.0/8", "::1", "192.0.2.7"]), max_size=2),
        "history": paths,
        "retention": durations,
    },
    "control": {"socket": paths},
    "log": {"level": st.sampled_from(["debug", "error"]), "format": st.sampled_from(["text", "json"])},
}
plugin_tables = st.dictionaries(
    words.filter(lambda name: name not in ("enabled", "dirs", "timeout", "pause_period")),
    st.dictionaries(words.filter(lambda name: "token" not in name), plugin_values, max_size=3),
    max_size=2,
)
configs = st.builds(
    lambda tables, plugins: {**tables, "plugins": {**tables["plugins"], **plugins}},
    st.fixed_dictionaries(
        {
            section: st.fixed_dictionaries({}, optional=values)
            for section, values in VALUES.items()
            if section != "model"
        }
        | {"model": st.fixed_dictionaries(VALUES["model"])}
    ),
    plugin_tables,
)


def test_the_strategies_know_every_key() -> None:
    assert {f"{section}.{key}" for section, values in VALUES.items() for key in values} == {
        ".".join(path[:2]) for path in schema_keys()
    }


@settings(deadline=None)
@given(configs)
def test_what_is_shown_loads_to_the_same(tables: dict[str, Any]) -> None:
    config = config_from(tables)
    text = as_toml(config)
    assert config_from(tomllib.loads(text)) == config
    assert tomllib.loads(as_toml(config, dict.fromkeys(_all_paths(text), "origin"))) == tomllib.loads(text)
    assert json.loads(json.dumps(as_json(config))) == as_json(config)


def _all_paths(text: str) -> list[tuple[str, ...]]:
    return [path for path, _ in table_leaves(tomllib.loads(text))]


def test_origins_stand_beside_the_values(read: Callable[..., Loaded], file: Path) -> None:
    loaded = read(
        "[serve]\nblocks = '0:4'\n[plugins.x]\ny = 1", {"serve.device": "cpu"}, {"STATE_DIRECTORY": "/s"}
    )
    lines = {line.split(" = ")[0]: line for line in as_toml(loaded.config, loaded.origins).splitlines()}
    assert lines["blocks"].endswith(f"# {file}:2") and lines["y"].endswith(f"# {file}:4")
    assert lines["device"].endswith("# command line") and lines["relay"].endswith("# default")
    assert lines["identity"].endswith("# default (systemd and XDG)")


def test_no_secret_is_shown(file: Path) -> None:
    secret = file.with_name("token")
    secret.write_text("hf_verysecret")
    file.write_text(
        "[model]\npath = 'a/b'\ntoken_file = 'token'\n"
        "[plugins.web]\nurl = 'https://x'\napi_key = 'verysecret'\ntargets = [{password = 'verysecret', to = 'me'}]\n"
        "[plugins.web.auth]\nbearer_token = 'verysecret'\n"
    )
    loaded = read_config(file, environ={})
    for text in (as_toml(loaded.config, loaded.origins), json.dumps(as_json(loaded.config))):
        assert "verysecret" not in text and str(secret) in text and "https://x" in text and "me" in text
    shown = tomllib.loads(as_toml(loaded.config))["plugins"]["web"]
    assert shown == {
        "url": "https://x",
        "api_key": "(hidden)",
        "targets": [{"password": "(hidden)", "to": "me"}],
        "auth": {"bearer_token": "(hidden)"},
    }
