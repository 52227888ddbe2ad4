"""What plugins print and log: named, line by line, and bounded."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from hooks.conftest import Folder, Start
from hooks.samples import ARGUMENTS
from petals_agent.hooks.output import MAX_LINE, MAX_LINES, PERIOD_S, Allowance

FLOOD = """
    import logging
    log = logging.getLogger(__name__)
    @hookimpl
    def on_start(config):
        print("x" * 100_000_000)
        for number in range(50_000):
            print(f"line {number} of a flood")
            sys.stderr.write("and ")
        for number in range(200):
            log.warning("logged %d", number)
            os.write(1, b"raw line\\n" * 100)
"""


async def test_a_flood_is_bounded(folder: Folder, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    folder.add("flood", FLOOD)
    folder.add("quiet", "@hookimpl\ndef on_start(config): print('good morning')\n")
    caller = await start(folder.config(timeout=100.0))
    outcome = await caller.call("on_start", **ARGUMENTS["on_start"])
    assert not outcome.failures
    await caller.stop()
    said = capfd.readouterr().err
    assert "plugin quiet: good morning" in said
    assert re.search(r"plugin flood: \d+ more lines were dropped", said)
    assert len(said) < 100_000
    assert max(map(len, said.splitlines())) < MAX_LINE + 200


async def test_what_is_printed_and_logged_has_its_name(
    folder: Folder, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.add(
        "says",
        """
        import logging, subprocess
        @hookimpl
        async def on_start(config):
            print("two", "words")
            logging.getLogger(__name__).info("logged")
            print("no end", end="")
            subprocess.run(["sh", "-c", "echo from a program >&2"])
        """,
    )
    caller = await start()
    await caller.call("on_start", **ARGUMENTS["on_start"])
    said = ""
    deadline = time.monotonic() + 20
    while "from a program" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        await asyncio.sleep(0.02)
    assert "plugin says: two words" in said
    assert "petals_agent_plugin_says: logged" in said
    assert "from a program" in said


def test_allowance() -> None:
    allowance = Allowance()
    assert [allowance.take("a", 0.0)[0] for _ in range(MAX_LINES + 5)].count(True) == MAX_LINES
    assert allowance.take("b", 0.0) == (True, 0)
    assert allowance.take("a", PERIOD_S) == (True, 5)
    assert allowance.take("a", PERIOD_S) == (True, 0)
    assert not allowance.dropped()
