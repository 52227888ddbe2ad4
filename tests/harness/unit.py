"""Does for an agent what systemd does for the unit: hears it, kills it when its pings stop, cleans up, starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.hurt import HIDDEN, SESSIONS, Outcome
from harness.live import LiveAgent, start_again
from harness.peer import Peer, chain
from harness.processes import Processes, wait_until
from harness.swarm import PETALS_AGENT
from harness.systemd import Systemd
from harness.watch import Watch

RESTART_S = 1.0  # RestartSec of petals-agent.service
ABORT_S = 15.0  # TimeoutAbortSec
POST_STOP_S = 30.0
NOT_AGAIN = (0, 78)


@dataclass(frozen=True)
class End:
    """Of one life: monotonic seconds, and what it ended with."""

    at: float
    status: int
    watchdog: bool  # we ended it, for want of pings
    post_stop: int  # exit status
    cleaned_at: float


@dataclass
class Unit:
    """`agent` is the present one; `ends` tells of those before."""

    processes: Processes
    config: Path
    watchdog_s: float
    env: Mapping[str, str] = field(default_factory=dict)
    restart: bool = True
    ends: list[End] = field(default_factory=list)

    def __enter__(self) -> Unit:
        self.systemd = Systemd(str(self.config.parent / "notify"))
        self._over = threading.Event()
        self.agent = self._start()
        self.starts = 1
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        self.systemd.close()

    def _start(self) -> LiveAgent:
        # without WATCHDOG_PID: the process is not known before it runs
        env = {**self.env, **self.systemd.environment(None, self.watchdog_s)}
        self.started = time.monotonic()
        return start_again(self.processes, self.config, env=env)

    def _live(self) -> None:
        while not self._over.is_set():
            family = self.agent.family()
            if self.agent.process.returncode is None and not self._overdue:
                time.sleep(0.05)
                continue
            watchdog = self.agent.process.returncode is None
            if watchdog:
                os.kill(self.agent.process.pid, signal.SIGABRT)
                os.kill(self.agent.process.pid, signal.SIGCONT)  # as systemd does
            self.agent.process.wait(ABORT_S)
            self._end(family, watchdog)
            if not self.restart or self.ends[-1].status in NOT_AGAIN or self._over.wait(RESTART_S):
                return
            self.agent = self._start()
            self.starts += 1

    @property
    def _overdue(self) -> bool:
        """The watchdog counts from READY on."""
        said = [(at, text) for at, text in self.systemd.messages if at > self.started]
        if any("WATCHDOG=trigger" in text for _, text in said):
            return True
        beats = [at for at, text in said if "READY=1" in text or text == "WATCHDOG=1"]
        ready = any("READY=1" in text for _, text in said)
        return ready and time.monotonic() - beats[-1] > self.watchdog_s

    def _end(self, family: list[psutil.Process], watchdog: bool) -> None:
        ended = time.monotonic()
        for process in family:  # KillMode=mixed: what is left in the unit is killed
            if process.is_running():
                process.kill()
        command = [*PETALS_AGENT, "post-stop", "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, timeout=POST_STOP_S, stdin=subprocess.DEVNULL)
        status = self.agent.process.wait(1)
        self.ends.append(End(ended, status, watchdog, done.returncode, time.monotonic()))

    def wait_end(self, count: int, timeout: float) -> End:
        """Wait until it has ended so often, and was cleaned up after."""
        wait_until(lambda: len(self.ends) >= count, timeout, f"end {count} of {self.config.parent.name}")
        return self.ends[count - 1]

    def wait_start(self, count: int, timeout: float) -> LiveAgent:
        """Wait until it was started again after end `count`."""
        wait_until(lambda: self.starts > count, timeout, f"another start after end {count}")
        return self.agent


def watch(agent: LiveAgent, peer: Peer) -> Watch:
    """From outside, once it serves."""
    peer_id = agent.online()["peer_id"]
    return Watch(peer, peer_id, HIDDEN, peer.step(peer_id, chain(0, 8), HIDDEN))


def hurt_agent(service: Unit, peer: Peer, name: str, number: int) -> Outcome:
    """Send the agent a signal that it does not survive, and wait until another one serves; it ends no earlier."""
    with watch(service.agent, peer) as seen:
        service.systemd.wait_for("READY=1")
        family = service.agent.family()
        seen.until(lambda: seen.calm_since(0), 60, "calm")
        hurt, hurt_at = time.time(), time.monotonic()
        os.kill(service.agent.process.pid, number)
        end = service.wait_end(1, service.watchdog_s + 60)
        wait_until(lambda: not any(process.is_running() for process in family), 10, "the end of its family")
        assert end.post_stop == 0
        service.wait_start(1, 60).online()
        seen.until(lambda: seen.calm_since(hurt + end.cleaned_at - hurt_at), 60, "calm after it")
        vain, sessions = seen.vain(hurt)
        return Outcome(
            fault=name,
            noticed=end.at - hurt_at,
            withdrawn=seen.not_online_after(hurt),
            outage=seen.outage(hurt),
            vain=vain,
            sessions=sessions,
            wrong=sum(attempt.wrong for attempt in seen.attempts),
            announced=seen.story(hurt),
            steps=[],
            lost=SESSIONS,
        )
