"""The agent's decisions and their reasons, kept on disk for `petals-agent explain`: JSON lines, bounded, hard to break."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger("petals_agent.decisions")

FILE = "decisions.jsonl"
OLD_FILE = "decisions.1.jsonl"
MAX_BYTES = 1_000_000  # of a file; then it becomes the old one
_MAX_LINE = 8_000  # bytes; of a longer one the facts are left out
_MAX_TEXT = 1_000  # characters of `what` and of `why`
_YEAR_3000 = 32_503_680_000


@dataclass(frozen=True)
class Decision:
    """One decision: what was done and why, with the figures it was made on."""

    time: float  # unix seconds
    kind: str  # "blocks", "restart", "ping_withheld", "drain", "move", "recovery", "give_up", …
    what: str
    why: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Decisions:
    """Appends to `decisions.jsonl` in a state folder. What cannot be kept is logged once and never an error."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self._failing = False

    def record(self, kind: str, what: str, why: str, **facts: Any) -> None:
        """Keep a decision; `facts` are values that JSON has, anything else is kept as its text."""
        decision = Decision(time.time(), kind, what[:_MAX_TEXT], why[:_MAX_TEXT], facts)
        try:
            self._append(_line(decision))
        except OSError as error:
            if not self._failing:
                log.warning("decisions cannot be kept in %s: %s", self._path, error.strerror or error)
            self._failing = True
        else:
            self._failing = False

    def _append(self, line: bytes) -> None:
        """Write with one call, so that another process's lines stay whole; after a torn line begin a new one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(file, line) < len(line):
                raise OSError("the disk is full")
        finally:
            os.close(file)
        if size + len(line) > MAX_BYTES:
            self._path.replace(self._path.with_name(OLD_FILE))


def _line(decision: Decision) -> bytes:
    try:
        line = json.dumps(decision.to_dict(), default=str, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):  # what JSON does not have: NaN, a circle
        line = b""
    if not 0 < len(line) <= _MAX_LINE:
        line = json.dumps({**decision.to_dict(), "facts": {"left_out": True}}).encode()
    return line + b"\n"


def read_decisions(state_dir: Path, count: int) -> list[Decision]:
    """The last `count` decisions, oldest first; lines that are none are passed over.

    Raises OSError when a file is there and cannot be read. Works beside a running agent and without one.
    """
    found: list[Decision] = []
    for name in (FILE, OLD_FILE):
        if len(found) < count:
            found = _read(state_dir / name) + found
    return found[-count:] if count > 0 else []


def _read(path: Path) -> list[Decision]:
    try:
        with path.open("rb") as file:
            raw = file.read(2 * MAX_BYTES)
    except FileNotFoundError:
        return []
    return [decision for line in raw.split(b"\n") if (decision := _parse(line)) is not None]


def _parse(line: bytes) -> Decision | None:
    try:
        entry = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    match entry:
        case {
            "time": int() | float() as when,
            "kind": str() as kind,
            "what": str() as what,
            "why": str() as why,
            "facts": dict() as facts,
        } if 0 <= when <= _YEAR_3000:
            return Decision(float(when), kind, what, why, facts)
    return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are no JSON
