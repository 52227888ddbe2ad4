"""Where log lines go: to stderr, with syslog priorities under systemd, as text or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import time

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _TextFormatter(logging.Formatter):
    def __init__(self, priorities: bool) -> None:
        form = "%(name)s: %(message)s" if priorities else "%(asctime)s %(levelname)s %(name)s: %(message)s"
        super().__init__(form)
        self._priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._priorities:
            return text
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in text.splitlines())


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.time(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def setup(level: str, form: str) -> None:
    """Configure the root logger; "auto" means priorities under systemd, plain text elsewhere.

    Call it after the imports: hivemind brings a handler of its own with the first of its modules, and loses it here.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter(priorities=form == "auto" and "JOURNAL_STREAM" in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    hivemind = logging.getLogger("hivemind")
    hivemind.handlers.clear()
    hivemind.propagate = True
    hivemind.setLevel(logging.DEBUG if level == "debug" else logging.ERROR)
