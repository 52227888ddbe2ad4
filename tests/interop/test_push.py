"""Pushes between servers: the next one computes from what the server before it sent, ours or published.

The wire protocol is spoken by hand here, to withhold the copy that every client sends itself. (Published servers take
pushes but never send any.)
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import LlamaForCausalLM

from petals_agent.client import wire
from petals_agent.client.channel import Channel
from petals_agent.client.network import Network
from petals_agent.models.client_parts import ClientParts, client_parts
from petals_agent.models.source import open_model

from harness.swarm import PREFIX  # isort: skip
from .members import IDS, Swarm  # isort: skip
from .reference import generated  # isort: skip

pytestmark = pytest.mark.usefixtures("calm")

ANSWER_S = 30.0
MAX_LENGTH = 32
ABSENT = "12D3KooWD3bfmNbuuuVCYwkjnFt3ukm3qaB3hDED3peHHXawvRAi"  # no such peer
BATCH = [IDS, IDS[::-1]]


class Session:
    """One stream to one server for blocks [start, end); what is sent and what is awaited are separate here."""

    def __init__(self, network: Network, peer_id: str, start: int, end: int, channel: Channel) -> None:
        self.uid = network.uid(start, end)
        self.address = (peer_id, str(uuid.uuid4()), start, end)
        self._channel = channel
        self._opened = False

    async def send(
        self,
        hidden: torch.Tensor,
        step_id: str,
        *,
        hypo_ids: torch.Tensor | None = None,
        next_servers: Sequence[tuple[str, str, int, int]] = (),
    ) -> None:
        """Send a step, hidden states [batch, n, hidden]."""
        metadata: dict[str, Any] = {"session_id": self.address[1], "step_id": step_id}
        metadata["args_structure"] = wire.structure(3)
        if not self._opened:
            metadata |= {"max_length": MAX_LENGTH, "points": 0.0}
            self._opened = True
        if next_servers:
            metadata["next_servers"] = list(next_servers)
        hypo_ids = wire.no_hypo_ids() if hypo_ids is None else hypo_ids
        tensors = (hidden, wire.no_prompts(), hypo_ids)
        await self._channel.send([wire.request(self.uid, tensors, metadata)])

    async def answer(self, like: torch.Tensor) -> torch.Tensor:
        """The next answer on the stream, of the shape of `like`."""
        shape = tuple(like.shape)
        message = await asyncio.wait_for(self._channel.receive(wire.answer_limit([shape])), ANSWER_S)
        assert message is not None, "the stream ended"
        (hidden,) = wire.response([message], [shape], like)
        return hidden

    async def step(self, hidden: torch.Tensor) -> torch.Tensor:
        """A step that nobody pushes."""
        await self.send(hidden, str(uuid.uuid4()))
        return await self.answer(hidden)

    async def end(self) -> None:
        """Say goodbye, and see that no answer was left: each step got one."""
        await self._channel.send([wire.empty_request()])
        left = await asyncio.wait_for(self._channel.receive(wire.STREAM_PART_BYTES), ANSWER_S)
        assert left is None, "an answer too many"


class Chain:
    """Sessions at the servers of a route, and the greedy tokens that came through them."""

    def __init__(self, parts: ClientParts, sessions: list[Session], ids: list[list[int]]) -> None:
        self.parts = parts
        self.sessions = sessions
        self._given = torch.tensor(ids)
        self._past = self._given

    @property
    def tokens(self) -> list[list[int]]:
        """What was generated."""
        return self._past[:, self._given.shape[1] :].tolist()

    def embed(self, count: int = 1) -> torch.Tensor:
        """The last `count` tokens of each row."""
        return self.parts.embed(self._past[:, -count:])

    def take(self, hidden: torch.Tensor) -> None:
        """Choose the next tokens from the last block's output."""
        chosen = self.parts.logits(hidden)[:, -1].argmax(-1)
        self._past = torch.cat([self._past, chosen[:, None]], dim=1)

    def swap(self) -> torch.Tensor:
        """Swap the two rows; the `hypo_ids` that tell the servers."""
        self._past, self._given = self._past.flip(0), self._given.flip(0)
        return torch.tensor([1, 0])

    async def direct(self, count: int = 1) -> None:
        """A step in which every server gets its input from us."""
        hidden = self.embed(count)
        for session in self.sessions:
            hidden = await session.step(hidden)
        self.take(hidden)

    async def pushed(self, *, hypo_ids: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
        """A step in which only the first server gets anything from us; its id, and what the last server got."""
        step_id, hidden = str(uuid.uuid4()), self.embed()
        first, *others = self.sessions
        targets = [session.address for session in others]
        await first.send(hidden, step_id, hypo_ids=hypo_ids, next_servers=targets)
        entered = hidden
        for session in self.sessions:
            entered, hidden = hidden, await session.answer(hidden)
        self.take(hidden)
        return step_id, entered

    async def end(self) -> None:
        """End all sessions."""
        for session in self.sessions:
            await session.end()


@pytest_asyncio.fixture
async def network(shared: Swarm) -> AsyncIterator[Network]:
    network = Network([shared.maddr], PREFIX, 8)
    await network.start()
    yield network
    await network.stop()


@pytest.fixture(scope="module")
def parts(shared: Swarm) -> ClientParts:
    return client_parts(open_model(str(shared.model)), torch.float32)


async def connect(
    shared: Swarm, network: Network, parts: ClientParts, hops: Sequence[tuple[str, int, int]]
) -> Chain:
    """A chain over (server, start, end); the prompt is through, so that every session is known to its server."""
    sessions = []
    for name, start, end in hops:
        peer_id = shared[name].peer_id
        sessions.append(Session(network, peer_id, start, end, await network.open(peer_id, "rpc_inference")))
    chain = Chain(parts, sessions, BATCH)
    await chain.direct(len(IDS))
    return chain


@pytest.mark.parametrize("last", ["ours 4:8", "stock 4:8"])
async def test_the_next_server_computes_from_the_push(
    shared: Swarm, network: Network, parts: ClientParts, local: LlamaForCausalLM, last: str
) -> None:
    chain = await connect(shared, network, parts, [("ours 0:4", 0, 4), (last, 4, 8)])
    for _ in range(7):
        await chain.pushed()
    assert chain.tokens == generated(local, BATCH, 8)
    await chain.end()


@pytest.mark.parametrize("last", ["ours 4:8", "stock 4:8"])
async def test_a_push_is_handed_on_along_the_route(
    shared: Swarm, network: Network, parts: ClientParts, local: LlamaForCausalLM, last: str
) -> None:
    hops = [("ours 0:4", 0, 2), ("ours 0:8", 2, 4), (last, 4, 8)]
    chain = await connect(shared, network, parts, hops)
    for _ in range(7):
        await chain.pushed()
    assert chain.tokens == generated(local, BATCH, 8)
    await chain.end()


@pytest.mark.parametrize("last", ["ours 4:8", "stock 4:8"])
async def test_a_push_carries_its_own_reordering(
    shared: Swarm, network: Network, parts: ClientParts, local: LlamaForCausalLM, last: str
) -> None:
    """Petals pushes the tensors of a session's first step, which has none (protocol: known bug)."""
    chain = await connect(shared, network, parts, [("ours 0:4", 0, 4), (last, 4, 8)])
    await chain.pushed()
    for _ in range(3):
        await chain.pushed(hypo_ids=chain.swap())
        await chain.pushed()
    assert chain.tokens == generated(local, BATCH[::-1], 8)
    await chain.end()


@pytest.mark.parametrize("last", ["ours 4:8", "stock 4:8"])
async def test_a_direct_copy_after_the_push_is_not_computed_again(
    shared: Swarm, network: Network, parts: ClientParts, local: LlamaForCausalLM, last: str
) -> None:
    chain = await connect(shared, network, parts, [("ours 0:4", 0, 4), (last, 4, 8)])
    for _ in range(3):
        step_id, entered = await chain.pushed()
        await chain.sessions[1].send(entered, step_id)
        await chain.direct()
    assert chain.tokens == generated(local, BATCH, 7)
    await chain.end()


async def test_a_push_that_cannot_arrive_holds_up_nobody(
    shared: Swarm, network: Network, parts: ClientParts, local: LlamaForCausalLM
) -> None:
    """To a session that is unknown there, and to a peer that does not exist."""
    chain = await connect(shared, network, parts, [("ours 0:4", 0, 4), ("ours 4:8", 4, 8)])
    first, second = chain.sessions
    peer_id, _, start, end = second.address
    for target in [(peer_id, str(uuid.uuid4()), start, end), (ABSENT, "nobody", start, end)]:
        step_id, hidden = str(uuid.uuid4()), chain.embed()
        await first.send(hidden, step_id, next_servers=[target])
        half = await first.answer(hidden)
        await second.send(half, step_id)
        chain.take(await second.answer(half))
    assert chain.tokens == generated(local, BATCH, 3)
    await chain.end()
