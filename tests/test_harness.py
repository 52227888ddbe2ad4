"""The tests' own guard: a process that outlives its parent is found, ended and reported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from harness.processes import Processes, pss_mb, python_count, wait_until

RUNAWAY = """
import json, os, subprocess, sys
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(json.dumps({"event": "started", "pid": sleeper.pid}), flush=True)
"""
STUBBORN = """
import json, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(json.dumps({"event": "started"}), flush=True)
time.sleep(60)
"""


def test_runaway_child_is_reported_and_killed(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    child = processes.run("runaway", [sys.executable, "-c", RUNAWAY], timeout=20)
    pid = child.events()[0]["pid"]
    assert [process.pid for process in processes.survivors()] == [pid]
    with pytest.raises(AssertionError, match="1 processes outlived"):
        processes.close(patience=0.5)
    wait_until(lambda: not processes.survivors(), 5, "the runaway's end")


def test_stubborn_process_is_killed_after_its_grace(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    child = processes.start("stubborn", [sys.executable, "-c", STUBBORN], grace=0.2)
    child.wait_event("started", 20)
    processes.close()
    assert child.returncode == -9


def test_early_end_is_reported_with_its_words(processes: Processes) -> None:
    child = processes.start("broken", [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(AssertionError, match=r"(?s)broken ended with 1.*no such model"):
        child.wait_event("online", 20)


def test_memory_and_interpreters_are_counted() -> None:
    me = psutil.Process(os.getpid())
    assert 5 < pss_mb([me]) < 1.05 * me.memory_info().rss / 1e6
    assert python_count([me]) == 1
