"""Moves our blocks while they are served: the new ones load beside the old, then those that leave are dropped.

If the memory does not hold both, what both spans share stays and the rest is exchanged. A load that fails changes nothing.
"""

from __future__ import annotations

import asyncio
import time

from petals_agent.config.schema import Config
from petals_agent.config.values import parse_span
from petals_agent.errors import AgentError, NoRoom, Refused
from petals_agent.link import messages
from petals_agent.supervisor.announcing import Announcing
from petals_agent.supervisor.serving import Serving
from petals_agent.supervisor.states import Life, State

_SETTLE_S = 30.0  # for the DHT to take the new records
_LINGER_S = 60.0  # clients read the swarm's records as often as that
_MARGIN_S = 30.0

Span = tuple[int, int]


class Moving:
    """One move at a time."""

    def __init__(self, config: Config, serving: Serving, announcing: Announcing, life: Life) -> None:
        self._config = config
        self._serving = serving
        self._announcing = announcing
        self._life = life
        self._busy = asyncio.Lock()

    def take(self, config: Config) -> None:
        """Go by another configuration from now on."""
        self._config = config

    def read(self, blocks: object) -> Span:
        """The span "start:end" of a request; raises Refused if it is none of this model."""
        model = self._serving.model
        if model is None:
            raise Refused("no move now: the model is not open yet")
        try:
            span = parse_span(str(blocks))
        except ValueError as error:
            raise Refused(f"blocks {str(blocks)!r:.40}: {error}") from None
        if span[1] > model.num_blocks:
            raise Refused(f"blocks {_text(span)}: the model has only {model.num_blocks} blocks")
        return span

    async def move(self, span: Span, why: str) -> None:
        """Serve blocks [start, end) from now on; returns when the others are gone.

        Raises Refused when we cannot move at present, and whatever a failed load raised: then all is as before.
        """
        serving, life = self._serving, self._life
        before = serving.span
        if self._busy.locked() or life.state is not State.ONLINE or before is None:
            raise Refused(f"no move now: the agent is {life.state.value}; wait until it is online")
        if span == before:
            raise Refused(f"blocks {_text(span)} are served already")
        async with self._busy:
            began = time.monotonic()
            life.enter(State.REBALANCING, f"from blocks {_text(before)} to {_text(span)}: {why}")
            try:
                cut = await self._exchange(before, span)
            except AgentError as error:
                text = f"blocks {_text(span)} were not taken, {self._here} go on: {error}"
                life.warn("move", text, span=_text(span), reason=str(error))
                life.decided("move", f"stayed with blocks {self._here}", str(error))
                raise
            finally:
                self._back()
            took = round(time.monotonic() - began, 3)
            text = f"moved from blocks {_text(before)} to {_text(span)} in {took:.1f} s: {why}"
            life.note("move", text, span=_text(span), before=_text(before), duration_s=took, cut=cut)
            life.decided("move", f"serve blocks {_text(span)} instead of {_text(before)}", why)

    @property
    def _here(self) -> str:
        return _text(self._serving.span) if self._serving.span is not None else "none"

    def _back(self) -> None:
        if self._life.state is State.REBALANCING:  # else something happened to us meanwhile
            self._life.enter(State.ONLINE, f"serving blocks {self._here}")

    async def _exchange(self, before: Span, span: Span) -> int:
        try:
            return await self._beside(span)
        except NoRoom:
            shared = max(before[0], span[0]), min(before[1], span[1])
            if shared[0] >= shared[1] or shared == before:
                raise
        cut = await self._beside(shared)
        try:
            return cut + await self._beside(span)
        except AgentError:
            await self._beside(before)
            raise

    async def _beside(self, span: Span) -> int:
        """Load what is missing beside what is there, offer it, and drop the rest; returns how many sessions that cut off."""
        serving = self._serving
        container = serving.container
        if container is None or serving.loaded is None:
            raise Refused("no move now: nothing is loaded")
        serving.arrive(span)
        try:
            move = messages.Move(start=span[0], end=span[1])
            loaded = await container.request(move, messages.Loaded, timeout=None)
        finally:
            serving.arrive(None)
        serving.offer(loaded)
        await self._announcing.settle(_SETTLE_S)
        # whoever has read our records before may still come
        await asyncio.sleep(min(self._config.swarm.update_period, _LINGER_S))
        timeout = self._config.balance.drain_timeout
        retired = await container.request(
            messages.Retire(timeout=timeout), messages.Retired, timeout + _MARGIN_S
        )
        return retired.cut


def _text(span: Span) -> str:
    return f"{span[0]}:{span[1]}"
