"""A folder for configuration files, and loading them without what this host's environment says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from petals_agent.config import InvalidConfig, Loaded, read_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the configuration of a test is, or will be."""
    return tmp_path / "petals-agent.toml"


@pytest.fixture
def read(file: Path) -> Callable[..., Loaded]:
    """`read(text, overrides, environ)` writes the file and reads it; a model is added unless `text` has [model]."""

    def read(
        text: str, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
    ) -> Loaded:
        file.write_text(text if "[model]" in text else text + '\n[model]\npath = "owner/name"\n')
        return read_config(file, overrides, {"HOME": str(file.parent), **(environ or {})})

    return read


@pytest.fixture
def refused(read: Callable[..., Loaded]) -> Callable[..., str]:
    """The same arguments; returns the message of the one mistake, without the path of its file."""

    def refused(*arguments: object) -> str:
        with pytest.raises(InvalidConfig) as caught:
            read(*arguments)
        assert caught.value.exit_code == 78
        assert len(caught.value.mistakes) == 1, str(caught.value)
        return str(caught.value).rpartition("petals-agent.toml:")[2]

    return refused
