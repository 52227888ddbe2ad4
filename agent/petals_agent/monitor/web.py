"""The monitor's HTTP interface: pages for people, an API for scripts and servers, metrics, and news as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import pydantic_core
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from petals_agent import __version__
from petals_agent.errors import LimitExceeded, SwarmError
from petals_agent.monitor import pages, tables
from petals_agent.monitor.callers import Allowance, Places, Proxies
from petals_agent.monitor.classic import StateDocument
from petals_agent.monitor.documents import HTML, JSON, Document, takes_gzip
from petals_agent.monitor.middleware import Guard
from petals_agent.monitor.site import Site
from petals_agent.swarm.uids import check_peer_id

_PIECE = 1 << 18  # bytes
_HOUR_S = 3600.0
_YEAR_HOURS = 366 * 24


class Reachability(BaseModel):
    """`success` is what published servers read, `ok` what their monitor's documentation says; both are the same."""

    ok: bool
    success: bool
    message: str | None = Field(description="why not")
    your_ip: str = Field(description="where the question came from")


class Health(BaseModel):
    ok: bool
    age_s: float | None = Field(description="of the snapshot; null: there is none")
    problem: str


class Problem(BaseModel):
    detail: str


class PastPoint(BaseModel):
    """The model's past from `at` on for `seconds`; rates in tokens/s."""

    at: float
    seconds: float
    weakest: float
    mean: float
    uncovered: int
    online: float
    joining: float
    offline: float
    unreachable: float


class Past(BaseModel):
    dht_prefix: str
    since: float
    until: float
    points: list[PastPoint]


class Limits:
    """What callers may ask for: buckets, one per caller and one for all, and checks at once."""

    def __init__(self) -> None:
        self.checks = Allowance(rate=1.0, burst=60, all_rate=10.0, all_burst=120)
        self.running = Places(4, "checks")  # half of what runs for all
        self.pages = Allowance(rate=10.0, burst=60, all_rate=30.0, all_burst=240)  # 10 ms each


def create_app(site: Site, proxies: Proxies | None = None, limits: Limits | None = None) -> ASGIApp:
    """The application; `site` must have been started."""
    app = FastAPI(
        title="Petals swarm monitor",
        version=__version__,
        description="State of every model and server of a Petals swarm. All answers are snapshots: see `taken_at`.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would lead to whatever the caller, or a proxy, calls us
    )
    _Routes(site, proxies or Proxies(), limits or Limits()).add_to(app)
    return Guard(app)


class _Routes:
    def __init__(self, site: Site, proxies: Proxies, limits: Limits) -> None:
        self._site = site
        self._proxies = proxies
        self._limits = limits

    def add_to(self, app: FastAPI) -> None:
        """Pages are left out of the OpenAPI document."""

        def page(path: str, answer: Callable[..., Awaitable[Response]]) -> None:
            app.add_api_route(path, answer, include_in_schema=False)

        def api(path: str, answer: Callable[..., Awaitable[Response]], model: Any, more: Any = None) -> None:
            app.add_api_route(
                path, answer, response_model=None, responses={200: {"model": model}, **(more or {})}
            )

        wrong = {code: {"model": Reachability} for code in (400, 429, 503)}
        failed = {code: {"model": Problem} for code in (404, 429)}
        unread = {"model": StateDocument, "description": "nothing was read yet"}
        stale = {"model": Health, "description": "not read yet, or too long ago"}
        api("/api/v1/state", self.state, StateDocument, {503: unread})
        api("/api/v1/is_reachable/{peer_id:path}", self.is_reachable, Reachability, wrong)
        api("/api/v1/history/{prefix:path}", self.history, Past, failed)
        api("/healthz", self.healthz, Health, {503: stale})
        app.add_api_route(
            "/metrics",
            self.metrics,
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}},
        )
        app.add_api_route(
            "/events",
            self.events,
            response_class=Response,
            responses={
                200: {"content": {"text/event-stream": {}}, "description": "`state` at each snapshot"},
                503: {"model": Problem, "description": "too many listen"},
            },
        )
        page("/", self.overview)
        page("/models/{prefix:path}/servers/{peer_id}", self.server)
        page("/models/{prefix:path}", self.model)
        page("/static/{name}", self.static)
        app.add_exception_handler(HTTPException, self.problem)
        # FastAPI's own for every parameter; of what is no peer id we say 400
        del app.openapi()["paths"]["/api/v1/is_reachable/{peer_id}"]["get"]["responses"]["422"]

    # --- for scripts and servers

    async def state(self, request: Request) -> Response:
        """All that is known of the swarm, in our keys and in those of the classic monitor."""
        read = self._site.rendering.view.read
        return _send(self._site.rendering.state_json, request, 200 if read else 503)

    async def is_reachable(self, peer_id: str, request: Request) -> Response:
        """Dials the peer now. A wrong peer id: 400; too many questions: 429."""
        caller = self._caller(request)

        def answer(ok: bool, message: str | None, status: int = 200, wait: float = 0.0) -> Response:
            content = Reachability(ok=ok, success=ok, message=message, your_ip=caller)
            headers = {"Cache-Control": "no-store"}
            if wait:
                headers["Retry-After"] = str(math.ceil(wait))
            return Response(content.model_dump_json(), status, headers, JSON)

        try:
            check_peer_id(peer_id)
        except ValueError as error:
            return answer(False, str(error), 400)
        wait = self._limits.checks.wait(caller)
        if wait:
            return answer(False, f"too many checks; ask again in {wait:.0f} s", 429, wait)
        try:
            with self._limits.running.taken(caller):
                ok, message = await self._site.source.check(peer_id)
        except ValueError as error:
            return answer(False, str(error), 400)
        except LimitExceeded as error:
            return answer(False, str(error), 429, 5.0)
        except SwarmError as error:
            return answer(False, str(error), 503, 60.0)
        return answer(ok, message or None)

    async def history(
        self, prefix: str, request: Request, hours: Annotated[int, Query(ge=1, le=_YEAR_HOURS)] = 24
    ) -> Response:
        """A model's past, oldest first: the finer, the younger."""
        rendering, history = self._site.rendering, self._site.source.history
        if prefix not in rendering.models:
            raise HTTPException(404, "no such model in this swarm")
        self._allow_page(request)
        until = time.time()
        since = until - hours * _HOUR_S
        points = await history.coverage(prefix, since) if history is not None else []
        past = {"dht_prefix": prefix, "since": since, "until": until, "points": points}
        return _send(Document.of(pydantic_core.to_json(past, inf_nan_mode="null"), JSON), request)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return _send(self._site.rendering.metrics, request)

    async def healthz(self) -> Response:
        """200 while what is served is fresh, 503 when it is not."""
        now, state = time.time(), self._site.rendering.state
        ok = self._site.fresh(now)
        age = round(now - state.taken_at, 1) if state.taken_at else None
        content = Health(ok=ok, age_s=age, problem=state.problem)
        headers = {"Cache-Control": "no-store"}
        return Response(content.model_dump_json(), 200 if ok else 503, headers, JSON)

    async def events(self, request: Request) -> Response:
        """A server-sent event `state` at each new snapshot, with its time; fetch what you want to know then."""
        try:
            stream = self._site.live.listen(request.headers.get("last-event-id", ""), self._caller(request))
        except LimitExceeded as error:
            raise HTTPException(503, str(error), {"Retry-After": "30"}) from None
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    # --- for people

    async def overview(self, request: Request) -> Response:
        rendering = self._site.rendering
        return _send(rendering.overview, request, 200 if rendering.view.read else 503)

    async def model(self, prefix: str, request: Request) -> Response:
        rendering = self._site.rendering
        model = rendering.models.get(prefix)
        if model is None:
            return self._missing("../", "There is no such model in this swarm (any more).")
        query = tables.Query.read(request.query_params)
        if not rendering.has((prefix, query)):
            self._allow_page(request)
        return _send(rendering.model_page(model, query), request)

    async def server(self, prefix: str, peer_id: str, request: Request) -> Response:
        rendering = self._site.rendering
        model = rendering.models.get(prefix)
        if not rendering.has((prefix, peer_id)):
            self._allow_page(request)
        document = rendering.server_page(model, peer_id) if model is not None else None
        if document is None:
            return self._missing("../../../", "This server is not in the swarm (any more).")
        return _send(document, request)

    async def static(self, name: str, request: Request) -> Response:
        document = pages.assets().get(name)
        if document is None:
            return self._missing("../", "There is no such file.")
        versioned = request.query_params.get("v") == document.tag[:8]
        return _send(
            document, request, cache="public, max-age=31536000, immutable" if versioned else "no-cache"
        )

    # --- what they share

    async def problem(self, request: Request, error: Exception) -> Response:
        """An error as JSON; as a page where a person asked for one, or for what does not exist."""
        assert isinstance(error, HTTPException)
        path = request.scope["path"]
        base = "../" * (request.scope["raw_path"].count(b"/") - 1) or "./"
        if path.startswith("/api/") or (error.status_code != 404 and not path.startswith("/models/")):
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        if error.status_code == 404:
            return self._missing(base, "There is nothing at this address.")
        text = pages.missing_page(self._site.rendering.view, base, "Not now", error.detail)
        return Response(text, error.status_code, {"Cache-Control": "no-store", **(error.headers or {})}, HTML)

    def _missing(self, base: str, what: str) -> Response:
        text = pages.missing_page(self._site.rendering.view, base, "Not here", what)
        return Response(text, 404, {"Cache-Control": "no-store"}, HTML)

    def _allow_page(self, request: Request) -> None:
        """Count what must be made for this caller. Raises HTTPException 429."""
        wait = self._limits.pages.wait(self._caller(request))
        if wait:
            text = f"too many different pages; ask again in {wait:.0f} s"
            raise HTTPException(429, text, {"Retry-After": str(math.ceil(wait))})

    def _caller(self, request: Request) -> str:
        peer = request.client.host if request.client is not None else "unknown"
        return self._proxies.caller(peer, request.headers.getlist("x-forwarded-for"))


class _Pieces(Response):
    """Sends a large body piece by piece, each when the one before it is on its way: a slow reader costs one piece."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        last = max(0, len(body) - _PIECE)
        for start in range(0, len(body) or 1, _PIECE):
            piece = body[start : start + _PIECE]
            await send({"type": "http.response.body", "body": piece, "more_body": start < last})


def _send(document: Document, request: Request, status: int = 200, cache: str = "no-cache") -> Response:
    """The document in the form that the caller takes, or 304 when it has it."""
    headers = request.headers
    packed = document.packed is not None and takes_gzip(headers.get("accept-encoding", ""))
    about = {"ETag": document.etag(packed), "Cache-Control": cache, "Vary": "Accept-Encoding"}
    if status == 200 and document.known(headers.get("if-none-match", "")):
        return Response(status_code=304, headers=about)
    if packed:
        about["Content-Encoding"] = "gzip"
    if status == 503:
        about["Retry-After"] = "5"
    body = document.packed if packed and document.packed is not None else document.body
    return _Pieces(body, status, about, document.kind)
