"""One `rpc_inference` stream: a session at one server for a run of blocks (protocol.md §4)."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

import torch

from petals_agent.client import wire
from petals_agent.client.blame import PeerFailure
from petals_agent.client.channel import Channel
from petals_agent.client.history import Message
from petals_agent.client.network import Network
from petals_agent.swarm.view import Span

_CLOSE_TIMEOUT = 1.0

NextServer = tuple[str, str, int, int]  # peer id, session id, start, end


def can_roll_back(version: str | None) -> bool:
    """Whether a server of this version heeds `start_from_position`: Petals does since 2.3."""
    petals = re.match(r"(\d+)\.(\d+)", version or "")
    return petals is None or not (1, 0) <= (int(petals[1]), int(petals[2])) < (2, 3)


class ServerSession:
    """The KV cache of one session at one server. After a failure only `close` makes sense."""

    def __init__(self, network: Network, span: Span, max_length: int, alloc_timeout: float = 0.0) -> None:
        self.network = network
        self.span = span
        self.max_length = max_length
        self.alloc_timeout = alloc_timeout  # seconds that the server may let us wait for room in its cache
        self.session_id = str(uuid.uuid4())
        self.position = 0  # tokens in the server's cache
        self.steps = 0
        self.last_used = time.monotonic()
        self._channel: Channel | None = None

    @property
    def address(self) -> NextServer:
        """How another server can push to this session."""
        return self.span.peer_id, self.session_id, self.span.start, self.span.end

    async def step(
        self,
        message: Message,
        hypo_ids: torch.Tensor | None,
        *,
        step_id: str,
        position: int,
        next_servers: Sequence[NextServer] = (),
    ) -> torch.Tensor:
        """Run hidden states [batch, n, hidden] through the blocks, as tokens `position` … position+n-1.

        A position before the server's rolls it back. `message.prompts` are those of this span's blocks, `hypo_ids`
        (int64 [batch]) reorders the cache first. Raises PeerFailure.
        """
        timeout = self.network.options.request_timeout
        what = f"a step of {message.tokens} tokens over blocks {self.span.start}:{self.span.end}"
        metadata: dict[str, Any] = {"session_id": self.session_id, "step_id": step_id}
        metadata["args_structure"] = wire.structure(3)
        if self.steps == 0:
            metadata |= {"max_length": self.max_length, "points": 0.0, "active_adapter": None}
            if self.alloc_timeout:
                metadata["alloc_timeout"] = self.alloc_timeout
        if position != self.position:
            metadata["start_from_position"] = position
        if next_servers:
            metadata["next_servers"] = list(next_servers)
        tensors = (
            message.hidden,
            wire.no_prompts() if message.prompts is None else message.prompts,
            wire.no_hypo_ids() if hypo_ids is None else hypo_ids,
        )
        request = wire.request(self.network.uid(self.span.start, self.span.end), tensors, metadata)
        try:
            if self._channel is None:
                self._channel = await self.network.open(self.span.peer_id, "rpc_inference")
            async with asyncio.timeout(timeout):
                answer = await self._exchange(self._channel, request, message.hidden)
        except TimeoutError:
            raise PeerFailure(self.span.peer_id, f"did not answer {what} within {timeout:g} s") from None
        except ValueError as error:
            raise PeerFailure(self.span.peer_id, f"{what}: {error}") from error
        self.position = position + message.tokens
        self.steps += 1
        self.last_used = time.monotonic()
        return answer

    async def _exchange(self, channel: Channel, request: Any, hidden: torch.Tensor) -> torch.Tensor:
        shape = tuple(hidden.shape)
        sending = asyncio.create_task(channel.send([request]))  # a refusal may come before all of it is read
        try:
            response = await channel.receive(wire.answer_limit([shape]))
            if response is None:
                raise PeerFailure(self.span.peer_id, "ended the session without an answer")
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        (answer,) = wire.response([response], [shape], like=hidden)
        return answer

    async def close(self, *, politely: bool = True) -> None:
        """End the session; `politely` waits up to a second until the server has freed its cache."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        try:
            if politely:
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await self._say_goodbye(channel)
        except (TimeoutError, PeerFailure):
            pass  # it is over either way
        finally:
            channel.close()

    async def _say_goodbye(self, channel: Channel) -> None:
        await channel.send([wire.empty_request()], end=True)
        while await channel.receive(wire.STREAM_PART_BYTES) is not None:
            pass
