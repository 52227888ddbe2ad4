"""What a step costs before its first row: the intercept of a running linear fit of duration over rows."""

from __future__ import annotations

_MEMORY = 0.02  # weight of the newest step once 50 are known


class StepCost:
    """`fixed` is the estimate in seconds; it is never more than the mean duration of a step."""

    def __init__(self) -> None:
        self.fixed = 0.0
        self._count = 0
        self._rows = self._duration = self._rows_squared = self._product = 0.0  # running means

    def take(self, rows: int, duration: float) -> None:
        """Learn from a step of `rows` rows that took `duration` seconds."""
        self._count += 1
        weight = max(_MEMORY, 1 / self._count)
        self._rows += weight * (rows - self._rows)
        self._duration += weight * (duration - self._duration)
        self._rows_squared += weight * (rows * rows - self._rows_squared)
        self._product += weight * (rows * duration - self._product)
        variance = self._rows_squared - self._rows**2
        if variance > 0.01 * self._rows_squared:
            slope = (self._product - self._rows * self._duration) / variance
            self.fixed = min(max(self._duration - slope * self._rows, 0.0), self._duration)
        else:  # all steps alike: no line through one point
            self.fixed = 0.5 * self._duration
