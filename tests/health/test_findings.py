"""What several looks amount to, and the verdict's rules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from petals_agent.health.findings import OK, Finding, Probe, Reading, Status, Tally, degraded, failed
from petals_agent.health.steps import Step
from petals_agent.health.verdict import Health, judge

GOOD = (Status.OK, Status.NOT_APPLICABLE)
readings = st.builds(Reading, st.sampled_from(Status), st.sampled_from(("", "a", "b")))
NAMES = ("container.engine", "swarm.p2pd", "swarm.peers", "swarm.announced", "host.clock", "host.disk")


async def never() -> Reading:
    raise AssertionError("nobody looks here")


def probe(failures: int = 1, cure: Step | None = None) -> Probe:
    return Probe("p", never, 1.0, 1.0, failures, cure)


def last_run(given: Sequence[Reading], of: Sequence[Status]) -> int:
    """How many of the last readings are among `of` without a break."""
    return len(list(takewhile(lambda reading: reading.status in of, reversed(given))))


@given(st.lists(readings, min_size=1, max_size=40), st.integers(1, 5))
def test_bad_readings_count_only_in_a_row(sequence: list[Reading], failures: int) -> None:
    tally = Tally(probe(failures, Step.REATTACH))
    before: Finding | None = None
    for count, reading in enumerate(sequence, 1):
        finding = tally.take(reading, float(count))
        seen = sequence[:count]
        bad = last_run(seen, (Status.DEGRADED, Status.FAILED))
        if reading.status in GOOD:
            assert finding.status is reading.status
        elif bad < failures:
            assert finding.status is (before.status if before is not None else Status.NOT_APPLICABLE)
        elif last_run(seen, (Status.FAILED,)) >= failures:
            assert finding.status is Status.FAILED and finding.cure is Step.REATTACH
        else:
            assert finding.status is Status.DEGRADED
        assert finding.looked == count and finding.since <= finding.looked
        if before is not None and before.status is finding.status:
            assert finding.since == before.since
        before = finding


def test_one_failure_after_many_degraded_readings_is_no_failure() -> None:
    tally = Tally(probe(3, Step.RESTART_CONTAINER))
    for now in range(10):
        tally.take(degraded("busy"), now)
    assert tally.take(failed("no answer"), 10).status is Status.DEGRADED
    assert tally.take(failed("no answer"), 11).status is Status.DEGRADED
    assert tally.take(failed("no answer"), 12).status is Status.FAILED
    assert tally.take(OK, 13).status is Status.OK


def finding(name: str, status: Status, cure: Step | None = None, since: float = 0.0) -> Finding:
    return Finding(name, status, f"why {name}", since, since, cure)


findings = st.lists(
    st.builds(
        finding,
        st.sampled_from(NAMES),
        st.sampled_from(Status),
        st.none() | st.sampled_from(list(Step)[:-1]),
        st.floats(0, 100),
    ),
    unique_by=lambda finding: finding.probe,
)


@given(findings)
def test_unhealthy_if_and_only_if_something_curable_failed(found: list[Finding]) -> None:
    verdict = judge(found)
    assert (verdict.health is Health.UNHEALTHY) == (verdict.cure is not None)
    failures = {f.probe: f for f in found if f.status is Status.FAILED}
    curable = {f.cure for f in failures.values() if f.cure is not None}
    if verdict.cure is not None:
        assert verdict.cure in curable | {Step.RESTART_BOTH} and verdict.cure >= min(curable)
    elif not failures.keys() & {"swarm.peers", "host.clock"}:
        assert not curable
    bad = {f.probe for f in found if f.status not in GOOD}
    assert (verdict.health is Health.HEALTHY) == (not bad)
    assert {reason.split(":")[0] for reason in verdict.reasons} == bad


@given(findings)
def test_the_order_of_findings_says_nothing(found: list[Finding]) -> None:
    one, other = judge(found), judge(found[::-1])
    assert (one.health, one.cure, sorted(one.reasons)) == (other.health, other.cure, sorted(other.reasons))


def test_reasons_come_in_the_order_in_which_they_arose() -> None:
    late, early = finding("a", Status.FAILED, None, 9.0), finding("b", Status.DEGRADED, None, 3.0)
    assert judge([late, early]).text == "b: why b; a: why a"
    assert judge([]).text == "all probes are content"


def test_the_cure_covers_all_that_failed() -> None:
    p2pd = finding("swarm.p2pd", Status.FAILED, Step.RESTART_P2PD)
    engine = finding("container.engine", Status.FAILED, Step.RESTART_CONTAINER)
    served = finding("swarm.served", Status.FAILED, Step.REATTACH)
    assert judge([served]).cure is Step.REATTACH
    assert judge([served, p2pd]).cure is Step.RESTART_P2PD
    assert judge([served, engine]).cure is Step.RESTART_CONTAINER
    assert judge([engine, p2pd]).cure is Step.RESTART_BOTH


def test_our_network_is_suspected_first() -> None:
    nobody = finding("swarm.peers", Status.FAILED)
    unknown = finding("swarm.announced", Status.FAILED, Step.RESTART_P2PD)
    engine = finding("container.engine", Status.FAILED, Step.RESTART_CONTAINER)
    assert judge([unknown]).cure is Step.RESTART_P2PD
    assert judge([unknown, nobody]).health is Health.DEGRADED
    assert judge([unknown, nobody, engine]).cure is Step.RESTART_CONTAINER
    few = finding("swarm.peers", Status.DEGRADED)
    assert judge([unknown, few]).cure is Step.RESTART_P2PD


def test_other_hosts_are_cured_by_no_step_of_ours() -> None:
    fleet = finding("heartbeat", Status.FAILED)
    assert (judge([fleet]).health, judge([fleet]).cure) == (Health.UNHEALTHY, None)
    assert judge([finding("heartbeat", Status.DEGRADED)]).health is Health.DEGRADED
    p2pd = finding("swarm.p2pd", Status.FAILED, Step.RESTART_P2PD)
    assert judge([fleet, p2pd]).cure is Step.RESTART_P2PD


def test_no_restart_sets_a_clock() -> None:
    clock = finding("host.clock", Status.FAILED)
    unknown = finding("swarm.announced", Status.FAILED, Step.RESTART_P2PD)
    p2pd = finding("swarm.p2pd", Status.FAILED, Step.RESTART_P2PD)
    assert judge([unknown, clock]).health is Health.DEGRADED
    assert judge([unknown, clock, p2pd]).cure is Step.RESTART_P2PD
