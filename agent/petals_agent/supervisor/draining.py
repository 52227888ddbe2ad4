"""Maintenance: nobody new is let in, open sessions may end, and that stays so over restarts until `undrain`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from petals_agent.errors import SwarmError
from petals_agent.supervisor.network import Network
from petals_agent.supervisor.serving import Serving
from petals_agent.supervisor.states import Life
from petals_agent.swarm.records import ServerState
from petals_agent.swarm.view import read_view

log = logging.getLogger("petals_agent.drain")

_LOOK_S = 3.0
_EMPTY_LOOK_S = 0.2


@dataclass(frozen=True)
class Order:
    """What an operator asked for. `timeout` s for open sessions (None: until they end); `force`: also as the last holder."""

    reason: str = ""
    timeout: float | None = None
    force: bool = False
    kept: bool = True  # over restarts

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> Order:
        """From a control request; raises SwarmError."""
        reason, timeout = request.get("reason", ""), request.get("timeout")
        if not isinstance(reason, str) or len(reason) > 300:
            raise SwarmError("the reason of a drain must be a text of at most 300 characters")
        try:
            reason.encode()
        except UnicodeEncodeError:
            raise SwarmError(
                f"the reason of a drain must be text that can be written down, not {reason!a:.80}"
            ) from None
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
            raise SwarmError(f"the timeout of a drain must be a number of seconds, not {timeout!r}")
        if timeout is not None and not 0 <= timeout <= 10**7:
            raise SwarmError(f"the timeout of a drain must be between 0 and {10**7} s, not {timeout:g}")
        return cls(reason, timeout, bool(request.get("force")), bool(request.get("kept", True)))


class Draining:
    """`run()` as a task; `drain` and `undrain` from the control socket. `stage`: None, "begun", "waiting", "emptying", "drained"."""

    def __init__(self, folder: Path, network: Network, serving: Serving, life: Life) -> None:
        self._file = folder / "drain.json"
        self._network, self._serving, self._life = network, serving, life
        self._order: Order | None = None
        self._changed = asyncio.Event()
        self.stage: str | None = None
        self.detail = ""

    @property
    def reason(self) -> str:
        return self._order.reason if self._order is not None else ""

    def drain(self, order: Order) -> None:
        """Begin, or go on with another order. Raises SwarmError when it cannot be kept on disk."""
        if order.kept:
            self._keep(order)
        self._order = order
        if self.stage is None:
            self.stage = "begun"
            self.detail = "closing the doors" if order.force else "who else serves our blocks is looked up"
        self._changed.set()

    def undrain(self) -> None:
        """Let everybody in again."""
        self._file.unlink(missing_ok=True)
        self._order = None
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        order = await asyncio.to_thread(self._kept)
        if order is not None and self._order is None:
            self._order = Order(order.reason, order.timeout, force=True)  # it was drained before
        while True:
            self._changed.clear()
            work = asyncio.create_task(self._carry_out(self._order), name="drain")
            try:
                await self._changed.wait()
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _carry_out(self, order: Order | None) -> None:
        try:
            if order is None:
                await self._open()
            else:
                await self._empty(order)
        except Exception:
            log.exception("the drain stopped")

    async def _open(self) -> None:
        if self.stage is not None:
            self._life.note("drain", "undrained: new sessions are let in again", stage="none")
            self._life.decided("drain", "undrain", "an operator asked for it")
        self.stage, self.detail = None, ""
        self._serving.open_doors("drain")

    async def _empty(self, order: Order) -> None:
        if not order.force:
            await self._until_not_needed(order)
        why = f"drained for maintenance{f': {order.reason}' if order.reason else ''}"
        self._stage("emptying", why)
        self._life.decided("drain", "drain", order.reason or "an operator asked for it", force=order.force)
        self._serving.close_doors("drain", why)
        deadline = None if order.timeout is None else time.monotonic() + order.timeout
        while (sessions := self._serving.unfinished) != 0:
            self.detail = f"{sessions} sessions are open" if sessions else "closing the doors"
            if deadline is not None and time.monotonic() > deadline:
                text = f"{sessions or 'some'} sessions were still open after {order.timeout:g} s"
                self._life.warn("drain", text, sessions=sessions)
                break
            await asyncio.sleep(_EMPTY_LOOK_S)
        self._stage("drained", "nothing is left to do here; `petals-agent undrain` lets everybody in again")

    async def _until_not_needed(self, order: Order) -> None:
        told = False
        while True:
            try:
                lonely = await self._lonely_blocks()
                if not lonely:
                    return
                text = f"nobody else serves blocks {_ranges(lonely)}"
            except (SwarmError, TimeoutError) as error:
                text = f"who else serves our blocks is not known ({error or type(error).__name__})"
            self.detail = f"{text}; drain with --force to go all the same"
            if not told:
                told = True
                self._stage("waiting", self.detail)
            await asyncio.sleep(_LOOK_S)

    async def _lonely_blocks(self) -> list[int]:
        """Blocks of ours without another ONLINE holder."""
        model, span = self._serving.model, self._serving.span
        if model is None or span is None:
            return []
        connection = await self._network.connected()
        view = await read_view(connection.node, model.dht_prefix, model.num_blocks)
        if view.unread:
            raise SwarmError(f"{len(view.unread)} of {model.num_blocks} blocks gave no answer")
        held = {
            record.block
            for record in view.records
            if record.info.state is ServerState.ONLINE and record.peer_id != connection.daemon.peer_id
        }
        return [block for block in range(*span) if block not in held]

    def _stage(self, stage: str, detail: str) -> None:
        self.stage, self.detail = stage, detail
        self._life.note("drain", f"{stage}: {detail}", stage=stage, reason=self.reason)

    def _keep(self, order: Order) -> None:
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(asdict(order)))
            temporary.replace(self._file)
        except OSError as error:
            raise SwarmError(
                f"{self._file} cannot be written ({error.strerror}), so the drain would not outlive a restart; make room, "
                "or drain with --until-restart"
            ) from error

    def _kept(self) -> Order | None:
        try:
            return Order.read(json.loads(self._file.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, SwarmError) as error:
            log.warning(
                "%s makes no sense (%s); drained all the same, as its being there says", self._file, error
            )
            return Order()


def _ranges(blocks: list[int]) -> str:
    """[0, 1, 2, 5] → "0:3, 5:6"."""
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in found)
