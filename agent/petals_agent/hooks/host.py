"""The plugin host: a process without torch in which every plugin lives, so that what they break is not the agent.

Nothing of a plugin runs in the main thread, which speaks with the agent: plain functions get a thread each, coroutines the
plugin's own loop in a thread of its own. A plugin that blocks is late, and the agent replaces this process.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import inspect
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from petals_agent import __version__
from petals_agent.errors import PluginError
from petals_agent.hooks import messages
from petals_agent.hooks.loading import Plugins, describe
from petals_agent.hooks.output import PERIOD_S, Allowance, Lines, Restraint, read_pipe, running, tell_dropped
from petals_agent.hooks.signatures import READING, SIGNATURES
from petals_agent.hooks.values import Probe
from petals_agent.link.channel import MAX_MESSAGE, Channel
from petals_agent.log import set_level, setup

log = logging.getLogger("petals_agent.plugins")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

Answer = messages.Returned | messages.Failed


class Host:
    """State of the process; every message of the agent has one method here."""

    def __init__(self, channel: Channel[messages.FromAgent], log_level: str) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._level = logging.getLevelNamesMapping()[log_level.upper()]
        self._plugins = Plugins()
        self._probes: dict[str, dict[str, Probe]] = {}
        self._loops: dict[str, asyncio.AbstractEventLoop] = {}

    async def run(self) -> None:
        """Until the agent says stop or is gone."""
        self._channel.send(messages.Hello(package=__version__))
        while (message := await self._channel.receive()) is not None:
            match message:
                case messages.Load():
                    self._in_thread(self._load, message)
                case messages.Call():
                    self._call(message)
                case messages.Look():
                    self._look(message)
                case messages.SetLog():
                    set_level(message.level)
                case messages.Stop():
                    return

    def _load(self, message: messages.Load) -> None:
        reports = []
        # pluggy asks the last one first
        for source in reversed(message.plugins):
            self._announce(source.name)
            running.set(source.name)
            report = self._plugins.load(source, self._level)
            self._end_if_forked()
            reports.append(report)
        self._send(messages.Loaded(plugins=reports[::-1], order=self._plugins.order()))

    def _announce(self, plugin: str) -> None:
        """Returns when the agent has been told: what the plugin does next may be the end of us."""
        told = threading.Event()

        def tell() -> None:
            self._channel.send(messages.Loading(plugin=plugin))
            told.set()

        self._loop.call_soon_threadsafe(tell)
        told.wait()

    def _call(self, message: messages.Call) -> None:
        signature = SIGNATURES[message.hook]
        given = signature.unpack(message.arguments)
        try:
            function, taken = self._plugins.function(message.plugin, message.hook)
        except LookupError:  # it was asked before the agent knew its hooks
            self._channel.send(messages.Returned(id=message.id, value=b"null"))
            return

        def write(value: Any) -> bytes:
            text = signature.answer.write(value)
            if message.hook == "health_probes":
                self._probes[message.plugin] = {probe.name: probe for probe in value or ()}
            return text

        arguments = {name: given[name] for name in taken}
        self._start(message.id, message.plugin, function, arguments, write)

    def _look(self, message: messages.Look) -> None:
        probe = self._probes.get(message.plugin, {}).get(message.probe)
        if probe is None:
            reason = f"plugin {message.plugin} has no probe {message.probe}"
            self._channel.send(messages.Failed(id=message.id, kind="junk", reason=reason))
            return
        self._start(message.id, message.plugin, probe.check, {}, READING.write)

    def _start(
        self,
        number: int,
        plugin: str,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        write: Callable[[Any], bytes],
    ) -> None:
        """Let the plugin's code run, and send what comes of it."""

        def answer_of(error: BaseException | None, value: Any) -> Answer:
            try:
                if error is not None:
                    raise error
                text = write(value)
                if len(text) > MAX_MESSAGE // 2:
                    raise PluginError(f"{len(text)} bytes were returned; {MAX_MESSAGE // 2} at most")
                return messages.Returned(id=number, value=text)
            except PluginError as problem:
                return messages.Failed(id=number, kind="junk", reason=str(problem))
            except BaseException as problem:  # SystemExit too
                log.debug("plugin %s", plugin, exc_info=problem)
                return messages.Failed(id=number, kind="raised", reason=describe(problem))

        def plain() -> None:
            running.set(plugin)
            error, value = None, None
            try:
                value = function(**arguments)
            except BaseException as raised:
                error = _as_raised(raised)
            self._end_if_forked()
            self._send(answer_of(error, value))

        async def coroutine() -> None:
            running.set(plugin)
            error, value = None, None
            try:
                value = await function(**arguments)
            except BaseException as raised:
                error = _as_raised(raised)
            self._end_if_forked()
            self._send(answer_of(error, value))

        if inspect.iscoroutinefunction(function):
            asyncio.run_coroutine_threadsafe(coroutine(), self._loop_of(plugin))
        else:
            self._in_thread(plain)

    def _loop_of(self, plugin: str) -> asyncio.AbstractEventLoop:
        if plugin not in self._loops:
            self._loops[plugin] = asyncio.new_event_loop()
            self._in_thread(self._loops[plugin].run_forever)
        return self._loops[plugin]

    def _in_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def _send(self, message: messages.FromHost) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._channel.send, message)

    def _end_if_forked(self) -> None:
        """A plugin forked and its child came back to us: there is one plugin host, and that is not it."""
        if os.getpid() != self._pid:
            os._exit(0)


def _as_raised(error: BaseException) -> BaseException:
    """A PluginError of a plugin's own is its failure, not our judgement about its answer."""
    return RuntimeError(str(error)) if isinstance(error, PluginError) else error


def _forked(link: int) -> None:
    """In the child of a plugin's fork: dies with us, and what it writes to the link goes nowhere."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nowhere, link, inheritable=False)


def _take_over_output() -> tuple[Allowance, Lines]:
    """What is printed from now on becomes log lines, whose own way out is none of files 1 and 2 any more."""
    allowance = Allowance()
    lines = Lines(allowance)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Restraint(allowance))
    read, write = os.pipe()
    for number in (1, 2):
        os.dup2(write, number)
    os.close(write)
    threading.Thread(target=read_pipe, args=(open(read, "rb", buffering=0), lines), daemon=True).start()
    sys.stdout = sys.stderr = lines
    return allowance, lines


async def _tell_what_was_dropped(allowance: Allowance) -> None:
    while True:
        await asyncio.sleep(PERIOD_S)
        for plugin, count in allowance.dropped().items():
            tell_dropped(plugin, count)


async def serve(end: socket.socket, log_level: str, allowance: Allowance) -> None:
    """Answer the agent on its socket until it says stop or is gone."""
    channel = await Channel.open(end, messages.TO_HOST)
    os.register_at_fork(after_in_child=lambda: _forked(end.fileno()))
    telling = asyncio.create_task(_tell_what_was_dropped(allowance), name="dropped lines")
    try:
        await Host(channel, log_level).run()
    finally:
        telling.cancel()
        for plugin, count in allowance.dropped().items():
            tell_dropped(plugin, count)


def main() -> None:
    """Started by the agent (process.py); ends when the link does."""
    parser = argparse.ArgumentParser(prog="petals-agent plugin host")
    parser.add_argument("--link-fd", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="auto")
    options = parser.parse_args()
    end = socket.socket(fileno=options.link_fd)
    end.set_inheritable(False)
    sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")
    setup(options.log_level, options.log_format, "plugins")
    allowance, _ = _take_over_output()
    asyncio.run(serve(end, options.log_level, allowance))
    logging.shutdown()
    os._exit(0)  # not held up by plugins' threads


if __name__ == "__main__":
    main()
