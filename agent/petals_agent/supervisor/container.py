"""The agent's side of one container: started, spoken to, and known to be dead the moment it is."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from petals_agent import __version__
from petals_agent.errors import AgentError, ConfigError, ContainerError, ModelError
from petals_agent.link import messages
from petals_agent.link.channel import Channel
from petals_agent.link.child import start_linked
from petals_agent.processes import describe_exit, signal_child

log = logging.getLogger("petals_agent.container")

Answer = TypeVar(
    "Answer",
    messages.Hello,
    messages.Inspected,
    messages.Loaded,
    messages.Retired,
    messages.Attached,
    messages.CanaryAnswer,
    messages.Drained,
)


class ContainerProcess:
    """One container process from start to end. `request` sends a message and waits for its answer."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel[messages.FromContainer]) -> None:
        self.process = process
        self.beat: messages.Beat | None = None
        self.beat_at = 0.0
        self.tokens_per_s = 0.0
        self.started = time.monotonic()
        self.heard_at = self.started  # of any message
        self._ours = False  # we killed it
        self.on_progress: Callable[[messages.Progress], None] = lambda progress: None
        self.on_beat: Callable[[messages.Beat], None] = lambda beat: None
        self._channel = channel
        # by the type of the request
        self._awaited: dict[
            str, tuple[type[messages.FromContainer], asyncio.Future[messages.FromContainer]]
        ] = {}
        self._hello: asyncio.Future[messages.FromContainer] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(), name="container link")

    @property
    def pid(self) -> int:
        return self.process.pid

    @classmethod
    async def start(cls, socket_dir: Path, log_level: str, log_format: str) -> ContainerProcess:
        """Start the process; it imports torch while we go on. `hello` tells when it is there. Raises ContainerError."""
        options = (f"--socket-dir={socket_dir}", f"--log-level={log_level}", f"--log-format={log_format}")
        threads = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_cores())),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        try:
            process, channel = await start_linked(
                "petals_agent.container.main", messages.TO_AGENT, options, threads
            )
        except OSError as error:
            raise ContainerError(f"no container could be started: {error}") from error
        return cls(process, channel)

    async def hello(self, timeout: float) -> None:
        """Wait for its first message.

        Raises ContainerError when none comes, AgentError when it is of another version: we were replaced on disk.
        """
        message = await self._within(self._hello, timeout, "say hello")
        assert isinstance(message, messages.Hello)
        if message.version != messages.VERSION or message.package != __version__:
            raise AgentError(
                f"petals-agent {message.package} is installed now and {__version__} runs; start the agent again"
            )

    async def request(
        self, message: messages.FromAgent, answer: type[Answer], timeout: float | None
    ) -> Answer:
        """Send and wait; one request of a type at a time.

        Raises ContainerError when the process dies or does not answer in `timeout` seconds, or the error that it reports.
        """
        if message.type in self._awaited:
            raise ContainerError(f"{message.type} was sent before the answer to another one came")
        future: asyncio.Future[messages.FromContainer] = asyncio.get_running_loop().create_future()
        self._awaited[message.type] = (answer, future)
        try:
            self._channel.send(message)
            result = await self._within(future, timeout, message.type)
        finally:
            del self._awaited[message.type]
        assert isinstance(result, answer)
        return result

    async def _within(
        self, future: asyncio.Future[messages.FromContainer], timeout: float | None, doing: str
    ) -> messages.FromContainer:
        ended = asyncio.create_task(self.process.wait())
        waited: set[asyncio.Future[Any]] = {future, ended}
        try:
            await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            if ended.done():
                raise ContainerError(
                    f"the container ended ({describe_exit(ended.result())}) before it could {doing}"
                )
            raise ContainerError(f"the container did not {doing} within {timeout:g} s")
        finally:
            ended.cancel()

    async def _read(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                self._take(message)
        except ContainerError as error:
            log.error("%s; ending it", error)
            self.kill()

    def _take(self, message: messages.FromContainer) -> None:
        self.heard_at = time.monotonic()
        if isinstance(message, messages.Beat):
            now = time.monotonic()
            if self.beat is not None and now > self.beat_at:
                self.tokens_per_s = (message.tokens - self.beat.tokens) / (now - self.beat_at)
            self.beat, self.beat_at = message, now
            self.on_beat(message)
        elif isinstance(message, messages.Progress):
            self.on_progress(message)
        elif isinstance(message, messages.Hello):
            if not self._hello.done():
                self._hello.set_result(message)
        elif isinstance(message, messages.Failed):
            _, future = self._awaited.get(message.doing, (None, None))
            if future is not None and not future.done():
                future.set_exception(_error(message))
        else:
            for expected, future in self._awaited.values():
                if isinstance(message, expected) and not future.done():
                    future.set_result(message)

    def tell(self, message: messages.FromAgent) -> None:
        """Send something that has no answer."""
        self._channel.send(message)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def ended(self) -> str:
        """Until the process ends; says how it ended."""
        before = oom_kills()
        how = describe_exit(await self.process.wait())
        if how == "killed by signal 9" and not self._ours:
            after = oom_kills()
            if before is None or after is None:
                how += ", probably by the kernel, out of memory"
            elif after > before:
                how += " by the kernel: out of memory"
        return f"the container ended: {how}"

    def kill(self) -> None:
        """SIGKILL, e.g. because it hangs."""
        self._ours = True
        signal_child(self.process, signal.SIGKILL)

    async def stop(self, grace: float) -> None:
        """Ask it to end, and kill it after `grace` seconds."""
        self._channel.send(messages.Stop())
        try:
            async with asyncio.timeout(grace):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._channel.close()


def oom_kills(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """How many processes of our cgroup (version 2) the kernel has killed for want of memory; None where it does not say."""
    try:
        group = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
        events = (root / group.lstrip("/") / "memory.events").read_text()
        return next(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _error(message: messages.Failed) -> AgentError:
    kinds: list[type[AgentError]] = [ConfigError, ContainerError, ModelError, *ModelError.__subclasses__()]
    kind = next((kind for kind in kinds if kind.code == message.code), ContainerError)
    error = kind(message.message)
    error.exit_code = message.exit_code
    return error
