"""Child processes that cannot outlive us, and how to end them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

# a child must not speak to systemd in our name
_OURS_ALONE = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


def die_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the kernel kills the child when the thread that started it ends (so start it from the main one)."""
    parent = os.getpid()

    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return in_child


def raise_file_limit() -> None:
    """Allow us and our children as many open files as we may have: each session takes one, the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment without what only we may use, plus `extra`."""
    environment = {key: value for key, value in os.environ.items() if key not in _OURS_ALONE}
    environment.update(extra or {})
    return environment


async def start_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
) -> asyncio.subprocess.Process:
    """Start `command` so that it dies with us; standard input is empty.

    It has a process group of its own: a Ctrl-C is for us, who end our children when they have done their part.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=child_environment(environment),
        pass_fds=tuple(pass_fds),
        process_group=0,
        preexec_fn=die_with_parent(),
    )


async def end_child(process: asyncio.subprocess.Process, grace: float) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds; returns when the process is gone."""
    signal_child(process, signal.SIGTERM)
    # a stopped process takes its SIGTERM only when it runs
    signal_child(process, signal.SIGCONT)
    try:
        async with asyncio.timeout(grace):
            await process.wait()
    except TimeoutError:
        signal_child(process, signal.SIGKILL)
        await process.wait()


def signal_child(process: asyncio.subprocess.Process, number: int) -> None:
    """Send a signal unless the child has ended.

    Not by its own `send_signal`: that looks whether it has ended, and takes its exit status away from asyncio.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def describe_exit(status: int) -> str:
    """`killed by signal 9` or `exit status 3`."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
