"""The machines that tests boot: nothing is left of them, however a test run ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from e2e.machine import Machine
from e2e.trees import Trees
from harness.processes import wait_until

TESTS = Path(__file__).resolve().parents[1]
BOOT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from e2e.machine import Machine
from harness.processes import Processes

folder = Path(sys.argv[2])
machine = Machine(Processes(folder), [Path(sys.argv[3])], folder / "m")
print(machine.run("cat", "/proc/1/comm").stdout.strip(), flush=True)
time.sleep(60)
"""


def test_a_run_that_is_killed_leaves_nothing(trees: Trees, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", BOOT, TESTS, tmp_path, trees.base], stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None and run.stdout.readline() == "systemd\n"
        inside = psutil.Process(run.pid).children(recursive=True)
        assert "systemd" in {process.name() for process in inside}
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not any(process.is_running() for process in inside), 10, "all of it to be gone")


def test_powered_off_in_order(machine: Machine) -> None:
    assert machine.run("systemctl", "is-system-running", check=False).stdout.strip() in (
        "running",
        "degraded",
    )
    machine.power_off()
