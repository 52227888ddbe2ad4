"""Our client through our own servers: tokens, beams, gradients, roll-back, push, and the loss of one of two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from harness.processes import Processes
from harness.swarm import AgentServer, start_agent, start_bootstrap
from petals_agent.client.generate import Client
from petals_agent.client.network import ClientOptions

from .reference_server import through
from .test_stock import IDS, reference


@dataclass
class Agents:
    """Our servers on one bootstrap node: 0:5, and twice 5:8."""

    maddr: str
    servers: list[AgentServer]


@pytest.fixture(scope="module")
def agents(module_processes: Processes, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Agents:
    maddr = start_bootstrap(module_processes)
    folder = tmp_path_factory.mktemp("agents")
    servers = [
        start_agent(module_processes, folder / str(i), tiny_llama, blocks, [maddr])
        for i, blocks in enumerate(["0:5", "5:8", "5:8"])
    ]
    for server in servers:
        server.wait_online(90)
    return Agents(maddr, servers)


@pytest.fixture
def client(agents: Agents, tiny_llama: Path) -> Iterator[Client]:
    with Client(str(tiny_llama), [agents.maddr], "tiny", options=ClientOptions(request_timeout=30)) as client:
        client.end_tokens = set()  # random weights may emit one at any time
        yield client


@pytest.mark.parametrize("push", [False, True])
def test_tokens(client: Client, local: LlamaForCausalLM, push: bool) -> None:
    batch = [IDS, IDS[::-1]]
    result = client.generate(batch, 16, push=push)
    assert result.ids == reference(local, batch, 16)
    assert [(hop.start, hop.end) for hop in result.route] == [(0, 5), (5, 8)]


def test_beam_search(client: Client, local: LlamaForCausalLM) -> None:
    assert client.generate(IDS, 10, num_beams=3).ids == reference(local, [IDS], 10, num_beams=3)


def test_gradients(client: Client, local: LlamaForCausalLM) -> None:
    hidden = client.parts.embed(torch.tensor([IDS, IDS[::-1]])).detach()
    prompts = 0.1 * torch.randn(8, 2, 3, 256, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (client.blocks(), lambda x, p: through(local, x, p)):
        x, p = hidden.clone().requires_grad_(), prompts.clone().requires_grad_()
        output = function(x, p)
        output.square().sum().backward()
        results.append((output.detach(), x.grad, p.grad))
    for ours, expected in zip(*results, strict=True):
        assert ours is not None and expected is not None
        assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_rolling_back_in_place(client: Client, local: LlamaForCausalLM) -> None:
    with client.session(32) as session, torch.inference_mode():
        embed, logits = client.parts.embed, client.parts.logits
        session.step(embed(torch.tensor([IDS])))
        session.step(embed(torch.tensor([[7, 8, 9]])))
        session.position = len(IDS)
        again = logits(session.step(embed(torch.tensor([[11]]))))[:, -1]
    assert torch.allclose(again, local(torch.tensor([[*IDS, 11]])).logits[:, -1], atol=1e-4)


def test_a_server_dies_in_the_middle_of_a_text(
    agents: Agents, client: Client, local: LlamaForCausalLM
) -> None:
    """Last in this file: it leaves one server of 5:8."""
    tokens = client.tokens(IDS, 24)
    for _ in range(8):
        next(tokens)
    (victim,) = (hop.peer_id for hop in tokens.result.route if hop.start == 5)
    (server,) = (server for server in agents.servers if server.status()["peer_id"] == victim)
    os.killpg(server.process.pid, signal.SIGKILL)
    for _ in tokens:
        pass
    assert tokens.result.ids == reference(local, [IDS], 24)
    assert victim not in {hop.peer_id for hop in tokens.result.route}
