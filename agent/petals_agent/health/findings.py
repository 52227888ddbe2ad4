"""What a probe is, what one look through it gives, and what several looks in a row amount to."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from petals_agent.health.steps import Step


class Status(enum.Enum):
    OK = "ok"
    DEGRADED = "degraded"  # worse than it should be, but we serve
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Reading:
    """One look."""

    status: Status
    reason: str = ""


OK = Reading(Status.OK)


def failed(reason: str) -> Reading:
    return Reading(Status.FAILED, reason)


def degraded(reason: str) -> Reading:
    return Reading(Status.DEGRADED, reason)


def not_applicable(reason: str) -> Reading:
    return Reading(Status.NOT_APPLICABLE, reason)


@dataclass(frozen=True)
class Probe:
    """`check` looks once each `period` s and may take `timeout` s; only `failures` bad looks in a row count.

    `cure` is the step that helps if anything does; None: nobody but an operator can repair that.
    """

    name: str
    check: Callable[[], Awaitable[Reading]]
    period: float
    timeout: float
    failures: int
    cure: Step | None = None


@dataclass(frozen=True)
class Finding:
    """What a probe has found so far; `since` and `looked` are unix seconds."""

    probe: str
    status: Status
    reason: str
    since: float
    looked: float
    cure: Step | None = None


@dataclass
class Tally:
    """Makes a finding of readings: bad ones must come `failures` times in a row, a good one counts at once.

    It has failed only after so many failures; one failure after degraded readings is a degraded one more.
    """

    probe: Probe
    finding: Finding | None = None
    bad: int = field(default=0)  # in a row
    failed: int = field(default=0)  # in a row

    def take(self, reading: Reading, now: float) -> Finding:
        """The finding after `reading` at unix time `now`."""
        good = reading.status in (Status.OK, Status.NOT_APPLICABLE)
        self.bad = 0 if good else self.bad + 1
        self.failed = self.failed + 1 if reading.status is Status.FAILED else 0
        if 0 < self.failed < self.probe.failures:
            reading = degraded(reading.reason)
        before = self.finding
        if not good and self.bad < self.probe.failures:
            if before is None:
                before = Finding(self.probe.name, Status.NOT_APPLICABLE, "not known yet", now, now)
            self.finding = replace(before, looked=now)
            return self.finding
        same = before is not None and before.status is reading.status
        since = before.since if same and before is not None else now
        self.finding = Finding(self.probe.name, reading.status, reading.reason, since, now, self.probe.cure)
        return self.finding
