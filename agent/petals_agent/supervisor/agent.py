"""The agent: brings its host into the swarm, keeps a container serving, tells the truth about it, and leaves cleanly.

    agent = Agent(load_config(Path("petals-agent.toml")))
    agent.run()            # until SIGINT, SIGTERM or agent.shutdown() from another thread
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path

from petals_agent import __version__
from petals_agent.config.schema import Config
from petals_agent.errors import AgentError, ContainerError, ModelError, SwarmError
from petals_agent.link import messages
from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.config.messages import check_span  # noqa: E402
from petals_agent.p2p.control import remove_stream_handlers  # noqa: E402
from petals_agent.p2p.daemon import DaemonOptions  # noqa: E402
from petals_agent.supervisor.container import ContainerProcess  # noqa: E402
from petals_agent.supervisor.control import ControlServer  # noqa: E402
from petals_agent.supervisor.network import Network  # noqa: E402
from petals_agent.supervisor.states import Life, State  # noqa: E402
from petals_agent.supervisor.status import Status, read_status  # noqa: E402
from petals_agent.swarm.announcer import Announced, announce, register_model  # noqa: E402
from petals_agent.swarm.choice import choose_span  # noqa: E402
from petals_agent.swarm.identity import IdentityLock, ensure_identity  # noqa: E402
from petals_agent.swarm.pings import PingBook, ping_all, ping_targets  # noqa: E402
from petals_agent.swarm.records import ModelRecord, ServerInfo, ServerState  # noqa: E402
from petals_agent.swarm.view import read_view  # noqa: E402

log = logging.getLogger("petals_agent")

HELLO_TIMEOUT_S = 60.0
OFFLINE_TIMEOUT_S = 2.0
_RESTART_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_STEADY_S = 60.0  # a container that lived so long starts the back-off anew


class Agent:
    """One host's membership in one swarm. Build it, then `run()` (blocking) or `await serve()`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.life = Life()
        self.started = time.time()
        self.peer_id = ""
        self.model: messages.Inspected | None = None
        self.span: tuple[int, int] | None = None
        self.loaded: messages.Loaded | None = None
        self.progress: messages.Progress | None = None
        self.container: ContainerProcess | None = None
        self.container_restarts = 0
        self.announced: Announced | None = None
        self.network = Network(_daemon_options(config), self.life.note)
        self._pings = PingBook()
        self._rng = random.Random()
        self._state_to_announce = ServerState.JOINING
        self._announce_now = asyncio.Event()
        self._stop = asyncio.Event()
        self._stop_timeout: float | None = config.serve.drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finished = threading.Event()

    # --- embedding

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or `shutdown`; a second signal ends the process at once. Raises AgentError."""
        asyncio.run(self._run_with_signals())

    def shutdown(self, timeout: float | None = 5.0) -> None:
        """Leave: announce OFFLINE, wait `timeout` seconds for requests in flight (None: without limit), end all processes.

        To be called from another thread than that of `run`; returns when the agent has ended.
        """
        if self._loop is None:
            return
        self._loop.call_soon_threadsafe(self.stop, timeout)
        self._finished.wait()

    def stop(self, timeout: float | None = 5.0) -> None:
        """What `shutdown` does, from the agent's own thread, without waiting for the end."""
        self._stop_timeout = timeout
        self._stop.set()

    async def _run_with_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def leave() -> None:
            if self._stop.is_set():
                log.warning("second signal: ending at once")
                os._exit(1)  # children die with us
            self.stop(self.config.serve.drain_timeout)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, leave)
        await self.serve()

    async def serve(self) -> None:
        """Serve until `stop`. Raises AgentError when serving is impossible (configuration, model)."""
        self._loop = asyncio.get_running_loop()
        identity = self.config.swarm.identity
        self.peer_id = await asyncio.to_thread(ensure_identity, identity)
        lock = IdentityLock(identity)
        control = ControlServer(self.config.control.socket, {"status": self._status})
        try:
            await control.start()
            await self._until_stopped()
        finally:
            await control.stop()
            lock.release()
            self._finished.set()

    async def _status(self, request: object) -> dict[str, object]:
        return self.status().to_dict()

    def status(self) -> Status:
        """A snapshot of everything an operator asks about."""
        return read_status(self)

    # --- life

    async def _until_stopped(self) -> None:
        work = asyncio.create_task(self._work(), name="work")
        stopped = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            await self._leave(work)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise _root(error)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_network(), name="network")
            group.create_task(self._keep_container(), name="container")
            group.create_task(self._keep_announced(), name="announce")

    async def _leave(self, work: asyncio.Task[None]) -> None:
        """OFFLINE first, then no new requests, then those in flight, then the processes."""
        self.life.enter(State.STOPPING, "asked to stop" if self._stop.is_set() else "cannot go on")
        if self._state_was_announced():
            self._state_to_announce = ServerState.OFFLINE
            try:
                await self._announce(OFFLINE_TIMEOUT_S)
            except SwarmError as error:
                self.life.note("announce", f"the OFFLINE record did not go out: {error}")
        container = self.container
        if container is not None and self.loaded is not None and container.process.returncode is None:
            await self._drain(container)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        if self.container is not None:
            await self.container.stop(grace=2.0)
        await self.network.stop()
        self.life.enter(State.OFFLINE, "all processes ended")

    async def _drain(self, container: ContainerProcess) -> None:
        timeout = self._stop_timeout
        try:
            limit = None if timeout is None else timeout + 1.0
            drained = await container.request(messages.Drain(timeout=timeout), messages.Drained, limit)
        except ContainerError as error:
            self.life.note("drain", f"not drained: {error}")
        else:
            if drained.in_flight:
                self.life.note("drain", f"{drained.in_flight} requests were still unanswered after {timeout:g} s")

    async def _keep_network(self) -> None:
        await self.network.start()
        await self.network.keep()

    # --- the container

    async def _keep_container(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                ended = await self._one_container()
            except ModelError:
                raise  # trying again would give the same
            except ContainerError as error:
                ended = str(error)
            if self.life.state in (State.STOPPING, State.OFFLINE):
                return
            failures = 1 if time.monotonic() - began > _STEADY_S else failures + 1
            self.container_restarts += 1
            self.life.note("container", f"{ended}; starting another one")
            if self.life.state is not State.STARTING:
                self.life.enter(State.RECOVERING, ended)
            self._announce_as(ServerState.JOINING)
            await self._clean_up()
            await asyncio.sleep(_RESTART_BACKOFF_S[min(failures - 1, len(_RESTART_BACKOFF_S) - 1)])

    async def _one_container(self) -> str:
        """From start to end of one container; returns how it ended. Raises ModelError when no other would do better."""
        config = self.config
        container = await ContainerProcess.start(config.control.socket.parent, config.log.level.upper())
        self.container = container
        container.on_progress = self._take_progress
        await container.hello(HELLO_TIMEOUT_S)
        inspect = messages.Inspect(config=config.model_dump_json())
        self.model = await container.request(inspect, messages.Inspected, timeout=None)
        await self.network.up.wait()
        if self.span is None:
            self.span = await self._choose(self.model)
            self.life.enter(State.JOINING, f"loading blocks {self.span[0]}:{self.span[1]}")
        self._announce_as(ServerState.JOINING)
        load = messages.Load(start=self.span[0], end=self.span[1])
        self.loaded = await container.request(load, messages.Loaded, timeout=None)
        ended = asyncio.create_task(container.wait(), name="container exit")
        try:
            while not ended.done():
                await self._attach(container)
                lost = asyncio.create_task(self._network_lost(), name="network lost")
                try:
                    await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    lost.cancel()
            return f"the container ended: {ended.result()}"
        finally:
            ended.cancel()
            self.loaded = None

    async def _attach(self, container: ContainerProcess) -> None:
        """Let the container serve on the present p2pd, and say ONLINE; retried while p2pd is being replaced."""
        for pause in itertools.chain((0.1, 0.2, 0.5, 1.0), itertools.repeat(2.0)):
            await self.network.up.wait()
            daemon = self.network.daemon
            if daemon is None:
                continue
            attach = messages.Attach(daemon=daemon.maddr, peer_id=daemon.peer_id, client_mode=False)
            try:
                await container.request(attach, messages.Attached, timeout=15.0)
                break
            except ContainerError as error:
                if container.process.returncode is not None:
                    return
                self.life.note("attach", f"{error}; trying again")
                await asyncio.sleep(pause)
        span = self.span
        assert span is not None
        self.life.enter(State.ONLINE, f"serving blocks {span[0]}:{span[1]}")
        self._announce_as(ServerState.ONLINE)

    async def _network_lost(self) -> None:
        daemon = self.network.daemon
        if daemon is not None:
            await daemon.process.wait()
        while self.network.daemon is daemon and self.network.up.is_set():
            await asyncio.sleep(0.01)
        self.life.enter(State.RECOVERING, "p2pd is being replaced")

    async def _clean_up(self) -> None:
        """p2pd would go on sending streams to the dead container's socket."""
        container, daemon = self.container, self.network.daemon
        if container is None:
            return
        await container.stop(grace=0.0)
        attached = container.attached
        if attached is None:
            return
        Path(attached.listen_path).unlink(missing_ok=True)
        if daemon is not None:
            for name in attached.names:
                try:
                    await remove_stream_handlers(daemon.maddr, attached.listen_path, [name])
                except SwarmError:
                    pass  # unary names are forgotten by p2pd itself

    def _take_progress(self, progress: messages.Progress) -> None:
        self.progress = progress

    async def _choose(self, model: messages.Inspected) -> tuple[int, int]:
        """The span to serve: as configured, or where the swarm needs it most (protocol.md §9.4)."""
        serve = self.config.serve
        if serve.span is not None:
            check_span(serve.blocks, model.num_blocks, self.config.origin("serve.blocks"))
            return serve.span
        count = model.fit_blocks if serve.num_blocks == "auto" else serve.num_blocks
        if count < 1:
            raise ModelError(
                f"not one block of {self.config.model.path} fits into the free memory of {model.device}; "
                "free some, choose a smaller dtype or set serve.num_blocks"
            )
        count = min(count, model.num_blocks)
        if count == model.num_blocks:
            return 0, count
        await asyncio.sleep(self._rng.random() * 2 * self.config.balance.mean_block_selection_delay)
        while True:
            await self.network.up.wait()
            try:
                view = await read_view(self.network.node, model.dht_prefix, model.num_blocks)
                return choose_span(view, count, self.peer_id)
            except SwarmError as error:
                self.life.note("choose", f"the swarm could not be read: {error}; trying again")
                await asyncio.sleep(1.0)

    # --- announcements

    def _announce_as(self, state: ServerState) -> None:
        self._state_to_announce = state
        self._announce_now.set()

    def _state_was_announced(self) -> bool:
        return self.announced is not None and self.announced.state is not ServerState.OFFLINE

    async def _keep_announced(self) -> None:
        """Store our record whenever it changes, and anew each update period."""
        period = self.config.swarm.update_period
        while True:
            try:
                async with asyncio.timeout(period):
                    await self._announce_now.wait()
            except TimeoutError:
                pass
            self._announce_now.clear()
            await self.network.up.wait()
            if self.span is None or self.model is None:
                continue
            try:
                await self._announce(timeout=min(period, 10.0))
                await self._after_announcing()
            except SwarmError as error:
                self.life.note("announce", f"{error}; trying again")
                await asyncio.sleep(min(1.0, period))
                self._announce_now.set()

    async def _announce(self, timeout: float) -> None:
        node, model, span = self.network.node, self.model, self.span
        if node is None or model is None or span is None:
            raise SwarmError("there is no connection to the swarm")
        info = self.server_info()
        before = self.announced
        self.announced = await announce(
            node,
            self.peer_id,
            model.dht_prefix,
            span,
            info,
            update_period=self.config.swarm.update_period,
            timeout=timeout,
        )
        if before is None or before.state is not info.state:
            self.life.note("announce", f"{info.state.name} for blocks {span[0]}:{span[1]}")

    async def _after_announcing(self) -> None:
        """What each period also brings: the registry's entry, pings to following servers, peers to remember."""
        node, model, span = self.network.node, self.model, self.span
        if node is None or model is None or span is None:
            return
        period = self.config.swarm.update_period
        record = ModelRecord(model.num_blocks, model.repository)
        await register_model(node, model.dht_prefix, record, update_period=period, timeout=min(period, 10.0))
        try:
            view = await read_view(node, model.dht_prefix, model.num_blocks)
            await ping_all(node, ping_targets(view, self.peer_id, *span, self._rng), self._pings)
            await self.network.remember_peers()
        except (AgentError, TimeoutError, OSError) as error:
            log.info("pings were left out: %s", error)

    def server_info(self) -> ServerInfo:
        """Our record as it would be announced now."""
        state, loaded, span = self._state_to_announce, self.loaded, self.span
        assert span is not None
        beat = self.container.beat if self.container is not None else None
        return ServerInfo(
            state=state,
            throughput=loaded.throughput if loaded is not None else _configured(self.config.serve.throughput),
            start_block=span[0],
            end_block=span[1],
            public_name=self.config.swarm.public_name or None,
            version=__version__,
            network_rps=loaded.network_rps if loaded is not None else None,
            forward_rps=loaded.forward_rps if loaded is not None else None,
            inference_rps=loaded.inference_rps if loaded is not None else None,
            torch_dtype=self.model.dtype if self.model is not None else None,
            quant_type="none",
            using_relay=False,
            cache_tokens_left=_cache_left(beat, loaded),
            next_pings=self._pings.as_dict() if state is not ServerState.OFFLINE else None,
        )


def _cache_left(beat: messages.Beat | None, loaded: messages.Loaded | None) -> int | None:
    if loaded is None:
        return None
    return loaded.cache_units if beat is None or beat.cache_units_left == 0 == beat.sessions else beat.cache_units_left


def _configured(throughput: float | str) -> float:
    return float(throughput) if not isinstance(throughput, str) else 0.0


def _root(error: BaseException) -> BaseException:
    """The first real error inside a task group's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _daemon_options(config: Config) -> DaemonOptions:
    swarm = config.swarm
    return DaemonOptions(
        identity=swarm.identity,
        initial_peers=swarm.entry_peers,
        listen=swarm.listen,
        announce=swarm.announce,
        use_relay=swarm.relay,
        use_auto_relay=swarm.relay,
        startup_timeout=swarm.daemon_startup_timeout,
        socket_dir=config.control.socket.parent,
    )
