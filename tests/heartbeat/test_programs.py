"""Five programs, each a process with a p2pd: one is killed, stopped, started again, or loses its traffic for a round."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.processes import Process, Processes, wait_until
from petals_agent.heartbeat.rules import Timing
from petals_agent.swarm.identity import ensure_identity

PROGRAM = Path(__file__).with_name("program.py")
TIMING = Timing.of(1.0)  # the shortest that the rule allows: a time-out of 2 s
SLACK_S = 30.0  # for a busy machine
pytestmark = pytest.mark.timeout(300)


@dataclass
class Fleet:
    """`seats` by number, in the order of their peer ids: 0, 1 and 2 are witnesses."""

    processes: Processes
    entry: str
    keys: list[Path]
    on_failure: str
    seats: dict[int, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys.sort(key=ensure_identity)
        self.peers = [ensure_identity(key) for key in self.keys]
        for number in range(len(self.keys)):
            self.start(number)
        for seat in self.seats.values():
            assert seat.wait_event("begun", 90)["again"], "a second start returns the running one"

    def start(self, number: int) -> None:
        members = [part for peer in self.peers for part in ("--member", peer)]
        command = [sys.executable, PROGRAM, self.keys[number], "--entry", self.entry, *members]
        command += ["--period", str(TIMING.period), "--on-failure", self.on_failure]
        self.seats[number] = self.processes.start(f"member{number}", command, env={"PETALS_AGENT_CONFIG": ""})

    def said(self, number: int) -> list[dict[str, Any]]:
        """All that it said of itself."""
        seat = self.seats[number]
        events = [{**event, "number": at, "process": id(seat)} for at, event in enumerate(seat.events())]
        return [event for event in events if event["event"] == "status"]

    def until(
        self, condition: Callable[[dict[str, Any]], object], limit: float, what: str, *who: int
    ) -> None:
        """Until each of `who` (default: all) says so."""
        self._until(lambda said: bool(said) and bool(condition(said[-1])), limit, what, who)

    def beat(self, rounds: int = 2) -> None:
        """Until all have had so many more rounds together."""
        before = {id(seat): len(seat.events()) for seat in self.seats.values()}

        def well(said: dict[str, Any]) -> bool:
            running = said["state"] == "running" and not said["failure"] and not said["failures"]
            return bool(running and said["members"] == 5)

        def holds(said: list[dict[str, Any]]) -> bool:
            later = [one for one in said if one["number"] >= before.get(one["process"], 0)]
            return len({one["round"] for one in later if well(one)}) > rounds and well(later[-1])

        self._until(holds, 90, f"{rounds} rounds together", ())

    def _until(
        self, condition: Callable[[list[dict[str, Any]]], bool], limit: float, what: str, who: tuple[int, ...]
    ) -> None:
        numbers = who or tuple(self.seats)
        try:
            wait_until(lambda: all(condition(self.said(number)) for number in numbers), limit, what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {[self.said(number)[-3:] for number in numbers]}") from None

    def others(self, victim: int) -> tuple[int, ...]:
        return tuple(number for number in self.seats if number != victim)

    def p2pd(self, number: int) -> int:
        children = psutil.Process(self.seats[number].pid).children(recursive=True)
        return next(child.pid for child in children if child.name() == "p2pd")

    def failures(self) -> list[str]:
        """Every fatal failure that anybody has spoken of."""
        return [str(one["failure"]) for number in self.seats for one in self.said(number) if one["failure"]]


def five(processes: Processes, bootstrap: str, folder: Path, on_failure: str) -> Fleet:
    return Fleet(processes, bootstrap, [folder / f"{number}.key" for number in range(5)], on_failure)


def test_the_life_of_a_fleet(processes: Processes, bootstrap: str, tmp_path: Path) -> None:
    """Traffic of one is away for a round; one is stopped for a while; one is started again; all end in order."""
    fleet = five(processes, bootstrap, tmp_path, "unhealthy")

    # its p2pd stands still for a round: a failure for all, and nothing fatal
    p2pd = fleet.p2pd(4)
    os.kill(p2pd, signal.SIGSTOP)
    try:
        fleet.until(lambda said: said["failures"] == 1, 30, "a failure")
        missing = [fleet.said(number)[-1]["missing"] for number in (0, 4)]
    finally:
        os.kill(p2pd, signal.SIGCONT)
    assert fleet.peers[4] in missing[0] and fleet.peers[0] in missing[1]
    fleet.until(lambda said: not said["failures"], 30, "a good round")
    assert fleet.failures() == []

    # a stop that is shorter than a time-out
    os.kill(fleet.seats[0].pid, signal.SIGSTOP)
    resume = time.monotonic() + TIMING.timeout * 0.6
    wait_until(lambda: time.monotonic() > resume, 10, "part of a time-out")
    os.kill(fleet.seats[0].pid, signal.SIGCONT)
    fleet.beat()
    assert fleet.failures() == []

    # a witness is stopped, while its p2pd takes what comes: three failures; when it goes on, it finds out, too
    os.kill(fleet.seats[1].pid, signal.SIGSTOP)
    try:
        others = fleet.others(1)
        fleet.until(lambda said: said["failure"], TIMING.bound + SLACK_S, "noticed", *others)
    finally:
        os.kill(fleet.seats[1].pid, signal.SIGCONT)
    assert any("3 rounds in a row" in text for text in fleet.failures())
    fleet.beat()
    assert any(one["failure"] for one in fleet.said(1)), "the one that was stopped knows, too"

    # one is started again, and has no part in the others' token: fatal at once
    before = len(fleet.failures())
    fleet.seats[3].kill()
    fleet.start(3)
    fleet.seats[3].wait_event("begun", 90)
    fleet.beat()
    later = [
        str(one["failure"]) for number in fleet.others(3) for one in fleet.said(number) if one["failure"]
    ]
    assert len(fleet.failures()) > before and any("was started again" in text for text in later)

    # an orderly end leaves nothing
    for seat in fleet.seats.values():
        os.kill(seat.pid, signal.SIGTERM)
    for seat in fleet.seats.values():
        assert seat.wait(30) == 0, seat.output()
        assert "Traceback" not in seat.output()


def test_one_is_killed_and_the_others_end_for_it(
    processes: Processes, bootstrap: str, tmp_path: Path
) -> None:
    fleet = five(processes, bootstrap, tmp_path, "exit")
    fleet.beat(1)
    fleet.seats[0].kill()
    killed = time.monotonic()
    for number in fleet.others(0):
        assert fleet.seats[number].wait(TIMING.bound + SLACK_S) == 75
        assert "the fleet is not consistent" in fleet.seats[number].output()
    took = time.monotonic() - killed
    print(f"all ended {took:.1f} s after the kill, the bound is {TIMING.bound:g} s")
    assert took > 2 * TIMING.period, "three rounds, not one"


def test_without_the_others_it_says_who_is_missing(
    processes: Processes, bootstrap: str, tmp_path: Path
) -> None:
    key, *others = (tmp_path / name for name in ("a.key", "b.key", "c.key"))
    me = ensure_identity(key)
    members = [part for other in others for part in ("--member", ensure_identity(other))]
    command = [sys.executable, PROGRAM, key, "--entry", bootstrap, *members]
    stranger = processes.run("stranger", command, timeout=60)
    assert stranger.returncode == 78 and me in stranger.events()[0]["error"]
    alone = processes.run("alone", [*command, "--member", me, "--start-timeout", "2"], timeout=60)
    assert alone.returncode == 69 and "did not start within 2 s" in alone.events()[0]["error"]
