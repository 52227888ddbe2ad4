"""What every answer has: headers that keep a browser on guard, leave for other sites to read, and HEAD for each GET."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Headers = Sequence[tuple[bytes, bytes]]

_SAFE: Headers = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_OPEN: Headers = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", b"ETag, Retry-After"),
)
_PREFLIGHT: Headers = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"GET, HEAD"),
    (b"access-control-allow-headers", b"If-None-Match, Last-Event-ID, Cache-Control"),
    (b"access-control-max-age", b"86400"),
)
_READERS = ("/api/", "/metrics", "/healthz", "/events", "/openapi.json")
_MAX_TARGET = 4096
_MAX_HEADERS = 16_384


class Guard:
    """ASGI middleware around the whole application: reads only, of bounded addresses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        is_open = path.startswith(_READERS)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_SAFE, *(_OPEN if is_open else ())]
            await send(message)

        if len(scope["raw_path"]) + len(scope["query_string"]) > _MAX_TARGET:
            await _answer(guarded, 414, b"the address is too long\n")
        elif sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADERS:
            await _answer(guarded, 431, b"the headers are too long\n")
        elif method == "OPTIONS" and is_open:
            await _answer(send, 204, b"", _PREFLIGHT)
        elif method not in (allowed := ("GET",) if path == "/events" else ("GET", "HEAD")):
            text = f"this is for reading: {' and '.join(allowed)}\n"
            await _answer(guarded, 405, text.encode(), ((b"allow", ", ".join(allowed).encode()),))
        elif method == "HEAD":  # the server leaves the body out
            await self._app({**scope, "method": "GET"}, receive, guarded)
        else:
            await self._app(scope, receive, guarded)


async def _answer(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    kind = ((b"content-type", b"text/plain; charset=utf-8"),) if body else ()
    length = ((b"content-length", str(len(body)).encode()),) if status != 204 else ()
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *length, *headers]})
    await send({"type": "http.response.body", "body": body})
