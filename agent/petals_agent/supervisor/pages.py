"""A few plain pages over HTTP for machines on this host or network: small requests, short answers, no patience."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

log = logging.getLogger("petals_agent.pages")

MAX_REQUEST = 8192  # bytes of request line and headers
MAX_CONNECTIONS = 64
PATIENCE_S = 5.0  # for a whole exchange
_REQUEST = re.compile(rb"([A-Z]+) (/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r?\n")


@dataclass(frozen=True)
class Page:
    """What a GET gets."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


class PageServer:
    """`pages`: path → function that makes the page. `await start()`, and `stop()`."""

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
        self._host, self._port = host, port
        self._pages = dict(pages)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}  # the oldest first

    async def start(self) -> None:
        """Listen; raises OSError when that address cannot be had."""
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=MAX_REQUEST)

    @property
    def port(self) -> int:
        """The one that is listened on, also where 0 was asked for."""
        sockets = self._server.sockets if self._server is not None else ()
        return int(sockets[0].getsockname()[1]) if sockets else self._port

    async def stop(self) -> None:
        """Close the port and all connections."""
        if self._server is None:
            return
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait(self._open, timeout=1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= MAX_CONNECTIONS:  # who only holds connections does not keep others out
            next(iter(self._open.values())).transport.abort()
        self._open[task] = writer
        try:
            async with asyncio.timeout(PATIENCE_S):
                page = await self._answer(reader)
                writer.write(_response(page))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # too slow, or gone
        finally:
            writer.close()
            del self._open[task]

    async def _answer(self, reader: asyncio.StreamReader) -> Page:
        try:
            head = await reader.readuntil(b"\n")
            request = _REQUEST.fullmatch(head)
            if request is None:
                return _no(HTTPStatus.BAD_REQUEST)
            size = len(head)
            while (line := await reader.readuntil(b"\n")) not in (b"\r\n", b"\n"):
                size += len(line)
                if size > MAX_REQUEST:
                    return _no(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except asyncio.LimitOverrunError:
            return _no(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        method, path = request.groups()
        make = self._pages.get(path.decode("ascii", "replace"))
        if make is None:
            return _no(HTTPStatus.NOT_FOUND)
        if method != b"GET":
            return _no(HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return make()
        except Exception:
            log.exception("the page %s could not be made", path.decode())
            return _no(HTTPStatus.INTERNAL_SERVER_ERROR)


def _no(status: HTTPStatus) -> Page:
    return Page(f"{status.value} {status.phrase}\n".encode(), status=status)


def _response(page: Page) -> bytes:
    head = [
        f"HTTP/1.1 {page.status.value} {page.status.phrase}",
        f"Content-Type: {page.kind}",
        f"Content-Length: {len(page.body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if page.status is HTTPStatus.METHOD_NOT_ALLOWED:
        head.append("Allow: GET")
    return "\r\n".join([*head, "", ""]).encode() + page.body
