"""The clock: the DHT drops records of a host whose time is more than 3 s off."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from petals_agent.doctor.check import Result, Skip, ok, problem, warning
from petals_agent.doctor.host import Host
from petals_agent.errors import DaemonError
from petals_agent.health.findings import Status
from petals_agent.supervisor.swarm_probes import clock_reading

_REMEDY = "Set it by NTP: sudo timedatectl set-ntp true"
_TIME_ERROR = 5  # adjtimex: the clock is not synchronized


class _Timex(ctypes.Structure):
    _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_char * 252))


async def check_clock(host: Host) -> Result:
    """Compared with what peers say, else judged by whether the kernel's clock is kept by NTP."""
    try:
        answers = await host.answers()
    except (DaemonError, Skip):
        answers = []
    offsets = [answer.offset for answer in answers if answer.offset is not None]
    return judge_offsets(offsets) if offsets else judge_ntp(is_synchronized())


def judge_offsets(offsets: Sequence[float]) -> Result:
    """From peers' clocks minus ours in seconds, at least one."""
    reading = clock_reading(list(offsets))
    if reading.status is Status.FAILED:
        return problem(reading.reason, _REMEDY)
    if reading.status is Status.DEGRADED:
        return warning(reading.reason, _REMEDY)
    return ok(f"within {max(map(abs, offsets)):.1f} s of {len(offsets)} peers")


def judge_ntp(synchronized: bool | None) -> Result:
    """Without a peer to compare with."""
    if synchronized:
        return ok("kept by NTP (no peer could be asked)")
    state = "whether NTP keeps the clock is not known" if synchronized is None else "no NTP keeps the clock"
    return warning(f"{state}, and no peer could be asked for the time", _REMEDY)


def is_synchronized() -> bool | None:
    """The kernel's word; None where it cannot be asked."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.byref(_Timex()))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(state != _TIME_ERROR)
