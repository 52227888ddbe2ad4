"""The folder of our unix sockets: beside the control socket, p2pd's and those that it brings streams to."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from petals_agent.config.messages import InvalidConfig, mistake
from petals_agent.config.origin import Origin

_PATTERNS = ("p2pd-????????.sock", "p2pclient-????????.sock")
_LONGEST_NAME = len("p2pclient-") + 8 + len(".sock")
_LONGEST_PATH = 107  # what the kernel takes
_STALE_S = 10.0  # younger ones may not be listened on yet


def check_socket_folder(control: Path, origin: Origin) -> None:
    """Raise a ConfigError if the sockets beside `control` would have too long a path; `origin` is where it was set."""
    limit = _LONGEST_PATH - 1 - _LONGEST_NAME
    if len(os.fsencode(control.parent)) > limit:
        problem = f"its folder's path is too long for the sockets that lie beside it (at most {limit} bytes)"
        raise InvalidConfig([mistake(origin, ("control", "socket"), str(control), problem)])


def remove_stale_sockets(folder: Path) -> None:
    """Remove what killed agents left in `folder`: sockets that nobody listens on. Others' are left alone."""
    for pattern in _PATTERNS:
        for path in folder.glob(pattern):
            try:
                if time.time() - path.stat().st_mtime > _STALE_S and not _is_listened_on(path):
                    path.unlink()
            except OSError:
                continue  # not ours to remove, or gone


def _is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True
