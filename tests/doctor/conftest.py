"""A host whose configuration is the test's own, and checks made on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  # first: the agent's imports put a stand-in where it is not

from harness.live import write_config
from models.shards import write_checkpoint
from petals_agent.doctor.check import Result
from petals_agent.doctor.checks import CHECKS
from petals_agent.doctor.host import Host
from petals_agent.doctor.runner import run_checks

Look = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of four small blocks."""
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """`config("[serve]\\nblocks = …", peers=[…])` writes the configuration and returns its path."""

    def write(more: str = "", peers: tuple[str, ...] = ()) -> Path:
        file = write_config(tmp_path, model, "0:4", list(peers), more)
        file.chmod(0o640)
        return file

    return write


@pytest.fixture
def look(config: Callable[..., Path]) -> Look:
    """`look("identity", …)` makes one check, by the runner, on a host configured with the rest of the arguments."""

    def make(name: str, *arguments: Any, **more: Any) -> Result:
        return check(name, Host(config(*arguments, **more)))

    return make


def check(name: str, host: Host) -> Result:
    """Make one of the checks."""

    async def run() -> Result:
        chosen = [one for one in CHECKS if one.name == name]
        (checked,) = [done async for done in run_checks(chosen, host)]
        return checked.result

    return asyncio.run(run())


def empty_host(tmp_path: Path, environ: Mapping[str, str] | None = None) -> Host:
    """A host without any configuration."""
    return Host(None, {"HOME": str(tmp_path), **(environ or {})})
