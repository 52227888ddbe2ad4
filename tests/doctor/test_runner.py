"""Checks run side by side; what raises or hangs costs itself alone."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import empty_host
from petals_agent.doctor.check import Check, Checked, Outcome, Result, Skip, ok, worst
from petals_agent.doctor.host import Host
from petals_agent.doctor.runner import run_checks

RESULTS = st.builds(Result, st.sampled_from(Outcome), st.text(max_size=9), st.text(max_size=9))


def run(checks: Sequence[Check], host: Host) -> dict[str, Checked]:
    async def collect() -> dict[str, Checked]:
        return {one.name: one async for one in run_checks(checks, host)}

    return asyncio.run(collect())


def test_each_outcome(tmp_path: Path) -> None:
    def fine(host: Host) -> Result:
        return ok("fine")

    async def fine_too(host: Host) -> Result:
        return ok("fine too")

    def skips(host: Host) -> Result:
        raise Skip("not here", "go there")

    def forbidden(host: Host) -> Result:
        raise PermissionError(13, "Permission denied", "/some/file")

    def broken(host: Host) -> Result:
        raise ZeroDivisionError("a bug of ours")

    looks = (fine, fine_too, skips, forbidden, broken)
    done = run([Check(one.__name__, one) for one in looks], empty_host(tmp_path))
    assert {name: one.result.outcome.value for name, one in done.items()} == {
        "fine": "ok",
        "fine_too": "ok",
        "skips": "skipped",
        "forbidden": "skipped",
        "broken": "warning",
    }
    assert "/some/file" in done["forbidden"].result.found and "sudo" in done["forbidden"].result.remedy
    assert "a bug of ours" in done["broken"].result.found


def test_a_check_that_hangs_is_given_up(tmp_path: Path) -> None:
    """Reading a pipe that nobody writes to, and waiting for ever: the others are told meanwhile, in the order of their ends."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    told = threading.Event()

    def hangs(host: Host) -> Result:
        return ok(pipe.read_text())

    async def waits(host: Host) -> Result:
        return ok(str(await asyncio.Event().wait()))

    def quick(host: Host) -> Result:
        return ok("quick")

    async def collect() -> list[str]:
        names = []
        checks = [Check("hangs", hangs, 0.5), Check("waits", waits, 0.5), Check("quick", quick)]
        async for one in run_checks(checks, empty_host(tmp_path)):
            names.append(f"{one.name}: {one.result.outcome.value}")
            told.set()
        return names

    names = asyncio.run(collect())
    assert told.is_set() and names[0] == "quick: ok"
    assert sorted(names[1:]) == ["hangs: problem", "waits: problem"]
    with pipe.open("w"):  # lets the thread go
        pass


@given(st.lists(RESULTS, min_size=1, max_size=5))
def test_the_worst_is_told(results: list[Result]) -> None:
    said = worst(results)
    order = [Outcome.OK, Outcome.SKIPPED, Outcome.WARNING, Outcome.PROBLEM]
    assert said.outcome is max((one.outcome for one in results), key=order.index)
    alike = [one for one in results if one.outcome is said.outcome]
    assert said.remedy == alike[0].remedy and all(one.found in said.found for one in alike)


PROBE = """
import json, sys
from petals_agent.cli.main import app
try:
    app(["doctor", "--json", "--config", sys.argv[1]])
except SystemExit as end:
    code = end.code
torch = sys.modules.get("torch")
print(json.dumps({"code": code, "torch": None if torch is None else torch.__version__}))
"""


def test_its_own_process_has_no_torch(tmp_path: Path) -> None:
    """The stand-in for torch (p2p/light.py) says that its version is 0."""
    command = [sys.executable, "-c", PROBE, str(tmp_path / "none.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    report, ended = map(json.loads, done.stdout.splitlines())
    assert ended["code"] == 1 and ended["torch"] in (None, "0")
    gpu = next(one for one in report["checks"] if one["name"] == "gpu")
    assert "torch 2" in gpu["found"], "which was imported elsewhere"
