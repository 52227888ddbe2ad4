"""A hostile peer at work beside good sessions: they do not notice, memory stays bounded, and each refusal says what was wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import sys
from pathlib import Path

import psutil
import pytest
import torch

from harness.processes import Processes
from harness.waiting import until
from serving.caller import NO_PROMPTS, request, uid
from serving.conftest import Swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
WIDTH = 32
SECONDS = 6.0
MAX_SESSIONS = 60
ROOM = 48 * 2**20  # bytes of requests that may wait
GROWTH_MB = 200  # ROOM, what is decoded of it, the KV cache (12 MB at most), and what the allocator keeps

# A unary call is answered with the repr of what was raised; anything else than these is an accident.
REFUSAL = re.compile(r"(RequestError|LimitExceeded|CacheFull|Refused)\(")


async def good_session(swarm: Swarm, seed: int, opened: asyncio.Queue[str], stop: asyncio.Event) -> int:
    """Decode until told to stop; every answer must equal the model. Returns the number of steps."""
    hidden = torch.randn(1, 500, WIDTH, generator=torch.Generator().manual_seed(seed))
    session = swarm.caller.session(swarm.first.peer_id, 0, 4)
    opened.put_nowait(session.session_id)
    view, position = swarm.model.view(0, 4), 0
    while not stop.is_set() or position < 10:
        if position == 500:
            answer = await session.step(hidden[:, 200:201], start_from_position=200)
            position = 200
        else:
            answer = await session.step(hidden[:, position : position + 1], max_length=500)
        position += 1
        expected = view(hidden[:, :position])[:, -1:]
        assert (answer - expected).abs().max() <= 1e-4 * expected.abs().max(), f"step {position}"
        await asyncio.sleep(0.01)
    await session.close()
    return position


@pytest.mark.timeout(90)
async def test_a_hostile_peer_beside_good_sessions(
    swarm: Swarm, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    server = swarm.first.server
    server.limits = dataclasses.replace(server.limits, max_sessions=MAX_SESSIONS)
    server.budget.limit = ROOM
    stop, opened = asyncio.Event(), asyncio.Queue[str]()
    good = [asyncio.create_task(good_session(swarm, seed, opened, stop)) for seed in range(3)]
    overheard = await opened.get()
    await until(lambda: server.ledger.used > 0, 10, "the good sessions are open")
    memory = psutil.Process().memory_info
    before = most = memory().rss
    hostile = processes.start(
        "hostile",
        [
            sys.executable,
            Path(__file__).parent / "hostile.py",
            "1",
            str(SECONDS),
            overheard,
            swarm.first.peer_id,
            *swarm.first.maddrs,
        ],
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        while hostile.returncode is None:
            most = max(most, memory().rss)
            assert not any(task.done() for task in good), "a good session ended"
            await asyncio.sleep(0.05)
    finally:
        stop.set()
        steps = await asyncio.gather(*good)
    told = hostile.wait_event("told", 0)
    texts = [text for text, _ in told["texts"]]
    assert min(steps) >= 10
    assert (most - before) / 2**20 < GROWTH_MB
    assert set(told["done"]) == {
        "noise", "torn", "huge_claim", "garbage_call", "bad_metadata", "bad_tensors",
        "bad_session", "vanish", "push", "ranges", "deaf", "messages",
    }  # fmt: skip
    assert all(texts)
    accidents = [text for text in texts if re.match(r"\w+\(", text) and not REFUSAL.match(text)]
    accidents += [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ]  # of streams
    assert not accidents
    for limit in (
        f"{MAX_SESSIONS} open sessions",
        "limit for one peer",
        "bytes was announced; the limit here is",
    ):
        assert any(limit in text for text in texts), limit
    await until(lambda: swarm.first.idle, 10, "nothing of the hostile peer is left")
    hidden = torch.randn(2, 5, WIDTH)
    (answer,) = await swarm.caller.call(
        swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (hidden, NO_PROMPTS))
    )
    assert torch.allclose(answer, swarm.model.view(0, 4)(hidden), atol=1e-3)
