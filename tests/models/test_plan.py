"""The plan's arithmetic: what it says fits does fit, and one more would not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_agent.models.facts import ModelFacts
from petals_agent.models.memory import BlockCost
from petals_agent.models.plan import Room, Wishes, fit

FACTS = st.builds(
    ModelFacts,
    model_type=st.just("llama"),
    num_blocks=st.just(7),
    hidden_size=st.integers(1, 10_000),
    num_heads=st.just(8),
    num_kv_heads=st.sampled_from([2, 8]),
    head_dim=st.just(64),
    kv_width=st.integers(1, 10_000),
    block_parameters=st.lists(st.integers(1, 10**10), min_size=7, max_size=7).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    max_positions=st.none(),
    repository=st.none(),
    revision=st.none(),
    dht_prefix=st.none(),
)
ROOMS = st.builds(
    Room, device=st.sampled_from(["cpu", "cuda:1"]), name=st.just("it"), free=st.integers(0, 10**13)
)
WISHES = st.builds(
    Wishes,
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    blocks=st.none() | st.integers(1, 9),
    cache_tokens=st.none() | st.integers(1, 10**6),
    batch_tokens=st.none() | st.integers(1, 10**5),
)


@given(FACTS, ROOMS, WISHES)
def test_what_fits_fits_and_no_more(facts: ModelFacts, room: Room, wishes: Wishes) -> None:
    found = fit(facts, room, wishes)
    cost = BlockCost.of(facts, found.dtype)

    def need(blocks: int, tokens: int) -> int:
        return cost.span(blocks, tokens, found.batch_tokens)

    if found.fit_blocks:
        assert need(found.fit_blocks, found.cache_tokens) <= room.free
    if found.fit_blocks < facts.num_blocks:
        assert need(found.fit_blocks + 1, found.cache_tokens) > room.free
    if found.max_cache_tokens:
        assert need(found.blocks, found.max_cache_tokens) <= room.free
    assert found.fits == (found.blocks > 0 and found.needed_bytes <= room.free)
    assert found.fits == (found.blocks > 0 and found.max_cache_tokens >= found.cache_tokens)


@given(FACTS, ROOMS, WISHES)
def test_wishes_are_kept(facts: ModelFacts, room: Room, wishes: Wishes) -> None:
    found = fit(facts, room, wishes)
    if wishes.blocks is not None:
        assert found.blocks == min(wishes.blocks, 7)
    grouped = facts.num_kv_heads < facts.num_heads
    assert found.cache_tokens == (wishes.cache_tokens or (16384 if grouped else 4096))
    assert found.batch_tokens == (wishes.batch_tokens or (8192 if grouped else 2048))
    assert found.dtype == wishes.dtype or wishes.dtype == "auto"
    assert not (room.device == "cpu" and found.dtype == "float16"), "which does not compute there"
