"""A peer that means harm, as a process of its own: does all it can think of for some seconds, prints what it was told.

`hostile.py SEED SECONDS SESSION_ID PEER_ID MADDR…`; SESSION_ID is a session of somebody else that it has overheard.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import torch

from serving.caller import NO_IDS, NO_PROMPTS, Caller, Request, request, uid

from hivemind.p2p import PeerID  # isort: skip
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError  # isort: skip
from hivemind.proto import p2pd_pb2, runtime_pb2  # isort: skip

WIDTH, BLOCKS = 32, 4
SERVICE = "TransformerConnectionHandler"
STREAMS = ("rpc_inference", "rpc_forward_stream", "rpc_backward_stream")
UNARY = ("rpc_info", "rpc_forward", "rpc_backward", "rpc_push")
WEIRD: list[Any] = [
    None, True, -1, 0, 2**63, 1.5, float("nan"), float("inf"), "", "x" * 300, b"\xff", [], {}, (), [[]], ((b"__T9",), {}),
    ((b"__T0",) * 50, {}), [("p", "s", 0, 1)] * 5, {"a": {"b": [1, 2, 3]}},
]  # fmt: skip
KEYS = (
    "session_id", "step_id", "max_length", "points", "active_adapter", "args_structure", "alloc_timeout",
    "start_from_position", "next_servers", "pushed", "output_compression", "x",
)  # fmt: skip


class Hostile:
    """One kind of harm per method; `told` counts the texts of refusals."""

    def __init__(self, caller: Caller, peer_id: str, overheard: str, seed: int) -> None:
        self.caller, self.peer_id, self.overheard = caller, peer_id, overheard
        self.peer = PeerID.from_base58(peer_id)
        self.rng = random.Random(seed)
        self.told: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.held: list[Any] = []

    @property
    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.noise, self.torn, self.huge_claim, self.garbage_call, self.bad_metadata, self.bad_tensors,
            self.bad_session, self.vanish, self.push, self.ranges, self.deaf, self.messages,
        ]  # fmt: skip

    async def go_on(self, seconds: float) -> None:
        """Harm of random kinds, one after another."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind = self.rng.choice(self.kinds)
            try:
                async with asyncio.timeout(3):
                    await kind()
            except P2PHandlerError as error:
                self.told[str(error)] += 1
            except (
                TimeoutError,
                StopAsyncIteration,
                OSError,
                EOFError,
                P2PDaemonError,
                asyncio.IncompleteReadError,
            ):
                pass
            self.done[kind.__name__] += 1

    # --- below the protocol

    async def stream(self, method: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        _, reader, writer = await self.caller.p2p.call_binary_stream_handler(self.peer, f"{SERVICE}.{method}")
        return reader, writer

    async def read_error(self, reader: asyncio.StreamReader, timeout: float = 0.5) -> None:
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, OSError):
            async with asyncio.timeout(timeout):
                marker, size = struct.unpack(">BQ", await reader.readexactly(9))
                body = await reader.readexactly(size)
                if marker == 1:
                    self.told[str(p2pd_pb2.RPCError.FromString(body).message)] += 1

    async def noise(self) -> None:
        reader, writer = await self.stream(self.rng.choice(STREAMS))
        writer.write(self.rng.randbytes(self.rng.choice([1, 8, 9, 100, 5000])))
        await self.read_error(reader)
        writer.close()

    async def torn(self) -> None:
        """Most of a valid message, then nothing, or the end."""
        reader, writer = await self.stream(self.rng.choice(STREAMS))
        body = self.step().SerializeToString()
        whole = struct.pack(">BQ", 0, len(body)) + body
        writer.write(whole[: self.rng.randrange(1, len(whole))])
        if self.rng.random() < 0.5:
            self.held.append((reader, writer))
            del self.held[:-20]
        else:
            writer.transport.abort()

    async def huge_claim(self) -> None:
        reader, writer = await self.stream(self.rng.choice(STREAMS))
        size = self.rng.choice([2**25, 10 * 2**30, 2**40, 2**64 - 1])
        writer.write(struct.pack(">BQ", 0, size) + b"x" * 1000)
        await self.read_error(reader)
        writer.close()

    async def messages(self) -> None:
        """Whole messages that are no requests, or requests with random bytes in their fields."""
        reader, writer = await self.stream(self.rng.choice(STREAMS))
        bodies = [
            self.rng.randbytes(50),
            Request(uid=uid(0, 4), metadata=self.rng.randbytes(100)).SerializeToString(),
            Request(uid="\x00" * 10_000).SerializeToString(),
            Request(uid=uid(0, 4), tensors=[runtime_pb2.Tensor()] * 10_000).SerializeToString(),
        ]
        body = self.rng.choice(bodies)
        writer.write(struct.pack(">BQ", 0, len(body)) + body + struct.pack(">BQ", 1, 0))
        await self.read_error(reader)
        writer.close()

    async def garbage_call(self) -> None:
        body = self.rng.choice([b"", b"\xff" * 20, self.rng.randbytes(200), self.rng.randbytes(2_000_000)])
        await self.caller.p2p._client.call_unary_handler(
            self.peer, f"{SERVICE}.{self.rng.choice(UNARY)}", body
        )

    # --- requests

    def tensor(self) -> Any:
        """A tensor's message that is not what it claims, or what nobody wants."""
        return runtime_pb2.Tensor(
            buffer=self.rng.randbytes(self.rng.choice([0, 1, 128, 128, 4096])),
            size=[
                self.rng.choice([0, 1, 1, 2, WIDTH, 2**20, 2**32 - 1])
                for _ in range(self.rng.choice([0, 1, 3, 3, 4, 9]))
            ],
            dtype=self.rng.choice(
                ["float32", "float32", "float16", "bfloat16", "int64", "bool", "object", ""]
            ),
            compression=self.rng.randrange(6),
        )

    def hidden(self) -> Any:
        values = self.rng.choice([0.0, float("nan"), float("inf"), 3e38])
        shape = self.rng.choice(
            [(1, 1, WIDTH), (2, 3, WIDTH), (1, 1, 8), (1, WIDTH), (300, 1, WIDTH), (1, 3000, WIDTH)]
        )
        return self.rng.choice([torch.full(shape, values), self.tensor()])

    def metadata(self) -> dict[str, Any]:
        keys = self.rng.sample(KEYS, self.rng.randrange(4))
        return {"max_length": self.rng.choice([1, 5, 20]), **{key: self.rng.choice(WEIRD) for key in keys}}

    def step(self) -> Any:
        tensors = (
            self.hidden(),
            self.rng.choice([NO_PROMPTS, self.tensor()]),
            self.rng.choice([NO_IDS, self.tensor()]),
        )
        return request(uid(0, 4), tensors[: self.rng.choice([1, 3, 3, 3])], **self.metadata())

    async def bad_metadata(self) -> None:
        """msgpack that wants memory, depth or patience."""
        nested = b"\xc0"
        for _ in range(self.rng.choice([3, 50, 300, 5000])):
            nested = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + nested))
            if len(nested) > 60_000:
                break
        bombs = [
            b"\x81\xa1a" + nested,
            b"\x81\xa1a\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\x81\xa1a\xc6\xff\xff\xff\xff",
            b"\x91" * 60_000,
            b"\x81\xa1a" + b"\x91" * 900 + b"\xc0",
            msgpack.packb({"x": "y" * 100_000}),
            msgpack.packb({"max_length": 5, "x": [{}] * 10_000}),
            msgpack.packb({str(i): i for i in range(5000)}),
        ]
        message = Request(uid=uid(0, 4), tensors=self.step().tensors, metadata=self.rng.choice(bombs))
        method = self.rng.choice(["rpc_forward", "rpc_backward", "rpc_push", "rpc_inference"])
        await self.send(method, message)

    async def bad_tensors(self) -> None:
        chain = self.rng.choice([uid(0, 4), uid(0, 1), uid(3, 9), "", "tiny.0 " * 2000])
        tensors = [self.hidden(), self.hidden(), self.rng.choice([NO_PROMPTS, self.tensor()])]
        message = request(chain, tensors[: self.rng.randrange(4)], **self.metadata())
        await self.send(self.rng.choice(["rpc_forward", "rpc_backward"]), message)

    async def send(self, method: str, message: Any) -> None:
        if method == "rpc_inference":
            session = self.caller.session(self.peer_id, 0, 4)
            await session.send(message)
            await session.receive(timeout=2)
        elif method == "rpc_push":
            await self.caller.stub(self.peer_id).rpc_push(message, timeout=2)
        else:
            await self.caller.call(self.peer_id, method, message, streamed=self.rng.random() < 0.5)

    # --- sessions

    async def bad_session(self) -> None:
        """A good first step, then something else."""
        session = self.caller.session(self.peer_id, 0, 4)
        try:
            await session.step(torch.zeros(1, 3, WIDTH), max_length=20)
            await session.send(self.step())
            await session.receive(timeout=1)
        finally:
            await session.vanish()

    async def vanish(self) -> None:
        """Leave in the middle of a long step."""
        session = self.caller.session(self.peer_id, 0, 4)
        await session.send(session.step_request(torch.zeros(2, 200, WIDTH), max_length=200))
        await asyncio.sleep(self.rng.choice([0.0, 0.005, 0.05]))
        await session.vanish()

    async def push(self) -> None:
        """Into sessions that are not there, and into one that is somebody else's."""
        target = self.rng.choice(["unknown", self.overheard])
        chain = self.rng.choice([uid(0, 4), uid(0, 4), "tiny.7"])
        bad = [torch.zeros(7, 1, WIDTH), torch.zeros(1, 1, 5), torch.zeros(1, 600, WIDTH), self.tensor()]
        tensors = (self.rng.choice(bad), NO_PROMPTS, NO_IDS)
        metadata = {
            **self.metadata(),
            "session_id": target,
            "step_id": str(self.rng.random()),
            "pushed": True,
        }
        metadata["start_from_position"] = 10**6  # fits nothing, even if the shape does
        await self.send("rpc_push", request(chain, tensors[: self.rng.choice([0, 1, 3])], **metadata))

    async def ranges(self) -> None:
        """A session of a range and a size that nobody had yet."""
        start = self.rng.randrange(BLOCKS)
        session = self.caller.session(self.peer_id, start, self.rng.randint(start + 1, BLOCKS))
        rows = self.rng.choice([1, 1, 40, 256])
        try:
            await session.step(torch.zeros(rows, 1, WIDTH), max_length=self.rng.choice([1, 2, 100, 300, 512]))
        finally:
            await session.vanish()

    async def deaf(self) -> None:
        """Ask for much and read nothing."""
        reader, writer = await self.stream("rpc_inference")
        body = request(
            uid(0, 4), (torch.zeros(8, 60, WIDTH), NO_PROMPTS, NO_IDS), max_length=480
        ).SerializeToString()
        writer.write((struct.pack(">BQ", 0, len(body)) + body) * 8)
        self.held.append((reader, writer))
        del self.held[:-20]

    async def flood_memory(self, streams: int, size: int) -> None:
        """Torn messages of `size` bytes, all at once; what is not refused stays open."""

        async def one() -> None:
            reader, writer = await self.stream("rpc_forward_stream")
            self.held.append((reader, writer))
            reading = asyncio.create_task(self.read_error(reader, timeout=3))
            with contextlib.suppress(OSError):
                writer.write(struct.pack(">BQ", 0, size + 1))
                for _ in range(size // 2**16):
                    writer.write(bytes(2**16))
                    await writer.drain()
            await reading

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(8):
                await asyncio.gather(*(one() for _ in range(streams)), return_exceptions=True)

    async def flood_sessions(self, count: int) -> None:
        """Sessions that stay open, until there may be no more."""

        async def one() -> None:
            session = self.caller.session(self.peer_id, 0, 1)
            try:
                await session.step(torch.zeros(1, 1, WIDTH), max_length=1)
                self.held.append(session)
            except P2PHandlerError as error:
                self.told[str(error)] += 1

        await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)


async def main(seed: int, seconds: float, overheard: str, peer_id: str, maddrs: list[str]) -> None:
    torch.set_num_threads(1)
    caller = await Caller.start(maddrs)
    hostile = Hostile(caller, peer_id, overheard, seed)
    print(json.dumps({"event": "begins"}), flush=True)
    await asyncio.gather(*(hostile.go_on(seconds) for _ in range(6)))
    print(json.dumps({"event": "memory"}), flush=True)
    hostile.held.clear()
    await hostile.flood_memory(streams=40, size=15 * 2**20)
    print(json.dumps({"event": "sessions"}), flush=True)
    await hostile.flood_sessions(80)
    print(
        json.dumps({"event": "told", "texts": list(hostile.told.items()), "done": hostile.done}), flush=True
    )
    await caller.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]))
