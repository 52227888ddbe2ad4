"""Where log lines go: to the journal with fields, elsewhere to stderr as text or JSON; libraries' lines the same way.

An event is a line with a name and fields that programs can select by (docs/events.md):

    log.warning("p2pd ended", extra=event("p2pd", status=1))      # PETALS_EVENT=p2pd PETALS_STATUS=1 in the journal
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from petals_agent.journal import JournalHandler, stderr_is_journal
from petals_agent.redact import redact

IDENTIFIER = "petals-agent"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_NAMES = {number: name for name, number in _LEVELS.items()}  # hivemind changes those of logging
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_OURS = logging.getLogger("petals_agent")


def event(name: str, **fields: Any) -> dict[str, Any]:
    """The `extra` of a log line that is an event; fields that are None are left out."""
    return {"petals": {"event": name, **fields}}


def setup(level: str, form: str, process: str = "agent") -> None:
    """Take over all logging of this `process` ("agent", "container", …).

    "auto" is the journal where stderr leads to it, and text elsewhere. Call it after the imports: libraries bring
    handlers of their own with their first modules, and lose them here.
    """
    stream = logging.StreamHandler(sys.stderr)
    handler: logging.Handler = stream
    if form == "json":
        stream.setFormatter(_JsonFormatter(process))
    elif form == "auto" and stderr_is_journal():
        stream.setFormatter(_TextFormatter(priorities=True))
        handler = JournalHandler(lambda record: _journal_fields(record, process), stream)
    else:
        stream.setFormatter(_TextFormatter(priorities=False))
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(logging.NOTSET)
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("asyncio").addFilter(_is_worth_it)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    set_level(level)


def set_level(level: str) -> None:
    """From now on: our lines of `level` and above; those of libraries from "warning" on, or all at "debug"."""
    number = _LEVELS[level]
    _OURS.setLevel(number)
    logging.getLogger().setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))


def _is_worth_it(record: logging.LogRecord) -> bool:
    """hivemind leaves tasks behind when its p2pd has died, and asyncio calls each of them an error; ours are awaited."""
    if record.getMessage().startswith("Task was destroyed but it is pending"):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger().isEnabledFor(record.levelno)


class _TextFormatter(logging.Formatter):
    def __init__(self, priorities: bool) -> None:
        form = "%(name)s: %(message)s" if priorities else "%(asctime)s %(levelname)s %(name)s: %(message)s"
        super().__init__(form)
        self._priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        text = redact(super().format(record))
        if not self._priorities:
            return text
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in text.splitlines())


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": record.created,
            "level": _NAMES.get(record.levelno, "info"),
            "logger": record.name,
            "process": self._process,
            "message": redact(record.getMessage()),
        }
        entry |= {
            f"petals_{key}": value if isinstance(value, (bool, int, float)) else redact(str(value))
            for key, value in _own_fields(record).items()
        }
        if record.exc_info:
            entry["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry)


def _journal_fields(record: logging.LogRecord, process: str) -> dict[str, str]:
    fields = {
        "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "PETALS_PROCESS": process,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
        "MESSAGE": redact(record.getMessage()),
    }
    for key, value in _own_fields(record).items():
        fields[f"PETALS_{_field_name(key)}"] = redact(str(value))
    if record.exc_info:
        fields["PETALS_TRACEBACK"] = redact(_PLAIN.formatException(record.exc_info))
    return fields


_PLAIN = logging.Formatter()


def _own_fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "petals", {})
    return {key: value for key, value in fields.items() if value is not None}


def _field_name(key: str) -> str:
    """What the journal takes as (the end of) a name: capitals, digits and underscores, not too many."""
    return re.sub(r"[^A-Z0-9_]", "_", key.upper())[:50]


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        _OURS.critical("an error that nobody expected: %r", error, exc_info=(kind, error, trace))


def _uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not issubclass(arguments.exc_type, SystemExit):
        _uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
