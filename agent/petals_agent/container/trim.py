"""When to give freed memory back to the host: in a pause, since loads and long prompts leave much of it behind."""

from __future__ import annotations


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
