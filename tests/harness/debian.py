"""Installs Debian packages that tests need, where that can be done: as root, with apt-get."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

INSTALL_S = 300.0


def can_install() -> bool:
    """Whether apt-get would listen to us."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install(packages: Sequence[str]) -> None:
    """apt-get, within a limit; what it cannot do is found by looking again. Raises TimeoutError."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        try:
            subprocess.run(
                ["apt-get", "-q", *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=environment,
                timeout=INSTALL_S,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"apt-get {command[0]} took longer than {INSTALL_S:.0f} s") from None
