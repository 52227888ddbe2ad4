"""Gives memory that was freed back to the system when the work has paused: loads and long prompts leave much of it."""

from __future__ import annotations

import ctypes


class Trimmer:
    """Tells from one beat to the next whether a pause has come that is worth it."""

    def __init__(self) -> None:
        self._seen = self._trimmed = -1

    def due(self, progress: int, busy: bool) -> bool:
        """Whether nothing has moved since the last call, and something has since the last trim."""
        paused = not busy and progress == self._seen
        self._seen = progress
        if not paused or progress == self._trimmed:
            return False
        self._trimmed = progress
        return True


def give_back() -> None:
    """Ask the C library for it; takes milliseconds, in which other threads may wait for memory."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # GNU's has
        library.malloc_trim(0)
