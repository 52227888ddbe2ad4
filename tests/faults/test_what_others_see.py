"""What others see of us goes wrong while all is well with us: our router lets nobody in any more."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.hurt import Victim, start_victim
from harness.peer import Peer
from harness.processes import Processes, wait_until

from .test_company import start_entry

pytestmark = pytest.mark.timeout(240)


class Router:
    """Leads a port of ours to another one, until it is `cut`."""

    def __init__(self, port: int, target: int) -> None:
        self._port, self._target = port, target
        self._open: list[socket.socket] = []
        self.join()

    def join(self) -> None:
        """Let callers in, from now on."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Nobody comes in any more, and whoever is in is thrown out."""
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listener.accept()
                target = socket.create_connection(("127.0.0.1", self._target))
                self._open += [caller, target]
                for pair in ((caller, target), (target, caller)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def router(free_port: Callable[[], int]) -> Iterator[tuple[Router, int, int]]:
    """It, its port, and the port that it leads to."""
    port, target = free_port(), free_port()
    router = Router(port, target)
    yield router, port, target
    router.cut()


def told_after(victim: Victim, words: str, since: float) -> float:
    """Wait until a probe's event says so; seconds from `since`."""
    at = wait_until(lambda: victim.told(words, since, ("probe",)), 90, words)
    assert at is not None
    return float(at) - since


def test_nobody_can_dial_us_any_more(
    router: tuple[Router, int, int], processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """Said, and nothing is restarted for it: what is between us and the others is not ours to repair."""
    way, port, target = router
    _, maddr = start_entry(processes, tmp_path / "entry", 0)
    more = f'[swarm]\nlisten = ["/ip4/127.0.0.1/tcp/{target}"]\nannounce = ["/ip4/127.0.0.1/tcp/{port}"]\n'
    more += '[health.probes."swarm.reachable"]\nperiod = "2s"'
    with Peer([maddr]) as peer:
        victim = start_victim(processes, tmp_path / "a", tiny_llama, maddr, peer, more)
        before = victim.agent.online()
        assert not before["relayed"] and before["health"] == "healthy"
        way.cut()
        cut = time.time()
        print(f"nobody can dial us: noticed after {told_after(victim, 'can dial us', cut):.1f} s")
        status = victim.agent.until(lambda s: s["health"] == "degraded", 10, "degraded")
        assert "swarm.reachable" in str(status["reasons"])
        way.join()
        told_after(victim, "swarm.reachable is content again", cut)
        assert victim.agent.online()["pids"] == before["pids"] and victim.recoveries() == []
