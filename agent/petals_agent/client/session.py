"""An inference session over a chain of servers that outlives any of them.

For each server we keep what entered its span. When one is lost, its blocks are routed anew, the history is replayed to
the replacement (one or several servers), and the step goes on; the other servers of the chain keep their caches.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType

import torch

from petals_agent.client.blame import PeerFailure, Retry
from petals_agent.client.history import History, Message, split
from petals_agent.client.network import Network
from petals_agent.client.stream import NextServer, ServerSession, can_roll_back
from petals_agent.errors import ClientError
from petals_agent.swarm.view import Span

log = logging.getLogger("petals_agent.client")

MAX_STEP_TOKENS = 1024  # longer prefills go in pieces, so that each is answered long before the timeout
_ALLOC_TIMEOUT = 10.0  # seconds to queue for room at a server, once nobody had some at once
_IDLE = 60.0  # seconds after which a closed stream is no fault of the server (its step timeout)


@dataclass
class _Hop:
    server: ServerSession
    history: History = field(default_factory=History)


class InferenceSession:
    """Decode through blocks [start, end) with up to `max_length` tokens for each of `batch_size` sequences.

    `async with session: hidden = await session.step(hidden)`. With `push` servers are asked to hand their output to the
    next one directly. After an exception from `step` the session is closed.
    """

    def __init__(
        self,
        network: Network,
        start: int,
        end: int,
        max_length: int,
        *,
        batch_size: int = 1,
        push: bool = False,
    ) -> None:
        self._network = network
        self.start, self.end = start, end
        self.max_length = max_length
        self.batch_size = batch_size
        self.push = push
        self._hops: list[_Hop] = []
        self._position = 0
        self._closed = False
        self._stepping = False

    async def __aenter__(self) -> InferenceSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def route(self) -> list[Span]:
        """The servers in use; empty before the first step."""
        return [hop.server.span for hop in self._hops]

    @property
    def position(self) -> int:
        """Tokens processed. Setting a smaller value makes the next step continue from there."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self._position:
            raise ClientError(
                f"a session at position {self._position} cannot go to {value}, only back to 0 or more"
            )
        self._position = value

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Process hidden states [batch, n, hidden]; returns the same shape, dtype and device.

        `prompts` [blocks, batch or 1, p ≤ n, hidden] are added to the first p positions before each block; `hypo_ids`
        (int64 [batch]) names for each row the row whose past it continues (beam search). Raises ClientError when
        `max_length` is exceeded or no servers can be found; bounded by the network's options.
        """
        self._check(hidden, prompts, hypo_ids)
        self._stepping = True
        try:
            outputs = []
            for piece in split(Message(hidden.detach(), prompts), MAX_STEP_TOKENS):
                outputs.append(await self._step(piece, hypo_ids))
                hypo_ids = None
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        except BaseException:
            await self.close(politely=False)
            raise
        finally:
            self._stepping = False

    def _check(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None
    ) -> None:
        if self._closed:
            raise ClientError("the session is closed (it ended, or a step failed); open a new one")
        if self._stepping:
            raise ClientError("a step of this session is still running; await it first")
        if hidden.dim() != 3 or hidden.shape[0] != self.batch_size or 0 in hidden.shape:
            raise ClientError(
                f"hidden states must be [{self.batch_size}, n, hidden], not {list(hidden.shape)}"
            )
        if self._position + hidden.shape[1] > self.max_length:
            raise ClientError(
                f"{hidden.shape[1]} more tokens after {self._position} exceed the session's max_length {self.max_length}"
            )
        blocks, (batch, tokens, size) = self.end - self.start, hidden.shape
        if prompts is not None and not (
            prompts.dim() == 4
            and prompts.shape[0] == blocks
            and prompts.shape[1] in (1, batch)
            and prompts.shape[2] <= tokens
            and prompts.shape[3] == size
        ):
            raise ClientError(
                f"prompts must be [{blocks}, 1 or {batch}, ≤{tokens}, {size}], not {list(prompts.shape)}"
            )
        if hypo_ids is not None and (hypo_ids.shape != (batch,) or hypo_ids.dtype != torch.int64):
            raise ClientError(
                f"hypo_ids must be int64 [{batch}], not {hypo_ids.dtype} {list(hypo_ids.shape)}"
            )

    async def _step(self, message: Message, hypo_ids: torch.Tensor | None) -> torch.Tensor:
        """One message through the whole chain."""
        step_id = str(uuid.uuid4())
        for hop in self._hops:
            hop.history.truncate(self._position)
            if hypo_ids is not None:
                hop.history.reorder(hypo_ids)
        index, hidden = 0, message.hidden
        if not self._hops:
            hidden, self._hops = await self._enter(self.start, self.end, History(), message, None)
            index = len(self._hops)
        while index < len(self._hops):
            hop, entering = self._hops[index], Message(hidden, message.prompts)
            failure: PeerFailure | None = None
            try:
                hidden = await self._through(hop, index, entering, hypo_ids, step_id)
                index += 1
                continue
            except PeerFailure as error:
                failure = error
            except _CannotRollBack:
                pass
            await hop.server.close(politely=failure is None)
            span = hop.server.span
            if failure is not None:
                log.warning("%s; moving blocks %d:%d elsewhere", failure, span.start, span.end)
            lost = None if failure is None else (failure, time.monotonic() - hop.server.last_used > _IDLE)
            hidden, replacement = await self._enter(span.start, span.end, hop.history, entering, lost)
            self._hops[index : index + 1] = replacement
            index += len(replacement)
        self._position += message.tokens
        return hidden

    async def _through(
        self, hop: _Hop, index: int, message: Message, hypo_ids: torch.Tensor | None, step_id: str
    ) -> torch.Tensor:
        """One message through a server that has the history."""
        server = hop.server
        if server.position != self._position and not can_roll_back(server.span.info.version):
            raise _CannotRollBack
        answer = await server.step(
            self._for_span(message, server.span),
            hypo_ids,
            step_id=step_id,
            position=self._position,
            next_servers=self._push_targets(index, message),
        )
        hop.history.append(message)
        self._network.bans.succeeded(server.span.peer_id)
        return answer

    def _push_targets(self, index: int, message: Message) -> list[NextServer]:
        """The servers after `index` that can take this step from the one before them (protocol.md §4.6)."""
        if not self.push or message.prompts is not None:
            return []
        targets = []
        for hop in self._hops[index + 1 :]:
            if hop.server.steps == 0 or hop.server.position != self._hops[index].server.position:
                break
            targets.append(hop.server.address)
        return targets

    async def _enter(
        self,
        start: int,
        end: int,
        history: History,
        message: Message,
        lost: tuple[PeerFailure, bool] | None,
    ) -> tuple[torch.Tensor, list[_Hop]]:
        """Find servers for blocks [start, end), replay `history` to them, then run `message`.

        `lost`: why the previous server is gone, and whether that was only because the session was idle. Returns the
        output for `message` and the hops. Raises ClientError when the retries are used up.
        """
        retry = Retry(self._network.bans, self._network.options.max_retries, f"blocks {start}:{end}")
        if lost is not None:
            retry.failed(lost[0], innocent=lost[1])
        fresh, patience = lost is not None, 0.0
        while True:
            hops: list[_Hop] = []
            try:
                route = await self._network.route(
                    start,
                    end,
                    cache_tokens=self.batch_size * self.max_length,
                    avoid=retry.avoided,
                    fresh=fresh,
                )
                messages = [*history.replay(MAX_STEP_TOKENS), message]
                step_ids = [str(uuid.uuid4()) for _ in messages]  # the same at each server of the route
                for span in route:
                    hops.append(_Hop(ServerSession(self._network, span, self.max_length, patience)))
                    messages = await self._replay(hops[-1], messages, step_ids)
                return messages[-1].hidden, hops
            except ClientError as error:
                await self._close(hops)
                wait, fresh, patience = retry.failed(error), True, _ALLOC_TIMEOUT
                log.warning("%s; next attempt for blocks %d:%d in %g s", error, start, end, wait)
            except BaseException:
                await self._close(hops)
                raise
            await asyncio.sleep(wait)

    async def _replay(self, hop: _Hop, messages: list[Message], step_ids: list[str]) -> list[Message]:
        """All messages through one new server; returns what the next one gets."""
        outputs = []
        for message, step_id in zip(messages, step_ids, strict=True):
            position = hop.server.position
            answer = await hop.server.step(
                self._for_span(message, hop.server.span), None, step_id=step_id, position=position
            )
            hop.history.append(message)
            outputs.append(Message(answer, message.prompts))
        self._network.bans.succeeded(hop.server.span.peer_id)
        return outputs

    def _for_span(self, message: Message, span: Span) -> Message:
        if message.prompts is None:
            return message
        return Message(message.hidden, message.prompts[span.start - self.start : span.end - self.start])

    async def close(self, *, politely: bool = True) -> None:
        """Free the servers' caches; the session cannot be used again."""
        self._closed = True
        hops, self._hops = self._hops, []
        await self._close(hops, politely=politely)

    @staticmethod
    async def _close(hops: list[_Hop], *, politely: bool = False) -> None:
        await asyncio.gather(*(hop.server.close(politely=politely) for hop in hops))


class _CannotRollBack(Exception):
    """The server is too old for `start_from_position`; it needs a new session."""
