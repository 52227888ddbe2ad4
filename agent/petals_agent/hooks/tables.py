"""[plugins.NAME]: what plugins say about their tables, as mistakes of the configuration with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from typing import Any

from petals_agent.config.messages import Mistake, mistake
from petals_agent.config.origin import DEFAULT, Origin
from petals_agent.config.schema import Config
from petals_agent.hooks.messages import WrongKey


def table_json(table: Mapping[str, Any] | None) -> str | None:
    """A table for the link; times of TOML become text in ISO form, which pydantic reads again."""
    return None if table is None else json.dumps(table, default=_text)


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, (date, datetime, time)) else str(value)


def mistakes(config: Config, plugin: str, wrong_keys: Iterable[WrongKey]) -> list[Mistake]:
    """One for each key that the plugin's Config refuses."""
    found = []
    for wrong in wrong_keys:
        path = ("plugins", plugin, *wrong.key)
        value = (
            None if wrong.missing or not wrong.key else _value(config.plugins.tables.get(plugin), wrong.key)
        )
        found.append(mistake(_origin(config, path), path, value, wrong.problem))
    return found


def stray_tables(config: Config, plugins: Iterable[str]) -> list[str]:
    """A warning for each table that belongs to no plugin."""
    known = set(plugins)
    return [
        f"{_origin(config, ('plugins', name))}: [plugins.{name}] belongs to no plugin that is there; "
        "install it, or remove the table"
        for name in config.plugins.tables
        if name not in known
    ]


def _origin(config: Config, path: tuple[str | int, ...]) -> Origin:
    """Where the key was set; for one that is missing, where its table begins to be set."""
    names = tuple(part for part in path if isinstance(part, str))
    while len(names) > 1:
        inside = [origin for key, origin in config._origins.items() if key[: len(names)] == names]
        if inside:
            return min(inside, key=lambda origin: origin.line or 0)
        names = names[:-1]
    return DEFAULT


def _value(table: Any, key: Iterable[str | int]) -> Any:
    for part in key:
        try:
            table = table[part]
        except (LookupError, TypeError):
            return None
    return table
