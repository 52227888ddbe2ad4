"""What systemd's journal is to a program: a socket that datagrams with fields come to."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

# for a folder in PYTHONPATH: every Python process takes its stderr for the journal's, and `path` for its socket
SITE = """
import os
from petals_agent import journal

status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{{status.st_dev}}:{{status.st_ino}}"
journal.SOCKET = {path!r}
"""


class Journal:
    """Entries as dicts of their fields, in the order of their arrival."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def entries(self) -> list[dict[str, str]]:
        """Those that came since the last call."""
        before = len(self.all)
        while True:
            try:
                self.all.append(decode(self._socket.recv(2**20)))
            except BlockingIOError:
                return self.all[before:]

    def having(self, **fields: str) -> list[dict[str, str]]:
        """All so far that have these values."""
        self.entries()
        return [entry for entry in self.all if all(entry.get(key) == fields[key] for key in fields)]

    def close(self) -> None:
        self._socket.close()


def decode(datagram: bytes) -> dict[str, str]:
    """The native protocol as journald reads it; each name may come once here."""
    fields: dict[str, str] = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        if b"=" in name:
            name, _, value = name.partition(b"=")
            datagram = rest
        else:
            (size,) = struct.unpack_from("<Q", rest)
            value, end, datagram = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert len(value) == size and end == b"\n"
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields
