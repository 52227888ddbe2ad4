"""`petals-agent plan`, run as a person runs it: on a folder, on a Hub, without a network; weights stay where they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from harness.swarm import PETALS_AGENT
from models.hub import COMMIT, Hub, serve
from models.shards import LLAMA, shard_name, write_checkpoint
from petals_agent.cli.main import app, main

REPO = "someone/tiny-1.5"
DEVICE = {
    "device",
    "name",
    "dtype",
    "free_bytes",
    "block_bytes",
    "kv_bytes_per_token",
    "cache_tokens",
    "batch_tokens",
    "fit_blocks",
    "needed_bytes",
    "blocks",
    "max_cache_tokens",
    "fits",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration, cache or state but the test's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")  # the socket's path would be too long for the kernel
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "PETALS_AGENT_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub({REPO: folder})) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield running


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def planned(*arguments: str) -> dict[str, Any]:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return dict(json.loads(done.stdout))


def test_a_folder_needs_neither_prefix_nor_network(folder: Path) -> None:
    plan = planned(str(folder), "--device", "cpu")
    assert (plan["supported"], plan["model_type"], plan["num_blocks"]) == (True, "llama", 4)
    assert (plan["dht_prefix"], plan["commit"], plan["download_bytes"]) == (None, None, 0)
    assert plan["span"] == "0:4" and plan["dtype_of_checkpoint"] == "float32"
    (cpu,) = plan["devices"]
    assert set(cpu) == DEVICE
    assert (cpu["device"], cpu["dtype"], cpu["block_bytes"], cpu["kv_bytes_per_token"]) == (
        "cpu",
        "bfloat16",
        2 * (16 * 16 + 40 * 16),
        2 * 16,
    )
    assert cpu["fits"] and cpu["fit_blocks"] == 4 and cpu["max_cache_tokens"] >= cpu["cache_tokens"]
    said = invoke(str(folder), "--device", "cpu", "--dtype", "float32").stdout
    assert "set model.dht_prefix" in said and "float32" in said and "blocks 0:4" in said


def test_a_repository_costs_headers_alone(hub: Hub, tmp_path: Path) -> None:
    plan = planned(REPO, "--device", "cpu")
    shards = [hub.repos[REPO] / shard_name(block) for block in range(4)]
    assert plan["commit"] == COMMIT and plan["dht_prefix"] == "tiny-1-5-hf"
    assert plan["span_bytes"] == plan["download_bytes"] == sum(path.stat().st_size for path in shards)
    assert set(hub.fetched()) == {"config.json", "model.safetensors.index.json"}
    cache = tmp_path / "home" / ".cache" / "petals-agent" / "models"
    assert not list(cache.rglob("*.safetensors"))


def test_what_is_configured_counts(hub: Hub, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f"[model]\npath = '{REPO}'\ndht_prefix = 'mine'\ndtype = 'float32'\n"
        "[serve]\nblocks = '1:3'\ncache_tokens = 77\n"
    )
    plan = planned("--config", str(config), "--device", "cpu")
    assert (plan["dht_prefix"], plan["span"]) == ("mine", "1:3")
    assert plan["span_bytes"] == sum((hub.repos[REPO] / shard_name(b)).stat().st_size for b in (1, 2))
    (cpu,) = plan["devices"]
    assert (cpu["dtype"], cpu["cache_tokens"], cpu["blocks"], cpu["fit_blocks"]) == ("float32", 77, 2, 4)


def test_what_does_not_fit_is_said_with_figures(tmp_path: Path) -> None:
    """A cache of more tokens than any host has memory for."""
    config = tmp_path / "c.toml"
    config.write_text("[serve]\ncache_tokens = 2147483647\n")
    wide = LLAMA | {"head_dim": 131_072}  # 1 MiB of cache per token
    folder = str(write_checkpoint(tmp_path / "m", wide))
    arguments = (folder, "--config", str(config), "--device", "cpu")
    (cpu,) = planned(*arguments)["devices"]
    assert (cpu["fit_blocks"], cpu["blocks"], cpu["fits"], cpu["max_cache_tokens"]) == (0, 0, False, 0)
    said = invoke(*arguments).stdout.replace("\n", " ")
    assert "one block with 2147483647 tokens of cache would take 2097152." in said


def test_an_unsupported_model_is_told_what_is_supported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "m", LLAMA | {"model_type": "mamba"})
    done = invoke(str(folder), "--json")
    said = json.loads(done.stdout)
    assert done.exit_code == 65 and said["supported"] is False and "llama" in said["families"]
    monkeypatch.setattr(sys, "argv", ["petals-agent", "plan", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err
    assert ended.value.code == 65 and "'mamba' is not served" in message and "qwen3" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "which model?"),
        (("there/is/none",), "no such folder"),
        (("MODEL", "--dtype", "int8"), "choose float32"),
        (("MODEL", "--device", "cuda:77"), "is not there"),
        (("MODEL", "--config", "CONFIG"), "has 4 blocks"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"[model]\npath = '{folder}'\ndht_prefix = 'x'\n[serve]\nblocks = '2:9'\n")
    given = [{"MODEL": str(folder), "CONFIG": str(config)}.get(one, one) for one in arguments]
    done = invoke(*given)
    assert done.exit_code != 0 and words in str(done.exception)


def test_without_a_network(tmp_path: Path) -> None:
    """Nobody listens at the Hub's address; a fresh process, without torch."""
    environment = {"HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    command = [*PETALS_AGENT, "plan", REPO]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 66 and "cannot be fetched" in done.stderr and "network" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
