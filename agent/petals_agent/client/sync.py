"""A decoding session for blocking code."""

from __future__ import annotations

from types import TracebackType

import torch

from petals_agent.client.loop import LoopThread
from petals_agent.client.session import InferenceSession
from petals_agent.swarm.view import Span


class SyncSession:
    """An `InferenceSession` whose methods block; they must not be called from its own loop."""

    def __init__(self, session: InferenceSession, loop: LoopThread) -> None:
        self._session = session
        self._loop = loop

    def __enter__(self) -> SyncSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def route(self) -> list[Span]:
        """The servers in use; empty before the first step."""
        return self._session.route

    @property
    def position(self) -> int:
        """Tokens processed; set a smaller value to continue from there."""
        return self._session.position

    @position.setter
    def position(self, value: int) -> None:
        self._session.position = value

    def step(
        self,
        hidden: torch.Tensor,
        *,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `InferenceSession.step`."""
        return self._loop.run(self._session.step(hidden, prompts=prompts, hypo_ids=hypo_ids))

    def close(self) -> None:
        """Free the servers' caches; idempotent."""
        if self._loop.alive:
            self._loop.run(self._session.close())
