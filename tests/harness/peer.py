"""Another member of a test swarm: a DHT node of hivemind's own that reads records and calls servers, on a loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch  # before what follows could put its stand-in there

from petals_agent.p2p import light

light.install(without_torch=False)

from hivemind.compression.serialization import (  # noqa: E402
    deserialize_torch_tensor,
    serialize_torch_tensor,
)
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.proto import runtime_pb2  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402
from hivemind.utils.timed_storage import get_dht_time  # noqa: E402

T = TypeVar("T")
HANDLER = "TransformerConnectionHandler"
CALL_TIMEOUT_S = 60.0


class Peer:
    """`with Peer([maddr]) as peer:`; all methods block and belong to the test's thread."""

    def __init__(self, peers: Sequence[str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.node: DHTNode = self.run(
            DHTNode.create(
                initial_peers=list(peers),
                client_mode=True,
                use_relay=False,
                auto_nat=False,
                nat_port_map=False,
                no_listen=True,
            )
        )

    def begin(self, coroutine: Coroutine[Any, Any, T], timeout: float = CALL_TIMEOUT_S) -> Future[T]:
        """Run it on the peer's loop, for at most `timeout` seconds."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout), self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = CALL_TIMEOUT_S) -> T:
        """The same, and wait for its result; raises TimeoutError."""
        return self.begin(coroutine, timeout).result()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        refresh = self.node.cache_refresh_task
        if refresh is not None:
            refresh.cancel()
        await self.node.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # --- the DHT

    def read(self, key: str) -> dict[str, tuple[Any, float]]:
        """Subkey → (value, seconds until it expires) of a dictionary record."""
        found = self.run(self.node.get(key, latest=True))
        if found is None:
            return {}
        now = get_dht_time()
        return {subkey: (item.value, item.expiration_time - now) for subkey, item in found.value.items()}

    def state(self, peer_id: str, key: str = "tiny.0") -> int | None:
        """The state that `peer_id` announces there."""
        value = self.read(key).get(peer_id)
        return int(value[0][0]) if value is not None else None

    def record(self, peer_id: str, key: str = "tiny.0") -> dict[str, Any]:
        """The optional fields of its record there; empty without one."""
        value = self.read(key).get(peer_id)
        return dict(value[0][2]) if value is not None else {}

    def store(self, key: str, subkey: str, value: Any, seconds: float = 60.0) -> None:
        """Write a record, true or not."""
        assert self.run(self.node.store(key, value, get_dht_time() + seconds, subkey=subkey))

    def store_raw(self, key: str, subkey: str, raw: bytes, seconds: float = 60.0) -> None:
        """Bytes that no serialiser would write, straight into a node's storage."""

        async def put() -> None:
            protocol, target = self.node.protocol, DHTID.generate(key)
            remote = next(one for _, one in protocol.routing_table.get_nearest_neighbors(target, 1))
            await protocol.call_store(remote, [target], [raw], get_dht_time() + seconds, subkeys=[subkey])

        self.run(put())

    # --- calls to servers

    @property
    def p2p(self) -> P2P:
        return self.node.protocol.p2p

    def info(self, peer_id: str, uid: str) -> dict[str, Any]:
        """rpc_info."""
        return dict(MSGPackSerializer.loads(self.run(self._info(peer_id, uid)).serialized_info))

    async def _info(self, peer_id: str, uid: str) -> runtime_pb2.ExpertInfo:
        request = runtime_pb2.ExpertUID(uid=uid)
        return await self.p2p.call_protobuf_handler(
            PeerID.from_base58(peer_id), f"{HANDLER}.rpc_info", request, runtime_pb2.ExpertInfo
        )

    def step(self, peer_id: str, uid: str, hidden: torch.Tensor) -> torch.Tensor:
        """A new rpc_inference stream of one step: hidden states [batch, tokens, hidden] in and out."""
        return self.run(self.stepping(peer_id, uid, hidden))

    async def stepping(self, peer_id: str, uid: str, hidden: torch.Tensor) -> torch.Tensor:
        """The same, on the peer's loop."""
        metadata = {"max_length": hidden.shape[1]}
        tensors = [hidden, torch.empty(0), torch.empty(0, dtype=torch.int64)]
        answered = asyncio.Event()

        async def requests() -> AsyncIterator[runtime_pb2.ExpertRequest]:
            yield runtime_pb2.ExpertRequest(
                uid=uid,
                tensors=[serialize_torch_tensor(tensor) for tensor in tensors],
                metadata=MSGPackSerializer.dumps(metadata),
            )
            await answered.wait()
            yield runtime_pb2.ExpertRequest()

        answers = await self.p2p.iterate_protobuf_handler(
            PeerID.from_base58(peer_id), f"{HANDLER}.rpc_inference", requests(), runtime_pb2.ExpertResponse
        )
        output: torch.Tensor | None = None
        try:
            async for answer in answers:
                output = deserialize_torch_tensor(answer.tensors[0])
                answered.set()
        except ConnectionError:  # hivemind's last word, when the server has ended the session before it
            if output is None:
                raise
        assert output is not None, "the stream ended without an answer"
        return output


def chain(first: int, last: int) -> str:
    """Uid of blocks [first, last) of the test model."""
    return " ".join(f"tiny.{block}" for block in range(first, last))
