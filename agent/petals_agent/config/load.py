"""Builds the configuration from its sources: defaults, file, drop-ins, environment, command line; the last one wins."""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from petals_agent.config import keys
from petals_agent.config.files import TomlFile, drop_ins, read_toml
from petals_agent.config.keys import KeyPath
from petals_agent.config.kinds import locate, locate_model
from petals_agent.config.messages import InvalidConfig, Mistake, invalid, invalid_values, mistake
from petals_agent.config.origin import CODE, DEFAULT, Origin
from petals_agent.config.places import default_files, places
from petals_agent.config.schema import Config
from petals_agent.config.toml_text import key_text

log = logging.getLogger("petals_agent.config")

ENV_FILE = "PETALS_AGENT_CONFIG"
ENV_PREFIX = "PETALS_AGENT__"
_NAMES_MODEL = (
    'path = "Qwen/Qwen3-8B" (a Hub repository), or path = "./my-model" and dht_prefix = "my-model" (a folder)'
)

_OFF = (False, "off", "", "unlimited", ())

Settings = list[tuple[tuple[str, ...], Any, Origin]]
"""Single keys with their values and where they were set, in the order of precedence."""


@dataclass(frozen=True)
class Loaded:
    """A valid configuration, what was read for it, and what its operator should know."""

    config: Config
    origins: dict[tuple[str, ...], Origin]
    files: list[Path]
    environment: list[str]
    overrides: list[str]
    notes: list[str]


def load_config(
    path: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    require_model: bool = True,
) -> Config:
    """The configuration of `path`, or of the first default file; logs a warning for keys without effect as yet.

    `overrides` are the command line's: {"serve.blocks": "0:4"}. Commands that serve nothing pass
    `require_model=False`. Raises ConfigError, which lists every mistake.
    """
    loaded = read_config(path, overrides, environ, require_model=require_model)
    for note in loaded.notes:
        log.warning("%s", note)
    return loaded.config


def read_config(
    path: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    require_model: bool = True,
) -> Loaded:
    """As `load_config`, with the origin of every value and the notes instead of log lines."""
    file, looked_at = find_file(path, environ)
    files = [] if file is None else _read_files(file)
    from_environment = list(_from_environment(environ))
    settings = _defaults(environ, file)
    for source in files:
        settings += _from_file(source)
    config, origins = _build([*settings, *from_environment, *_from_command_line(overrides or {})])
    if require_model and not config.model.path:
        raise _no_model(file, looked_at)
    return Loaded(
        config,
        origins,
        files=[source.path for source in files],
        environment=sorted({origin.name for _, _, origin in from_environment}),
        overrides=list(overrides or {}),
        notes=_notes(config, origins),
    )


def config_from(tables: Mapping[str, Any]) -> Config:
    """A configuration from values in a program, as a file would hold them: {"model": {"path": "./tiny"}}.

    Relative paths belong to the current folder. Raises ConfigError, which lists every mistake.
    """
    return _build([(path, value, CODE) for path, value in keys.table_leaves(tables)])[0]


def find_file(path: Path | None, environ: Mapping[str, str]) -> tuple[Path | None, list[Path]]:
    """The file to read, absolute, and where it was looked for; none found is no error, one that was named is read."""
    named = path or (Path(environ[ENV_FILE]) if environ.get(ENV_FILE) else None)
    if named is not None:
        named = Path(os.path.abspath(os.path.expanduser(named)))
        return named, [named]
    candidates = default_files(environ)
    return next(filter(_is_there, candidates), None), candidates


def _is_there(file: Path) -> bool:
    try:
        os.lstat(file)
    except PermissionError:  # it may be; reading it will say who may
        return True
    except OSError:
        return False
    return True


def parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    """{"serve.blocks": "0:4"} from ["serve.blocks=0:4"]. Raises ConfigError for one without "="."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise invalid(Origin("command line"), f'"{text}" sets nothing', allowed="SECTION.KEY=VALUE")
        overrides[key.strip()] = value.strip()
    return overrides


def _read_files(file: Path) -> list[TomlFile]:
    """The file and its drop-ins, of which only the file must not be empty."""
    main = read_toml(file)
    if main.is_blank:
        problem = "the file is empty; write at least [model]"
        raise invalid(Origin("file", str(file)), problem, allowed=_NAMES_MODEL)
    return [main, *map(read_toml, drop_ins(file))]


def _no_model(file: Path | None, looked_at: list[Path]) -> InvalidConfig:
    origin = Origin("file", str(file)) if file else DEFAULT
    problem = "it is not set, and nothing can be served without a model; write it under [model]"
    if file is None:
        problem += f" (there is no configuration file: looked for {', '.join(map(str, looked_at))})"
    return InvalidConfig([mistake(origin, ("model", "path"), None, problem, allowed=_NAMES_MODEL)])


def _defaults(environ: Mapping[str, str], file: Path | None) -> Settings:
    folders = places(environ, file)
    origin = Origin("default", folders.reason)
    return [
        (("model", "cache_dir"), str(folders.cache / "models"), origin),
        (("swarm", "identity"), str(folders.state / "identity.key"), origin),
        (("monitor", "history"), str(folders.state / "monitor.sqlite"), origin),
        (("control", "socket"), str(folders.runtime / "control.sock"), origin),
    ]


def _from_file(source: TomlFile) -> Settings:
    def origin(path: tuple[str, ...], items: int = 0) -> Origin:
        item_lines = tuple(source.lines.get((*path, index), 0) for index in range(items))
        return Origin("file", str(source.path), source.lines.get(path), source.path.parent, item_lines)

    settings: Settings = []
    tables: set[tuple[str, ...]] = set()
    for path, value in keys.table_leaves(source.tables):
        for table in (path[:depth] for depth in range(1, len(path))):
            if table not in tables:
                tables.add(table)
                settings.append((table, {}, origin(table)))
        settings.append((path, value, origin(path, len(value) if isinstance(value, list) else 0)))
    return settings


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], Any, Origin]]:
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            yield _setting(path, environ[name], Origin("environment", name))


def _from_command_line(overrides: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], Any, Origin]]:
    for key, text in overrides.items():
        yield _setting(_key_path(key), text, Origin("command line"))


def _key_path(key: str) -> tuple[str, ...]:
    """The parts of a key on the command line; quotes as in TOML: health.probes."container.loop".period."""
    if '"' not in key and "'" not in key:
        return tuple(key.split("."))
    try:
        leaves = list(keys.table_leaves(tomllib.loads(f"{key} = 0")))
    except ValueError:
        return ()
    return leaves[0][0] if len(leaves) == 1 else ()


def _setting(path: tuple[str, ...], text: str, origin: Origin) -> tuple[tuple[str, ...], Any, Origin]:
    if len(path) < 2 or not all(path):
        raise InvalidConfig(
            [
                Mistake(
                    origin.source,
                    None,
                    "",
                    "",
                    "it names no key",
                    allowed=f"SECTION.KEY, {ENV_PREFIX}SECTION__KEY",
                )
            ]
        )
    return path, _typed(path, text), origin


def _typed(path: tuple[str, ...], text: str) -> Any:
    """The value of text from outside a file: as TOML where the key wants more than text, else the text itself."""
    field = keys.field_at(path)
    if field is not None and (keys.takes_only_text(field) or text in keys.choices(field)):
        return text
    if field is not None and keys.takes_list(field) and not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return (
        value["value"] if len(value) == 1 and isinstance(value["value"], (bool, int, float, list)) else text
    )


def _build(settings: Settings) -> tuple[Config, dict[tuple[str, ...], Origin]]:
    """Merge and check. Raises ConfigError with every mistake."""
    values: dict[str, Any] = {}
    given: dict[tuple[str, ...], tuple[Any, Origin]] = {}
    for path, value, origin in settings:
        table = values
        for depth, name in enumerate(path[:-1], start=1):
            if not isinstance(table.get(name), dict):
                table[name] = {}
                given[path[:depth]] = {}, origin
            table = table[name]
        if value == {} and isinstance(table.get(path[-1]), dict):
            if given[path][1].kind == "default":
                given[path] = value, origin
        else:
            table[path[-1]] = _resolved(path, value, origin.base)
            given[path] = value, origin

    def look_up(path: KeyPath) -> tuple[Any, Origin]:
        names = tuple(part for part in path if isinstance(part, str))
        indexes = [part for part in path if isinstance(part, int)]
        value, origin = given.get(names, (None, DEFAULT))
        if indexes and isinstance(value, (list, tuple)):
            return value[indexes[0]], origin.of_item(indexes[0])
        while names not in given and names:
            names = names[:-1]
        return value, given.get(names, (None, DEFAULT))[1]

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise invalid_values(error, values, look_up) from None
    origins = {path: given.get(path, (None, DEFAULT))[1] for path, _ in keys.leaves(config)}
    config._origins.update(origins)
    return config, origins


def _resolved(path: tuple[str, ...], value: Any, base: Path | None) -> Any:
    """`value` with its relative paths made absolute, if the key holds paths."""
    if not keys.located(path):
        return value
    resolve = locate_model if path[0] == "model" and path[1] in ("path", "adapters") else locate
    return [resolve(item, base) for item in value] if isinstance(value, list) else resolve(value, base)


def _notes(config: Config, origins: Mapping[tuple[str, ...], Origin]) -> list[str]:
    """What was set, is not switched off, and has no effect in this version."""
    return [
        f"{origins[path]}: {key_text(path)} has no effect in this version, but in a later one"
        for path, value in keys.leaves(config)
        if origins[path].kind != "default" and keys.is_not_yet(path) and value not in _OFF
    ]
