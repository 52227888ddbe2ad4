"""rpc_inference: one stream is one session, its KV cache lives as long as the stream (protocol.md §4)."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from petals_agent.engine.session import Session
from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.p2p.streams import Stream
from petals_agent.serving import wire
from petals_agent.serving.push import Pushed, SeenSteps, send_push
from petals_agent.serving.server import BlockServer, check_adapter

from hivemind.proto import runtime_pb2  # isort: skip

log = logging.getLogger("petals_agent.inference")

_LARGE = 2**18  # elements from which encoding would hold up other sessions


@dataclass(frozen=True)
class Step:
    """One request of a session, checked."""

    hidden: torch.Tensor  # [rows, n, hidden_size]
    prompts: torch.Tensor | None  # [blocks, rows or 1, p, hidden_size]
    hypo_ids: torch.Tensor | None  # [rows] int64
    rollback_to: int | None
    others: list[runtime_pb2.Tensor] = field(default_factory=list)  # prompts and hypo_ids as they came


async def serve_session(server: BlockServer, stream: Stream) -> None:
    """Handle one stream from its first message to its end; the cache is freed however it ends."""
    limits = server.limits
    server.check_open()
    if server.sessions >= limits.max_sessions:
        raise LimitExceeded(
            f"this server has {limits.max_sessions} open sessions, which is its limit; try another one"
        )
    server.sessions += 1
    try:
        async with asyncio.timeout(limits.session_timeout) as session_time:
            try:
                await _session(server, stream)
            except TimeoutError:
                if session_time.expired():
                    raise
                # the next step did not come in step_timeout: closed without an error, as Petals does
    except TimeoutError:
        raise LimitExceeded(
            f"the session lasted longer than session_timeout ({limits.session_timeout:g} s)"
        ) from None
    finally:
        server.sessions -= 1


async def _session(server: BlockServer, stream: Stream) -> None:
    limits = server.limits
    body = await _receive(stream, limits.step_timeout)
    if body is None:
        return
    request, metadata = _parse(server, body)
    start, end = server.chain(request.uid)
    check_adapter(wire.text(metadata, "active_adapter"))
    wire.number(metadata, "points", 0.0)
    tensors = wire.ordered(request.tensors, metadata.get("args_structure"))
    session = Session(_rows(server, tensors), _max_length(server, metadata), start, end)
    with server.using(stream, (start, end)):
        await _serve(server, stream, session, request, metadata)


async def _serve(
    server: BlockServer,
    stream: Stream,
    session: Session,
    request: runtime_pb2.ExpertRequest,
    metadata: dict[str, Any],
) -> None:
    limits = server.limits
    session_id = wire.text(metadata, "session_id")
    if session_id is not None:
        server.pushes.open(session_id, stream)
    try:
        units = 2 * session.rows * session.max_length * (session.end - session.start)
        wait = min(wire.number(metadata, "alloc_timeout", 0.0), limits.max_alloc_timeout)
        await server.ledger.reserve(units, wait)
        try:
            await _steps(server, stream, session, request, metadata)
        finally:
            server.engine.close(session)
            server.ledger.release(units)
    finally:
        if session_id is not None:
            server.pushes.close(session_id, stream)


async def _steps(
    server: BlockServer,
    stream: Stream,
    session: Session,
    request: runtime_pb2.ExpertRequest,
    metadata: dict[str, Any],
) -> None:
    structure = metadata.get("args_structure")  # the first request's counts for the whole session
    seen = SeenSteps()
    pushed = False
    while request.tensors:
        with server.working():
            step = _next_step(server, session, request, metadata, structure, seen, pushed)
            if step is not None:
                await _answer(server, stream, session, step, metadata)
        stream.answered()
        body = await _receive(stream, server.limits.step_timeout)
        if body is None:
            return
        pushed = isinstance(body, Pushed)
        request, metadata = _parse(server, body)


async def _answer(
    server: BlockServer, stream: Stream, session: Session, step: Step, metadata: dict[str, Any]
) -> None:
    if step.hidden.numel() == 0:
        if step.rollback_to is not None:
            session.length = step.rollback_to
        output = step.hidden.to(server.engine.backend.dtype)
    else:
        output = await server.engine.step(
            session,
            step.hidden,
            prompts=step.prompts,
            hypo_ids=step.hypo_ids,
            rollback_to=step.rollback_to,
        )
    if output.numel() > _LARGE:
        answer = await asyncio.to_thread(wire.encode_tensor, output, server.compression)
    else:
        answer = wire.encode_tensor(output, server.compression)
    targets = wire.next_servers(metadata, server.limits.max_next_servers)
    if targets and step.prompts is None:
        send_push(server, targets, metadata, answer, step.others)
    await stream.send(runtime_pb2.ExpertResponse(tensors=[answer]).SerializeToString())


async def _receive(stream: Stream, timeout: float) -> bytes | None:
    if stream.ready:
        return await stream.receive()
    async with asyncio.timeout(timeout):
        return await stream.receive()


def _parse(server: BlockServer, body: bytes) -> tuple[runtime_pb2.ExpertRequest, dict[str, Any]]:
    request: runtime_pb2.ExpertRequest = wire.parse(runtime_pb2.ExpertRequest, body)
    return request, wire.decode_metadata(request.metadata, server.limits.max_metadata_bytes)


def _rows(server: BlockServer, tensors: list[runtime_pb2.Tensor]) -> int:
    rows = tensors[0].size[0] if tensors and tensors[0].size else 1
    if not 0 < rows <= server.limits.max_rows:
        raise LimitExceeded(
            f"a batch of {rows} sequences was asked for; 1 to {server.limits.max_rows} are possible"
        )
    return int(rows)


def _max_length(server: BlockServer, metadata: dict[str, Any]) -> int:
    value, limit = metadata.get("max_length"), server.limits.inference_max_length
    if type(value) is not int:
        raise RequestError(f"max_length must be an int, not {type(value).__name__}")
    if not 0 <= value <= limit:
        raise LimitExceeded(f"max_length must be within 0 and inference_max_length ({limit}), not {value}")
    return value


def _next_step(
    server: BlockServer,
    session: Session,
    request: runtime_pb2.ExpertRequest,
    metadata: dict[str, Any],
    structure: Any,
    seen: SeenSteps,
    pushed: bool,
) -> Step | None:
    """The step to compute; None for a copy of one that was, and for a push that fits nothing (the client's copy will come)."""
    try:
        step_id = wire.text(metadata, "step_id")
        if step_id in seen:
            return None
        step = _check_step(server, session, request, metadata, structure)
    except RequestError as error:
        if not pushed:
            raise
        log.debug("a push was of no use: %s", error)
        return None
    seen.add(step_id)
    return step


def _check_step(
    server: BlockServer,
    session: Session,
    request: runtime_pb2.ExpertRequest,
    metadata: dict[str, Any],
    structure: Any,
) -> Step:
    """Everything about one step that can be wrong, before it costs compute."""
    limits, backend = server.limits, server.engine.backend
    tensors = wire.ordered(request.tensors, structure)
    if len(tensors) < 3:
        raise RequestError(
            f"an inference step needs hidden_states, prompts and hypo_ids; {len(tensors)} tensors came"
        )
    room = limits.max_batch_tokens * backend.hidden_size
    hidden = wire.decode_tensor(tensors[0], room)
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise RequestError(
            f"hidden_states must be floating [batch, tokens, hidden], not {list(hidden.shape)}"
        )
    rows, count, width = hidden.shape
    if rows != session.rows or width != backend.hidden_size:
        raise RequestError(
            f"hidden_states of shape {list(hidden.shape)} do not fit this session: "
            f"[{session.rows}, tokens, {backend.hidden_size}] is expected"
        )
    if rows * count > limits.max_batch_tokens:
        raise LimitExceeded(
            f"a step of {rows * count} tokens; max_batch_size here is {limits.max_batch_tokens}"
        )
    rollback = _rollback(session, metadata)
    length = session.length if rollback is None else rollback
    if length + count > session.max_length:
        raise LimitExceeded(
            f"Maximum length exceeded: prefix {length} + current {count} exceeds pre-allocated maximum {session.max_length}"
        )
    prompts = _prompts(server, session, tensors[1], rows, count)
    hypo_ids = _hypo_ids(tensors[2], rows)
    return Step(hidden, prompts, hypo_ids, rollback, list(tensors[1:3]))


def _rollback(session: Session, metadata: dict[str, Any]) -> int | None:
    value = metadata.get("start_from_position")
    if value is None or value == session.length:
        return None
    if type(value) is not int or not 0 <= value <= session.length:
        raise RequestError(
            f"start_from_position must be an int within 0 and the session's length {session.length}, not {str(value)[:32]}"
        )
    return value


def _prompts(
    server: BlockServer, session: Session, message: runtime_pb2.Tensor, rows: int, count: int
) -> torch.Tensor | None:
    if 0 in message.size:  # nearly always: a dummy
        return None
    blocks, width = session.end - session.start, server.engine.backend.hidden_size
    longest = min(count, server.limits.prompt_tokens)
    prompts = wire.decode_tensor(message, blocks * rows * longest * width)
    check_prompts(prompts, blocks, rows, count, width)
    return prompts


def check_prompts(prompts: torch.Tensor, blocks: int, rows: int, count: int, width: int) -> None:
    """Raises RequestError unless `prompts` is [blocks, rows or 1, p ≤ count, width], floating and finite."""
    shape = tuple(prompts.shape)
    if (
        prompts.dim() != 4
        or shape[0] != blocks
        or shape[1] not in (1, rows)
        or shape[2] > count
        or shape[3] != width
    ):
        raise RequestError(
            f"prompts of shape {list(shape)} do not fit: [{blocks}, {rows} or 1, at most {count}, {width}] is expected"
        )
    if not prompts.is_floating_point() or not bool(torch.isfinite(prompts).all()):
        raise RequestError("prompts must be floating and finite")


def _hypo_ids(message: runtime_pb2.Tensor, rows: int) -> torch.Tensor | None:
    if message.dtype != "int64":
        raise RequestError(f"hypo_ids must be int64, not {message.dtype[:32]!r}")
    if 0 in message.size:
        return None
    ids = wire.decode_tensor(message, max(rows, 1))
    if ids.shape != (rows,) or int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise RequestError(f"hypo_ids must be [{rows}] with values from 0 to {rows - 1}")
    return None if torch.equal(ids, torch.arange(rows)) else ids
