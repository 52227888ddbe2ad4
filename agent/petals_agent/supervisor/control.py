"""The control socket: one JSON object a line in, one out; only the agent's user and group may connect."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from petals_agent.errors import AgentError, SwarmError

log = logging.getLogger("petals_agent.control")

LINE_LIMIT = 65536
IDLE_TIMEOUT_S = 60.0
Action = Callable[[Mapping[str, Any]], Awaitable[Any]]


class ControlServer:
    """Answers `{"do": NAME, …}` with `{"ok": true, "result": …}` or `{"ok": false, "error": …}`."""

    def __init__(self, path: Path, actions: Mapping[str, Action]) -> None:
        self._path = path
        self._actions = dict(actions)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; a socket that a dead agent left is replaced, that of a live one is an error."""
        if await _answers(self._path):
            raise SwarmError(f"another agent answers on {self._path}; give each its own control.socket")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o117)  # 0660
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=LINE_LIMIT)
        finally:
            os.umask(mask)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    line = await reader.readline()
                if not line:
                    return
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ValueError, ConnectionError):
            pass  # idle, a line over the limit, or gone
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            action = self._actions.get(request.get("do")) if isinstance(request, dict) else None
            if action is None:
                return {"ok": False, "error": f"unknown request; this agent knows: {', '.join(self._actions)}"}
            return {"ok": True, "result": await action(request)}
        except ValueError as error:
            return {"ok": False, "error": f"not a JSON object: {error}"}
        except AgentError as error:
            return {"ok": False, "error": str(error), "code": error.code}
        except Exception as error:
            log.exception("a control request failed")
            return {"ok": False, "error": repr(error)}


async def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        _, writer = await asyncio.wait_for(asyncio.open_unix_connection(path), 2.0)
    except (OSError, asyncio.TimeoutError):
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
                writer.write(json.dumps(dict(request)).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except PermissionError:
        raise SwarmError(f"no permission to talk to the agent at {path}; join its group or use sudo") from None
    except (FileNotFoundError, ConnectionError):
        raise SwarmError(f"no agent runs with the control socket {path}; start it, or name its --config") from None
    except TimeoutError:
        raise SwarmError(f"the agent at {path} did not answer within {timeout:g} s") from None
    if not line:
        raise SwarmError(f"the agent at {path} closed the connection; see its log")
    answer = json.loads(line)
    if not answer.get("ok"):
        raise SwarmError(str(answer.get("error")))
    return answer.get("result")
