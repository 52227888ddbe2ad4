"""The arithmetic of what fits, and where free memory is read from."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shards import write_checkpoint
from petals_agent.errors import ModelError
from petals_agent.models.memory import (
    BlockCost,
    cpu_free,
    free_memory,
    max_blocks,
    max_cache_tokens,
    require_block,
)
from petals_agent.models.source import open_model

COSTS = st.builds(
    BlockCost,
    weights=st.integers(1, 10**10),
    cached_token=st.integers(1, 10**5),
    trained_token=st.integers(1, 10**5),
)
FREE = st.integers(0, 10**13)
TOKENS = st.integers(0, 10**5)


@given(FREE, COSTS, TOKENS, TOKENS, st.integers(1, 200))
def test_what_is_chosen_fits_and_one_more_would_not(
    free: int, cost: BlockCost, cache_tokens: int, batch_tokens: int, total: int
) -> None:
    blocks = max_blocks(free, cost, cache_tokens, batch_tokens, total)
    assert 0 <= blocks <= total
    if blocks:
        assert cost.span(blocks, cache_tokens, batch_tokens) <= free
    if blocks < total:
        assert cost.span(blocks + 1, cache_tokens, batch_tokens) > free


@given(FREE, COSTS, st.integers(1, 200), TOKENS)
def test_the_cache_takes_what_is_left(free: int, cost: BlockCost, blocks: int, batch_tokens: int) -> None:
    tokens = max_cache_tokens(free, cost, blocks, batch_tokens)
    assert tokens >= 0
    if tokens:
        assert cost.span(blocks, tokens, batch_tokens) <= free
    assert cost.span(blocks, tokens + 1, batch_tokens) > free


@given(FREE, FREE, COSTS, TOKENS, TOKENS)
def test_more_memory_never_means_fewer_blocks(
    less: int, more: int, cost: BlockCost, cache: int, batch: int
) -> None:
    less, more = sorted((less, more))
    assert max_blocks(less, cost, cache, batch, 100) <= max_blocks(more, cost, cache, batch, 100)


@given(FREE, COSTS, TOKENS, TOKENS)
def test_the_error_comes_exactly_when_no_block_fits(
    free: int, cost: BlockCost, cache: int, batch: int
) -> None:
    if max_blocks(free, cost, cache, batch, 1):
        require_block(free, cost, cache, batch)
    else:
        with pytest.raises(ModelError, match=r"serve\.cache_tokens"):
            require_block(free, cost, cache, batch)


def test_figures_of_a_checkpoint(tmp_path: Path) -> None:
    cost = BlockCost.of(open_model(str(write_checkpoint(tmp_path / "m"))).facts, "bfloat16")
    assert cost == BlockCost(weights=2 * 896, cached_token=2 * 16, trained_token=2 * 16)
    # 100 tokens of cache: 3200 bytes; a batch of 10 tokens: 320 bytes per block, and 13 × 320 for the one in work
    assert cost.span(2, 100, 10) == 2 * (1792 + 3200 + 320) + 4160
    assert max_blocks(4160 + 3 * 5312, cost, 100, 10, 8) == 3


def _cgroup(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\nactive_file 0\ninactive_file {cached}\n")


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The tightest limit on the way to the root counts; page cache is not in the way."""
    (tmp_path / "member").write_text("0::/system.slice/petals.service\n")
    root = tmp_path / "cgroup"
    _cgroup(root / "system.slice", "5000", 1000, 0)
    _cgroup(root / "system.slice/petals.service", "max", 1000, 0)
    assert cpu_free(tmp_path / "member", root) == 4000
    _cgroup(root / "system.slice/petals.service", "2000", 1500, 600)
    assert cpu_free(tmp_path / "member", root) == 1100
    _cgroup(root / "system.slice/petals.service", "2000", 2500, 0)
    assert cpu_free(tmp_path / "member", root) == 0


@pytest.mark.parametrize("content", [None, "", "4:memory:/old/version/one\n", "0::/gone\n"])
def test_without_a_limit_the_host_decides(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "member").write_text(content)
    before = psutil.virtual_memory().total
    assert 0 < cpu_free(tmp_path / "member", tmp_path / "cgroup") <= before


def test_free_memory_leaves_a_margin() -> None:
    assert 0 < free_memory("cpu") < psutil.virtual_memory().total * 0.81
