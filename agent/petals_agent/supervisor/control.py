"""The control socket: one JSON object a line in, one out; only the agent's user and group may connect."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from petals_agent.errors import AgentError, SwarmError

log = logging.getLogger("petals_agent.control")

LINE_LIMIT = 65536
MAX_CONNECTIONS = 100
IDLE_TIMEOUT_S = 60.0
Action = Callable[[Mapping[str, Any]], Awaitable[Any]]


class ControlServer:
    """Answers `{"do": NAME, …}` with `{"ok": true, "result": …}` or `{"ok": false, "error": …}`."""

    def __init__(self, path: Path, actions: Mapping[str, Action]) -> None:
        self._path = path
        self._actions = dict(actions)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        """Listen; a socket that a dead agent left is replaced.

        Raises SwarmError when a live agent has it, or when it cannot be made.
        """
        if await _answers(self._path):
            raise SwarmError(f"another agent answers on {self._path}; give each its own control.socket")
        listener = socket.socket(socket.AF_UNIX)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o660)  # before anyone can connect
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=LINE_LIMIT)
        except OSError as error:
            listener.close()
            raise SwarmError(
                f"the control socket {self._path} cannot be made ({error.strerror}); check the folder's owner and space"
            ) from error

    async def stop(self) -> None:
        """Close the socket and what is connected to it."""
        if self._server is None:
            return
        self._server.close()
        self._path.unlink(missing_ok=True)
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait(self._open, timeout=1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            if len(self._open) > MAX_CONNECTIONS:
                writer.write(_line(_no(f"{MAX_CONNECTIONS} connections are open, which is the limit")))
                return
            while line := await _read_line(reader):
                writer.write(_line(await self._answer(line)))
                await writer.drain()
        except _TooLong:
            writer.write(_line(_no(f"a line is longer than {LINE_LIMIT} bytes")))
        except (TimeoutError, ConnectionError):
            pass  # idle, or gone
        finally:
            writer.close()
            del self._open[task]

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            return _no(f"not a JSON object: {error}")
        name = request.get("do") if isinstance(request, dict) else None
        action = self._actions.get(name) if isinstance(name, str) else None
        if action is None:
            return _no(
                f'unknown request; send {{"do": NAME}}, where this agent knows {", ".join(self._actions)}'
            )
        try:
            return {"ok": True, "result": await action(request)}
        except AgentError as error:
            return {**_no(str(error)), "code": error.code}
        except Exception as error:
            log.exception("a control request failed")
            return _no(repr(error))


class _TooLong(Exception):
    """A line beyond the limit."""


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """One line, or what there is at the end; raises _TooLong, or TimeoutError after a minute without."""
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            return await reader.readline()
    except ValueError:
        raise _TooLong from None


def _no(error: str) -> dict[str, Any]:
    return {"ok": False, "error": error}


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


async def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_unix_connection(path)
    except (TimeoutError, OSError):
        return False
    writer.close()
    return True


async def ask(path: Path, request: Mapping[str, Any], timeout: float = 10.0) -> Any:
    """The client's side: send one request to the agent at `path`.

    Raises SwarmError when no agent answers there, or with what it says went wrong.
    """
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(path, limit=16 * 2**20)
            try:
                writer.write(_line(request))
                line = await reader.readline()
            finally:
                writer.close()
    except PermissionError:
        raise SwarmError(
            f"no permission to talk to the agent at {path}; join its group or use sudo"
        ) from None
    except (FileNotFoundError, ConnectionError):
        raise SwarmError(
            f"no agent runs with the control socket {path}; start it, or name its --config"
        ) from None
    except TimeoutError:
        raise SwarmError(f"the agent at {path} did not answer within {timeout:g} s") from None
    if not line:
        raise SwarmError(f"the agent at {path} closed the connection; see its log")
    answer = json.loads(line)
    if not answer.get("ok"):
        raise SwarmError(str(answer.get("error")))
    return answer.get("result")
