"""A session that stays open between its steps: one rpc_inference stream, driven from the test's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import torch

from harness.peer import HANDLER, Peer

from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor  # isort: skip
from hivemind.p2p import PeerID  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip


class OpenSession:
    """`with OpenSession(peer, peer_id, uid, max_length) as session: session.step(hidden)`."""

    def __init__(self, peer: Peer, peer_id: str, uid: str, max_length: int) -> None:
        self._peer, self._peer_id, self._uid = peer, peer_id, uid
        self._max_length = max_length
        self._requests: asyncio.Queue[runtime_pb2.ExpertRequest | None] = asyncio.Queue()
        self._answers: Any = None

    def __enter__(self) -> OpenSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.run(self._end(), 10)

    async def _end(self) -> None:
        await self._requests.put(runtime_pb2.ExpertRequest())
        await self._requests.put(None)
        if self._answers is not None:
            try:
                async for _ in self._answers:
                    pass
            except ConnectionError:  # hivemind's last word, when the server has ended the session before it
                pass

    def step(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] in and out."""
        return self._peer.run(self._step(hidden))

    async def _step(self, hidden: torch.Tensor) -> torch.Tensor:
        tensors = [hidden, torch.empty(0), torch.empty(0, dtype=torch.int64)]
        await self._requests.put(
            runtime_pb2.ExpertRequest(
                uid=self._uid,
                tensors=[serialize_torch_tensor(tensor) for tensor in tensors],
                metadata=MSGPackSerializer.dumps({"max_length": self._max_length}),
            )
        )
        if self._answers is None:
            self._answers = await self._peer.p2p.iterate_protobuf_handler(
                PeerID.from_base58(self._peer_id),
                f"{HANDLER}.rpc_inference",
                self._stream(),
                runtime_pb2.ExpertResponse,
            )
        answer = await anext(self._answers)
        return deserialize_torch_tensor(answer.tensors[0])

    async def _stream(self) -> AsyncIterator[runtime_pb2.ExpertRequest]:
        while (request := await self._requests.get()) is not None:
            yield request
