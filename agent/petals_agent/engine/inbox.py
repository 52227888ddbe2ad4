"""What the event loop hands to the engine's thread: steps, trainings, sessions to close, changes of the blocks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from petals_agent.engine.session import Session, StepWork
from petals_agent.engine.training import TrainingWork


@dataclass(eq=False)
class Change:
    """Something to be done to the backend between two steps."""

    do: Callable[[], None]
    done: Callable[[Any], None]


Item = StepWork | TrainingWork | Session | Change  # a session is to be closed


class Inbox:
    """A queue. The engine is woken for as many steps as it waits for: each wake-up takes the
    interpreter from the event loop, which has the next ones to read.
    """

    def __init__(self) -> None:
        self.items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._steps = 1  # worth waking for; anything but a step always is
        self._closed = False

    def put(self, item: Item) -> None:
        with self._changed:
            self.items.append(item)
            if len(self.items) >= self._steps or not isinstance(item, StepWork):
                self._changed.notify()

    def wait(self, steps: int, timeout: float | None) -> None:
        """Return once `steps` steps or anything else came, or after `timeout` seconds."""
        with self._changed:
            if self._closed or len(self.items) >= steps:
                return
            if all(isinstance(item, StepWork) for item in self.items):
                self._steps = steps
                self._changed.wait(timeout)
                self._steps = 1

    def close(self) -> None:
        """Wake the engine, and never let it wait again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
