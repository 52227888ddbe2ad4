"""Every line goes one way: the level and form that were asked for, libraries' too; to the journal with its fields."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.journal import Journal, decode
from petals_agent import redact
from petals_agent.journal import encode

PROGRAM = """
import logging, os, sys, threading, warnings
if "get_logger" in sys.argv[3]:
    from petals_agent.p2p import light
    light.install(without_torch=True)
    from hivemind.utils.logging import get_logger
from petals_agent import journal
from petals_agent.log import event, set_level, setup

status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = os.environ.get("TEST_STREAM") or f"{status.st_dev}:{status.st_ino}"
journal.SOCKET = os.environ.get("TEST_SOCKET", "/nonexistent/socket")
logging.getLogger("chatty").addHandler(logging.StreamHandler())
logging.getLogger("chatty").propagate = False
setup(sys.argv[1], sys.argv[2])
exec(sys.argv[3])
"""
LINES = """
logging.getLogger("petals_agent.x").debug("low")
logging.getLogger("petals_agent.x").info("two\\nlines")
get_logger("hivemind.x").info("chatter")
get_logger("hivemind.x").error("trouble")
logging.getLogger("chatty").warning("brought a handler")
try:
    raise ValueError("why")
except ValueError:
    logging.getLogger("petals_agent.y").exception("failed")
"""
EVENT = """
extra = event("recovery", step="restart p2pd", duration_s=0.25, peer=None, **{"bad-näme": True})
logging.getLogger("petals_agent.z").warning("it\\nwas repaired", extra=extra)
"""


def lines(level: str, form: str, program: str = LINES, **environment: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, level, form, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal")
    yield opened
    opened.close()


def test_json() -> None:
    entries = [json.loads(line) for line in lines("info", "json")]
    assert [(entry["level"], entry["logger"], entry["message"]) for entry in entries] == [
        ("info", "petals_agent.x", "two\nlines"),
        ("error", "hivemind.x", "trouble"),
        ("warning", "chatty", "brought a handler"),
        ("error", "petals_agent.y", "failed"),
    ]
    assert "ValueError: why" in entries[3]["traceback"]


def test_json_holds_the_fields_of_an_event() -> None:
    (entry,) = [json.loads(line) for line in lines("info", "json", EVENT)]
    assert entry["petals_event"] == "recovery"
    assert entry["petals_duration_s"] == 0.25
    assert entry["process"] == "agent"
    assert "petals_peer" not in entry


@pytest.mark.parametrize(("level", "shown"), [("debug", 6), ("info", 4), ("warning", 3), ("error", 2)])
def test_levels(level: str, shown: int) -> None:
    assert len(lines(level, "json")) == shown


def test_the_level_changes_at_run_time() -> None:
    program = LINES + 'set_level("debug")' + LINES + 'set_level("error")' + LINES
    found = [json.loads(line)["message"] for line in lines("info", "json", program)]
    assert found[4:] == [
        "low",
        "two\nlines",
        "chatter",
        "trouble",
        "brought a handler",
        "failed",
        "trouble",
        "failed",
    ]


LEFT_TASK = """
import asyncio, gc
loop = asyncio.new_event_loop()
task = loop.create_task(asyncio.Event().wait())
loop.run_until_complete(asyncio.sleep(0))
loop._ready.clear()
del task
gc.collect()
"""


@pytest.mark.parametrize("level, shown", [("info", 0), ("debug", 1)])
def test_tasks_that_a_library_left_are_no_error(level: str, shown: int) -> None:
    found = [line for line in lines(level, "text", LEFT_TASK) if "Task was destroyed" in line]
    assert len(found) == shown and not any("ERROR" in line for line in found)


def test_to_the_journal(journal: Journal) -> None:
    assert lines("info", "auto", LINES + EVENT, TEST_SOCKET=str(journal.path)) == []
    entries = journal.entries()
    assert [(entry["MESSAGE"], entry["PRIORITY"], entry["LOGGER"]) for entry in entries] == [
        ("two\nlines", "6", "petals_agent.x"),
        ("trouble", "3", "hivemind.x"),
        ("brought a handler", "4", "chatty"),
        ("failed", "3", "petals_agent.y"),
        ("it\nwas repaired", "4", "petals_agent.z"),
    ]
    assert "ValueError: why" in entries[3]["PETALS_TRACEBACK"]
    assert all(entry["SYSLOG_IDENTIFIER"] == "petals-agent" for entry in entries)
    assert all(entry["PETALS_PROCESS"] == "agent" for entry in entries)
    assert {key: value for key, value in entries[4].items() if key.startswith("PETALS_")} == {
        "PETALS_PROCESS": "agent",
        "PETALS_EVENT": "recovery",
        "PETALS_STEP": "restart p2pd",
        "PETALS_DURATION_S": "0.25",
        "PETALS_BAD_N_ME": "True",
    }


def test_what_nobody_caught_is_logged_too(journal: Journal) -> None:
    program = """
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
warnings.warn("old ways", DeprecationWarning)
sys.excepthook(*(lambda error: (type(error), error, None))(ValueError("main")))
"""
    assert lines("info", "auto", program, TEST_SOCKET=str(journal.path), PYTHONWARNINGS="always") == []
    thread, warning, main = journal.entries()
    assert (thread["PRIORITY"], main["PRIORITY"]) == ("2", "2")
    assert "ZeroDivisionError" in thread["PETALS_TRACEBACK"] and "main" in main["MESSAGE"]
    assert warning["LOGGER"] == "py.warnings" and "old ways" in warning["MESSAGE"]


def test_a_huge_entry_arrives_cut(journal: Journal) -> None:
    program = """
extra = event("big", **{f"field{i}": "ü" * 300_000 for i in range(20)}, reason="short")
logging.getLogger("petals_agent.z").error("m" * 5_000_000, extra=extra)
"""
    assert lines("info", "auto", program, TEST_SOCKET=str(journal.path)) == []
    (entry,) = journal.entries()
    assert len(entry["MESSAGE"]) > 10_000 and set(entry["MESSAGE"]) == {"m"}
    assert entry["PETALS_EVENT"] == "big" and entry["PETALS_REASON"] == "short"
    assert set(entry["PETALS_FIELD0"]) == {"ü"}


def test_without_the_socket_lines_go_to_stderr_with_priorities() -> None:
    found = lines("info", "auto")
    assert found[:4] == [
        "<6>petals_agent.x: two",
        "<6>lines",
        "<3>hivemind.x: trouble",
        "<4>chatty: brought a handler",
    ]
    assert all(line.startswith("<3>") for line in found[4:])


def test_the_journal_is_found_again(journal: Journal) -> None:
    program = f"""
log = logging.getLogger("petals_agent.x")
log.info("first")
os.rename({str(journal.path)!r}, {str(journal.path) + ".away"!r})
logging.getLogger().handlers[0]._socket.close()
log.info("second")
os.rename({str(journal.path) + ".away"!r}, {str(journal.path)!r})
log.info("third")
"""
    assert lines("info", "auto", program, TEST_SOCKET=str(journal.path)) == ["<6>petals_agent.x: second"]
    assert [entry["MESSAGE"] for entry in journal.entries()] == ["first", "third"]


def test_nothing_is_lost_when_nobody_reads_the_journal(journal: Journal) -> None:
    program = """
for number in range(16):
    logging.getLogger("petals_agent.x").info("%d", number)
"""
    rest = lines("info", "auto", program, TEST_SOCKET=str(journal.path))
    sent = [entry["MESSAGE"] for entry in journal.entries()]
    assert [*sent, *(line.removeprefix("<6>petals_agent.x: ") for line in rest)] == [
        str(number) for number in range(16)
    ]


def test_a_redirected_stderr_gets_plain_text(journal: Journal) -> None:
    found = lines("info", "auto", TEST_STREAM="8:1", TEST_SOCKET=str(journal.path))
    assert found[0].endswith(" INFO petals_agent.x: two") and journal.entries() == []


def test_text_is_text_even_with_a_journal(journal: Journal) -> None:
    assert lines("info", "text", TEST_SOCKET=str(journal.path))[0].endswith(" INFO petals_agent.x: two")


TOKEN = "hf_" + "aB3" * 11
SECRETS = [
    (f"repo at https://hub/x?token={TOKEN}", TOKEN),
    (f"'authorization': 'Bearer {TOKEN[3:]}', 'x': 1", TOKEN[3:]),
    ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
    ("[(b'Authorization', b'Bearer abcdefghijkl')]", "abcdefghijkl"),
    ("curl -H 'Authorization: s3cr3t-words'", "s3cr3t-words"),
    ("https://user:pa55word@host/path", "pa55word"),
    ("https://cdn/x?X-Amz-Signature=deadbeef00&Expires=1", "deadbeef00"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_a_secret_is_taken_out(text: str, secret: str) -> None:
    assert secret not in redact.redact(text) and "[hidden]" in redact.redact(text)


def test_no_secrets_in_any_form(journal: Journal) -> None:
    program = f"""
log = logging.getLogger("petals_agent.x")
for text in {[text for text, _ in SECRETS]!r}:
    log.info("said %s", text, extra=event("x", reason=text))
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed")
"""
    outputs = ["\n".join(lines("info", form, program)) for form in ("text", "json", "auto")]
    lines("info", "auto", program, TEST_SOCKET=str(journal.path))
    outputs.append(repr(journal.entries()))
    assert [(secret, out) for _, secret in SECRETS for out in outputs if secret in out] == []
    assert all(output.count("[hidden]") >= 2 * len(SECRETS) for output in outputs)


def test_what_a_token_file_held_is_hidden(journal: Journal) -> None:
    program = """
from petals_agent.redact import keep_secret
keep_secret("  correct horse battery\\n")
keep_secret("log")
logging.getLogger("petals_agent.x").info("the log: correct horse battery.")
"""
    assert lines("info", "auto", program, TEST_SOCKET=str(journal.path)) == []
    assert [entry["MESSAGE"] for entry in journal.entries()] == ["the log: [hidden]."]


@pytest.mark.parametrize("text", ["a bearer of news", "tokens=5 per s", "12:30 user@host", "hf_hub", ""])
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact.redact(text) == text


@given(
    st.dictionaries(st.text("ABCXYZ", min_size=1, max_size=20), st.text(), max_size=8),
    st.integers(200, 2000),
)
def test_an_entry_is_what_was_said_or_less(fields: dict[str, str], room: int) -> None:
    datagram = encode(fields, room)
    assert len(datagram) <= room
    found = decode(datagram)
    assert list(found) == [name for name in fields if name in found]
    for name, value in found.items():
        said = fields[name].encode(errors="replace").decode()
        assert said.startswith(value) and (value == said or len(value.encode()) > room // 4 - 4)


def test_no_module_logs_past_it() -> None:
    """Handlers, levels and prints belong to log.py and the commands."""
    package = Path(redact.__file__).parent
    bad = []
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("cli", "demo", "log.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "logging.basicConfig") or name.endswith((".addHandler", "log.setLevel")):
                bad.append(f"{path.relative_to(package)}:{node.lineno}: {name}")
    assert not bad
