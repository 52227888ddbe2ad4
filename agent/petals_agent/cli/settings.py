"""The configuration as a command sees it: file, environment and `--set` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from petals_agent.config import Config, load_config, parse_overrides
from petals_agent.config.multiaddr import Purpose, check_multiaddr
from petals_agent.errors import ConfigError


def configured(path: Path | None, overrides: list[str] | None, *, require_model: bool = True) -> Config:
    """Raises ConfigError (exit code 78) with one message that names every mistake."""
    return load_config(path, parse_overrides(overrides or []), require_model=require_model)


def addresses(option: str, values: Sequence[str] | None, purpose: Purpose) -> list[str]:
    """The multiaddresses given to `option`, checked. Raises ConfigError (exit code 78) for the first that is wrong."""
    for value in values or ():
        try:
            check_multiaddr(value, purpose)
        except ValueError as error:
            raise ConfigError(f"{option} {value}: {error}") from None
    return list(values or ())
