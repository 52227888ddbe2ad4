"""Load on one server over the Petals wire protocol, the same for every server, with every answer checked.

    load.py --peers MADDR --prefix P --answers FILE.npz [--sessions 1,4,16,64]      (FILE.npz: see local.py)

A session is a closed loop: the next step leaves as soon as the answer is complete. The loop shares the machine with
the server, so all requests are serialised before the clock starts, answers are kept as bytes and checked after it
stops, and neither torch nor hivemind's streams are in between: a step costs one callback. One wrong step voids the
figure. Prints one JSON object; exit status 1 means that something was void.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import struct
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import uvloop

from petals_agent.p2p import light

light.install(without_torch=True)

from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.proto import runtime_pb2  # noqa: E402

HANDLER = "TransformerConnectionHandler"
TOLERANCE = 1e-3  # of the largest value of the expected answer
STEP_TIMEOUT_S = 180.0
ONLINE = 2
HEADER = struct.Struct(">BQ")  # 0 message, 1 error; length of what follows


class Void(Exception):
    """A figure that must not be used: an answer was wrong, missing or an error."""


@dataclass(frozen=True)
class Work:
    """Inputs and the answers that are right, from local.py."""

    prefill: int
    inputs: np.ndarray
    outputs: np.ndarray
    forward_in: np.ndarray
    forward_out: np.ndarray
    gradient_in: np.ndarray
    gradient_out: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Work:
        """Read what `local.py --answers` wrote."""
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return cls(prefill=int(arrays.pop("prefill")), **arrays)

    @property
    def steps(self) -> int:
        return int(self.inputs.shape[1]) - self.prefill


def encode(array: np.ndarray) -> runtime_pb2.Tensor:
    """An uncompressed tensor message."""
    return runtime_pb2.Tensor(
        buffer=array.tobytes(), size=array.shape, dtype=str(array.dtype), requires_grad=False
    )


EMPTY, EMPTY_IDS = encode(np.empty(0, np.float32)), encode(np.empty(0, np.int64))


def check(message: runtime_pb2.ExpertResponse, expected: np.ndarray, what: str) -> None:
    """Raise Void unless the first tensor is `expected` within the tolerance."""
    if not message.tensors:
        raise Void(f"{what}: an answer without a tensor")
    tensor = message.tensors[0]
    if (tensor.dtype, tensor.compression, tuple(tensor.size)) != ("float32", 0, expected.shape):
        raise Void(
            f"{what}: {tensor.dtype} {tuple(tensor.size)} codec {tensor.compression}, not float32 {expected.shape}"
        )
    error = float(np.abs(np.frombuffer(tensor.buffer, np.float32).reshape(expected.shape) - expected).max())
    if not error <= TOLERANCE * float(np.abs(expected).max()):  # NaN is wrong too
        raise Void(f"{what}: off by {error:.3g} where the largest value is {np.abs(expected).max():.3g}")


class Session(asyncio.Protocol):
    """One inference stream: `run(n)` sends the next n prepared requests, each when the last is answered."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self.answers: list[bytes] = []
        self.latencies: list[float] = []
        self._frames = iter(frames)
        self._left = 0
        self._sent = 0.0
        self._buffer = bytearray()
        self._done: asyncio.Future[None] | None = None
        self._lost = ""

    async def open(self, p2p: P2P, peer: PeerID) -> None:
        """Open the stream and take its socket over from hivemind."""
        _, _, self._writer = await p2p.call_binary_stream_handler(peer, f"{HANDLER}.rpc_inference")
        self._transport = self._writer.transport  # the writer is kept: its end would close the transport
        self._transport.set_protocol(self)

    def run(self, count: int) -> asyncio.Future[None]:
        """Start; the future ends with the last answer, or with Void."""
        self._left = count
        self._done = asyncio.get_running_loop().create_future()
        if self._lost:
            self._fail(self._lost)
        else:
            self._send()
        return self._done

    def _send(self) -> None:
        frame = next(self._frames)
        self._sent = time.perf_counter()
        self._transport.write(frame)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._buffer)
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            self._answered(kind, body)

    def _answered(self, kind: int, body: bytes) -> None:
        self.latencies.append(time.perf_counter() - self._sent)
        if kind:
            return self._fail(f"the server answered with an error: {body!r}")
        self.answers.append(body)
        self._left -= 1
        if self._left:
            self._send()
        elif self._done and not self._done.done():
            self._done.set_result(None)

    def _fail(self, why: str) -> None:
        self._lost = why
        if self._done and not self._done.done():
            self._done.set_exception(Void(why))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(self._lost or f"the stream ended before the session did ({exc!r})")

    def close(self) -> None:
        """End the session as clients do: an empty request, the end marker, then the stream closes."""
        if not self._transport.is_closing():
            self._transport.write(HEADER.pack(0, 0) + HEADER.pack(1, 0))
            self._transport.close()


def session_frames(work: Work, row: int, uid: str) -> list[bytes]:
    """All requests of one session, ready to be sent: the prefill, then one token each."""
    session_id = str(uuid.uuid4())
    total = work.inputs.shape[1]
    spans = [(0, work.prefill), *((t, t + 1) for t in range(work.prefill, total))]
    frames = []
    for start, end in spans:
        metadata: dict[str, Any] = {"session_id": session_id, "step_id": str(uuid.uuid4())}
        if start == 0:
            metadata["max_length"] = total
        tensors = [encode(work.inputs[row : row + 1, start:end]), EMPTY, EMPTY_IDS]
        request = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=msgpack.packb(metadata))
        body = request.SerializeToString()
        frames.append(HEADER.pack(0, len(body)) + body)
    return frames


class Load:
    """A client of one swarm that drives any of its servers; the same p2pd for all of them."""

    def __init__(self, node: DHTNode, work: Work, blocks: int) -> None:
        self.node, self.p2p, self.work, self.blocks = node, node.protocol.p2p, work, blocks

    @classmethod
    async def connect(cls, peers: Sequence[str], work: Work, blocks: int) -> Load:
        """Join as a DHT client."""
        quiet = {"use_relay": False, "use_auto_relay": False, "nat_port_map": False, "auto_nat": False}
        return cls(await DHTNode.create(initial_peers=list(peers), client_mode=True, **quiet), work, blocks)

    async def close(self) -> None:
        await self.node.shutdown()

    async def online(self, prefix: str, timeout: float = 120) -> PeerID:
        """Wait until one server announces all blocks of `prefix` as ONLINE."""
        deadline = time.monotonic() + timeout
        keys = [f"{prefix}.{block}" for block in range(self.blocks)]
        while time.monotonic() < deadline:
            found = await self.node.get_many(keys, sufficient_expiration_time=float("inf"))
            holders = [
                {peer for peer, entry in record.value.items() if entry.value[0] == ONLINE}
                for record in found.values()
                if record is not None and isinstance(record.value, dict)
            ]
            if len(holders) == len(keys):
                for peer in set.intersection(*holders):
                    return PeerID.from_base58(peer)
            await asyncio.sleep(0.03)
        raise TimeoutError(f"no server of {prefix} was ONLINE within {timeout:g} s")

    def uid(self, prefix: str) -> str:
        return " ".join(f"{prefix}.{block}" for block in range(self.blocks))

    async def inference(
        self, peer: PeerID, prefix: str, count: int, pids: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """`count` sessions at once: prefill (all at once), then the timed steps; raises Void.

        `cpu_us` is the CPU time per timed step of the client and of the groups of processes in `pids`, in µs.
        """
        watched = {"client": [os.getpid()], "client p2pd": [self.p2p._child.pid], **(pids or {})}
        sessions = [Session(session_frames(self.work, row, self.uid(prefix))) for row in range(count)]
        try:
            await asyncio.gather(*(session.open(self.p2p, peer) for session in sessions))
            await self._all(sessions, 1)
            used = {name: cpu_seconds(group) for name, group in watched.items()}
            start = time.perf_counter()
            await self._all(sessions, self.work.steps)
            seconds = time.perf_counter() - start
            used = {name: cpu_seconds(group) - used[name] for name, group in watched.items()}
        finally:
            for session in sessions:
                session.close()
        for row, session in enumerate(sessions):
            self._check_session(row, session.answers)
        steps = sorted(latency for session in sessions for latency in session.latencies[1:])
        return {
            "steps_s": count * self.work.steps / seconds,
            "p50_ms": statistics.median(steps) * 1e3,
            "p99_ms": steps[min(len(steps) - 1, int(len(steps) * 0.99))] * 1e3,
            "prefill_ms": statistics.median(session.latencies[0] for session in sessions) * 1e3,
            "cpu_us": {name: spent * 1e6 / (count * self.work.steps) for name, spent in used.items()},
        }

    async def _all(self, sessions: Sequence[Session], count: int) -> None:
        try:
            await asyncio.wait_for(
                asyncio.gather(*(session.run(count) for session in sessions)), STEP_TIMEOUT_S
            )
        except TimeoutError:
            raise Void(
                f"{len(sessions)} sessions did not finish {count} steps in {STEP_TIMEOUT_S:g} s"
            ) from None

    def _check_session(self, row: int, answers: Sequence[bytes]) -> None:
        start = 0
        for step, answer in enumerate(answers):
            end = start + (1 if step else self.work.prefill)
            expected = self.work.outputs[row : row + 1, start:end]
            check(runtime_pb2.ExpertResponse.FromString(answer), expected, f"session {row}, step {step}")
            start = end

    async def training(self, peer: PeerID, prefix: str, kind: str) -> float:
        """Tokens per second of one `kind` ("forward" or "backward") call; raises Void."""
        work = self.work
        tensors = [work.forward_in] if kind == "forward" else [work.forward_in, work.gradient_in]
        expected = work.forward_out if kind == "forward" else work.gradient_out
        request = runtime_pb2.ExpertRequest(
            uid=self.uid(prefix), tensors=[*map(encode, tensors), EMPTY], metadata=msgpack.packb({})
        )
        start = time.perf_counter()
        call = self.p2p.call_protobuf_handler(
            peer, f"{HANDLER}.rpc_{kind}", request, runtime_pb2.ExpertResponse
        )
        try:
            answer = await asyncio.wait_for(call, STEP_TIMEOUT_S)
        except Exception as error:
            raise Void(f"{kind}: {error!r}") from error
        seconds = time.perf_counter() - start
        check(answer, expected, kind)
        return float(work.forward_in.shape[0] * work.forward_in.shape[1] / seconds)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that these processes have used so far."""
    total = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything once, for the command line."""
    load = await Load.connect(args.peers, Work.read(args.answers), args.blocks)
    try:
        peer = await load.online(args.prefix)
        result: dict[str, Any] = {"peer": str(peer), "sessions": {}}
        for count in args.sessions.split(","):
            figures = await load.inference(peer, args.prefix, int(count))
            del figures["cpu_us"]
            result["sessions"][count] = {name: round(value, 2) for name, value in figures.items()}
        for kind in ("forward", "backward"):
            rates = [await load.training(peer, args.prefix, kind) for _ in range(4)]
            result[f"{kind}_tok_s"] = round(max(rates))
        return result
    except Void as error:
        return {"void": str(error)}
    finally:
        await load.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", required=True, help="multiaddrs of the swarm")
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--answers", type=Path, required=True, help="from local.py")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of the model; one server must hold all")
    parser.add_argument("--sessions", default="1,4,16,64")
    parser.add_argument(
        "--json", action="store_true", help="accepted as everywhere here; the output always is"
    )
    result = uvloop.run(measure(parser.parse_args()))
    print(json.dumps(result))
    return int("void" in result)


if __name__ == "__main__":
    sys.exit(main())
