"""From findings to a verdict: a pure function, so that each rule of it is a test."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from petals_agent.health.findings import Finding, Status
from petals_agent.health.steps import Step

# While the first has failed, what the others find says nothing about p2pd or the container.
EXCUSES: Mapping[str, frozenset[str]] = {
    "swarm.peers": frozenset({"swarm.announced", "swarm.reachable", "host.clock"}),
    "host.clock": frozenset({"swarm.announced"}),
}


# A failure of these is an illness that no step of ours cures: plugins are asked what to do, and our blocks are sound.
OF_OTHERS = frozenset({"heartbeat"})


class Health(enum.Enum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True)
class Verdict:
    """`reasons` name the probes; `cure` is the step to begin with, None when none of ours would help."""

    health: Health
    reasons: tuple[str, ...] = ()
    cure: Step | None = None

    @property
    def probes(self) -> tuple[str, ...]:
        """Those that are the reasons; what they say of it may change by the second."""
        return tuple(reason.partition(":")[0] for reason in self.reasons)

    @property
    def text(self) -> str:
        return "; ".join(self.reasons) or "all probes are content"


def judge(findings: Iterable[Finding]) -> Verdict:
    """Unhealthy if something failed that a step of ours may cure, or the fleet; degraded if something else is not as it should be.

    When nobody in the swarm answers, what others say or do not say of us is no finding against p2pd or the container: our
    own network is suspected first, and a restart would not bring it back. Nor does one set a wrong clock, for which peers
    drop our records.
    """
    known = list(findings)
    failed = {finding.probe for finding in known if finding.status is Status.FAILED}
    excused = {probe for name in failed for probe in EXCUSES.get(name, ())}
    reasons: list[str] = []
    cures: set[Step] = set()
    for finding in sorted(known, key=lambda finding: finding.since):
        if finding.status in (Status.OK, Status.NOT_APPLICABLE):
            continue
        reasons.append(f"{finding.probe}: {finding.reason}")
        if finding.status is Status.FAILED and finding.cure is not None:
            if finding.probe not in excused:
                cures.add(finding.cure)
    if cures:
        both = {Step.RESTART_P2PD, Step.RESTART_CONTAINER} <= cures
        return Verdict(Health.UNHEALTHY, tuple(reasons), Step.RESTART_BOTH if both else max(cures))
    if failed & OF_OTHERS:
        return Verdict(Health.UNHEALTHY, tuple(reasons))
    return Verdict(Health.DEGRADED if reasons else Health.HEALTHY, tuple(reasons))
