"""Reads one TOML file; whatever is wrong with it becomes a ConfigError that says so, in bounded time."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals_agent.config.lines import MAX_DEPTH, TooDeep, key_lines
from petals_agent.config.messages import invalid
from petals_agent.config.origin import Origin

MAX_BYTES = 2**20


@dataclass(frozen=True)
class TomlFile:
    """What a file holds, and the line of each key in it."""

    path: Path
    tables: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]
    is_blank: bool


def read_toml(path: Path) -> TomlFile:
    """Read a file of at most 1 MiB. Raises ConfigError when it cannot be read or is no TOML in UTF-8."""
    origin = Origin("file", str(path))
    raw = _read_bytes(path, origin)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        at = Origin("file", str(path), line)
        raise invalid(
            at, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        ) from None
    return parse_toml(text, path)


def parse_toml(text: str, path: Path) -> TomlFile:
    """Parse the text of a file; `path` is for messages. Raises ConfigError with the line of a syntax error."""
    text = text.replace("\r\n", "\n")
    try:
        lines = key_lines(text)
        return TomlFile(path, tomllib.loads(text), lines, is_blank=not text.strip())
    except TooDeep as error:
        at = Origin("file", str(path), error.line)
        raise invalid(at, f"keys, tables and lists are nested more than {MAX_DEPTH} deep") from None
    except RecursionError:
        raise invalid(Origin("file", str(path)), "lists or tables are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number with too many digits
        place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1 if place else None
        reason = str(error)[: place.start()] if place else str(error)
        column = f" in column {place[2]}" if place and place[2] else ""
        raise invalid(
            Origin("file", str(path), line),
            f"this is not TOML: {reason}{column}",
            allowed='[section], or key = value; text stands in quotes, such as blocks = "0:8"',
        ) from None


def drop_ins(path: Path) -> list[Path]:
    """The *.toml files of the folder FILE.d beside `path`, sorted by name. Raises ConfigError if it cannot be listed."""
    folder = path.with_name(path.name + ".d")
    try:
        names = sorted(
            entry for entry in os.listdir(folder) if entry.endswith(".toml") and not entry.startswith(".")
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise invalid(Origin("file", str(folder)), f"the folder cannot be listed: {error.strerror}") from None
    return [folder / name for name in names]


def _read_bytes(path: Path, origin: Origin) -> bytes:
    try:
        handle = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe without a writer must not hang us
    except FileNotFoundError:
        raise invalid(origin, "there is no such file; write it, or name another with --config") from None
    except PermissionError:
        raise invalid(
            origin,
            "no permission to read it; the installed one is for root and members of the group petals-agent",
        ) from None
    except (OSError, ValueError) as error:
        raise invalid(origin, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise invalid(
                origin, "it is a folder; name the file in it" if stat.S_ISDIR(mode) else "it is no plain file"
            )
        with open(handle, "rb", closefd=False) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise invalid(origin, f"it cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    if len(raw) > MAX_BYTES:
        raise invalid(origin, f"it is larger than {MAX_BYTES} bytes, so it is no configuration")
    return raw
