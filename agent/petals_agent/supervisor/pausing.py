"""Leaves the device to others while a plugin or an operator wants that: drains, unloads, and loads again afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from petals_agent.config.schema import Config
from petals_agent.errors import Refused
from petals_agent.hooks.caller import PluginCaller
from petals_agent.hooks.values import Pause
from petals_agent.supervisor.serving import Serving
from petals_agent.supervisor.states import Life

_LOOK_S = 0.2  # at sessions that are still open


class Pausing:
    """`run()` as a task; `pause` and `resume` from the control socket. `reason`: why we pause or are about to."""

    def __init__(self, config: Config, plugins: PluginCaller, serving: Serving, life: Life) -> None:
        self._config = config
        self._plugins, self._serving, self._life = plugins, serving, life
        self._operator: Pause | None = None
        self._theirs: Pause | None = None  # the plugins' last answer
        self._present: Pause | None = None  # what is being carried out
        self._deadline = 0.0
        self._news = asyncio.Event()

    @property
    def reason(self) -> str | None:
        wanted = self._present or self._operator
        return wanted.reason if wanted is not None else None

    def take(self, config: Config) -> None:
        """Go by another configuration from now on."""
        self._config = config
        self._news.set()

    def pause(self, request: Mapping[str, Any]) -> None:
        """An operator wants it, until `resume` or a restart of the agent. Raises Refused."""
        reason, drain_s = request.get("reason") or "an operator asked for it", request.get("drain_s", 30.0)
        try:
            self._operator = Pause(reason, float(drain_s))
        except (ValidationError, TypeError, ValueError):
            raise Refused(
                f"no pause: the reason must be a text of at most 1000 characters, not {reason!s:.40}, and the drain's "
                f"limit a number of seconds up to 86400, not {drain_s!s:.40}"
            ) from None
        self._news.set()

    def resume(self) -> str | None:
        """The operator does not want it any more; returns which plugin's reason still stands, if any did at the last look."""
        mine, self._operator = self._operator, None
        self._theirs = None  # who wants it still says so again
        self._news.set()
        return self._present.reason if self._present not in (None, mine) else None

    async def run(self) -> NoReturn:
        """Ask the plugins each `plugins.pause_period`, and follow."""
        while True:
            self._news.clear()
            self._follow(await self._wanted())
            due = time.monotonic() + self._config.plugins.pause_period
            while (left := due - time.monotonic()) > 0 and not self._news.is_set():
                waits = self._unload_when_empty()
                try:
                    async with asyncio.timeout(min(left, _LOOK_S) if waits else left):
                        await self._news.wait()
                except TimeoutError:
                    pass

    async def first_look(self) -> None:
        """Before anything is loaded: who starts into a pause loads nothing."""
        self._follow(await self._wanted())
        self._unload_when_empty()

    async def _wanted(self) -> Pause | None:
        if self._operator is not None:
            return self._operator
        outcome = await self._plugins.call("should_pause", paused=self._serving.paused is not None)
        # when in doubt, what is stays
        if isinstance(outcome.value, Pause) or not (outcome.failures or self._silenced):
            self._theirs = outcome.value
        return self._theirs

    @property
    def _silenced(self) -> bool:
        """Whether somebody who would be asked is disabled."""
        return any(one.state == "disabled" and "should_pause" in one.hooks for one in self._plugins.plugins)

    def _follow(self, wanted: Pause | None) -> None:
        before, self._present = self._present, wanted
        if wanted is not None and wanted != before:
            deadline = time.monotonic() + wanted.drain_s
            self._deadline = deadline if before is None else min(self._deadline, deadline)
        if wanted is not None and before is None:
            text = f"to pause: {wanted.reason}"
            self._life.note("pause", text, stage="draining", reason=wanted.reason)
            self._life.decided("pause", "drain and unload", wanted.reason)
            self._serving.close_doors("pause", wanted.reason)
        if wanted is None and before is not None:
            self._life.note("pause", f"over: {before.reason}", stage="over", reason=before.reason)
            self._life.decided("pause", "serve again", f"over: {before.reason}")
            self._serving.open_doors("pause")
            self._serving.resume()

    def _unload_when_empty(self) -> bool:
        """Unload once no session is open or their time is over; whether that is still to come."""
        if self._present is None or self._serving.paused is not None:
            return False
        unfinished = self._serving.unfinished
        if unfinished == 0 or time.monotonic() > self._deadline:
            cut = unfinished or 0
            text = "nothing of ours is on the device" + (f"; {cut} sessions were cut off" if cut else "")
            self._life.note("pause", text, stage="paused", reason=self._present.reason, cut=cut)
            self._serving.pause(self._present.reason)
        return self._serving.paused is None
