"""The clock against peers that are right or wrong, and against the kernel's word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import Look
from harness.processes import Processes
from harness.swarm import start_bootstrap
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.clock import is_synchronized, judge_ntp, judge_offsets

SMALL = st.floats(-1.4, 1.4)
LARGE = st.floats(3.1, 1e9) | st.floats(-1e9, -3.1)


@given(st.lists(SMALL, min_size=1, max_size=9))
def test_a_right_clock(offsets: list[float]) -> None:
    assert judge_offsets(offsets).outcome is Outcome.OK


@given(st.lists(LARGE.map(abs), min_size=1, max_size=9), st.sampled_from([1, -1]))
def test_a_skewed_clock(offsets: list[float], sign: int) -> None:
    """What peers answer when our clock is more than 3 s behind or ahead."""
    result = judge_offsets([sign * offset for offset in offsets])
    assert result.outcome is Outcome.PROBLEM and result.remedy.endswith("sudo timedatectl set-ntp true")


@given(st.lists(SMALL, min_size=2, max_size=9), LARGE)
def test_one_peer_with_a_wrong_clock_says_nothing(offsets: list[float], wrong: float) -> None:
    assert judge_offsets([*offsets, wrong]).outcome is Outcome.OK


def test_nearly_too_much() -> None:
    assert judge_offsets([2.5]).outcome is Outcome.WARNING


def test_without_a_peer_the_kernel_is_asked() -> None:
    assert is_synchronized() in (True, False)
    assert judge_ntp(True).outcome is Outcome.OK
    assert judge_ntp(False).outcome is judge_ntp(None).outcome is Outcome.WARNING


def test_asked_of_a_peer(look: Look, processes: Processes) -> None:
    result = look("clock", peers=(start_bootstrap(processes),))
    assert result.outcome is Outcome.OK and "of 1 peers" in result.found
