"""Writes a configuration as TOML that loads to the same one, or as plain values for JSON; secrets are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petals_agent.config import keys
from petals_agent.config.messages import is_secret
from petals_agent.config.origin import Origin
from petals_agent.config.schema import Config
from petals_agent.config.toml_text import key_text, literal

_COMMENT_COLUMN = 48


def as_toml(config: Config, origins: Mapping[tuple[str, ...], Origin] | None = None) -> str:
    """The whole configuration as TOML text; with `origins`, each key has a comment that says where it was set."""
    lines: list[str] = []
    table: tuple[str, ...] = ()
    for path, value in keys.leaves(config):
        is_empty_table = isinstance(value, Mapping)
        parent = path if is_empty_table else path[:-1]
        if parent != table:
            lines += ["", f"[{key_text(parent)}]"]
            table = parent
        if not is_empty_table:
            line = f"{key_text(path[-1:])} = {literal(keys.written(path, _masked(path, value)))}"
            lines.append(f"{line:<{_COMMENT_COLUMN}}  # {origins[path]}" if origins else line)
    return "\n".join(lines[1:]) + "\n"


def as_json(config: Config) -> dict[str, Any]:
    """Nested plain values: durations in seconds, sizes in bytes, paths as text."""
    values: dict[str, Any] = {}
    for path, value in keys.leaves(config):
        table = values
        for name in path[:-1]:
            table = table.setdefault(name, {})
        table[path[-1]] = _plain(_masked(path, value))
    return values


def _masked(path: tuple[str, ...], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _masked((*path, name), item) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and not is_secret(path, value):
        return [_masked(path, item) for item in value]
    return "(hidden)" if value and is_secret(path, value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
