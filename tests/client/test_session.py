"""Sessions over servers that die, hang, refuse and lie: the result is that of the whole model, or an error in time."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from harness.processes import Processes
from harness.swarm import start_bootstrap
from petals_agent.client import remote as remote_module
from petals_agent.client import session as session_module
from petals_agent.client.network import ClientOptions, Network
from petals_agent.client.remote import RemoteBlocks
from petals_agent.client.session import InferenceSession
from petals_agent.errors import ClientError

from .reference_server import ExpertResponse, ReferenceServer, through

BLOCKS = 4
_names = itertools.count()
Serve = Callable[..., ReferenceServer]


@pytest.fixture(scope="module")
def maddr(module_processes: Processes) -> str:
    return start_bootstrap(module_processes)


@pytest.fixture
def prefix() -> str:
    """Each test has a swarm of its own on the common bootstrap node."""
    return f"swarm{next(_names)}"


@pytest.fixture
def serve(maddr: str, prefix: str, local: LlamaForCausalLM) -> Iterator[Serve]:
    started: list[ReferenceServer] = []

    def start(first: int, last: int, **info: Any) -> ReferenceServer:
        started.append(ReferenceServer(local, maddr, prefix, first, last, **info))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
async def network(maddr: str, prefix: str) -> AsyncIterator[Network]:
    network = Network(
        [maddr], prefix, BLOCKS, ClientOptions(request_timeout=5, connect_timeout=5, max_retries=4)
    )
    await network.start()
    yield network
    await network.stop()


def whole(local: LlamaForCausalLM, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
    """The first blocks of the model, over a whole sequence."""
    if prompts is None:
        prompts = torch.zeros(BLOCKS, 1, 1, hidden.shape[2])
    with torch.inference_mode():
        return through(local, hidden, prompts)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4, rtol=1e-4)


async def steps(session: InferenceSession, hidden: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat([await session.step(piece) for piece in hidden.split(sizes, 1)], 1)


async def test_steps_through_a_chain(network: Network, serve: Serve, local: LlamaForCausalLM) -> None:
    servers = [serve(0, 2), serve(2, 4)]
    x = random(2, 9, 256)
    async with InferenceSession(network, 0, BLOCKS, 9, batch_size=2) as session:
        assert close(await steps(session, x, [5, 1, 2, 1]), whole(local, x))
        assert [(hop.peer_id, hop.start, hop.end) for hop in session.route] == [
            (server.peer_id, server.start, server.end) for server in servers
        ]
        first, *later = servers[0].handler.requests
        assert first["max_length"] == 9 and all("max_length" not in request for request in later)
        assert all("start_from_position" not in request for request in servers[0].handler.requests)
        ids = [[request["step_id"] for request in server.handler.requests] for server in servers]
        assert ids[0] == ids[1] and len(set(ids[0])) == 4
        with pytest.raises(ClientError, match="max_length 9"):
            await session.step(x[:, :1])
    for server in servers:
        await until(lambda server=server: server.handler.sessions == 0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  another process's state
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("spare", [[(2, 4)], [(2, 3), (3, 4)]])
async def test_replay_to_one_or_several_replacements(
    network: Network, serve: Serve, local: LlamaForCausalLM, spare: list[tuple[int, int]]
) -> None:
    first, victim = serve(0, 2), serve(2, 4)
    x = random(1, 12, 256)
    async with InferenceSession(network, 0, BLOCKS, 12) as session:
        before = await steps(session, x[:, :7], [4, 1, 1, 1])
        replacements = [serve(*blocks) for blocks in spare]
        victim.die()
        after = await steps(session, x[:, 7:], [1, 1, 2, 1])
        assert close(torch.cat([before, after], 1), whole(local, x))
        assert [hop.peer_id for hop in session.route] == [s.peer_id for s in [first, *replacements]]
    assert first.steps == 8  # it kept its cache
    assert [request["tokens"] for request in replacements[0].handler.requests][:2] == [
        7,
        1,
    ]  # history, then the step


async def test_replay_knows_roll_backs_reorders_and_prompts(
    network: Network, serve: Serve, local: LlamaForCausalLM
) -> None:
    victim = serve(0, 4)
    prompts, later = random(BLOCKS, 1, 2, 256, seed=1), random(BLOCKS, 3, 1, 256, seed=2)
    x, added = torch.empty(3, 0, 256), torch.empty(BLOCKS, 3, 0, 256)

    def track(
        hidden: torch.Tensor, prompts: torch.Tensor | None = None, order: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same step on the whole model: everything so far, computed anew."""
        nonlocal x, added
        if order is not None:
            x, added = x[order], added[:, order]
        extra = torch.zeros(BLOCKS, *hidden.shape)
        if prompts is not None:
            extra[:, :, : prompts.shape[2]] = prompts
        x, added = torch.cat([x, hidden], 1), torch.cat([added, extra], 2)
        return whole(local, x, added)[:, -hidden.shape[1] :]

    async with InferenceSession(network, 0, BLOCKS, 20, batch_size=3) as session:
        a, b, c, d, e, f = (random(3, n, 256, seed=n) for n in (5, 1, 3, 2, 4, 1))
        order, other = torch.tensor([2, 0, 0]), torch.tensor([1, 1, 0])
        assert close(await session.step(a, prompts=prompts), track(a, prompts))
        assert close(await session.step(b, hypo_ids=order), track(b, None, order))
        assert close(await session.step(c, prompts=later), track(c, later))
        session.position = 7
        x, added = x[:, :7], added[:, :, :7]
        assert close(await session.step(d), track(d))
        assert victim.handler.requests[-1]["start_from_position"] == 7
        spare = serve(0, 4)
        victim.die()
        assert close(await session.step(e, hypo_ids=other), track(e, None, other))
        assert session.route[0].peer_id == spare.peer_id
        assert close(await session.step(f), track(f))


async def test_an_old_server_gets_a_new_session_to_roll_back(
    network: Network, serve: Serve, local: LlamaForCausalLM
) -> None:
    server = serve(0, 4, version="2.2.0.post1")
    x = random(1, 6, 256)
    async with InferenceSession(network, 0, BLOCKS, 10) as session:
        await session.step(x[:, :4])
        session.position = 2
        assert close(await session.step(x[:, 2:]), whole(local, x)[:, 2:])
    assert all("start_from_position" not in request for request in server.handler.requests)
    assert len({request["session_id"] for request in server.handler.requests}) == 2
    assert network.bans.banned() == set()


async def test_long_steps_go_in_pieces(
    network: Network, serve: Serve, local: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_STEP_TOKENS", 8)
    victim, x = serve(0, 4), random(2, 11, 256)
    async with InferenceSession(network, 0, BLOCKS, 20, batch_size=2) as session:
        assert close(await session.step(x), whole(local, x))
        assert [request["tokens"] for request in victim.handler.requests] == [4, 4, 3]
        spare = serve(0, 4)
        victim.die()
        more = torch.cat([x, x[:, :1]], 1)
        assert close(await session.step(x[:, :1]), whole(local, more)[:, -1:])
        assert [request["tokens"] for request in spare.handler.requests] == [4, 4, 3, 1]


def raising(error: Exception) -> Callable[[int, ExpertResponse], None]:
    def misbehave(count: int, answer: ExpertResponse) -> None:
        raise error

    return misbehave


def lying(count: int, answer: ExpertResponse) -> ExpertResponse:
    tensor = answer.tensors[0]
    return ExpertResponse(
        tensors=[type(tensor)(size=[1, 1, 1], dtype=tensor.dtype, buffer=tensor.buffer[:4])]
    )


def poisoned(count: int, answer: ExpertResponse) -> None:
    answer.tensors[0].buffer = b"\xff" * len(answer.tensors[0].buffer)  # NaN


def huge(count: int, answer: ExpertResponse) -> None:
    answer.tensors[0].buffer += bytes(2**20)


def nothing(count: int, answer: ExpertResponse) -> ExpertResponse:
    return ExpertResponse()


BAD = {
    "error": raising(RuntimeError("CUDA error")),
    "empty error": raising(TimeoutError()),
    "other shape": lying,
    "NaN": poisoned,
    "a megabyte too much": huge,
    "no tensors": nothing,
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [0, 2])
async def test_a_bad_answer_moves_its_blocks(
    network: Network, serve: Serve, local: LlamaForCausalLM, kind: str, at: int
) -> None:
    bad, good = serve(0, 4, inference_rps=1000.0), serve(0, 4, inference_rps=1.0)
    bad.handler.misbehave = lambda count, answer: BAD[kind](count, answer) if count >= at else answer
    x = random(1, 6, 256)
    async with InferenceSession(network, 0, BLOCKS, 6) as session:
        assert close(await steps(session, x, [3, 1, 1, 1]), whole(local, x))
        assert session.route[0].peer_id == good.peer_id and bad.steps == at + 1
    assert network.bans.banned() == {bad.peer_id}


async def test_a_silent_server_costs_one_timeout(
    maddr: str, prefix: str, serve: Serve, local: LlamaForCausalLM
) -> None:
    silent, good = serve(0, 4, inference_rps=1000.0), serve(0, 4, inference_rps=1.0)
    silent.handler.silent = True
    network = Network([maddr], prefix, BLOCKS, ClientOptions(request_timeout=1))
    await network.start()
    x = random(1, 3, 256)
    async with asyncio.timeout(30), InferenceSession(network, 0, BLOCKS, 6) as session:
        assert close(await session.step(x), whole(local, x))
        assert session.route[0].peer_id == good.peer_id and silent.steps == 1
    await network.stop()


async def test_a_wrong_request_is_reported_and_bans_nobody(network: Network, serve: Serve) -> None:
    for _ in range(3):
        serve(0, 4).handler.misbehave = raising(ValueError("Maximum length exceeded: prefix 5"))
    async with InferenceSession(network, 0, BLOCKS, 6) as session:
        with pytest.raises(ClientError, match=r"servers refuse the request.*Maximum length exceeded"):
            await session.step(random(1, 3, 256))
        with pytest.raises(ClientError, match="closed"):
            await session.step(random(1, 3, 256))
    assert network.bans.banned() == set()


async def test_a_full_server_is_asked_to_wait_when_there_is_no_other(
    network: Network, serve: Serve, local: LlamaForCausalLM
) -> None:
    server = serve(0, 4)

    def full_at_first(count: int, answer: ExpertResponse) -> None:
        if count == 0:
            raise RuntimeError("Could not allocate 1000 bytes immediately: out of memory")

    server.handler.misbehave = full_at_first
    x = random(1, 3, 256)
    async with InferenceSession(network, 0, BLOCKS, 6) as session:
        assert close(await session.step(x), whole(local, x))
    assert [request.get("alloc_timeout") for request in server.handler.requests] == [None, 10.0]


async def test_blocks_that_nobody_serves(maddr: str, prefix: str, serve: Serve) -> None:
    serve(0, 3)
    network = Network([maddr], prefix, BLOCKS, ClientOptions(max_retries=1))
    await network.start()
    async with InferenceSession(network, 0, BLOCKS, 6) as session:
        with pytest.raises(ClientError, match="no ONLINE server holds block 3"):
            await session.step(random(1, 3, 256))
    await network.stop()


async def test_push(network: Network, serve: Serve, local: LlamaForCausalLM) -> None:
    first, second, third = serve(0, 1), serve(1, 3), serve(3, 4)
    x = random(1, 8, 256)
    async with InferenceSession(network, 0, BLOCKS, 8, push=True) as session:
        assert close(await steps(session, x, [4, 1, 2, 1]), whole(local, x))
        ids = {s: s.handler.requests[0]["session_id"] for s in (second, third)}
    for server, pushes in ((first, 0), (second, 3), (third, 3)):
        assert server.steps == 4  # the direct copies were not computed again
        assert sum(request.get("pushed", False) for request in server.handler.requests) == pushes
    assert "next_servers" not in first.handler.requests[0]
    assert first.handler.requests[1]["next_servers"] == [
        (second.peer_id, ids[second], 1, 3),
        (third.peer_id, ids[third], 3, 4),
    ]


async def test_push_survives_the_loss_of_its_target(
    network: Network, serve: Serve, local: LlamaForCausalLM
) -> None:
    serve(0, 2)
    victim = serve(2, 4)
    x = random(1, 8, 256)
    async with InferenceSession(network, 0, BLOCKS, 8, push=True) as session:
        before = await steps(session, x[:, :5], [4, 1])
        spare = serve(2, 4)
        victim.die()
        assert close(torch.cat([before, await steps(session, x[:, 5:], [1, 1, 1])], 1), whole(local, x))
        assert session.route[1].peer_id == spare.peer_id
    assert [request.get("pushed", False) for request in spare.handler.requests] == [False, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 256)}, r"must be \[2, n, hidden\]"),
        ({"hidden": torch.zeros(2, 0, 256)}, r"must be \[2, n, hidden\]"),
        ({"hidden": torch.zeros(2, 1, 256), "prompts": torch.zeros(4, 1, 2, 256)}, "prompts must be"),
        ({"hidden": torch.zeros(2, 1, 256), "prompts": torch.zeros(3, 1, 1, 256)}, "prompts must be"),
        (
            {"hidden": torch.zeros(2, 1, 256), "hypo_ids": torch.zeros(2, dtype=torch.int32)},
            "hypo_ids must be int64",
        ),
    ],
)
async def test_own_mistakes(network: Network, arguments: dict[str, torch.Tensor], message: str) -> None:
    session = InferenceSession(network, 0, BLOCKS, 6, batch_size=2)
    with pytest.raises(ClientError, match=message):
        await session.step(**arguments)
    with pytest.raises(ClientError, match="only back"):
        session.position = 1


async def test_a_cancelled_step_ends_the_session_at_the_servers(network: Network, serve: Serve) -> None:
    server = serve(0, 4)
    session = InferenceSession(network, 0, BLOCKS, 6)
    await session.step(random(1, 3, 256))
    assert server.handler.sessions == 1
    server.handler.silent = True
    step = asyncio.create_task(session.step(random(1, 1, 256)))
    await until(lambda: server.steps == 2)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    await until(lambda: server.handler.sessions == 0)


# --- forward and backward


@pytest.mark.parametrize("fails", ["rpc_forward", "rpc_backward"])
async def test_gradients_when_a_server_fails(
    network: Network, serve: Serve, local: LlamaForCausalLM, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "MAX_CALL_TOKENS", 100)  # six calls at once
    serve(0, 2)
    good, bad = serve(2, 4), serve(2, 4)
    setattr(bad.handler, fails, failing)
    rows = 6
    x, grad = random(rows, 60, 256), random(rows, 60, 256, seed=1)
    prompts = random(BLOCKS, rows, 3, 256, seed=2)
    blocks = RemoteBlocks(network, 0, BLOCKS)
    passed = await blocks.forward(x, prompts)
    used = {done.span.peer_id for piece in passed.pieces for done in piece}
    assert good.peer_id in used and (fails == "rpc_forward" or bad.peer_id in used)
    inputs, deep = x.clone().requires_grad_(), prompts.clone().requires_grad_()
    output = through(local, inputs, deep)
    output.backward(grad)
    assert inputs.grad is not None and deep.grad is not None
    assert close(passed.output, output)
    grad_input, grad_prompts = await blocks.backward(passed, grad, prompts)
    assert grad_prompts is not None
    assert (grad_input - inputs.grad).norm() < 1e-4 * inputs.grad.norm()
    assert (grad_prompts - deep.grad).norm() < 1e-4 * deep.grad.norm()


async def failing(*_: Any) -> ExpertResponse:
    raise RuntimeError("CUDA error")


def test_nothing_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio reports here what was never awaited or retrieved."""
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
