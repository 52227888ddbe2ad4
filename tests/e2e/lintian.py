"""Debian's checks of the packages: minutes for so many files, so they run beside the tests, and once for each set of rules."""

from __future__ import annotations

from pathlib import Path

from e2e.cache import cached, root
from harness.processes import Process, Processes

LINTIAN = ("nice", "lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "5")
PATIENCE_S = 1200.0


class Lintian:
    """`start` before the other tests, `report` after them; nothing is run again for the `key` of an earlier success."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._process: Process | None = None

    def start(self, processes: Processes, *packages: Path) -> None:
        """Begin, in the background."""
        if not (root() / f"lintian-{self._key}").exists():
            self._process = processes.start("lintian", [*LINTIAN, *packages], grace=0)

    def report(self) -> str:
        """What it says; fails if there is an error among it."""
        return (cached("lintian", self._key, self._finish) / "report.txt").read_text()

    def _finish(self, folder: Path) -> None:
        assert self._process is not None, "it was not started"
        status = self._process.wait(PATIENCE_S)
        assert status == 0, f"lintian ended with {status}\n{self._process.out.read_text()}"
        (folder / "report.txt").write_text(self._process.out.read_text())
