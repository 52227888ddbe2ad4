"""The model in a folder and at a Hub: readable, whole, cut, mixed up, gated, out of reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from doctor.conftest import Look
from models.hub import Hub, serve
from models.shards import LLAMA, shard_name, write_shard
from petals_agent.doctor.account import Account
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.model import first_unreadable
from petals_agent.models.source import open_model

REPO = "someone/tiny"
NOBODY = Account("nobody", 65534, frozenset({65534}))
AT_HUB = f'[model]\npath = "{REPO}"\ncache_dir = "cache"\n'


def test_a_whole_folder(look: Look) -> None:
    assert "4 blocks, llama" in look("model").found
    result = look("weights")
    assert result.outcome is Outcome.OK and result.found == "all 5 files are here and whole"


def test_a_truncated_shard(look: Look, model: Path) -> None:
    shard = model / shard_name(2)
    shard.write_bytes(shard.read_bytes()[:-7])
    result = look("weights")
    assert (
        result.outcome is Outcome.PROBLEM
        and "truncated" in result.found
        and result.remedy.endswith(f"rm {shard}")
    )


def test_a_header_that_is_torn(look: Look, model: Path) -> None:
    shard = model / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:20])
    assert look("weights").outcome is Outcome.PROBLEM


def test_a_shard_that_is_missing(look: Look, model: Path) -> None:
    (model / shard_name(1)).unlink()
    result = look("weights")
    assert (
        result.outcome is Outcome.PROBLEM and shard_name(1) in result.found and "of 5 files" in result.found
    )


def test_index_and_weights_of_different_models(look: Look, model: Path) -> None:
    write_shard(model / shard_name(1), {"model.layers.1.other.weight": [3]})
    result = look("weights")
    assert result.outcome is Outcome.PROBLEM and "though the index names it" in result.found


def test_a_folder_without_a_config(look: Look, model: Path) -> None:
    (model / "config.json").unlink()
    assert look("model").outcome is Outcome.PROBLEM
    assert look("weights").outcome is Outcome.SKIPPED


def test_a_family_that_is_not_served(look: Look, model: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mamba"}))
    result = look("model")
    assert result.outcome is Outcome.PROBLEM and "'mamba' is not served" in result.found


def test_a_folder_that_the_agent_cannot_read(model: Path) -> None:
    """By the modes of the files and of the folders on the way."""
    for folder in (model, *model.parents):
        if folder == Path("/"):
            break
        if not folder.stat().st_mode & 0o001:
            assert first_unreadable(model, NOBODY) in (model, *model.parents)
    closed = model / "config.json"
    closed.chmod(0o600)
    assert first_unreadable(closed.parent, NOBODY) is not None
    assert first_unreadable(model / "none", Account("root", 0, frozenset())) is None


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub({REPO: model})) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield running


def test_a_repository(look: Look, hub: Hub, tmp_path: Path) -> None:
    result = look("model", AT_HUB)
    assert result.outcome is Outcome.OK and "commit c0ffee" in result.found
    assert "0 of 5 files are here" in look("weights", AT_HUB).found
    cache = tmp_path / "cache"
    source = open_model(REPO, "main", cache)
    (path,) = source.fetch(source.block_tensors(0, 1)).values()
    assert "1 of 5 files are here" in look("weights", AT_HUB).found
    used = path.stat().st_mtime_ns
    look("weights", AT_HUB)
    assert path.stat().st_mtime_ns == used, "a look is no use that the disk budget goes by"
    result = look("disk", AT_HUB + 'max_disk = "1KB"')
    assert result.outcome is Outcome.PROBLEM and "model.max_disk" in result.found
    path.resolve().write_bytes(b"torn")
    assert look("weights", AT_HUB).outcome is Outcome.PROBLEM


def test_a_repository_that_is_gated(look: Look, hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    result = look("model", AT_HUB)
    assert result.outcome is Outcome.PROBLEM and "access is restricted" in result.found
    token = tmp_path / "token"
    for words, outcome in (("hf_wrong", Outcome.PROBLEM), (hub.token, Outcome.OK)):
        token.write_text(words)
        assert look("model", AT_HUB + 'token_file = "token"').outcome is outcome


def test_a_hub_that_is_gone(look: Look, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached can be served; what is not cannot."""
    assert look("model", AT_HUB).outcome is Outcome.OK
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    result = look("model", AT_HUB)
    assert result.outcome is Outcome.WARNING and "only what is cached" in result.found
    result = look("model", AT_HUB.replace('"cache"', '"other"'))
    assert result.outcome is Outcome.PROBLEM and "cannot be fetched" in result.found
