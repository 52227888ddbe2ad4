"""Whatever else the engine does meanwhile, each session gets what a plain forward over its own tokens gives.

Sessions join, step, roll back, reorder their beams, bring prompts and vanish at random; long prompts are cut into chunks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.churn import FIRST, LAST, Action, Script, churn, load, random_script
from models.tiny import VARIANTS
from petals_agent.engine.backend import Backend
from petals_agent.models.span import SpanModel

TOLERANCE = 1e-4  # of the largest value; rounding gives about 1e-6, a token too many or too few 0.01 and more

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_and_backend(tiny: Tiny, variant: str) -> None:
    rng = random.Random(variant)
    backends, reference = load(tiny(variant))
    for backend in backends:
        scripts = [random_script(rng) for _ in range(10 if backend is backends[0] else 5)]
        error = asyncio.run(churn(backend, reference, scripts))
        assert error < TOLERANCE, backend.name


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> tuple[Backend, SpanModel]:
    backends, reference = load(tiny("llama"))
    assert backends[0].name == "lean"
    return backends[0], reference


_ACTION = st.builds(
    Action,
    tokens=st.integers(1, 20),
    rollback=st.none() | st.floats(0, 0.999),
    reorder=st.none() | st.integers(0, 100),
    prompt=st.none() | st.none() | st.floats(0, 1),
    vanish=st.sampled_from([False] * 7 + [True]),
    pause=st.integers(0, 5),
)
_RANGE = st.sampled_from(
    [(a, b) for a in range(LAST - FIRST) for b in range(a + 1, LAST - FIRST + 1)] + [(0, 5)] * 15
)
_SCRIPT = st.builds(
    lambda rows, blocks, actions: Script(rows, *blocks, actions),
    st.integers(1, 4),
    _RANGE,
    st.lists(_ACTION, min_size=1, max_size=8),
)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(_SCRIPT, min_size=2, max_size=10))
def test_any_traffic(llama: tuple[Backend, SpanModel], scripts: list[Script]) -> None:
    assert asyncio.run(churn(*llama, scripts)) < TOLERANCE


@pytest.mark.parametrize("number", [0, 1])
def test_a_broken_mask_is_noticed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The control: without it the tests above could be blind. The reference attends by its own code ("eager")."""
    backends, reference = load(tiny("llama"))
    attention = F.scaled_dot_product_attention

    def unmasked(*args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", unmasked)
    rng = random.Random(0)
    scripts = [random_script(rng) for _ in range(10)]
    assert asyncio.run(churn(backends[number], reference, scripts)) > 100 * TOLERANCE
