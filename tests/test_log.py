"""Every line goes one way: the level and form that were asked for, hivemind's too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
from petals_agent.p2p import light
light.install(without_torch=True)
from hivemind.utils.logging import get_logger
from petals_agent.log import setup

setup(sys.argv[1], sys.argv[2])
logging.getLogger("petals_agent.x").debug("low")
logging.getLogger("petals_agent.x").info("two\\nlines")
get_logger("hivemind.x").info("chatter")
get_logger("hivemind.x").error("trouble")
try:
    raise ValueError("why")
except ValueError:
    logging.getLogger("petals_agent.y").exception("failed")
"""


def lines(level: str, form: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, level, form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_json() -> None:
    entries = [json.loads(line) for line in lines("info", "json")]
    assert [(entry["level"], entry["logger"], entry["message"]) for entry in entries] == [
        ("info", "petals_agent.x", "two\nlines"),
        ("error", "hivemind.x", "trouble"),
        ("error", "petals_agent.y", "failed"),
    ]
    assert "ValueError: why" in entries[2]["traceback"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 5), ("info", 3), ("warning", 2), ("error", 2)])
def test_levels(level: str, shown: int) -> None:
    assert len(lines(level, "json")) == shown


def test_priorities_for_the_journal() -> None:
    found = lines("info", "auto", JOURNAL_STREAM="8:1")
    assert found[:3] == ["<6>petals_agent.x: two", "<6>lines", "<3>hivemind.x: trouble"]
    assert all(line.startswith("<3>") for line in found[3:])


def test_plain_text_elsewhere() -> None:
    assert lines("info", "auto")[0].endswith(" INFO petals_agent.x: two")
