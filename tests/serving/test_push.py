"""Server-to-server pushes: a step is computed from whichever copy comes first, once, and passed on with what is left of the route."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import Any

import pytest
import torch

from harness.waiting import until
from petals_agent.serving import handlers
from petals_agent.serving.server import BlockServer
from serving.caller import NO_IDS, NO_PROMPTS, P2PHandlerError, Request, Session, request, uid
from serving.conftest import Swarm
from serving.expect import WIDTH, close, normal

from hivemind.utils.serializer import MSGPackSerializer  # isort: skip

pytestmark = pytest.mark.asyncio(loop_scope="module")
NOBODY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def sessions(swarm: Swarm) -> tuple[Session, Session]:
    """One at each server, so that both together are the whole model."""
    return swarm.caller.session(swarm.first.peer_id, 0, 4), swarm.caller.session(swarm.second.peer_id, 4, 6)


async def push(swarm: Swarm, message: Any) -> Any:
    return await swarm.caller.stub(swarm.first.peer_id).rpc_push(message, timeout=10)


async def silent(session: Session) -> None:
    """No answer comes for what was sent so far."""
    with pytest.raises(TimeoutError):
        await session.receive(timeout=0.2)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BlockServer, Any]]:
    """Every push that a server takes."""
    found: list[tuple[BlockServer, Any]] = []
    take = handlers.take_push

    async def watch(server: BlockServer, body: bytes) -> bytes:
        found.append((server, Request.FromString(body)))
        return await take(server, body)

    monkeypatch.setattr(handlers, "take_push", watch)
    return found


# --- taking


async def test_a_push_to_a_session_that_is_not_here(swarm: Swarm) -> None:
    message = request(uid(0, 4), (normal(1, 1, WIDTH), NO_PROMPTS, NO_IDS), session_id="unknown", step_id="a")
    answer = await push(swarm, message)
    assert not answer.tensors and not answer.metadata


@pytest.mark.parametrize(
    ("chain", "tensors", "metadata", "error"),
    [
        (uid(0, 4), (NO_PROMPTS,), {}, "needs the session_id"),
        (uid(0, 4), (NO_PROMPTS,), {"session_id": 5}, "needs the session_id"),
        (uid(0, 4), (), {"session_id": "a"}, "without tensors"),
        (uid(4, 6), (NO_PROMPTS,), {"session_id": "a"}, "does not serve"),
        ("", (NO_PROMPTS,), {"session_id": "a"}, "no block is named"),
        (uid(0, 4), (NO_PROMPTS,), {"session_id": "a", "x": "y" * 70_000}, "limit here is 65536"),
    ],
)
async def test_pushes_that_cannot_be(
    swarm: Swarm, chain: str, tensors: Any, metadata: Any, error: str
) -> None:
    with pytest.raises(P2PHandlerError, match=error):
        await push(swarm, request(chain, tensors, **metadata))


@pytest.mark.parametrize("pushed_first", [True, False])
async def test_both_copies_of_a_step_give_one_answer(swarm: Swarm, pushed_first: bool) -> None:
    hidden = normal(1, 3, WIDTH)
    expected = swarm.model.view(0, 4)(hidden)
    one, _ = sessions(swarm)
    await one.step(hidden[:, :1], max_length=5)
    step_id = str(uuid.uuid4())
    pushed = one.step_request(hidden[:, 1:2], step_id=step_id, pushed=True)
    direct = one.step_request(hidden[:, 1:2], step_id=step_id)
    if pushed_first:
        await push(swarm, pushed)
        assert close(await one.receive(), expected[:, 1:2])
        await one.send(direct)
    else:
        await one.send(direct)
        assert close(await one.receive(), expected[:, 1:2])
        await push(swarm, pushed)
    await silent(one)
    await one.vanish()


async def test_a_push_that_fits_nothing_is_left_to_the_clients_copy(swarm: Swarm) -> None:
    """A wrong shape, a wrong position or a damaged tensor from elsewhere does not end the session."""
    hidden = normal(1, 2, WIDTH)
    one, _ = sessions(swarm)
    await one.step(hidden[:, :1], max_length=5)
    step_id = "the next"
    for bad in (
        one.step_request(normal(3, 1, WIDTH), step_id=step_id, pushed=True),
        one.step_request(normal(1, 1, WIDTH + 1), step_id=step_id, pushed=True),
        one.step_request(normal(1, 1, WIDTH), step_id=step_id, pushed=True, start_from_position=7),
        one.step_request(normal(1, 9, WIDTH), step_id=step_id, pushed=True),
        request(one.chain, (normal(1, 1, WIDTH),), session_id=one.session_id, step_id=step_id),
        one.step_request(normal(1, 1, WIDTH), step_id=5, pushed=True),
    ):
        await push(swarm, bad)
    answer = await one.step(hidden[:, 1:], step_id=step_id)
    assert close(answer, swarm.model.view(0, 4)(hidden)[:, 1:])
    await one.close()


async def test_a_flood_of_pushes_to_a_session_is_dropped(swarm: Swarm) -> None:
    """Those beyond the few that may wait are forgotten; the session's own step is answered."""
    hidden = normal(1, 2, WIDTH)
    one, _ = sessions(swarm)
    await one.step(hidden[:, :1], max_length=500)
    flood = [one.step_request(normal(3, 1, WIDTH), step_id=str(i), pushed=True) for i in range(200)]
    await asyncio.gather(*(push(swarm, message) for message in flood))
    answer = await one.step(hidden[:, 1:])
    assert close(answer, swarm.model.view(0, 4)(hidden)[:, 1:])
    await one.close()


# --- sending


async def test_the_next_server_computes_from_the_push(swarm: Swarm) -> None:
    """The client sends only to the first, and gets the answers of both."""
    hidden = normal(2, 5, WIDTH)
    whole, half = swarm.model.view(0, 6)(hidden), swarm.model.view(0, 4)(hidden)
    first, second = sessions(swarm)
    between = await first.step(hidden[:, :2], max_length=8)
    assert close(await second.step(between, max_length=8), whole[:, :2])
    for position in range(2, 5):
        one = hidden[:, position : position + 1]
        route = [(swarm.second.peer_id, second.session_id, 4, 6)]
        answer = await first.step(one, next_servers=route)
        assert close(answer, half[:, position : position + 1])
        assert close(await second.receive(), whole[:, position : position + 1])
    await first.close()
    await second.close()


async def test_the_clients_own_copy_after_the_push_is_dropped(swarm: Swarm) -> None:
    """As stock clients do it: the direct copy always comes as well."""
    hidden = normal(1, 6, WIDTH)
    whole = swarm.model.view(0, 6)(hidden)
    first, second = sessions(swarm)
    await second.step(await first.step(hidden[:, :1], max_length=8), max_length=8)
    for position in range(1, 6):
        step_id = str(uuid.uuid4())
        route = [(swarm.second.peer_id, second.session_id, 4, 6)]
        between = await first.step(hidden[:, position : position + 1], next_servers=route, step_id=step_id)
        answer = await second.step(between, step_id=step_id)
        assert close(answer, whole[:, position : position + 1])
    await silent(second)
    await first.close()
    await second.vanish()


async def test_beams_go_with_the_push(swarm: Swarm) -> None:
    """hypo_ids are those of the step that is passed on."""
    hidden, after = normal(2, 3, WIDTH), normal(2, 1, WIDTH, seed=1)
    first, second = sessions(swarm)
    await second.step(await first.step(hidden, max_length=8), max_length=8)
    route = [(swarm.second.peer_id, second.session_id, 4, 6)]
    await first.step(after, NO_PROMPTS, torch.tensor([1, 0]), next_servers=route)
    said = torch.cat((hidden[[1, 0]], after), dim=1)
    assert close(await second.receive(), swarm.model.view(0, 6)(said)[:, 3:])
    await first.close()
    await second.close()


async def test_what_is_passed_on(swarm: Swarm, taken: list[tuple[BlockServer, Any]]) -> None:
    first, _ = sessions(swarm)
    route = [(swarm.second.peer_id, "the next", 4, 6), (NOBODY, "the last", 6, 9)]
    answer = await first.step(
        normal(1, 2, WIDTH), max_length=8, next_servers=route, step_id="this", extra=[1]
    )
    await until(lambda: taken, 5, "the push arrives")
    ((server, pushed),) = taken
    assert server is swarm.second.server and pushed.uid == "tiny.4 tiny.5"
    metadata = MSGPackSerializer.loads(pushed.metadata)
    assert metadata == {
        "session_id": "the next",
        "step_id": "this",
        "max_length": 8,
        "next_servers": [(NOBODY, "the last", 6, 9)],
        "pushed": True,
        "extra": [1],
    }
    hidden, prompts, ids = pushed.tensors
    assert torch.equal(
        torch.frombuffer(bytearray(hidden.buffer), dtype=torch.float32).view(1, 2, WIDTH), answer
    )
    assert (list(prompts.size), list(ids.size), ids.dtype) == ([0], [0], "int64")
    await first.close()


async def test_tensors_are_passed_on_in_their_plain_order(
    swarm: Swarm, taken: list[tuple[BlockServer, Any]]
) -> None:
    first, _ = sessions(swarm)
    metadata = {
        "args_structure": ((b"__T2", b"__T0", b"__T1"), {}),
        "next_servers": [(swarm.second.peer_id, "the next", 4, 6)],
        "max_length": 8,
    }
    await first.send(request(first.chain, (NO_PROMPTS, NO_IDS, normal(1, 2, WIDTH)), **metadata))
    await first.receive()
    await until(lambda: taken, 5, "the push arrives")
    ((_, pushed),) = taken
    assert [list(tensor.size) for tensor in pushed.tensors] == [[1, 2, WIDTH], [0], [0]]
    assert "args_structure" not in MSGPackSerializer.loads(pushed.metadata)
    await first.close()


async def test_steps_with_prompts_are_not_pushed(swarm: Swarm, taken: list[tuple[BlockServer, Any]]) -> None:
    """The prompts are those of our blocks; the next ones have their own."""
    first, _ = sessions(swarm)
    route = [(swarm.second.peer_id, "the next", 4, 6)]
    await first.step(normal(1, 2, WIDTH), normal(4, 1, 1, WIDTH), max_length=8, next_servers=route)
    await first.step(normal(1, 1, WIDTH), next_servers=route, step_id="without")
    await until(lambda: taken, 5, "the second step's push arrives")
    assert [MSGPackSerializer.loads(pushed.metadata)["step_id"] for _, pushed in taken] == ["without"]
    await first.close()


@pytest.mark.parametrize("target", [NOBODY, "no peer id", "", "second"])
async def test_a_push_that_fails_costs_nothing(swarm: Swarm, target: str) -> None:
    """Nobody there, no peer id, or a session that is not there: the client's own copy does it."""
    hidden = normal(1, 2, WIDTH)
    first, second = sessions(swarm)
    await second.step(await first.step(hidden[:, :1], max_length=8), max_length=8)
    route = [(swarm.second.peer_id if target == "second" else target, "who?", 4, 6)]
    answer = await second.step(await first.step(hidden[:, 1:], next_servers=route))
    assert close(answer, swarm.model.view(0, 6)(hidden)[:, 1:])
    await first.close()
    await second.close()


async def test_a_large_output_is_not_pushed(swarm: Swarm, taken: list[tuple[BlockServer, Any]]) -> None:
    """It would not fit into one message; the prefill's answer comes all the same."""
    first, _ = sessions(swarm)
    route = [(swarm.second.peer_id, "the next", 4, 6)]
    hidden = normal(128, 300, WIDTH).half()
    swarm.first.server.ledger.capacity = 2**30
    answer = await first.step(hidden, max_length=300, next_servers=route)
    assert answer.shape == hidden.shape and not taken
    await first.close()


async def test_only_so_many_pushes_are_under_way(swarm: Swarm) -> None:
    server = swarm.first.server
    server.limits = dataclasses.replace(server.limits, max_push_tasks=3)
    first, _ = sessions(swarm)
    for _ in range(10):
        await first.step(normal(1, 1, WIDTH), max_length=20, next_servers=[(NOBODY, "who?", 4, 6)])
        assert len(server.pushes.outgoing) <= 3
    await first.close()


@pytest.mark.parametrize(
    "route", [5, [5], [("p", "s", 4)], [(NOBODY, "s", 6, 4)], [(NOBODY, "s", 0, 1)] * 200]
)
async def test_a_route_that_cannot_be(swarm: Swarm, route: Any) -> None:
    first, _ = sessions(swarm)
    await first.send(first.step_request(normal(1, 1, WIDTH), max_length=8, next_servers=route))
    with pytest.raises(P2PHandlerError, match="next_servers"):
        await first.receive()
