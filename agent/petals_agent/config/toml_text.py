"""Writes values and keys as TOML, for `config show` and for error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def literal(value: Any) -> str:
    """A value as TOML writes it; tables inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        # Python refuses to write thousands of decimal digits; such a number was given in hex, so it is not negative
        return str(value) if value.bit_length() < 4096 else hex(value)
    if isinstance(value, float):
        return repr(value)  # inf and nan are spelled so in TOML too
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key_part(key)} = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(literal, value)) + "]"
    return quoted("" if value is None else str(value) if isinstance(value, Path) else value)


def quoted(text: str) -> str:
    """A basic string. JSON's escapes are TOML's too, but for DEL and the surrogates, which TOML cannot hold."""
    escaped = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
    return escaped.encode("utf-8", "backslashreplace").decode()


def key_part(name: object) -> str:
    """One part of a key, quoted where it must be."""
    text = str(name)
    return text if _BARE_KEY.fullmatch(text) else quoted(text)


def key_text(path: tuple[str | int, ...]) -> str:
    """A key as people write it: swarm.initial_peers[1]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{key_part(part)}" if text else key_part(part)
    return text
