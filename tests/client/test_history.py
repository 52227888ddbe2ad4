"""A replayed history gives what a cache that was reordered and rolled back in place would hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.client.history import History, Message, split

BATCH = 3

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)),
        st.tuples(st.just("truncate"), st.integers(0, 12)),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(1, 20))
def test_replay_equals_a_cache_changed_in_place(steps: list[tuple[str, object]], max_tokens: int) -> None:
    history, cache, fresh = History(), torch.empty(BATCH, 0, 1), 0
    for kind, value in steps:
        if kind == "append":
            assert isinstance(value, int)
            hidden = torch.arange(fresh, fresh + BATCH * value, dtype=torch.float32).reshape(BATCH, value, 1)
            fresh += BATCH * value
            history.append(Message(hidden))
            cache = torch.cat([cache, hidden], dim=1)
        elif kind == "reorder":
            order = torch.tensor(value)
            history.reorder(order)
            cache = cache[order]
        else:
            assert isinstance(value, int)
            history.truncate(value)
            cache = cache[:, :value]
    assert history.position == cache.shape[1]
    replayed = history.replay(max_tokens)
    assert torch.equal(torch.cat([m.hidden for m in replayed] or [torch.empty(BATCH, 0, 1)], dim=1), cache)
    assert all(m.tokens == 1 or m.tokens * BATCH <= max_tokens for m in replayed)


def test_prompts_keep_their_place_and_their_rows() -> None:
    history = History()
    prompts = torch.arange(2 * BATCH * 2, dtype=torch.float32).reshape(2, BATCH, 2, 1)
    shared = torch.ones(2, 1, 3, 1)
    history.append(Message(torch.zeros(BATCH, 2, 1)))
    history.append(Message(torch.ones(BATCH, 3, 1), prompts))
    history.append(Message(torch.ones(BATCH, 1, 1)))
    history.append(Message(torch.ones(BATCH, 4, 1), shared))
    order = torch.tensor([2, 0, 0])
    history.reorder(order)
    plain, deep, last = history.replay(1000)
    assert (plain.tokens, deep.tokens, last.tokens) == (2, 4, 4)
    assert plain.prompts is None and deep.prompts is not None
    assert torch.equal(deep.prompts, prompts[:, order])
    assert last.prompts is not None and torch.equal(last.prompts, shared)
    history.truncate(3)  # into the message with prompts
    _, cut = history.replay(1000)
    assert cut.tokens == 1 and cut.prompts is not None and cut.prompts.shape[2] == 1


@pytest.mark.parametrize(("prefix", "sizes"), [(0, [4, 4, 2]), (3, [4, 4, 2]), (6, [6, 4])])
def test_pieces_do_not_cut_prompts(prefix: int, sizes: list[int]) -> None:
    prompts = torch.zeros(2, 1, prefix, 1) if prefix else None
    pieces = split(Message(torch.zeros(2, 10, 1), prompts), 8)
    assert [piece.tokens for piece in pieces] == sizes
    assert [piece.prompts is None for piece in pieces] == [prompts is None] + [True] * (len(pieces) - 1)
