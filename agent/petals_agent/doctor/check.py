"""What a check is and what it finds."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petals_agent.doctor.host import Host


class Outcome(enum.Enum):
    """From good to bad; SKIPPED means that it could not be looked at."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Result:
    """What was found, and for all but OK what to do: one sentence with the command to run."""

    outcome: Outcome
    found: str
    remedy: str = ""


def ok(found: str) -> Result:
    return Result(Outcome.OK, found)


def warning(found: str, remedy: str) -> Result:
    return Result(Outcome.WARNING, found, remedy)


def problem(found: str, remedy: str) -> Result:
    return Result(Outcome.PROBLEM, found, remedy)


class Skip(Exception):
    """Raised by a check that cannot be made here; becomes a SKIPPED result."""

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found)
        self.result = Result(Outcome.SKIPPED, found, remedy)


_ORDER = list(Outcome)


def worst(results: Sequence[Result]) -> Result:
    """One result for several findings: the worst outcome, with all that have it and the first one's remedy."""
    outcome = max((result.outcome for result in results), key=_ORDER.index)
    alike = [result for result in results if result.outcome is outcome]
    return Result(outcome, "; ".join(dict.fromkeys(result.found for result in alike)), alike[0].remedy)


@dataclass(frozen=True)
class Check:
    """One look at the host: `look` is a coroutine function, or blocks and is run in a thread."""

    name: str
    look: Callable[[Host], Result] | Callable[[Host], Awaitable[Result]]
    timeout: float = 10.0  # seconds


@dataclass(frozen=True)
class Checked:
    """A check that was made, and how long it took."""

    name: str
    result: Result
    seconds: float
