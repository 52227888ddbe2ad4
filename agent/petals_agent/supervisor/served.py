"""What a caller sees of us: a p2pd of its own, client only, dials our address and calls what we serve."""

from __future__ import annotations

import asyncio
import logging
import struct
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgpack

from petals_agent.errors import DaemonError, SwarmError
from petals_agent.p2p import light
from petals_agent.p2p.daemon import Daemon, for_calls

light.install(without_torch=True)

from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError  # noqa: E402
from hivemind.proto import p2pd_pb2, runtime_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

from petals_agent.p2p import control  # noqa: E402
from petals_agent.p2p.attachment import close  # noqa: E402

_SERVICE = "TransformerConnectionHandler"
_HEADER = struct.Struct(">BQ")
_ANSWER_LIMIT = 65536
_START_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 2.0
_PAUSE_S = 5.0

log = logging.getLogger("petals_agent.served")


class Caller:
    """`check` calls rpc_info and opens an rpc_inference without tokens, as a client would."""

    def __init__(self, maddrs: Callable[[], Sequence[str]], socket_dir: Path) -> None:
        """`maddrs` gives the addresses where this host can dial us, with the peer id."""
        self._maddrs = maddrs
        self._socket_dir = socket_dir
        self._daemon: Daemon | None = None
        self._p2p: P2P | None = None
        self._backs_off = False  # after a dial in vain it tries no other for seconds
        self._lock = asyncio.Lock()

    async def run(self) -> NoReturn:
        """As a task: the p2pd is there before it is needed, and again when it has ended."""
        while True:
            try:
                await self.start()
                assert self._daemon is not None
                await self._daemon.process.wait()
            except DaemonError as error:
                log.warning("the p2pd that checks on us does not start: %s", error)
            await asyncio.sleep(_PAUSE_S)

    async def start(self) -> None:
        """Start the p2pd if it is not there, and replace one that is no good witness. Raises DaemonError."""
        async with self._lock:
            if self._daemon is not None and self._daemon.process.returncode is None:
                if not self._backs_off and await _answers(self._daemon):
                    return
            await self._drop()
            self._backs_off = False
            options = for_calls(self._socket_dir, startup_timeout=_START_TIMEOUT_S, use_relay=False)
            self._daemon = await Daemon.start(options)
            self._p2p = await P2P.replicate(Multiaddr(self._daemon.maddr))

    async def stop(self) -> None:
        """End the p2pd."""
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        daemon, p2p = self._daemon, self._p2p
        self._daemon = self._p2p = None
        if p2p is not None:
            await close(p2p)
        if daemon is not None:
            await daemon.stop()

    async def check(self, peer_id: str, uid: str, hidden_size: int) -> None:
        """Bound it by asyncio.timeout. Raises SwarmError that says what a caller runs into.

        A refusal in our own words (too many sessions, draining) is an answer: whoever can refuse, serves.
        """
        try:
            await self.start()
        except DaemonError as error:
            raise SwarmError(f"the p2pd that checks on us does not start: {error}") from error
        assert self._daemon is not None and self._p2p is not None
        try:
            await control.dial(self._daemon.maddr, self._maddrs(), timeout=10.0)
        except DaemonError as error:
            self._backs_off = True
            raise SwarmError(f"our own address cannot be dialled: {error}") from error
        except asyncio.CancelledError:
            self._backs_off = True
            raise
        peer = PeerID.from_base58(peer_id)
        await self._info(self._p2p, peer, uid)
        await self._inference(self._p2p, peer, uid, hidden_size)

    async def _info(self, p2p: P2P, peer: PeerID, uid: str) -> None:
        request = runtime_pb2.ExpertUID(uid=uid)
        try:
            await p2p.call_protobuf_handler(peer, f"{_SERVICE}.rpc_info", request, runtime_pb2.ExpertInfo)
        except P2PHandlerError as error:
            raise SwarmError(f"rpc_info fails: {error!s:.200}") from error
        except Exception as error:  # hivemind raises what it likes
            raise SwarmError(f"rpc_info does not answer: {error!r:.200}") from error

    async def _inference(self, p2p: P2P, peer: PeerID, uid: str, hidden_size: int) -> None:
        shapes = ([1, 0, hidden_size], [0], [0])
        types = ("float32", "float32", "int64")
        tensors = [
            runtime_pb2.Tensor(size=shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)
        ]
        metadata = {"max_length": 0, "session_id": str(uuid.uuid4()), "step_id": str(uuid.uuid4())}
        request = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=msgpack.packb(metadata))
        body = request.SerializeToString()
        try:
            _, reader, writer = await p2p.call_binary_stream_handler(peer, f"{_SERVICE}.rpc_inference")
        except Exception as error:  # hivemind raises what it likes
            raise SwarmError(f"rpc_inference cannot be opened: {error!r:.200}") from error
        try:
            writer.write(_HEADER.pack(0, len(body)) + body)
            kind, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            answer = await reader.readexactly(min(size, _ANSWER_LIMIT))
            if kind == 0:
                writer.write(_HEADER.pack(0, 0) + _HEADER.pack(1, 0))
                return
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise SwarmError("rpc_inference ends without an answer: its handler is gone") from error
        finally:
            writer.close()
        if not answer:
            raise SwarmError("rpc_inference ends without an answer")
        words = p2pd_pb2.RPCError.FromString(answer).message
        if not any(known in words for known in _REFUSALS):
            raise SwarmError(f"rpc_inference fails: {words:.200}")


_REFUSALS = ("which is its limit", "is leaving", "cache")


async def _answers(daemon: Daemon) -> bool:
    try:
        await control.identify(daemon.maddr, _ANSWER_TIMEOUT_S)
    except DaemonError as error:
        log.info("the p2pd that checks on us does not answer and is replaced: %s", error)
        return False
    return True
