"""The configuration as a command sees it: file, environment and `--set` overrides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from petals_agent.config import Config, load_config, parse_overrides
from petals_agent.config.load import find_file
from petals_agent.config.multiaddr import Purpose, check_multiaddr
from petals_agent.config.places import places
from petals_agent.errors import ConfigError


def configured(path: Path | None, overrides: list[str] | None, *, require_model: bool = True) -> Config:
    """Raises ConfigError (exit code 78) with one message that names every mistake."""
    return load_config(path, parse_overrides(overrides or []), require_model=require_model)


def control_socket(path: Path | None) -> Path:
    """Where the agent of this configuration listens; it may be running although its file has become wrong since.

    Raises ConfigError (exit code 78) for a wrong file when nobody listens in the usual place either.
    """
    try:
        return configured(path, None, require_model=False).control.socket
    except ConfigError:
        file, _ = find_file(path, os.environ)
        usual = places(os.environ, file).runtime / "control.sock"
        with suppress(OSError):
            if usual.is_socket():
                return usual
        raise


def addresses(option: str, values: Sequence[str] | None, purpose: Purpose) -> list[str]:
    """The multiaddresses given to `option`, checked. Raises ConfigError (exit code 78) for the first that is wrong."""
    for value in values or ():
        try:
            check_multiaddr(value, purpose)
        except ValueError as error:
            raise ConfigError(f"{option} {value}: {error}") from None
    return list(values or ())
