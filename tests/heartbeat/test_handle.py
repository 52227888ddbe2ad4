"""What a program may do with its handle: start and stop in any order, from threads, signal handlers and forked children."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from harness.processes import Processes
from petals_agent.errors import ConfigError
from petals_agent.heartbeat.api import start
from petals_agent.swarm.identity import ensure_identity

PROGRAM = Path(__file__).with_name("program.py")
pytestmark = pytest.mark.timeout(120)

SCRIPT = """
import json, os, signal, sys, threading, time
from petals_agent import heartbeat
from petals_agent.swarm.identity import IdentityLock

key, entry, *members = sys.argv[1:]

def start(**more):
    options = dict(on_failure="log", initial_peers=[entry], listen=["/ip4/127.0.0.1/tcp/0"], start_timeout=60)
    return heartbeat.start(1, members=members, identity=key, **{**options, **more})

def say(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)

"""


def run(processes: Processes, entry: str, folder: Path, script: str, on_failure: str = "log") -> list[object]:
    """What `script` said, after SCRIPT, in a fleet of two; the other member is a program that goes on."""
    keys = [folder / "a.key", folder / "b.key"]
    members = [ensure_identity(key) for key in keys]
    named = [part for peer in members for part in ("--member", peer)]
    other = [sys.executable, PROGRAM, keys[1], "--entry", entry, *named, "--period", "1"]
    processes.start("other", [*other, "--on-failure", on_failure], env={"PETALS_AGENT_CONFIG": ""})
    text = SCRIPT + textwrap.dedent(script)
    command = [sys.executable, "-c", text, str(keys[0]), entry, *members]
    process = processes.start("program", command, env={"PETALS_AGENT_CONFIG": ""})
    code = process.wait(90)
    assert "Traceback" not in process.output(), process.output()
    return [*process.events(), code]


def test_it_can_be_stopped_and_started_again_at_once(
    processes: Processes, bootstrap: str, tmp_path: Path
) -> None:
    said = run(
        processes,
        bootstrap,
        tmp_path,
        """
        first = start()
        first.set()
        second = start()
        say("again", other=first is not second, set=second.is_set(), members=len(second.status()["members"]))
        second.set()
        second.join(10)
        say("ended", status=second.status(), alive=second.alive)
        """,
    )
    assert said == [
        {"event": "again", "other": True, "set": False, "members": 2},
        {"event": "ended", "status": {}, "alive": False},
        0,
    ]


def test_threads_signals_and_children(processes: Processes, bootstrap: str, tmp_path: Path) -> None:
    """Many starts give one handle; a forked child has none and does not hold our identity; a signal handler may stop it."""
    said = run(
        processes,
        bootstrap,
        tmp_path,
        """
        found = []
        threads = [threading.Thread(target=lambda: found.append(start())) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        handle = found[0]
        say("handles", number=len(set(map(id, found))))

        child = os.fork()
        if child == 0:
            say("child", alive=handle.alive, status=handle.status())
            sys.stdout.flush()
            time.sleep(60)
            os._exit(0)

        signal.signal(signal.SIGUSR1, lambda *_: handle.set())
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        say("set", set=handle.wait(30))
        handle.join(10)
        IdentityLock(__import__("pathlib").Path(key)).release()  # raises if the child holds it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        """,
    )
    assert sorted(map(str, said)) == sorted(
        map(
            str,
            [
                {"event": "handles", "number": 1},
                {"event": "child", "alive": False, "status": {}},
                {"event": "set", "set": True},
                0,
            ],
        )
    )


def test_a_program_does_not_outlive_its_heartbeat(
    processes: Processes, bootstrap: str, tmp_path: Path
) -> None:
    """Whatever ended it: the program counts on it."""
    (code,) = run(
        processes,
        bootstrap,
        tmp_path,
        """
        import logging
        logging.disable(logging.CRITICAL)
        handle = start(on_failure="exit")
        handle._member._phase._timing = None  # a mistake of ours
        time.sleep(60)
        """,
    )
    assert code == 75


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    peer = ensure_identity(tmp_path / "a.key")
    whole = {"initial_peers": [], "listen": ["/ip4/127.0.0.1/tcp/0"], "identity": tmp_path / "a.key"}
    for period, more, words in (
        (0, {"members": [peer]}, "heartbeat.period = 0"),
        (3, {"members": [peer, "junk"]}, r"heartbeat.members\[1\]"),
        (3, {"members": peer}, "heartbeat.members"),
        (3, {"group": "x" * 101}, "heartbeat.group"),
        (3, {"group": "g", "size": 0}, "heartbeat.size"),
        (3, {"members": [peer], "on_failure": "exti"}, "heartbeat.on_failure"),
        (3, {"members": [peer]}, "2 to 100 members"),
    ):
        with pytest.raises(ConfigError, match=words):
            start(period, **{**whole, **more})  # type: ignore[arg-type]
