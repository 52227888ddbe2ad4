"""The configuration as a command sees it: file, environment and `--set` overrides."""

from __future__ import annotations

from pathlib import Path

from petals_agent.config import Config, load_config, parse_overrides


def configured(path: Path | None, overrides: list[str] | None, *, require_model: bool = True) -> Config:
    """Raises ConfigError (exit code 78) with one message that names every mistake."""
    return load_config(path, parse_overrides(overrides or []), require_model=require_model)
