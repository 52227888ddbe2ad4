"""Our client on any mixture of our servers and published ones: what local transformers computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from petals_agent.client.generate import Client
from petals_agent.swarm.view import Span

from .members import IDS, ROUTES, Member, Swarm
from .reference import generated, logits_with_prompts

pytestmark = pytest.mark.usefixtures("calm")

BATCH = [IDS, IDS[::-1], [1] * len(IDS)]


@pytest.fixture(scope="module")
def any_route(shared: Swarm) -> Iterator[Client]:
    with shared.client() as client:
        yield client


@pytest.fixture(params=ROUTES)
def members(shared: Swarm, any_route: Client, request: pytest.FixtureRequest) -> list[Member]:
    """The servers of one route, which the client must use."""
    members = shared.route(request.param)
    shared.steer(any_route, members)
    return members


@pytest.fixture
def client(any_route: Client, members: list[Member]) -> Client:
    return any_route


def hops(route: list[Span]) -> list[tuple[str, tuple[int, int]]]:
    return [(hop.peer_id, (hop.start, hop.end)) for hop in route]


@pytest.mark.parametrize("push", [False, True], ids=["direct", "push"])
def test_greedy_tokens_of_a_batch(
    client: Client, members: list[Member], local: LlamaForCausalLM, push: bool
) -> None:
    result = client.generate(BATCH, 16, push=push)
    assert result.ids == generated(local, BATCH, 16)
    assert hops(result.route) == [(member.peer_id, member.blocks) for member in members]


def test_beam_search(client: Client, local: LlamaForCausalLM) -> None:
    batch = BATCH[:2]
    assert client.generate(batch, 10, num_beams=3).ids == generated(local, batch, 10, num_beams=3)


@pytest.mark.parametrize("ids", [BATCH, [[*range(5, 555)] * 2]], ids=["unary", "streamed"])
def test_gradients(client: Client, local: LlamaForCausalLM, ids: list[list[int]]) -> None:
    """Of a loss, at the embeddings and at deep prompts; 1100 tokens are over 1 MiB, which calls are streamed above."""
    prompts = 0.1 * torch.randn(8, 1, 3, 256, generator=torch.Generator().manual_seed(1))

    def gradients(remote: bool) -> tuple[torch.Tensor, ...]:
        embedded = client.parts.embed(torch.tensor(ids)).detach().requires_grad_()
        deep = prompts.clone().requires_grad_()
        logits = (
            client.parts.logits(client.blocks()(embedded, deep))
            if remote
            else logits_with_prompts(local, embedded, deep)
        )
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), torch.tensor(ids)[:, 1:].flatten()
        ).backward()
        assert embedded.grad is not None and deep.grad is not None
        return logits.detach(), embedded.grad, deep.grad

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-4 * expected.norm()
