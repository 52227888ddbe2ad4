"""Prometheus' promtool: the installed one, or the one of Debian's package, fetched once into a cache and not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petals-agent-tests"


def promtool() -> Path | None:
    """Its path; None where it neither is nor can be had."""
    if found := shutil.which("promtool"):
        return Path(found)
    cached = CACHE / "promtool"
    if not cached.exists() and shutil.which("apt-get") and shutil.which("dpkg"):
        try:
            _fetch(cached)
        except (OSError, subprocess.SubprocessError):
            return None
    return cached if cached.exists() else None


def tool_or_skip() -> Path:
    """Its path, or this test is skipped."""
    tool = promtool()
    if tool is None:
        pytest.skip("no promtool here, and Debian's package cannot be fetched")
    return tool


def _fetch(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for command in (
            ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "prometheus"],
            ["sh", "-c", "dpkg -x prometheus_*.deb ."],
        ):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        os.replace(Path(folder) / "usr/bin/promtool", target)
