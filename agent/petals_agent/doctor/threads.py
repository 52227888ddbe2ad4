"""Blocking work in threads that nobody waits for at the end of the process, so that a dead disk cannot hold us."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(look: Callable[[], T]) -> T:
    """Run what blocks; cancelled, it goes on unheard."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not outcome.done():
            setter(value)

    def run() -> None:
        try:
            value: Any = look()
            setter: Callable[[Any], None] = outcome.set_result
        except Exception as error:
            value, setter = error, outcome.set_exception
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, setter, value)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    return await outcome
