"""A model's past drawn as SVG: how many blocks were covered, and how fast the slowest block was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from petals_agent.monitor.history import Point
from petals_agent.monitor.shown import figure, span_of_time

WIDTH, HEIGHT = 480, 120
_COLUMNS = 120  # more is not seen
_HOLE = 3.0  # so many buckets without a point, and the line is broken


@dataclass(frozen=True)
class Sample:
    """The worst that a model was in one column of a chart; `at` and `until` in Unix seconds."""

    at: float
    until: float
    weakest: float
    mean: float
    uncovered: int


@dataclass(frozen=True)
class Charts:
    """Two drawings of the same time, with the top of their axes and what they say in words."""

    coverage: Markup
    throughput: Markup
    covered_words: str
    throughput_words: str
    top: str
    seconds: float


def draw(points: Sequence[Point], num_blocks: int, since: float, until: float) -> Charts | None:
    """Charts of `since` to `until`; None while there is nothing to draw a line through."""
    samples = thin(points, since, until)
    if len(samples) < 2:
        return None
    top = _nice(max(max(one.weakest, one.mean) for one in samples))
    length = span_of_time(until - since)
    worst = max(one.uncovered for one in samples)
    covered = f"Blocks covered in the last {length}: " + (
        f"all {num_blocks} throughout" if worst == 0 else f"at worst {num_blocks - worst} of {num_blocks}"
    )
    low, high = min(one.weakest for one in samples), max(one.weakest for one in samples)
    speed = (
        f"Slowest block in the last {length}: {figure(low)} to {figure(high)} tokens/s, "
        f"now {figure(samples[-1].weakest)}"
    )

    def path(value: Callable[[Sample], float]) -> str:
        return _path(samples, since, until, value)

    blocks = num_blocks or 1
    coverage = _svg(
        covered,
        Markup('<path class="lack" fill="url(#p-gap)" d="{}"/><path class="line" d="{}"/>').format(
            _columns([one for one in samples if one.uncovered], since, until),
            path(lambda one: 1 - one.uncovered / blocks),
        ),
    )
    throughput = _svg(
        speed,
        Markup('<path class="mean" d="{}"/><path class="line" d="{}"/>').format(
            path(lambda one: one.mean / top), path(lambda one: one.weakest / top)
        ),
    )
    return Charts(coverage, throughput, covered, speed, _brief(top), until - since)


def thin(points: Sequence[Point], since: float, until: float) -> list[Sample]:
    """At most as many samples as a chart has columns; each is the worst of its points."""
    width = (until - since) / _COLUMNS
    columns: dict[int, list[Point]] = {}
    for point in points:
        if since - point.seconds < point.at <= until:
            columns.setdefault(min(_COLUMNS - 1, max(0, int((point.at - since) / width))), []).append(point)
    return [
        Sample(
            at=max(since, group[0].at),
            until=min(until, group[-1].at + group[-1].seconds),
            weakest=min(point.weakest for point in group),
            mean=sum(point.mean for point in group) / len(group),
            uncovered=max(point.uncovered for point in group),
        )
        for _, group in sorted(columns.items())
    ]


def _svg(words: str, inside: Markup) -> Markup:
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, words, inside)


def _columns(samples: Sequence[Sample], since: float, until: float) -> str:
    """The whole height over the time of each sample."""
    ranges = [(_x(one.at, since, until), _x(one.until, since, until)) for one in samples]
    return "".join(f"M{start} 0H{end}V{HEIGHT}H{start}Z" for start, end in ranges)


def _path(samples: Sequence[Sample], since: float, until: float, value: Callable[[Sample], float]) -> str:
    """Steps through the samples, 0 at the bottom and 1 at the top, each run from the bottom to the bottom."""
    parts: list[str] = []
    before: Sample | None = None
    end, level = 0, HEIGHT
    for one in samples:
        y = round((1 - value(one)) * (HEIGHT - 4)) + 2
        if before is None or one.at - before.until > _HOLE * max(
            one.until - one.at, before.until - before.at
        ):
            parts.append(f"H{end}V{HEIGHT}" if parts else "")
            parts.append(f"M{_x(one.at, since, until)} {HEIGHT}V{y}")
        elif y != level:
            parts.append(f"H{_x(one.at, since, until)}V{y}")
        end, level, before = _x(one.until, since, until), y, one
    return "".join([*parts, f"H{end}V{HEIGHT}"]) if parts else ""


def _x(at: float, since: float, until: float) -> int:
    """At the ends a little beyond them, where no edge of an area is seen."""
    x = round((at - since) / (until - since) * WIDTH)
    return -3 if x <= 0 else WIDTH + 3 if x >= WIDTH else x


def _brief(top: float) -> str:
    """For the end of an axis."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if top >= least:
            return f"{top / size:g}{unit}"
    return f"{top:,g}"


def _nice(value: float) -> float:
    """The least round number that is not below `value`; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * 0.999999)
