"""Our client through published Petals servers: the tokens, beams and gradients of local transformers."""

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
from harness.swarm import StockServer, peer_python, start_bootstrap, start_stock_server
from petals_agent.client.generate import Client
from petals_agent.client.network import ClientOptions

from .reference_server import through

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

IDS = [5, 17, 99, 314, 271, 828, 182, 845]


@dataclass
class Stock:
    """Published servers on one bootstrap node: `one` holds all blocks, the others 0:5 and twice 5:8."""

    maddr: str
    servers: dict[str, StockServer]


@pytest.fixture(scope="module")
def stock(module_processes: Processes, tiny_llama: Path) -> Stock:
    python = peer_python()
    if python is None:
        pytest.skip("the published Petals is not installed: make peer-venv (or set PETALS_PEER_PYTHON)")
    maddr = start_bootstrap(module_processes)
    plan = {"one": ("one", "0:8"), "head": ("two", "0:5"), "tail": ("two", "5:8"), "spare": ("two", "5:8")}
    servers = {
        name: start_stock_server(module_processes, python, tiny_llama, blocks, [maddr], prefix=prefix)
        for name, (prefix, blocks) in plan.items()
    }
    for server in servers.values():
        server.wait_online(240)
    return Stock(maddr, servers)


@pytest.fixture(params=["one", "two"])
def client(request: pytest.FixtureRequest, stock: Stock, tiny_llama: Path) -> Iterator[Client]:
    with connect(stock, tiny_llama, request.param) as client:
        yield client


def connect(stock: Stock, model: Path, prefix: str) -> Client:
    client = Client(str(model), [stock.maddr], prefix, options=ClientOptions(request_timeout=30))
    client.end_tokens = set()  # random weights may emit one at any time
    return client


def reference(local: LlamaForCausalLM, ids: list[list[int]], count: int, **how: object) -> list[list[int]]:
    tensor = torch.tensor(ids)
    out = local.generate(
        tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=count, do_sample=False, **how
    )
    return out[:, tensor.shape[1] :].tolist()


def test_greedy_tokens(client: Client, local: LlamaForCausalLM) -> None:
    result = client.generate(IDS, 24)
    assert result.ids == reference(local, [IDS], 24)
    assert [(hop.start, hop.end) for hop in result.route] in ([(0, 8)], [(0, 5), (5, 8)])
    assert result.steps == 24 and result.first_s > 0 and result.tokens_per_s > 0


def test_a_batch(client: Client, local: LlamaForCausalLM) -> None:
    batch = [IDS, IDS[::-1], [1] * len(IDS)]
    assert client.generate(batch, 8).ids == reference(local, batch, 8)


def test_beam_search(client: Client, local: LlamaForCausalLM) -> None:
    batch = [IDS, IDS[::-1]]
    assert client.generate(batch, 10, num_beams=3).ids == reference(local, batch, 10, num_beams=3)


@pytest.mark.parametrize("rows", [2, 9])  # 9 rows of 200 tokens: several calls at once, each in a stream
def test_gradients(client: Client, local: LlamaForCausalLM, rows: int) -> None:
    tokens = 200 if rows == 9 else 12
    ids = torch.randint(0, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    prompts = 0.1 * torch.randn(8, 1, 3, 256, generator=torch.Generator().manual_seed(1))

    def gradients(remote: bool) -> tuple[torch.Tensor, ...]:
        hidden = client.parts.embed(ids).detach().requires_grad_()
        deep = prompts.clone().requires_grad_()
        logits = client.parts.logits(
            client.blocks()(hidden, deep) if remote else through(local, hidden, deep)
        )
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert hidden.grad is not None and deep.grad is not None
        return logits.detach(), hidden.grad, deep.grad

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_rolling_back(client: Client, local: LlamaForCausalLM) -> None:
    """Servers before 2.3 do not know how to: they get a new session."""
    ids = torch.tensor([IDS])
    with client.session(32) as session, torch.inference_mode():
        embed, logits = client.parts.embed, client.parts.logits
        first = logits(session.step(embed(ids)))[:, -1]
        session.step(embed(torch.tensor([[7, 8, 9]])))
        session.position = len(IDS)
        again = logits(session.step(embed(torch.tensor([[11]]))))[:, -1]
        expected = local(torch.tensor([[*IDS, 11]])).logits[:, -2:]
    assert torch.allclose(torch.stack([first, again], 1), expected, atol=1e-4)
    assert session.position == len(IDS) + 1


def test_a_server_dies_in_the_middle_of_a_text(
    stock: Stock, tiny_llama: Path, local: LlamaForCausalLM
) -> None:
    """Last in this file: it leaves one server of 5:8."""
    with connect(stock, tiny_llama, "two") as client:
        tokens = client.tokens(IDS, 24)
        for _ in range(8):
            next(tokens)
        (victim,) = (hop.peer_id for hop in tokens.result.route if hop.start == 5)
        (server,) = (server for server in stock.servers.values() if server.peer_id == victim)
        os.killpg(server.process.pid, signal.SIGKILL)
        for _ in tokens:
            pass
        assert tokens.result.ids == reference(local, [IDS], 24)
        assert victim not in {hop.peer_id for hop in tokens.result.route}
        assert client.generate(IDS, 6).ids == reference(local, [IDS], 6)
