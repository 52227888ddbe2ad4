"""Children: what they may know, how they end, and that they end with us."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from petals_agent.processes import die_with_parent, end_child, signal_child, start_child

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
PLAIN = "import time; print('up', flush=True); time.sleep(60)"


async def child(program: str) -> asyncio.subprocess.Process:
    process = await start_child([sys.executable, "-c", program], stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"up\n"
    return process


@pytest.mark.parametrize(
    ("program", "grace", "status"), [(PLAIN, 10.0, -signal.SIGTERM), (STUBBORN, 0.2, -signal.SIGKILL)]
)
async def test_end(program: str, grace: float, status: int) -> None:
    process = await child(program)
    await asyncio.wait_for(end_child(process, grace), 15)
    assert process.returncode == status
    await end_child(process, grace)  # twice is no harm
    signal_child(process, signal.SIGKILL)


async def test_stopped_child_ends_too() -> None:
    process = await child(PLAIN)
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.wait_for(end_child(process, 10.0), 15)
    assert process.returncode == -signal.SIGTERM


async def test_exit_status_of_one_that_ended_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    process = await child("print('up', flush=True); raise SystemExit(3)")
    signal_child(process, signal.SIGTERM)  # whether it is still there or not
    assert await asyncio.wait_for(process.wait(), 15) in (3, -signal.SIGTERM)
    assert "Unknown child process" not in caplog.text


async def test_systemd_is_ours_alone_and_input_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        monkeypatch.setenv(name, "1")
    program = (
        "import os, sys; print('up', flush=True);"
        "print(*sorted(k for k in os.environ if k.startswith(('NOTIFY', 'WATCHDOG', 'EXTRA'))), repr(sys.stdin.read()),"
        "os.getpgrp() == os.getpid())"
    )
    process = await start_child(
        [sys.executable, "-c", program], environment={"EXTRA": "x"}, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert output.decode().split() == ["up", "EXTRA", "''", "True"]


async def test_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        await start_child(["/no/such/program"])


def test_child_ends_with_the_thread_that_started_it() -> None:
    """What embedding must know: the kernel watches the thread, not the process."""
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        children.append(subprocess.Popen(["sleep", "60"], preexec_fn=die_with_parent()))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(30)
    assert children[0].wait(5) == -signal.SIGKILL
