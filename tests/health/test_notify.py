"""What is said to systemd, on a real socket; and that nothing is, where there is none."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from harness.processes import wait_until
from harness.systemd import Systemd, own_environment
from petals_agent.supervisor.notify import Notifier

Make = Callable[[Mapping[str, str]], Notifier]
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    abstract = f"@petals-agent-test-{secrets.token_hex(8)}"
    listening = Systemd(str(tmp_path / "notify") if request.param == "path" else abstract)
    yield listening
    listening.close()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A notifier in the given environment, as if the process had been started with it."""

    def made(environment: Mapping[str, str]) -> Notifier:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Notifier()

    return made


def say_everything(notifier: Notifier) -> None:
    notifier.status("joining: loading")
    notifier.extend_start()
    notifier.ready()
    notifier.ping()
    notifier.reloading()
    notifier.reloaded()
    notifier.failing("no disk", 5)
    notifier.stopping()
    notifier.extend_stop(2.5)


def heard(systemd: Systemd, count: int) -> list[str]:
    wait_until(lambda: len(systemd.messages) >= count, 10, f"{count} messages")
    return systemd.texts


def test_everything_is_said_in_order(systemd: Systemd, make: Make) -> None:
    notifier = make(own_environment(systemd))
    assert notifier.watchdog_s == 30.0
    say_everything(notifier)
    assert notifier.trigger()
    assert heard(systemd, 11) == [
        "STATUS=joining: loading",
        "EXTEND_TIMEOUT_USEC=30000000",
        f"READY=1\nMAINPID={os.getpid()}",
        "WATCHDOG=1",
        "RELOADING=1",
        "READY=1",
        "STATUS=no disk",
        "ERRNO=5",
        "STOPPING=1",
        "EXTEND_TIMEOUT_USEC=2500000",
        "WATCHDOG=trigger",
    ]


def test_ready_is_said_once_and_ends_the_start(systemd: Systemd, make: Make) -> None:
    notifier = make(own_environment(systemd))
    for _ in range(3):
        notifier.ready()
        notifier.extend_start()
        notifier.status("online")
    notifier.status("online: more")
    assert heard(systemd, 3) == [f"READY=1\nMAINPID={os.getpid()}", "STATUS=online", "STATUS=online: more"]


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ("two\nREADY=1", "STATUS=two READY=1"),  # one line, whatever an error message contains
        ("online → …hq3J: Grüße", "STATUS=online → …hq3J: Grüße"),
        ("\ud800", "STATUS=?"),
        ("x" * 5000, "STATUS=" + "x" * 5000),
    ],
)
def test_status_is_one_line_of_utf8(systemd: Systemd, make: Make, said: str, sent: str) -> None:
    make(own_environment(systemd)).status(said)
    assert heard(systemd, 1) == [sent]


@pytest.mark.parametrize(
    "change",
    [
        {"WATCHDOG_PID": str(os.getpid() + 1)},
        {"WATCHDOG_PID": "x"},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "soon"},
    ],
)
def test_whoever_is_not_watched_does_not_ping(systemd: Systemd, make: Make, change: dict[str, str]) -> None:
    notifier = make({**own_environment(systemd), **change})
    assert notifier.watchdog_s is None and not notifier.trigger()
    say_everything(notifier)
    assert not [text for text in heard(systemd, 8) if "WATCHDOG" in text]


def test_without_a_pid_the_one_who_reads_it_is_meant(systemd: Systemd, make: Make) -> None:
    notifier = make(systemd.environment(pid=None, watchdog_s=3.0))
    assert notifier.watchdog_s == 3.0
    notifier.ping()
    assert heard(systemd, 1) == ["WATCHDOG=1"]


@pytest.mark.parametrize("name", [None, "", "/nowhere/at/all", "@nobody-listens-there", "x"])
def test_without_systemd_all_is_silent(make: Make, name: str | None) -> None:
    environment = {"WATCHDOG_USEC": "1000000"} | ({"NOTIFY_SOCKET": name} if name is not None else {})
    notifier = make(environment)
    say_everything(notifier)
    notifier.trigger()
    if not name:
        assert notifier.watchdog_s is None


def test_a_systemd_that_does_not_read_holds_nobody_up(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(path))
        notifier = make({"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1000000"})
        began = time.monotonic()
        full = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 2
        for number in range(full):
            notifier.status(str(number))
        assert time.monotonic() - began < 60
