"""Log entries with fields of their own, sent to systemd's journal by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping

SOCKET = "/run/systemd/journal/socket"
MAX_BYTES = 128 * 1024  # of an entry; the kernel refuses datagrams beyond the socket's buffer
_TIMEOUT_S = 0.25  # journald hangs: rather the old way than to wait with it


def stderr_is_journal(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether file 2 is the stream that systemd connected to the journal: nobody has redirected it since."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends `fields(record)`, the most important first; what the socket does not take goes to `fallback`."""

    def __init__(
        self, fields: Callable[[logging.LogRecord], Mapping[str, str]], fallback: logging.Handler
    ) -> None:
        super().__init__()
        self._fields, self._fallback = fields, fallback
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._socket is None:
                self._socket = _connect()
            room = min(MAX_BYTES, self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)
            self._socket.send(encode(self._fields(record), room))
        except OSError:
            if self._socket is not None:
                self._socket.close()
            self._socket = None  # the next entry tries again
            self._fallback.handle(record)
        except Exception:
            self.handleError(record)


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(SOCKET)
    except BaseException:
        connection.close()
        raise
    return connection


def encode(fields: Mapping[str, str], room: int) -> bytes:
    """One datagram of at most `room` bytes: no value takes more than a quarter, what finds no place is left out."""
    entry = b""
    for name, value in fields.items():
        data = value.encode(errors="replace")[: room // 4].decode(errors="ignore").encode()
        field = name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        if len(entry) + len(field) <= room:
            entry += field
    return entry
