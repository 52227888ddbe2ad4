"""Takes what plugins print and logs it line by line with their name, a bounded number of lines and characters of it."""

from __future__ import annotations

import contextvars
import io
import logging
import os
import threading
import time
from typing import BinaryIO

log = logging.getLogger("petals_agent.plugins")

MAX_LINE = 1000  # characters; the rest of a line is dropped
MAX_LINES = 50  # of one plugin within a period
PERIOD_S = 10.0
_CHUNK = 65536

running: contextvars.ContextVar[str] = contextvars.ContextVar("running", default="")
"""The plugin whose code runs in this thread or task; empty where that is not known, as in a plugin's own threads."""


class Allowance:
    """How much each plugin may still say; what was dropped is told with its next period."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent: dict[str, tuple[float, int, int]] = {}  # since when, lines said, lines dropped

    def take(self, plugin: str, now: float | None = None) -> tuple[bool, int]:
        """Whether one more line may be said at `now` (seconds, monotonic), and how many were dropped before it."""
        now = time.monotonic() if now is None else now
        with self._lock:
            since, said, dropped = self._spent.get(plugin, (now, 0, 0))
            if now - since >= PERIOD_S:
                since, said, before, dropped = now, 0, dropped, 0
            else:
                before = 0
            allowed = said < MAX_LINES
            self._spent[plugin] = since, said + allowed, dropped + (not allowed)
        return allowed, before

    def dropped(self) -> dict[str, int]:
        """What was dropped and not yet told, by plugin; told now."""
        with self._lock:
            found = {plugin: dropped for plugin, (_, _, dropped) in self._spent.items() if dropped}
            self._spent = {plugin: (since, said, 0) for plugin, (since, said, _) in self._spent.items()}
        return found


class Lines(io.TextIOBase):
    """Stands in for sys.stdout and sys.stderr: a line becomes a log line of the plugin that printed it."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._lock = threading.RLock()
        self._begun: dict[str, str] = {}  # lines without an end as yet, by plugin

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.take(running.get(), str(text))
        return len(text)

    def take(self, plugin: str, text: str) -> None:
        """Log the lines of `text` that are complete; never holds more than a line's worth of characters."""
        with self._lock:
            start = 0
            while (end := text.find("\n", start)) >= 0:
                line = self._begun.pop(plugin, "") + text[start : min(end, start + MAX_LINE)]
                say(self._allowance, plugin, line[:MAX_LINE])
                start = end + 1
            rest = self._begun.get(plugin, "") + text[start : start + MAX_LINE]
            if rest:
                self._begun[plugin] = rest[:MAX_LINE]


def say(allowance: Allowance, plugin: str, line: str) -> None:
    """Log one line of a plugin, or count it as dropped."""
    allowed, dropped = allowance.take(plugin)
    if dropped:
        tell_dropped(plugin, dropped)
    if allowed and line.strip():
        log.info("plugin %s: %s", plugin or "(which is not known)", line)


def tell_dropped(plugin: str, lines: int) -> None:
    """Say how much was not logged."""
    log.warning(
        "plugin %s: %d more lines were dropped; %d in %g s are logged",
        plugin or "(which is not known)",
        lines,
        MAX_LINES,
        PERIOD_S,
    )


class Restraint(logging.Filter):
    """Lines that plugins log are counted as those that they print; ours pass."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("petals_agent."):
            return True
        plugin = running.get()
        allowed, dropped = self._allowance.take(plugin)
        if dropped:
            tell_dropped(plugin, dropped)
        return allowed


def read_pipe(pipe: BinaryIO, lines: Lines) -> None:
    """Log what arrives in a pipe that stands for file 1 and 2: of C libraries and of programs that plugins start."""
    while chunk := os.read(pipe.fileno(), _CHUNK):
        lines.take("", chunk.decode(errors="replace"))
