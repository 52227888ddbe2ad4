"""The container process: obeys the agent over the link, serves blocks on its p2pd, and reports facts once a second."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from petals_agent import __version__
from petals_agent.config import config_from
from petals_agent.container.canary import Canary
from petals_agent.container.loading import ServedModel
from petals_agent.container.throughput import Rates
from petals_agent.container.trim import Trimmer
from petals_agent.engine.backend import Backend
from petals_agent.errors import AgentError, ContainerError
from petals_agent.histogram import Histogram
from petals_agent.link import messages
from petals_agent.link.channel import Channel
from petals_agent.log import event, set_level, setup
from petals_agent.models.memory import return_freed_memory
from petals_agent.p2p.attachment import Attachment
from petals_agent.p2p.streams import Stream, StreamServer
from petals_agent.serving.handlers import stream_handlers, unary_handlers
from petals_agent.serving.server import BlockServer

log = logging.getLogger("petals_agent.container")

BEAT_PERIOD_S = 1.0
_CUT_S = 5.0  # for sessions that were cut off to be gone


class Container:
    """State of the process; every message of the agent has one method here."""

    def __init__(self, channel: Channel[messages.FromAgent], socket_dir: Path) -> None:
        self._channel = channel
        self._socket_dir = socket_dir
        self._model: ServedModel | None = None
        self._server: BlockServer | None = None
        self._streams: StreamServer | None = None
        self._canary: Canary | None = None
        self._doors_closed = False
        self._asked: set[asyncio.Task[None]] = set()  # what may take long beside the orders

    async def run(self) -> None:
        """Until the agent says stop or is gone, whatever we are doing then."""
        self._channel.send(messages.Hello(package=__version__, pid=os.getpid()))
        orders: asyncio.Queue[messages.FromAgent] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._beat(), name="beat"),
            asyncio.create_task(self._obey_all(orders), name="orders"),
        ]
        try:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, messages.Stop):
                    return
                if isinstance(message, messages.Canary | messages.Move | messages.Retire):
                    # may take as long as the engine is busy, a load or sessions last, or for ever
                    task = asyncio.create_task(self._answer(message), name=message.type)
                    self._asked.add(task)
                    task.add_done_callback(self._asked.discard)
                elif not self._obey_at_once(message):
                    orders.put_nowait(message)
        finally:
            tasks += self._asked
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    def _obey_at_once(self, message: messages.FromAgent) -> bool:
        """What has no answer and takes no time; False for everything else."""
        match message:
            case messages.Doors():
                self._doors_closed = message.closed
                if self._server is not None:
                    self._server.closed = message.closed
                    self._channel.send(self._facts(lag=0.0))
            case messages.SetLog():
                set_level(message.level)
            case _:
                return False
        return True

    async def _obey_all(self, orders: asyncio.Queue[messages.FromAgent]) -> None:
        """One after the other; the agent never sends a second one before the first is answered."""
        while True:
            await self._answer(await orders.get())

    async def _answer(self, message: messages.FromAgent) -> None:
        try:
            await self._obey(message)
        except Exception as error:
            self._channel.send(_failed(message, error))

    async def _obey(self, message: messages.FromAgent) -> None:
        match message:
            case messages.Inspect():
                await self._inspect(message)
            case messages.Load():
                await self._load(message)
            case messages.Attach():
                await self._attach(message)
            case messages.Drain():
                await self._drain(message)
            case messages.Canary():
                await self._ask_canary()
            case messages.Move():
                await self._move(message)
            case messages.Retire():
                await self._retire(message)
            case _:
                raise ContainerError(f"no method for message {message.type!r}")

    async def _inspect(self, message: messages.Inspect) -> None:
        config = config_from(json.loads(message.config))
        self._model = await asyncio.to_thread(ServedModel.open, config, self._progress())
        self._channel.send(await asyncio.to_thread(self._model.inspect))

    async def _load(self, message: messages.Load) -> None:
        if self._model is None:
            raise ContainerError("load came before inspect")
        started = time.monotonic()
        backend, rates = await asyncio.to_thread(
            self._model.load, message.start, message.end, self._progress()
        )
        self._server = self._model.server(backend, message.start, message.end)
        self._server.closed = self._doors_closed
        self._server.engine.start(on_death=lambda: os._exit(70))  # the agent starts another container
        self._canary = Canary(self._server.engine, message.start, message.end)
        await self._canary.record()
        self._streams = StreamServer(
            stream_handlers(self._server),
            self._server.message_bytes,
            self._socket_dir,
            self._server.budget,
        )
        await self._streams.start()
        self._channel.send(self._loaded(self._server, self._streams, rates, time.monotonic() - started))

    async def _move(self, message: messages.Move) -> None:
        """The present blocks serve on, whatever becomes of it."""
        model, server, streams = self._model, self._server, self._streams
        if model is None or server is None or streams is None:
            raise ContainerError("move came before load")
        started, engine, backend = time.monotonic(), server.engine, server.engine.backend
        before = server.start, server.end
        pieces, rates = await asyncio.to_thread(
            model.more, backend, message.start, message.end, self._progress()
        )
        await engine.change(lambda: _join_all(backend, pieces))
        canary = Canary(engine, message.start, message.end, self._canary)
        try:
            await canary.record()
        except BaseException:
            await engine.change(lambda: backend.keep(*before))
            raise
        self._canary = canary
        server.offer(message.start, message.end, model.cache_units(len(backend.layers)))
        streams.message_limit = server.message_bytes
        self._channel.send(self._loaded(server, streams, rates, time.monotonic() - started))

    async def _retire(self, message: messages.Retire) -> None:
        model, server = self._model, self._server
        if model is None or server is None:
            raise ContainerError("retire came before load")
        left = await server.leave(message.timeout)
        for who in left:
            if isinstance(who, Stream):
                who.abort()
        await server.leave(_CUT_S)
        backend = server.engine.backend
        await server.engine.change(lambda: backend.keep(server.start, server.end))
        server.ledger.resize(model.cache_units(server.blocks))
        await asyncio.to_thread(return_freed_memory)
        self._channel.send(messages.Retired(cut=len(left)))

    def _loaded(
        self, server: BlockServer, streams: StreamServer, rates: Rates, took: float
    ) -> messages.Loaded:
        return messages.Loaded(
            start=server.start,
            end=server.end,
            backend=server.engine.backend.name,
            throughput=rates.throughput,
            network_rps=rates.network_rps,
            forward_rps=rates.forward_rps,
            inference_rps=rates.inference_rps,
            cache_units=server.ledger.capacity,
            load_s=took,
            stream_path=streams.path,
            stream_names=list(streams.handlers),
        )

    async def _attach(self, message: messages.Attach) -> None:
        server, streams = self._server, self._streams
        if server is None or streams is None:
            raise ContainerError("attach came before load")
        if server.attachment is not None:
            await server.attachment.close()
            server.attachment = None
        server.client_mode = message.client_mode
        server.attachment = await Attachment.open(message.daemon, unary_handlers(server), streams)
        self._channel.send(messages.Attached())

    async def _ask_canary(self) -> None:
        if self._canary is None:
            raise ContainerError("canary came before load")
        self._channel.send(messages.CanaryAnswer(problem=await self._canary.check()))

    async def _drain(self, message: messages.Drain) -> None:
        left = await self._server.drain(message.timeout) if self._server is not None else 0
        self._channel.send(messages.Drained(in_flight=left))

    def _progress(self) -> Callable[[str, int, int], None]:
        """A callback that any thread may call: text, done, total."""
        loop = asyncio.get_running_loop()

        def report(text: str, done: int, total: int) -> None:
            message = messages.Progress(text=text, done=done, total=total)
            loop.call_soon_threadsafe(self._channel.send, message)

        return report

    async def _beat(self) -> None:
        due, trimmer = time.monotonic() + BEAT_PERIOD_S, Trimmer()
        while True:
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            now = time.monotonic()
            facts = self._facts(lag=now - due)
            self._channel.send(facts)
            due = now + BEAT_PERIOD_S
            if self._server and trimmer.due(facts.progress, busy=bool(facts.queued or facts.in_flight)):
                await asyncio.to_thread(return_freed_memory)

    def _facts(self, lag: float) -> messages.Beat:
        server = self._server
        if server is None:
            return messages.Beat(loop_lag_s=lag)
        stats = server.engine.stats
        return messages.Beat(
            loop_lag_s=lag,
            progress=stats.progress,
            queued=server.engine.queued,
            closed=server.closed,
            sessions=server.sessions,
            in_flight=server.in_flight,
            cache_units_left=server.ledger.left,
            tokens=stats.tokens,
            requests=server.requests,
            batch_rows=_counted(stats.batch_rows),
            step_seconds=_counted(stats.step_seconds),
        )

    async def _close(self) -> None:
        if self._streams is not None:
            await self._streams.stop()
        if self._server is not None:
            if self._server.attachment is not None:
                await self._server.attachment.close()
            self._server.engine.stop(timeout=1.0)


def _join_all(backend: Backend, pieces: list[Backend]) -> None:
    for piece in pieces:
        backend.join(piece)


def _counted(histogram: Histogram) -> messages.Counted:
    return messages.Counted(counts=tuple(histogram.counts), total=histogram.total)


def _failed(message: messages.FromAgent, error: Exception) -> messages.Failed:
    """`error` as the agent is told of it; one that is not ours is logged with its traceback."""
    if isinstance(error, AgentError):
        return messages.Failed(
            doing=message.type, code=error.code, exit_code=error.exit_code, message=str(error)
        )
    extra = event("container_error", doing=message.type)
    log.error("%s failed", message.type, exc_info=error, extra=extra)
    text = f"{type(error).__name__}: {error}"
    return messages.Failed(doing=message.type, code="internal", exit_code=70, message=text)


async def _serve(link: socket.socket, socket_dir: Path) -> None:
    await Container(await Channel.open(link, messages.TO_CONTAINER), socket_dir).run()
    # now, not at the interpreter's leisure: a load in a thread, or a daemon thread of torch, would hold it up
    os._exit(0)


def main() -> None:
    """Entry point; started by the agent with an inherited socket."""
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="petals-agent-container", description=__doc__)
    parser.add_argument("--link-fd", type=int, required=True, help="inherited socketpair end to the agent")
    parser.add_argument("--socket-dir", type=Path, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="auto")
    arguments = parser.parse_args()
    setup(arguments.log_level, arguments.log_format, "container")
    # the agent decides when we end; systemd's signals may reach the whole unit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    uvloop.run(_serve(socket.socket(fileno=arguments.link_fd), arguments.socket_dir))


if __name__ == "__main__":
    main()
