"""Where state, cache and sockets live unless the configuration says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "petals-agent.toml"
SYSTEM_FOLDER = Path("/etc/petals-agent")


@dataclass(frozen=True)
class Places:
    """Folders of one agent; nothing here creates them. `reason` says what they were taken from."""

    state: Path
    cache: Path
    runtime: Path
    reason: str


def places(environ: Mapping[str, str], config_file: Path | None = None) -> Places:
    """The folders systemd gives; else the system's if `config_file` is the system's; else the user's (XDG).

    A command that a person types has no STATE_DIRECTORY, yet with /etc/petals-agent/petals-agent.toml it must find the
    service's socket. /etc/petals-agent/NAME.toml (a second instance) shares the cache, not state and socket.
    """
    if config_file is not None and config_file.parent == SYSTEM_FOLDER:
        instance = "" if config_file.name == FILE_NAME else config_file.stem
        folders = Places(
            Path("/var/lib/petals-agent", instance),
            Path("/var/cache/petals-agent"),
            Path("/run/petals-agent", instance),
            reason=str(SYSTEM_FOLDER),
        )
    else:
        home = Path(environ.get("HOME") or os.path.expanduser("~"))
        state = _xdg(environ, "XDG_STATE_HOME", home / ".local/state")
        folders = Places(
            state,
            _xdg(environ, "XDG_CACHE_HOME", home / ".cache"),
            _xdg(environ, "XDG_RUNTIME_DIR", state) if "XDG_RUNTIME_DIR" in environ else state / "run",
            reason="XDG",
        )
    given = {
        name: Path(value.split(":")[0])
        for name in ("state", "cache", "runtime")
        if (value := environ.get(f"{name.upper()}_DIRECTORY", "")).startswith("/")
    }
    if not given:
        return folders
    return Places(
        given.get("state", folders.state),
        given.get("cache", folders.cache),
        given.get("runtime", folders.runtime),
        reason="systemd" if len(given) == 3 else f"systemd and {folders.reason}",
    )


def default_files(environ: Mapping[str, str]) -> list[Path]:
    """Files to look for, in this order, when none is named: the user's, then the system's.

    Never one in the current folder: a configuration names plugins, and plugins are code.
    """
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    return [_xdg(environ, "XDG_CONFIG_HOME", home / ".config") / FILE_NAME, SYSTEM_FOLDER / FILE_NAME]


def _xdg(environ: Mapping[str, str], name: str, fallback: Path) -> Path:
    value = environ.get(name, "")
    return Path(value if value.startswith("/") else fallback) / "petals-agent"
