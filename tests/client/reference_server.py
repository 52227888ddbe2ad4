"""A server of the wire protocol that is slow and plain, and misbehaves on demand.

A session keeps all that it was given and computes the whole sequence anew in each step, so reorders, roll-backs and
deep prompts are right by construction. Runs in the test's process on a loop of its own, with a real p2pd.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, AsyncIterator  # noqa: UP035  hivemind recognises streams by typing's name

import torch
from transformers import LlamaForCausalLM

from petals_agent.client import wire
from petals_agent.client.loop import LoopThread
from petals_agent.p2p.daemon import Daemon, DaemonOptions
from petals_agent.swarm.guard import RecordGuard
from petals_agent.swarm.records import ServerInfo, ServerState
from petals_agent.swarm.uids import block_uid, chain_uid, parse_chain

from hivemind.compression.serialization import deserialize_torch_tensor  # isort: skip
from hivemind.dht.node import DHTNode  # isort: skip
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.multiaddr import Multiaddr  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip

ExpertRequest, ExpertResponse = runtime_pb2.ExpertRequest, runtime_pb2.ExpertResponse

# What to do instead of answering a request: given its count (from 0) and our answer, return another one or raise.
Misbehaviour = Callable[[int, ExpertResponse], ExpertResponse | None]


def through(local: LlamaForCausalLM, hidden: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The first blocks of a model by hand, as many as there are deep prompts [blocks, batch or 1, p, hidden]."""
    position_ids = torch.arange(hidden.shape[1])[None]
    rotary = local.model.rotary_emb(hidden, position_ids)
    mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for layer, prompt in zip(local.model.layers, prompts, strict=False):
        hidden = torch.cat([hidden[:, : prompt.shape[1]] + prompt, hidden[:, prompt.shape[1] :]], 1)
        hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
    return hidden


class Session:
    """All inputs so far [batch, n, hidden], and what prompts add to them before each block [blocks, batch, n, hidden]."""

    def __init__(self, blocks: int, batch: int, hidden: int, max_length: int) -> None:
        self.inputs = torch.empty(batch, 0, hidden)
        self.added = torch.empty(blocks, batch, 0, hidden)
        self.max_length = max_length

    def take(
        self, metadata: dict[str, Any], hidden: torch.Tensor, prompts: torch.Tensor, hypo_ids: torch.Tensor
    ) -> None:
        position = metadata.get("start_from_position")
        if position is not None:
            if not 0 <= position <= self.inputs.shape[1]:
                raise ValueError(f"cannot go from {self.inputs.shape[1]} to {position}")
            self.inputs, self.added = self.inputs[:, :position], self.added[:, :, :position]
        if hypo_ids.numel():
            self.inputs, self.added = self.inputs[hypo_ids], self.added[:, hypo_ids]
        if self.inputs.shape[1] + hidden.shape[1] > self.max_length:
            raise ValueError(
                f"Maximum length exceeded: {self.inputs.shape[1]} + {hidden.shape[1]} > {self.max_length}"
            )
        added = torch.zeros(self.added.shape[0], *hidden.shape)
        if prompts.numel():
            added[:, :, : prompts.shape[2]] = prompts
        self.inputs = torch.cat([self.inputs, hidden], 1)
        self.added = torch.cat([self.added, added], 2)


class TransformerConnectionHandler(ServicerBase):
    """The handlers; `requests` are the metadata of all inference steps, as they came."""

    def __init__(self, model: LlamaForCausalLM, prefix: str) -> None:
        self.model = model
        self.prefix = prefix
        self.misbehave: Misbehaviour = lambda _, answer: answer
        self.silent = False  # take requests, never answer
        self.requests: list[dict[str, Any]] = []
        self.answered = 0
        self.queues: dict[str, asyncio.Queue[ExpertRequest]] = {}
        self.sessions = 0
        self.p2p: P2P | None = None

    def layers(self, uid: str) -> list[Any]:
        return [self.model.model.layers[i] for i in parse_chain(uid, self.prefix, 99)]

    def run(self, uid: str, hidden: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        position_ids = torch.arange(hidden.shape[1])[None]
        rotary = self.model.model.rotary_emb(hidden, position_ids)
        mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for index, layer in enumerate(self.layers(uid)):
            if added is not None:
                hidden = hidden + added[index]
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
        return hidden

    def answer(self, *tensors: torch.Tensor) -> ExpertResponse:
        answer = ExpertResponse(tensors=[wire.encode(tensor) for tensor in tensors])
        self.answered += 1
        changed = self.misbehave(self.answered - 1, answer)
        return answer if changed is None else changed

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        queue: asyncio.Queue[ExpertRequest | None] = asyncio.Queue()

        async def read() -> None:
            async for request in requests:
                await queue.put(request)
            await queue.put(None)

        reading = asyncio.create_task(read())
        session: Session | None = None
        session_id, seen, uid = "", set(), ""
        self.sessions += 1
        try:
            while (request := await queue.get()) is not None and request.tensors:
                metadata = MSGPackSerializer.loads(request.metadata)
                hidden, prompts, hypo_ids = (deserialize_torch_tensor(t) for t in request.tensors)
                if session is None:
                    uid, session_id = request.uid, metadata["session_id"]
                    session = Session(
                        len(self.layers(uid)), hidden.shape[0], hidden.shape[2], metadata["max_length"]
                    )
                    self.queues[session_id] = queue  # type: ignore[assignment]
                if metadata["step_id"] in seen:
                    continue
                seen.add(metadata["step_id"])
                self.requests.append({**metadata, "tokens": hidden.shape[1], "uid": request.uid})
                if self.silent:
                    await asyncio.Event().wait()
                session.take(metadata, hidden, prompts, hypo_ids)
                with torch.inference_mode():
                    output = self.run(uid, session.inputs, session.added)[:, -hidden.shape[1] :]
                answer = self.answer(output)
                if metadata.get("next_servers") and not prompts.numel():
                    await self.push(metadata, answer.tensors[0], request.tensors[1:])
                yield answer
        finally:
            self.sessions -= 1
            reading.cancel()
            self.queues.pop(session_id, None)

    async def push(self, metadata: dict[str, Any], output: Any, others: Any) -> None:
        """Hand the output on and wait until it is taken, so that a test knows which copy came first."""
        (peer, session_id, start, end), *rest = metadata["next_servers"]
        metadata = {**metadata, "session_id": session_id, "next_servers": rest, "pushed": True}
        request = ExpertRequest(
            uid=chain_uid(self.prefix, start, end),
            tensors=[output, *others],
            metadata=MSGPackSerializer.dumps(metadata),
        )
        stub = TransformerConnectionHandler.get_stub(self.p2p, PeerID.from_base58(peer))
        await stub.rpc_push(request, timeout=10)

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        queue = self.queues.get(MSGPackSerializer.loads(request.metadata)["session_id"])
        if queue is not None:
            await queue.put(request)
        return ExpertResponse()

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        hidden, prompts = (deserialize_torch_tensor(t) for t in request.tensors)
        return self.answer(self.run(request.uid, hidden, padded(prompts, hidden)))

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        hidden, grad, prompts = (deserialize_torch_tensor(t) for t in request.tensors)
        hidden.requires_grad_()
        prompts.requires_grad_()
        with torch.enable_grad():
            self.run(request.uid, hidden, padded(prompts, hidden)).backward(grad)
        return self.answer(hidden.grad, *([prompts.grad] if prompts.numel() else []))


def padded(prompts: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    if not prompts.numel():
        return None
    return torch.nn.functional.pad(prompts, (0, 0, 0, hidden.shape[1] - prompts.shape[2]))


class ReferenceServer:
    """Serves blocks [start, end) of a model that is already in memory, until `stop`."""

    def __init__(
        self, model: LlamaForCausalLM, maddr: str, prefix: str, start: int, end: int, **info: Any
    ) -> None:
        self.handler = TransformerConnectionHandler(model, prefix)
        self.start, self.end = start, end
        self._loop = LoopThread(f"reference server {start}:{end}")
        self.peer_id = self._loop.run(self._start(maddr, info))

    async def _start(self, maddr: str, info: dict[str, Any]) -> str:
        self._daemon = await Daemon.start(
            DaemonOptions(initial_peers=[maddr], nat_port_map=False, auto_nat=False)
        )
        self._p2p = self.handler.p2p = await P2P.replicate(Multiaddr(self._daemon.maddr))
        await self.handler.add_p2p_handlers(self._p2p)
        self._node = await DHTNode.create(
            p2p=self._p2p, initial_peers=[maddr], client_mode=True, record_validator=RecordGuard()
        )
        self._info = {"start_block": self.start, "end_block": self.end, **info}
        await self._announce(ServerState.ONLINE)
        return str(self._p2p.peer_id)

    async def _announce(self, state: ServerState) -> None:
        record = ServerInfo(state, 1.0, **self._info).to_value()
        keys = [block_uid(self.handler.prefix, i) for i in range(self.start, self.end)]
        expires = [time.time() + 120] * len(keys)
        stored = await self._node.store_many(
            keys, [record] * len(keys), expires, subkeys=[str(self._p2p.peer_id)] * len(keys)
        )
        assert all(stored.values())

    @property
    def steps(self) -> int:
        """Inference steps computed."""
        return len(self.handler.requests)

    def die(self) -> None:
        """End p2pd without a word; the DHT still shows the server."""
        self._loop.run(self._daemon.stop())

    def stop(self) -> None:
        if self._loop.alive:
            self._loop.run(self._p2p.shutdown())
            self.die()
            self._loop.close()
