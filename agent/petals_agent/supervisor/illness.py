"""An illness from its first verdict to its end, as plugins are shown it."""

from __future__ import annotations

from dataclasses import dataclass, field

from petals_agent.health.steps import Step
from petals_agent.health.verdict import Verdict
from petals_agent.hooks import values


@dataclass
class Illness:
    """Since when (monotonic seconds), why it began, and which steps were taken."""

    since: float
    reasons: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)

    def report(self, now: float) -> values.RecoveryReport:
        """It is over at `now` (monotonic seconds)."""
        return values.RecoveryReport(
            reasons=tuple(self.reasons),
            steps=tuple(recovery_of(step) for step in self.steps),
            unhealthy_s=max(0.0, now - self.since),
        )


def recovery_of(step: Step | None) -> values.Recovery:
    """The same step by the name that plugins know; None is NOTHING."""
    return values.Recovery[step.name] if step is not None else values.Recovery.NOTHING


def shown_verdict(verdict: Verdict) -> values.Verdict:
    """A verdict as plugins see it."""
    cure = recovery_of(verdict.cure) if verdict.cure is not None else None
    return values.Verdict(health=verdict.health.value, reasons=tuple(verdict.reasons), cure=cure)
