"""Probes side by side: none can hurt another, nor speak for what is gone, nor take our own absence for a failure."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest

from harness.processes import wait_until
from harness.waiting import until
from petals_agent.health.findings import OK, Finding, Probe, Reading, Status, failed, not_applicable
from petals_agent.health.probing import Probing, look

PERIOD_S, TIMEOUT_S, WAIT_S = 0.02, 0.1, 20.0


def probe(name: str, check: Callable[[], Any], failures: int = 1) -> Probe:
    return Probe(name, check, PERIOD_S, TIMEOUT_S, failures)


@asynccontextmanager
async def running(*probes: Probe) -> AsyncIterator[tuple[Probing, list[Finding]]]:
    changes: list[Finding] = []
    probing = Probing(probes, changes.append)
    task = asyncio.create_task(probing.run())
    try:
        yield probing, changes
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Counter:
    """A probe that is always content, and how often it was asked."""

    def __init__(self) -> None:
        self.looks = 0

    async def __call__(self) -> Reading:
        self.looks += 1
        return OK


async def hangs() -> Reading:
    await asyncio.Event().wait()
    raise AssertionError("never")


async def raises() -> Reading:
    raise RuntimeError("broken")


async def raises_nothing_to_read() -> Reading:
    raise ValueError


async def is_cancelled_from_within() -> Reading:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task
    raise AssertionError("never")


async def ignores_its_timeout() -> Reading:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(TIMEOUT_S)
        raise
    raise AssertionError("never")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (hangs, "no answer within 0.1 s"),
        (ignores_its_timeout, "no answer within 0.1 s"),
        (raises, "broken"),
        (raises_nothing_to_read, "ValueError()"),
        (is_cancelled_from_within, "CancelledError()"),
    ],
)
async def test_a_bad_probe_is_a_finding_and_hurts_no_other(check: Callable[[], Any], words: str) -> None:
    well, count = Counter(), Counter()
    looks = 0

    async def bad() -> NoReturn:
        nonlocal looks
        looks += 1
        await check()
        raise AssertionError("never")

    async with running(probe("well", well), probe("bad", bad), probe("count", count)) as (probing, changes):
        await until(lambda: looks >= 3 and well.looks >= 20 and count.looks >= 20, WAIT_S, "many looks")
        found = probing.findings
    assert (found["bad"].status, found["bad"].reason) == (Status.FAILED, words)
    assert found["well"].status is found["count"].status is Status.OK
    assert [finding.probe for finding in changes] == ["bad"]


async def test_the_end_of_it_all_is_not_a_finding() -> None:
    """A cancellation from outside ends the look."""
    task = asyncio.create_task(look(probe("p", hangs)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_changes_are_told_once() -> None:
    answers = [OK, failed("a"), failed("b"), not_applicable("gone"), OK, failed("c"), OK]
    left = iter(answers)

    async def check() -> Reading:
        return next(left, OK)

    async with running(probe("p", check)) as (_, changes):
        await until(lambda: len(changes) == 4, WAIT_S, "all changes")
    assert [(finding.status, finding.reason) for finding in changes] == [
        (Status.FAILED, "a"),
        (Status.NOT_APPLICABLE, "gone"),
        (Status.FAILED, "c"),
        (Status.OK, ""),
    ]


async def test_what_was_forgotten_stays_forgotten() -> None:
    """The answer of a look that began before is about what was replaced."""
    begun, go = asyncio.Event(), asyncio.Event()
    looks = 0

    async def slow() -> Reading:
        nonlocal looks
        looks += 1
        if looks > 1:
            await asyncio.Event().wait()
        begun.set()
        await go.wait()
        return failed("the old one is broken")

    patient = Probe("p", slow, PERIOD_S, 60.0, 1)
    async with running(patient) as (probing, changes):
        await begun.wait()
        probing.forget(["p"])
        go.set()
        await until(lambda: looks == 2, WAIT_S, "the next look")
        assert probing.findings == {} and changes == []


async def test_a_look_out_of_turn_counts() -> None:
    probing = Probing([probe("p", raises, failures=2)], lambda finding: None)
    assert (await probing.look("p")).status is Status.NOT_APPLICABLE
    assert (await probing.look("p")).status is Status.FAILED
    probing.forget(["p"])
    assert (await probing.look("p")).status is Status.NOT_APPLICABLE


class Beats:
    """Somebody alive who writes now and then, and a probe that finds fault with one who did not write for 0.4 s."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        while not self._over.wait(0.02):
            self._theirs.send(b".")

    def read(self) -> None:
        self.ours.recv(65536)
        self.at = time.monotonic()

    async def check(self) -> Reading:
        age = time.monotonic() - self.at
        return failed(f"no beat for {age:.2f} s") if age > 0.4 else OK

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.ours.close()
        self._theirs.close()


async def watch(beats: Beats, interrupt: Callable[[], None]) -> list[Finding]:
    asyncio.get_running_loop().add_reader(beats.ours, beats.read)
    try:
        async with running(probe("beat", beats.check)) as (probing, changes):
            for _ in range(3):
                await until(lambda: bool(probing.findings), WAIT_S, "a look")
                interrupt()
                looked = time.time()
                await until(
                    lambda looked=looked: probing.findings["beat"].looked > looked, WAIT_S, "a look after it"
                )
            return changes
    finally:
        asyncio.get_running_loop().remove_reader(beats.ours)


async def test_a_pause_of_ours_is_no_failure_of_theirs() -> None:
    beats = Beats()
    try:
        assert await watch(beats, lambda: time.sleep(1.3)) == []
    finally:
        beats.close()


def main() -> None:
    """Here as a program, to be stopped as a whole: says so, and then what it found."""
    beats = Beats()
    beats.close()
    theirs = socket.socket(fileno=int(sys.argv[1]))
    beats.ours = theirs

    def stopped() -> None:
        print("stop me", flush=True)
        sys.stdin.readline()

    print(asyncio.run(watch(beats, stopped)), flush=True)


def test_a_stopped_agent_finds_nothing_when_it_goes_on() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(True)
    over = threading.Event()

    def write() -> None:
        while not over.wait(0.02):
            ours.send(b".")

    thread = threading.Thread(target=write)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", "from health.test_probing import main; main()", str(theirs.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        pass_fds=(theirs.fileno(),),
    )
    thread.start()
    try:
        assert child.stdin is not None and child.stdout is not None
        for _ in range(3):
            assert child.stdout.readline() == "stop me\n"
            os.kill(child.pid, signal.SIGSTOP)
            child.stdin.write("\n")
            child.stdin.flush()
            began = time.monotonic()
            wait_until(lambda began=began: time.monotonic() - began > 1.3, 5, "a while")
            os.kill(child.pid, signal.SIGCONT)
        assert child.stdout.readline() == "[]\n"
    finally:
        over.set()
        child.kill()
        child.wait()
        thread.join()
        ours.close()
        theirs.close()
