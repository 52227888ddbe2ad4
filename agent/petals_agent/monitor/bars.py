"""Blocks drawn as SVG: the span of one server, and how many servers hold each block of a model.

Widths are shares of the whole, so that patterns are not stretched; no styles inside, since the page allows none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from petals_agent.monitor.state import Model, Server, ServerState

SYMBOLS = {"online": "#", "joining": "J", "unreachable": "?", "offline": "_"}


def span_bar(server: Server, num_blocks: int) -> Markup:
    """One server's blocks on the axis of its model."""
    x, width = _share(server.start, num_blocks), _share(server.length, num_blocks)
    return Markup(
        '<svg class="bar" aria-hidden="true"><rect class="{}"{} x="{}" width="{}" height="100%"/></svg>'
    ).format(server.state, _pattern(server.state), x, width)


def _pattern(state: ServerState) -> Markup:
    """Of every state but the usual one; the page defines them once."""
    return Markup("") if state == "online" else Markup(' fill="url(#p-{})"').format(state)


def coverage(model: Model, key: str) -> Markup:
    """Servers online over each block, what is joining above them, and a mark where there is nobody.

    `key` is the drawing's own among those of the page.
    """
    top = most(model) or 1
    gaps = Markup("").join(
        Markup('<rect class="gap" fill="url(#p-gap)" x="{}" width="{}" height="100%"/>').format(
            _share(start, model.num_blocks), _share(end - start, model.num_blocks)
        )
        for start, end in gap_runs(model.online)
    )
    above = _upon(model.online, model.joining, top)
    joining = Markup(
        '<clipPath id="{}-j" clipPathUnits="objectBoundingBox"><path transform="scale({:.6f} {:.6f})" d="{}"/></clipPath>'
        '<rect fill="url(#p-joining)" clip-path="url(#{}-j)" width="100%" height="100%"/>'
    ).format(key, 1 / (model.num_blocks or 1), 1 / top, above, key)
    return Markup(
        '<svg class="cover" role="img" aria-label="{}">{}{}'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none"><path class="joining" d="{}"/><path class="online" d="{}"/></svg>'
        "</svg>"
    ).format(
        coverage_in_words(model),
        gaps,
        joining if above else "",
        model.num_blocks,
        top,
        above,
        _steps(model.online, top),
    )


def most(model: Model) -> int:
    """Servers of the block that has the most, online and joining."""
    return max((a + b for a, b in zip(model.online, model.joining, strict=True)), default=0)


def coverage_in_words(model: Model) -> str:
    """The same for who does not see it."""
    least, most = min(model.online, default=0), max(model.online, default=0)
    servers = f"{least}" if least == most else f"{least} to {most}"
    text = f"Servers online per block: {servers}"
    gaps = gap_runs(model.online)
    if gaps:
        shown = ", ".join(
            f"{start} to {end - 1}" if end - start > 1 else str(start) for start, end in gaps[:5]
        )
        text += f"; nobody serves {shown}" + (" and more" if len(gaps) > 5 else "")
    return text


def gap_runs(online: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of blocks [start, end) that no online server holds."""
    return [(start, end) for start, end, count in _runs(online) if count == 0]


def _runs(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs [start, end) of equal counts."""
    found, start = [], 0
    for count, group in groupby(counts):
        end = start + len(list(group))
        found.append((start, end, count))
        start = end
    return found


def _steps(counts: Sequence[int], top: int) -> str:
    """A path with one step for each run, in blocks × servers, the origin at the top left."""
    steps = "".join(f"V{top - count}H{end}" for _, end, count in _runs(counts))
    return f"M0 {top}{steps}V{top}Z"


def _upon(below: Sequence[int], counts: Sequence[int], top: int) -> str:
    """A box for each run of blocks with equal `counts` that are not 0, standing on `below`."""
    boxes, start = [], 0
    for (under, count), group in groupby(zip(below, counts, strict=True)):
        end = start + len(list(group))
        if count:
            boxes.append(f"M{start} {top - under}V{top - under - count}H{end}V{top - under}Z")
        start = end
    return "".join(boxes)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3f}".rstrip("0").rstrip(".") + "%"
