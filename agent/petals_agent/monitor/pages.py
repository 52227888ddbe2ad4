"""The page as HTML: what the templates are given, and how they escape it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from petals_agent import __version__
from petals_agent.monitor import bars, charts, shown
from petals_agent.monitor.charts import Charts
from petals_agent.monitor.documents import Document
from petals_agent.monitor.history import Point
from petals_agent.monitor.state import Model, Server, SwarmState
from petals_agent.monitor.tables import Query, table

_HERE = Path(__file__).parent
_ROWS = 60  # on the first page; models after that are shown without their servers
_DAY = ("24 h", "12 h", 24)
_MONTH = ("30 days", "15 days", 30 * 24)
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}
STATES = {  # and what a legend must say of it
    "online": "",
    "joining": "loads its blocks",
    "unreachable": "cannot be dialled",
    "offline": "gone or silent",
}


@cache
def assets() -> Mapping[str, Document]:
    """Style, script and icon by file name."""
    return {
        path.name: Document.of(path.read_bytes(), _KINDS[path.suffix], 9)
        for path in sorted((_HERE / "static").iterdir())
        if path.suffix in _KINDS
    }


@dataclass(frozen=True)
class View:
    """What every page is made from: a state, its models' past by prefix until `now`, and whether it is out of date."""

    state: SwarmState
    past: Mapping[str, Sequence[Point]]
    stale: bool
    now: float
    drawn: dict[tuple[str, int], Charts | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Models by their state, the worst first."""
        states = [model.state for model in self.state.models]
        return {state: states.count(state) for state in ("broken", "degraded", "healthy")}

    @property
    def read(self) -> bool:
        """Whether the swarm was read at all."""
        return self.state.taken_at > 0


@dataclass(frozen=True)
class Plots:
    """A model's past over one length of time, with the words for its axis."""

    title: str
    half: str
    hours: int
    charts: Charts


def plots(view: View, model: Model, lengths: Sequence[tuple[str, str, int]]) -> list[Plots]:
    """Those of `lengths` (title, half of it, hours; the shortest first) of which more than a sliver is known."""
    points = view.past.get(model.dht_prefix, ())
    found: list[Plots] = []
    known = (view.now - points[0].at) / 3600.0 if points else 0.0
    shorter = 0
    for title, half, hours in lengths:
        name = model.dht_prefix, hours
        if name not in view.drawn:  # many pages show the same
            since = view.now - hours * 3600.0
            view.drawn[name] = charts.draw(points, model.num_blocks, since, view.now)
        drawn = view.drawn[name]
        if drawn is not None and known > 2 * shorter:
            found.append(Plots(title, half, hours, drawn))
        shorter = hours
    return found


def overview(view: View) -> str:
    """All models, the first ones with their servers."""
    left, cards = _ROWS, []
    for model in view.state.models:
        one = table(model.servers, Query())
        fits = len(one.servers) <= left
        left -= len(one.servers) if fits else 0
        cards.append((model, one if fits else None, plots(view, model, [_DAY])))
    return _render("overview.html", view, base="./", cards=cards)


def model_page(view: View, model: Model, query: Query) -> str:
    """One model with the servers that `query` asks for."""
    past = plots(view, model, [_DAY, _MONTH])
    return _render("model.html", view, base="../", model=model, table=table(model.servers, query), plots=past)


def server_page(view: View, model: Model, server: Server) -> str:
    """All that is known of one server."""
    return _render("server.html", view, base="../../../", model=model, server=server)


def missing_page(view: View, base: str, title: str, what: str) -> str:
    """For an address that shows nothing (any more, or for now)."""
    return _render("missing.html", view, base=base, title=title, what=what)


def key(prefix: str) -> str:
    """What a model's parts of the page are called there."""
    return "m" + hashlib.blake2b(prefix.encode(), digest_size=5).hexdigest()


def _render(template: str, view: View, **more: Any) -> str:
    return _environment().get_template(template).render(view=view, state=view.state, **more)


def _clean(value: Any) -> Any:
    """Whatever a template prints goes through here, then is escaped."""
    return shown.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
        auto_reload=False,
    )
    environment.filters |= {
        "figure": shown.figure,
        "machine_time": shown.machine_time,
        "ms": shown.milliseconds,
        "rate": shown.rate,
        "segment": shown.segment,
        "share": shown.share,
        "short": shown.short,
        "spell": shown.span_of_time,
        "tail": shown.tail,
        "utc": shown.utc,
        "web": shown.web_address,
        "key": key,
    }
    environment.globals |= {
        "asset": lambda name: f"static/{name}?v={assets()[name].tag[:8]}",
        "coverage": bars.coverage,
        "most": bars.most,
        "counted": _counted,
        "span_bar": bars.span_bar,
        "SYMBOLS": bars.SYMBOLS,
        "STATES": STATES,
        "version": __version__,
    }
    return environment


def _counted(model: Model) -> dict[str, int]:
    """The model's servers by state."""
    found = dict.fromkeys(STATES, 0)
    for server in model.servers:
        found[server.state] += 1
    return found
