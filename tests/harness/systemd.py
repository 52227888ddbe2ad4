"""A socket that stands for systemd's: what was sent to it, and the environment that leads there."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

from harness.processes import wait_until


class Systemd:
    """`messages` with the monotonic time of each; a name that begins with "@" is an abstract one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.settimeout(0.05)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def environment(self, pid: int | None = None, watchdog_s: float | None = 30.0) -> dict[str, str]:
        """Without `pid`, WATCHDOG_PID is left out: whoever reads it is meant."""
        found = {"NOTIFY_SOCKET": self.name}
        if watchdog_s is not None:
            found["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        if pid is not None:
            found["WATCHDOG_PID"] = str(pid)
        return found

    def _read(self) -> None:
        while not self._over.is_set():
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            self.messages.append((time.monotonic(), data.decode()))

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.messages]

    def wait_for(self, text: str, timeout: float = 60.0) -> float:
        """When it was said first."""

        def said() -> float | None:
            return next((at for at, seen in self.messages if text in seen), None)

        return wait_until(said, timeout, f"{text!r} among {self.texts[-20:]}") or 0.0

    def pings_after(self, moment: float) -> list[float]:
        """How many seconds after `moment` each ping came."""
        return [at - moment for at, text in self.messages if text == "WATCHDOG=1" and at > moment]

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()
        if not self.name.startswith("@"):
            Path(self.name).unlink()


def own_environment(systemd: Systemd, watchdog_s: float | None = 30.0) -> dict[str, str]:
    """For a notifier in this process."""
    return systemd.environment(os.getpid(), watchdog_s)
